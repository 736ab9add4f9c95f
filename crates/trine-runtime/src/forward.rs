//! The forward pass: tokens of any number of sequences through the layers together.

use trine_format::ModelConfig;
use trine_kernels::{nn, parallel};

use crate::RuntimeError;
use crate::linear::{Input, forward_all, forward_gated};
use crate::sequence::Sequence;
use crate::weights::{Layer, Model};

/// What one pass does for one sequence.
pub struct Step<'a> {
    /// The sequence, to which `ids` are appended.
    pub sequence: &'a mut Sequence,
    /// At least one id.
    pub ids: &'a [u32],
    /// Which logits are wanted.
    pub logits: Logits,
}

/// The positions of a [`Step`] of which logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// None: a part of a prompt that goes on.
    None,
    /// Those after the last id, `(V,)`.
    Last,
    /// Those after every id, `(T, V)`.
    All,
}

impl Step<'_> {
    /// Number of positions of which logits are wanted: the last ones.
    fn wanted(&self) -> usize {
        match self.logits {
            Logits::None => 0,
            Logits::Last => 1,
            Logits::All => self.ids.len(),
        }
    }
}

impl Model {
    /// Appends to sequences, all in one pass over the weights, and returns the logits that each step
    /// asked for.
    ///
    /// Every step computes the same bits as it would alone, whole or in parts. Memory for the pass
    /// grows with the number of ids: some 60 KB for each with the 2B4T shape.
    ///
    /// # Errors
    /// No ids, an id outside the vocabulary, a full context, a sequence of another model; all
    /// sequences are then as before.
    pub fn step(&self, steps: &mut [Step<'_>]) -> Result<Vec<Vec<f32>>, RuntimeError> {
        for step in &*steps {
            self.check(step)?;
        }
        if steps.is_empty() {
            return Ok(Vec::new());
        }
        let hidden = self.hidden(steps);
        Ok(self.logits(steps, &hidden))
    }

    pub(crate) fn check(&self, step: &Step<'_>) -> Result<(), RuntimeError> {
        let (vocab_size, limit) = (self.config.vocab_size, self.config.max_position_embeddings);
        if step.ids.is_empty() {
            return Err(RuntimeError::Empty);
        }
        if let Some(&id) = step.ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(RuntimeError::TokenId { id, vocab_size });
        }
        let requested = step.sequence.positions() + step.ids.len();
        if requested > limit {
            return Err(RuntimeError::ContextFull { requested, limit });
        }
        step.sequence.check(self)
    }

    /// The residual stream `(T, D)` after all layers, T being the ids of all steps.
    fn hidden(&self, steps: &mut [Step<'_>]) -> Vec<f32> {
        let width = self.config.hidden_size;
        let tokens = steps.iter().map(|step| step.ids.len()).sum::<usize>();
        let mut x = vec![0.0; tokens * width];
        let ids = steps.iter().flat_map(|step| step.ids);
        for (row, &id) in x.chunks_exact_mut(width).zip(ids) {
            self.embed.row(id as usize, row);
        }
        for step in &mut *steps {
            step.sequence.reserve(step.ids.len());
        }
        let mut pass = Pass::new(self, steps, tokens);
        for (index, layer) in self.layers.iter().enumerate() {
            pass.attention(index, layer, steps, &mut x);
            pass.feed_forward(layer, &mut x);
        }
        for step in steps {
            step.sequence.advance(step.ids.len());
        }
        x
    }

    /// Final norm and head, where a step asks for it.
    fn logits(&self, steps: &[Step<'_>], hidden: &[f32]) -> Vec<Vec<f32>> {
        let (width, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let mut rows = Vec::new();
        let mut at = 0;
        for step in steps {
            at += step.ids.len() * width;
            rows.extend_from_slice(&hidden[at - step.wanted() * width..at]);
        }
        let norm = &self.final_norm;
        for row in rows.chunks_exact_mut(width) {
            let x = row.to_vec();
            nn::rms_norm(&x, &norm.weight, norm.eps, row);
        }
        let mut logits = vec![0.0; rows.len() / width * vocab];
        if !logits.is_empty() {
            let head = self.head.as_ref().unwrap_or(&self.embed);
            head.matmul(&rows, rows.len() / width, &mut logits);
        }
        if let [_] = steps {
            return vec![logits];
        }
        let mut rest = &logits[..];
        let split = |step: &Step<'_>| Some(rest.split_off(..step.wanted() * vocab)?.to_vec());
        steps.iter().filter_map(split).collect()
    }
}

/// Scratch of a pass, which all layers use one after another.
struct Pass<'m> {
    model: &'m Model,
    tokens: usize,
    /// Of every token's position, `(T, d/2)` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// What lies between projections: room for the larger of the two parts of a layer.
    buffer: Vec<f32>,
}

impl<'m> Pass<'m> {
    fn new(model: &'m Model, steps: &[Step<'_>], tokens: usize) -> Self {
        let config = &model.config;
        let floats = |width: usize| vec![0.0; tokens * width];
        let half = model.inv_freq.len();
        let (mut cos, mut sin) = (floats(half), floats(half));
        let mut at = 0;
        for step in steps {
            let rows = at..at + step.ids.len() * half;
            at = rows.end;
            let start = step.sequence.positions();
            ModelConfig::rope_rows(&model.inv_freq, start, &mut cos[rows.clone()], &mut sin[rows]);
        }
        let heads = config.num_attention_heads + config.num_key_value_heads;
        let buffer = floats((2 * heads * config.head_dim).max(config.intermediate_size));
        Self { model, tokens, cos, sin, buffer }
    }

    /// Adds the attention part of a layer to `x` `(T, D)`.
    fn attention(&mut self, index: usize, layer: &Layer, steps: &mut [Step<'_>], x: &mut [f32]) {
        let config = &self.model.config;
        let (d, heads, kv_heads) =
            (config.head_dim, config.num_attention_heads, config.num_key_value_heads);
        // Queries and what attention returns are (T, H * d), keys and values (T, K * d).
        let (q, rest) = self.buffer.split_at_mut(self.tokens * heads * d);
        let (k, rest) = rest.split_at_mut(self.tokens * kv_heads * d);
        let (v, rest) = rest.split_at_mut(self.tokens * kv_heads * d);
        let y = &mut rest[..self.tokens * heads * d];
        let input = Input::new(x, self.tokens, Some(&layer.input_norm));
        forward_all([&layer.q, &layer.k, &layer.v], &input, [&mut *q, k, v]);

        let (cos, sin) = (&self.cos, &self.sin);
        let rotate = |heads: usize, data: &mut [f32]| {
            parallel::for_each_chunk(data, heads * d, |t, token| {
                let (cos, sin) = (&cos[t * (d / 2)..][..d / 2], &sin[t * (d / 2)..][..d / 2]);
                nn::rope(token, cos, sin);
            });
        };
        rotate(heads, q);
        rotate(kv_heads, k);

        let width = kv_heads * d;
        let mut at = 0;
        for step in &mut *steps {
            let kv = at..at + step.ids.len() * width;
            at = kv.end;
            step.sequence.write(index, &k[kv.clone()], &v[kv]);
        }
        let pages: Vec<_> = steps.iter().map(|step| step.sequence.pages()).collect();
        let views = steps.iter().zip(&pages);
        let views: Vec<_> =
            views.map(|(step, pages)| step.sequence.view(pages, index, step.ids.len())).collect();
        nn::attention_kv(self.model.kv, heads, kv_heads, &views, q, y);
        let input = Input::new(y, self.tokens, layer.attn_sub_norm.as_ref());
        layer.o.add_to(&input, x);
    }

    /// Adds the feed-forward part of a layer to `x` `(T, D)`.
    fn feed_forward(&mut self, layer: &Layer, x: &mut [f32]) {
        let input = Input::new(x, self.tokens, Some(&layer.post_attention_norm));
        // (T, F)
        let h = &mut self.buffer[..self.tokens * self.model.config.intermediate_size];
        forward_gated(self.model.gate(), &layer.gate, &layer.up, &input, h);
        let input = Input::new(h, self.tokens, layer.ffn_sub_norm.as_ref());
        layer.down.add_to(&input, x);
    }
}
