//! Keys and values of the positions a session has seen, in f32.

use trine_kernels::nn::{Blocks, Rows};

/// The cache of one sequence. Memory grows with the sequence, not with the context limit.
pub struct KvCache {
    layers: Vec<LayerCache>,
    heads: usize,
    head_dim: usize,
    positions: usize,
}

/// Keys and values of one layer.
struct LayerCache {
    /// One of each key/value head, after the rotary embedding.
    keys: Vec<Blocks>,
    /// `(positions, K * d)`
    values: Vec<f32>,
}

impl KvCache {
    /// An empty cache for `layers` layers of `heads` key/value heads with `head_dim` features.
    pub fn new(layers: usize, heads: usize, head_dim: usize) -> Self {
        let layer = || LayerCache { keys: vec![Blocks::new(head_dim); heads], values: Vec::new() };
        let layers = (0..layers).map(|_| layer()).collect();
        Self { layers, heads, head_dim, positions: 0 }
    }

    /// Number of positions held.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Appends keys and values, `(T, K * d)` each, to one layer.
    ///
    /// All layers are given the same tokens, then [`Self::advance`] counts them.
    pub fn append(&mut self, layer: usize, keys: &[f32], values: &[f32]) {
        let cache = &mut self.layers[layer];
        for token in keys.chunks_exact(self.heads * self.head_dim) {
            for (blocks, key) in cache.keys.iter_mut().zip(token.chunks_exact(self.head_dim)) {
                blocks.push(key);
            }
        }
        cache.values.extend_from_slice(values);
    }

    /// Counts `tokens` positions as held.
    pub fn advance(&mut self, tokens: usize) {
        self.positions += tokens;
    }

    /// Keys and values of a key/value head of a layer.
    pub fn head(&self, layer: usize, head: usize) -> (&Blocks, Rows<'_>) {
        let cache = &self.layers[layer];
        let data = &cache.values[head * self.head_dim..];
        (&cache.keys[head], Rows { data, stride: self.heads * self.head_dim })
    }

    /// Forgets all but the first `positions` positions.
    pub fn truncate(&mut self, positions: usize) {
        self.positions = self.positions.min(positions);
        for layer in &mut self.layers {
            layer.keys.iter_mut().for_each(|keys| keys.truncate(self.positions));
            layer.values.truncate(self.positions * self.heads * self.head_dim);
        }
    }
}
