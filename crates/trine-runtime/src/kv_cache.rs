//! Keys and values of the positions a session has seen, in f32.

/// The cache of one sequence. Memory grows with the sequence, not with the context limit.
pub struct KvCache {
    layers: Vec<LayerCache>,
    /// Features of all key/value heads of a position, `K * d`.
    width: usize,
    positions: usize,
}

/// Keys and values of one layer.
#[derive(Clone, Default)]
struct LayerCache {
    /// `(positions, K * d)`, after the rotary embedding.
    keys: Vec<f32>,
    /// `(positions, K * d)`
    values: Vec<f32>,
}

impl KvCache {
    /// An empty cache for `layers` layers of `width` = K * d features.
    pub fn new(layers: usize, width: usize) -> Self {
        Self { layers: vec![LayerCache::default(); layers], width, positions: 0 }
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
        cache.keys.extend_from_slice(keys);
        cache.values.extend_from_slice(values);
    }

    /// Counts `tokens` positions as held.
    pub fn advance(&mut self, tokens: usize) {
        self.positions += tokens;
        debug_assert!(self.layers.iter().all(|l| l.keys.len() == self.positions * self.width));
    }

    /// Keys `(positions, K * d)` and values of a layer.
    pub fn layer(&self, layer: usize) -> (&[f32], &[f32]) {
        (&self.layers[layer].keys, &self.layers[layer].values)
    }

    /// Forgets all but the first `positions` positions.
    pub fn truncate(&mut self, positions: usize) {
        self.positions = self.positions.min(positions);
        for layer in &mut self.layers {
            layer.keys.truncate(self.positions * self.width);
            layer.values.truncate(self.positions * self.width);
        }
    }
}
