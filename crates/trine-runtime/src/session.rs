//! The forward pass over one sequence.

use rayon::prelude::*;
use trine_format::ModelConfig;
use trine_kernels::nn;

use crate::RuntimeError;
use crate::kv_cache::KvCache;
use crate::weights::{Input, Layer, Model, rms_norm};

/// Tokens that go through the layers together during prefill; bounds the scratch memory.
const CHUNK: usize = 256;

/// One sequence on a model: what it has seen is in its cache.
pub struct Session<'m> {
    model: &'m Model,
    cache: KvCache,
}

impl<'m> Session<'m> {
    /// An empty sequence.
    pub fn new(model: &'m Model) -> Self {
        let config = &model.config;
        let (layers, heads) = (config.num_hidden_layers, config.num_key_value_heads);
        Self { model, cache: KvCache::new(layers, heads, config.head_dim) }
    }

    /// Number of positions seen.
    pub fn position(&self) -> usize {
        self.cache.positions()
    }

    /// Most positions that the model can hold.
    pub fn limit(&self) -> usize {
        self.model.config.max_position_embeddings
    }

    /// Forgets all but the first `positions` positions.
    pub fn truncate(&mut self, positions: usize) {
        self.cache.truncate(positions);
    }

    /// Appends `ids` to the sequence and returns the logits `(V,)` after the last of them.
    ///
    /// # Errors
    /// No ids, an id outside the vocabulary, a full context; the sequence is then as before.
    pub fn prefill(&mut self, ids: &[u32]) -> Result<Vec<f32>, RuntimeError> {
        self.check(ids)?;
        let mut hidden = Vec::new();
        for chunk in ids.chunks(CHUNK) {
            hidden = self.hidden(chunk);
        }
        let last = hidden.len() - self.model.config.hidden_size;
        Ok(self.logits(&hidden[last..], 1))
    }

    /// Appends one id and returns the logits `(V,)` after it.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn decode(&mut self, id: u32) -> Result<Vec<f32>, RuntimeError> {
        self.prefill(&[id])
    }

    /// Appends `ids` and returns the logits `(T, V)` after each of them.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn logits_of_all(&mut self, ids: &[u32]) -> Result<Vec<f32>, RuntimeError> {
        self.check(ids)?;
        let mut logits = Vec::with_capacity(ids.len() * self.model.config.vocab_size);
        for chunk in ids.chunks(CHUNK) {
            let hidden = self.hidden(chunk);
            logits.extend(self.logits(&hidden, chunk.len()));
        }
        Ok(logits)
    }

    fn check(&self, ids: &[u32]) -> Result<(), RuntimeError> {
        let config = &self.model.config;
        let (vocab_size, limit) = (config.vocab_size, config.max_position_embeddings);
        if ids.is_empty() {
            return Err(RuntimeError::Empty);
        }
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(RuntimeError::TokenId { id, vocab_size });
        }
        let requested = self.position() + ids.len();
        if requested > limit {
            return Err(RuntimeError::ContextFull { requested, limit });
        }
        Ok(())
    }

    /// The residual stream `(T, D)` after all layers.
    fn hidden(&mut self, ids: &[u32]) -> Vec<f32> {
        let model = self.model;
        let mut x = vec![0.0; ids.len() * model.config.hidden_size];
        for (row, &id) in x.chunks_exact_mut(model.config.hidden_size).zip(ids) {
            model.embed.row(id as usize, row);
        }
        let rope = self.rope(ids.len());
        for (index, layer) in model.layers.iter().enumerate() {
            let y = self.attention(index, layer, &x, &rope);
            add(&mut x, &y);
            let y = self.feed_forward(layer, &x, ids.len());
            add(&mut x, &y);
        }
        self.cache.advance(ids.len());
        x
    }

    /// Rotary rows of the next `tokens` positions.
    fn rope(&self, tokens: usize) -> Rope {
        let inv_freq = &self.model.inv_freq;
        let row = || vec![0.0; tokens * inv_freq.len()];
        let mut rope = Rope { tokens, cos: row(), sin: row() };
        ModelConfig::rope_rows(inv_freq, self.position(), &mut rope.cos, &mut rope.sin);
        rope
    }

    /// Final norm and head: `(T, D)` to `(T, V)`.
    fn logits(&self, hidden: &[f32], tokens: usize) -> Vec<f32> {
        let model = self.model;
        let x = self.norm(hidden, &model.final_norm);
        let mut logits = vec![0.0; tokens * model.config.vocab_size];
        model.head.as_ref().unwrap_or(&model.embed).matmul(&x, tokens, &mut logits);
        logits
    }

    /// The attention part of a layer: `(T, D)` to `(T, D)`.
    fn attention(&mut self, index: usize, layer: &Layer, x: &[f32], rope: &Rope) -> Vec<f32> {
        let tokens = rope.tokens;
        let config = &self.model.config;
        let (heads, kv_heads, d) =
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let x = self.norm(x, &layer.input_norm);
        let input = Input::new(&x, tokens);
        let mut q = layer.q.forward(&input);
        let mut k = layer.k.forward(&input);
        let v = layer.v.forward(&input);

        let start = self.position();
        for t in 0..tokens {
            let at = t * (d / 2)..(t + 1) * (d / 2);
            let (cos, sin) = (&rope.cos[at.clone()], &rope.sin[at]);
            let q = &mut q[t * heads * d..][..heads * d];
            let k = &mut k[t * kv_heads * d..][..kv_heads * d];
            q.chunks_exact_mut(d).chain(k.chunks_exact_mut(d)).for_each(|h| nn::rope(h, cos, sin));
        }
        self.cache.append(index, &k, &v);

        let mut y = vec![0.0; tokens * heads * d];
        let head = |(i, out): (usize, &mut [f32])| {
            let (t, h) = (i / heads, i % heads);
            let (keys, values) = self.cache.head(index, h / (heads / kv_heads));
            let mut weights = vec![0.0; start + t + 1];
            nn::attention(&q[i * d..][..d], keys, values, &mut weights, out);
        };
        if tokens * (start + tokens) * heads * d > 1 << 18 {
            y.par_chunks_exact_mut(d).enumerate().for_each(head);
        } else {
            y.chunks_exact_mut(d).enumerate().for_each(head);
        }
        if let Some(weight) = &layer.attn_sub_norm {
            y = self.norm(&y, weight);
        }
        layer.o.forward(&Input::new(&y, tokens))
    }

    /// The feed-forward part of a layer: `(T, D)` to `(T, D)`.
    fn feed_forward(&self, layer: &Layer, x: &[f32], tokens: usize) -> Vec<f32> {
        let x = self.norm(x, &layer.post_attention_norm);
        let input = Input::new(&x, tokens);
        let mut y = layer.gate.forward(&input);
        let up = layer.up.forward(&input);
        if self.model.relu2() {
            nn::gate(nn::Gate::Relu2, &mut y, &up)
        } else {
            nn::gate(nn::Gate::Silu, &mut y, &up)
        }
        if let Some(weight) = &layer.ffn_sub_norm {
            y = self.norm(&y, weight);
        }
        layer.down.forward(&Input::new(&y, tokens))
    }

    /// RMSNorm of every row of `x` `(T, n)` with `weight` `(n,)`.
    fn norm(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        rms_norm(x, weight, self.model.config.rms_norm_eps)
    }
}

/// Cosines and sines of the positions that go through the layers together, `(T, d/2)` each.
struct Rope {
    tokens: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
