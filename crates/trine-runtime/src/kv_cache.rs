//! Keys and values of the positions a session has seen, in f32.

use trine_kernels::nn::{Blocks, Rows};

/// The cache of one sequence. Memory grows with the sequence, not with the context limit.
pub(crate) struct KvCache {
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
    pub(crate) fn new(layers: usize, heads: usize, head_dim: usize) -> Self {
        let layer = || LayerCache { keys: vec![Blocks::new(head_dim); heads], values: Vec::new() };
        let layers = (0..layers).map(|_| layer()).collect();
        Self { layers, heads, head_dim, positions: 0 }
    }

    /// Number of positions held.
    pub(crate) fn positions(&self) -> usize {
        self.positions
    }

    /// Appends keys and values, `(T, K * d)` each, to one layer.
    ///
    /// All layers are given the same tokens, then [`Self::advance`] counts them.
    ///
    /// # Panics
    /// When keys and values differ in length, or are no whole number of tokens.
    pub(crate) fn append(&mut self, layer: usize, keys: &[f32], values: &[f32]) {
        assert_eq!(keys.len(), values.len(), "keys and values differ in length");
        let width = self.heads * self.head_dim;
        assert!(keys.len().is_multiple_of(width), "keys are not (tokens, {width})");
        let cache = &mut self.layers[layer];
        for token in keys.chunks_exact(width) {
            for (blocks, key) in cache.keys.iter_mut().zip(token.chunks_exact(self.head_dim)) {
                blocks.push(key);
            }
        }
        cache.values.extend_from_slice(values);
    }

    /// Counts `tokens` positions as held.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.positions += tokens;
    }

    /// Keys and values of a key/value head of a layer.
    pub(crate) fn head(&self, layer: usize, head: usize) -> (&Blocks, Rows<'_>) {
        let cache = &self.layers[layer];
        let data = &cache.values[head * self.head_dim..];
        (&cache.keys[head], Rows { data, stride: self.heads * self.head_dim })
    }

    /// Forgets all but the first `positions` positions.
    pub(crate) fn truncate(&mut self, positions: usize) {
        self.positions = self.positions.min(positions);
        for layer in &mut self.layers {
            layer.keys.iter_mut().for_each(|keys| keys.truncate(self.positions));
            layer.values.truncate(self.positions * self.heads * self.head_dim);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_positions_are_forgotten_in_every_layer() {
        let mut cache = KvCache::new(2, 3, 2);
        let tokens: Vec<f32> = (0..5 * 6).map(|i| i as f32).collect();
        (0..2).for_each(|layer| cache.append(layer, &tokens, &tokens));
        cache.advance(5);
        cache.truncate(4);
        for layer in 0..2 {
            let (keys, values) = cache.head(layer, 2);
            assert_eq!((keys.positions(), cache.positions()), (4, 4));
            assert_eq!(values.data[3 * values.stride..], tokens[3 * 6 + 4..][..2]);
        }
    }

    #[test]
    #[should_panic(expected = "keys and values differ in length")]
    fn missing_values_are_refused() {
        KvCache::new(1, 3, 2).append(0, &[0.0; 12], &[0.0; 6]);
    }

    #[test]
    #[should_panic(expected = "keys are not (tokens, 6)")]
    fn part_of_a_token_is_refused() {
        KvCache::new(1, 3, 2).append(0, &[0.0; 8], &[0.0; 8]);
    }
}
