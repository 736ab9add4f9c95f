//! The past in spans.

use super::block::Block;
use super::{Band, SPAN};
use crate::nn::kv::KV_BLOCK;

/// The blocks of a span, up to the last that any row of the band sees.
pub(super) struct Span<'a> {
    blocks: [Block<'a>; SPAN / KV_BLOCK],
    used: usize,
}

impl<'a> Span<'a> {
    #[inline(always)]
    pub(super) fn new(band: &Band<'a>, span: usize) -> Self {
        let d = band.layout.d;
        let used = seen(band, span, band.rows - 1).div_ceil(KV_BLOCK);
        let mut blocks = [Block { lines: &[], d }; SPAN / KV_BLOCK];
        for b in 0..used {
            blocks[b] = Block::new(band.block(span * (SPAN / KV_BLOCK) + b), d);
        }
        Self { blocks, used }
    }

    #[inline(always)]
    pub(super) fn blocks(&self) -> &[Block<'a>] {
        &self.blocks[..self.used]
    }
}

/// How many positions of a span row `r` of a band sees.
#[inline(always)]
pub(super) fn seen(band: &Band<'_>, span: usize, r: usize) -> usize {
    band.seen(r).saturating_sub(span * SPAN).min(SPAN)
}
