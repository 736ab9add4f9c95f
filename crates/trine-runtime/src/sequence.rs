//! What a sequence has seen.

use trine_format::ModelConfig;
use trine_kernels::{nn, parallel};

use crate::kv_cache::KvCache;
use crate::{Model, RuntimeError};

/// From this many multiplications on, threads share the attention of a pass.
const PARALLEL_WORK: usize = 1 << 16;

/// A sequence: the keys and values of its positions. It belongs to a model, but does not borrow it.
pub struct Sequence {
    cache: KvCache,
    /// Layers, query heads, key/value heads and features of a head.
    shape: [usize; 4],
}

impl Sequence {
    /// An empty sequence for `model`.
    pub fn new(model: &Model) -> Self {
        let shape = shape(&model.config);
        Self { cache: KvCache::new(shape[0], shape[2], shape[3]), shape }
    }

    /// Number of positions seen.
    pub fn positions(&self) -> usize {
        self.cache.positions()
    }

    /// Forgets all but the first `positions` positions.
    pub fn truncate(&mut self, positions: usize) {
        self.cache.truncate(positions);
    }

    /// Whether it is a sequence for models of this shape.
    pub(crate) fn check(&self, config: &ModelConfig) -> Result<(), RuntimeError> {
        let expected = shape(config);
        if self.shape == expected {
            return Ok(());
        }
        Err(RuntimeError::ForeignSequence { expected, found: self.shape })
    }

    /// Appends keys and values `(T, K * d)` to a layer. All layers are given the same tokens, then
    /// [`Self::advance`] counts them.
    pub(crate) fn append(&mut self, layer: usize, keys: &[f32], values: &[f32]) {
        self.cache.append(layer, keys, values);
    }

    /// Counts `tokens` positions as seen.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.cache.advance(tokens);
    }

    /// Attention of the queries `(T, H * d)` of the last T positions appended: `out` `(T, H * d)`.
    pub(crate) fn attend(&self, layer: usize, q: &[f32], out: &mut [f32]) {
        let [_, heads, kv_heads, d] = self.shape;
        let start = self.positions();
        let head = |i: usize, out: &mut [f32]| {
            let (t, h) = (i / heads, i % heads);
            let (keys, values) = self.cache.head(layer, h / (heads / kv_heads));
            let mut weights = vec![0.0; start + t + 1];
            nn::attention(&q[i * d..][..d], keys, values, &mut weights, out);
        };
        let tokens = q.len() / (heads * d);
        if q.len() * (start + tokens) >= PARALLEL_WORK {
            parallel::for_each_chunk(out, d, head);
        } else {
            out.chunks_exact_mut(d).enumerate().for_each(|(i, out)| head(i, out));
        }
    }
}

fn shape(config: &ModelConfig) -> [usize; 4] {
    [
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    ]
}
