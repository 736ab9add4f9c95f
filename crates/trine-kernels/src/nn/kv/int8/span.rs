//! The past in spans, and what memory is asked for ahead of its use.

use super::block::Block;
use super::{Band, SPAN};
use crate::arch::Simd;
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

/// A span that is read next, and how much of it memory was asked for already. For one query, there are
/// no more multiplications in a span than memory needs time to deliver it; so it has to be asked for all
/// along the span before, while scores are weighed too. A span is some `8 d` lines, of which `3 d` are
/// asked for with its keys' products, `2 d` with its weights and the rest with its values' products.
pub(super) struct Ahead<'a> {
    span: Option<Span<'a>>,
    block: usize,
    line: usize,
}

impl<'a> Ahead<'a> {
    #[inline(always)]
    pub(super) fn new(next: Option<(&Band<'a>, usize)>) -> Self {
        Self { span: next.map(|(band, span)| Span::new(band, span)), block: 0, line: 0 }
    }

    /// Asks for the next `lines`.
    #[inline(always)]
    pub(super) fn ask<S: Simd>(&mut self, simd: S, lines: usize) {
        let Some(block) = self.span.as_ref().and_then(|span| span.blocks().get(self.block)) else {
            return;
        };
        let end = block.lines.len().min(self.line + lines);
        block.lines[self.line..end].iter().for_each(|line| simd.prefetch_far(line, 0));
        self.line = end;
        if end == block.lines.len() {
            (self.block, self.line) = (self.block + 1, 0);
        }
    }
}

/// How many positions of a span row `r` of a band sees.
#[inline(always)]
pub(super) fn seen(band: &Band<'_>, span: usize, r: usize) -> usize {
    band.seen(r).saturating_sub(span * SPAN).min(SPAN)
}
