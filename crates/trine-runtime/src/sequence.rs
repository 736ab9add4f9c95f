//! What a sequence has seen.

use std::collections::HashMap;
use std::sync::Arc;

use trine_format::ModelConfig;
use trine_kernels::nn::{KV_BLOCK, KvLayout, KvPage, KvSequence};

use crate::{Adapter, Model, RuntimeError};

/// A sequence: the keys and values of its positions. It belongs to a model, but does not borrow it.
///
/// They lie in pages of 64 positions, so memory grows with the sequence and nothing is ever moved. A
/// clone shares the pages with the original until one of them writes to the last: many sequences
/// that begin with the same text hold it once.
#[derive(Clone)]
pub struct Sequence {
    shape: Shape,
    /// For 64 positions each: the blocks of all key/value heads of the first layer, of the second...
    pages: Vec<Arc<KvPage>>,
    positions: usize,
    /// What keys and values were computed with.
    adapter: Option<Arc<Adapter>>,
}

/// What a sequence must have in common with its model.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Shape {
    layers: usize,
    heads: usize,
    kv_heads: usize,
    layout: KvLayout,
}

impl Shape {
    /// Bytes of a layer in a page.
    fn layer_bytes(self) -> usize {
        self.kv_heads * self.layout.block_bytes()
    }
}

/// Keys and values on their way into the blocks of a layer in a page.
pub(crate) struct Write<'a> {
    layout: KvLayout,
    blocks: &'a mut [u8],
    /// Position of the first token.
    first: usize,
    /// `(tokens, K * d)`
    keys: &'a [f32],
    values: &'a [f32],
}

impl Write<'_> {
    pub(crate) fn run(&mut self) {
        let Self { layout, first, keys, values, .. } = *self;
        let (d, block) = (layout.head_dim(), layout.block_bytes());
        let width = self.blocks.len() / block * d;
        let tokens = keys.chunks_exact(width).zip(values.chunks_exact(width));
        for (position, (keys, values)) in (first..).zip(tokens) {
            let heads = keys.chunks_exact(d).zip(values.chunks_exact(d));
            for (block, (key, value)) in self.blocks.chunks_exact_mut(block).zip(heads) {
                layout.write(block, position, key, value);
            }
        }
    }
}

impl Sequence {
    /// An empty sequence for `model`.
    pub fn new(model: &Model) -> Self {
        Self::with_adapter(model, None)
    }

    /// An empty sequence for `model` beside an adapter, if there is one. It stays with the sequence and
    /// its clones, as keys and values depend on it; [`Model::step`] refuses one of another model.
    pub fn with_adapter(model: &Model, adapter: Option<Arc<Adapter>>) -> Self {
        let shape = shape(&model.config, model.kv);
        Self { shape, pages: Vec::new(), positions: 0, adapter }
    }

    /// The adapter, if it has one.
    pub fn adapter(&self) -> Option<&Arc<Adapter>> {
        self.adapter.as_ref()
    }

    /// Number of positions seen.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Bytes that the keys and values take; pages that are shared with clones are counted too.
    pub fn bytes(&self) -> usize {
        self.pages.iter().map(|page| page.len()).sum()
    }

    /// Bytes that the keys and values of sequences take together: a page that is shared counts once.
    pub fn distinct_bytes<'a>(sequences: impl IntoIterator<Item = &'a Self>) -> usize {
        let pages = sequences.into_iter().flat_map(|sequence| &sequence.pages);
        let distinct: HashMap<_, _> = pages.map(|page| (Arc::as_ptr(page), page.len())).collect();
        distinct.into_values().sum()
    }

    /// Bytes that are still to be allocated for `positions` positions, at most: those of the pages
    /// that are missing and of a copy of the last, which a clone may hold.
    pub(crate) fn growth(&self, positions: usize) -> usize {
        let missing = positions.div_ceil(KV_BLOCK).saturating_sub(self.pages.len());
        (missing + 1) * self.shape.layers * self.shape.layer_bytes()
    }

    /// Forgets all but the first `positions` positions.
    pub fn truncate(&mut self, positions: usize) {
        self.positions = self.positions.min(positions);
        self.pages.truncate(self.positions.div_ceil(KV_BLOCK));
    }

    /// Whether it is a sequence for `model`.
    pub(crate) fn check(&self, model: &Model) -> Result<(), RuntimeError> {
        if self.shape != shape(&model.config, model.kv) {
            return Err(RuntimeError::ForeignSequence);
        }
        match &self.adapter {
            Some(adapter) if !adapter.fits(&model.config) => Err(RuntimeError::ForeignAdapter),
            _ => Ok(()),
        }
    }

    /// Makes room for `tokens` more positions, in pages that nobody else sees.
    pub(crate) fn reserve(&mut self, tokens: usize) {
        let first = self.positions / KV_BLOCK;
        for page in self.pages.iter_mut().skip(first) {
            Arc::make_mut(page);
        }
        let pages = (self.positions + tokens).div_ceil(KV_BLOCK);
        let bytes = self.shape.layers * self.shape.layer_bytes();
        self.pages.resize_with(pages.max(self.pages.len()), || Arc::new(KvPage::new(bytes)));
    }

    /// What writes the keys and values `(T, K * d)` of the next T positions in a layer, for which there is
    /// room, into each page that has some of them. All layers are given the same tokens, then
    /// [`Self::advance`] counts them.
    pub(crate) fn writes<'a>(
        &'a mut self,
        layer: usize,
        keys: &'a [f32],
        values: &'a [f32],
    ) -> impl Iterator<Item = Write<'a>> {
        let Shape { kv_heads, layout, .. } = self.shape;
        let (width, bytes) = (kv_heads * layout.head_dim(), self.shape.layer_bytes());
        let (start, end) = (self.positions, self.positions + keys.len() / width);
        let pages = start / KV_BLOCK..end.div_ceil(KV_BLOCK);
        let starts = pages.clone().map(|page| page * KV_BLOCK);
        let pages = self.pages[pages].iter_mut().filter_map(Arc::get_mut);
        pages.zip(starts).map(move |(page, page_start)| {
            let first = start.max(page_start);
            let tokens = (first - start) * width..(end.min(page_start + KV_BLOCK) - start) * width;
            let blocks = &mut page[layer * bytes..][..bytes];
            Write { layout, blocks, first, keys: &keys[tokens.clone()], values: &values[tokens] }
        })
    }

    /// The pages, as attention takes them.
    pub(crate) fn pages(&self) -> Vec<&[u8]> {
        self.pages.iter().map(|page| &page[..]).collect()
    }

    /// What attention of the next `tokens` positions of a layer looks at.
    pub(crate) fn view<'a>(
        &self,
        pages: &'a [&'a [u8]],
        layer: usize,
        tokens: usize,
    ) -> KvSequence<'a> {
        let offset = layer * self.shape.layer_bytes();
        KvSequence { pages, offset, start: self.positions, tokens }
    }

    /// Counts `tokens` positions as seen.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.positions += tokens;
    }
}

fn shape(config: &ModelConfig, layout: KvLayout) -> Shape {
    Shape {
        layers: config.num_hidden_layers,
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        layout,
    }
}

#[cfg(test)]
mod tests {
    use trine_kernels::nn::KvType;

    use super::*;

    fn sequence() -> Sequence {
        let layout = KvLayout::new(KvType::F32, 2).unwrap();
        let shape = Shape { layers: 2, heads: 3, kv_heads: 3, layout };
        Sequence { shape, pages: Vec::new(), positions: 0, adapter: None }
    }

    fn append(sequence: &mut Sequence, tokens: std::ops::Range<usize>) {
        let values: Vec<f32> = (tokens.start * 6..tokens.end * 6).map(|i| i as f32).collect();
        sequence.reserve(tokens.len());
        for layer in 0..2 {
            sequence.writes(layer, &values, &values).for_each(|mut write| write.run());
        }
        sequence.advance(tokens.len());
    }

    #[test]
    fn positions_written_in_parts_are_those_written_at_once() {
        let (mut whole, mut parts) = (sequence(), sequence());
        append(&mut whole, 0..200);
        for part in [0..1, 1..64, 64..65, 65..190, 190..200] {
            append(&mut parts, part);
        }
        assert_eq!(whole.pages(), parts.pages());
        assert_eq!((whole.positions(), whole.pages.len()), (200, 4));
        whole.truncate(64);
        assert_eq!((whole.positions(), whole.pages.len()), (64, 1));
    }

    #[test]
    fn a_clone_shares_what_is_not_written_to() {
        let mut original = sequence();
        append(&mut original, 0..100);
        let before: Vec<Vec<u8>> = original.pages().iter().map(|page| page.to_vec()).collect();
        let mut clone = original.clone();
        clone.truncate(70);
        append(&mut clone, 500..510);
        assert_eq!(original.pages(), before);
        assert!(Arc::ptr_eq(&original.pages[0], &clone.pages[0]));
        assert!(!Arc::ptr_eq(&original.pages[1], &clone.pages[1]));
        assert_eq!((original.positions(), clone.positions()), (100, 80));
        let page = original.bytes() / 2;
        assert_eq!(Sequence::distinct_bytes([&original, &clone, &original]), 3 * page);
        assert_eq!((clone.growth(128), clone.growth(129)), (page, 2 * page));
    }
}
