//! The forward pass: tokens of any number of sequences through the layers together.

use std::ops::Range;

use trine_format::ModelConfig;
use trine_kernels::{AlignedBuf, Largest, TwoStageHead, nn, parallel};

use crate::RuntimeError;
use crate::adapter::{Adapted, same};
use crate::dense::DenseMatrix;
use crate::linear::{Input, forward_all, forward_gated};
use crate::outputs::Outputs;
use crate::sequence::{Sequence, Write};
use crate::weights::{Layer, Model};

/// Ids that go through the layers together, at most. More would not use the weights any better, while
/// what lies between projections would leave the caches.
const PASS: usize = 256;

/// Tokens of which a thread rotates the heads at a time.
const ROTATED: usize = 16;

/// What is done for one sequence.
pub struct Step<'a> {
    /// The sequence, to which `ids` are appended.
    pub sequence: &'a mut Sequence,
    /// At least one id.
    pub ids: &'a [u32],
    /// Which logits are wanted.
    pub logits: Logits,
}

/// The positions of a [`Step`] of which logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Logits {
    /// None: a part of a prompt that goes on.
    None,
    /// Those after the last id, `(V,)`.
    Last,
    /// Those after every id, `(T, V)`.
    All,
    /// As [`Self::Last`], but only the largest matter: any other may be `-inf` instead. A model with a
    /// sketch of its head ([`LoadOptions::sketch`](crate::LoadOptions::sketch)) has them sooner.
    Largest(Largest),
    /// As [`Self::All`], in the same way.
    AllLargest(Largest),
    /// No logits, but what the head would be given, after every id: `(T, D)`, after the final norm.
    Hidden,
    /// The same after the last so many ids, or all there are.
    LastHidden(usize),
}

impl Logits {
    /// Whether what the head would be given is wanted, instead of logits.
    fn is_hidden(self) -> bool {
        matches!(self, Self::Hidden | Self::LastHidden(_))
    }

    /// Which logits matter, if not all.
    fn largest(self) -> Option<Largest> {
        match self {
            Self::Largest(largest) | Self::AllLargest(largest) => Some(largest),
            _ => None,
        }
    }
}

impl Step<'_> {
    /// The part of the step that appends only some of the ids, in their turn.
    fn part(&mut self, ids: Range<usize>) -> Step<'_> {
        let logits = match self.logits {
            Logits::Last | Logits::Largest(_) if ids.end < self.ids.len() => Logits::None,
            Logits::LastHidden(wanted) => {
                let first = self.ids.len().saturating_sub(wanted).max(ids.start);
                Logits::LastHidden(ids.end.saturating_sub(first))
            }
            logits => logits,
        };
        Step { sequence: self.sequence, ids: &self.ids[ids], logits }
    }

    /// Number of positions of which logits are wanted: the last ones.
    fn wanted(&self) -> usize {
        match self.logits {
            Logits::None => 0,
            Logits::Last | Logits::Largest(_) => 1,
            Logits::All | Logits::AllLargest(_) | Logits::Hidden => self.ids.len(),
            Logits::LastHidden(wanted) => wanted.min(self.ids.len()),
        }
    }
}

impl Model {
    /// Appends to sequences, and returns the logits, or hidden states, that each step asked for: see
    /// [`Self::step_into`].
    ///
    /// # Errors
    /// As [`Self::step_into`].
    pub fn step(&self, steps: &mut [Step<'_>]) -> Result<Outputs, RuntimeError> {
        let mut outputs = Outputs::default();
        self.step_into(steps, &mut outputs)?;
        Ok(outputs)
    }

    /// Appends to sequences, and puts the logits, or hidden states, that each step asked for in the place of
    /// what `outputs` holds; whoever makes one pass after another passes the same.
    ///
    /// All steps go over the weights together, as many ids at a time as pays. Every step computes the
    /// same bits as it would alone, whole or in parts, with whatever adapter its sequence has. An adapter
    /// is read once for steps that follow each other.
    ///
    /// # Errors
    /// No ids, an id outside the vocabulary, a full context, a sequence or an adapter of another
    /// model; all sequences, and the outputs, are then as before.
    pub fn step_into(
        &self,
        steps: &mut [Step<'_>],
        outputs: &mut Outputs,
    ) -> Result<(), RuntimeError> {
        for step in &*steps {
            self.check(step)?;
        }
        let vocab = self.config.vocab_size;
        let logits = |step: &Step<'_>| (!step.logits.is_hidden()).then(|| step.wanted() * vocab);
        outputs.begin(steps.iter().map(logits));
        for parts in passes(steps.iter().map(|step| step.ids.len())) {
            let Some((first, _)) = parts.first() else { continue };
            let pairs = steps[*first..].iter_mut().zip(&parts);
            let mut pass: Vec<_> = pairs.map(|(step, (_, ids))| step.part(ids.clone())).collect();
            let hidden = self.hidden(&mut pass);
            self.outputs(&pass, *first, &hidden, outputs);
        }
        Ok(())
    }

    fn check(&self, step: &Step<'_>) -> Result<(), RuntimeError> {
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
    fn hidden(&self, steps: &mut [Step<'_>]) -> AlignedBuf<f32> {
        let width = self.config.hidden_size;
        let tokens = steps.iter().map(|step| step.ids.len()).sum::<usize>();
        let mut x = AlignedBuf::new(tokens * width);
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

    /// The logits `(T, V)` after hidden states `(T, D)`, as a step returns them: what the head makes of
    /// them, with the bits that the step would return itself.
    ///
    /// # Panics
    /// When `hidden` is not `(T, D)` or `logits` not `(T, V)`.
    pub fn head(&self, hidden: &[f32], logits: &mut [f32]) {
        let tokens = hidden.len() / self.config.hidden_size;
        self.head_matrix().matmul(hidden, tokens, logits);
    }

    /// As [`Self::head`], where only the `largest` logits of every token matter and any other may be `-inf`
    /// instead: with the sketch of the head, if there is one and it pays. Returns how many logits were
    /// computed from rows of the head.
    ///
    /// # Panics
    /// As [`Self::head`].
    pub fn largest(&self, hidden: &[f32], largest: Largest, logits: &mut [f32]) -> usize {
        let (head, tokens) = (self.head_matrix(), hidden.len() / self.config.hidden_size);
        match &self.sketch {
            Some(sketch) if head.sketch_use().pays(tokens, largest) => {
                sketch.largest(head.head_rows(), hidden, largest, logits)
            }
            _ => {
                self.head(hidden, logits);
                logits.len()
            }
        }
    }

    /// Bytes of the sketch of the head, if there is one.
    pub fn sketch_bytes(&self) -> Option<usize> {
        self.sketch.as_ref().map(TwoStageHead::bytes)
    }

    fn head_matrix(&self) -> &DenseMatrix {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// Final norm and head, where one of `steps`, which are those from `first` on, asks for it.
    fn outputs(&self, steps: &[Step<'_>], first: usize, hidden: &[f32], outputs: &mut Outputs) {
        let (width, vocab) = (self.config.hidden_size, self.config.vocab_size);
        // What all steps want of the head; what is read for one needs not be spared for another.
        let (mut rows, mut largest) = (Vec::new(), Some(Largest { count: 0, within: 0.0 }));
        let mut at = 0;
        for (i, step) in steps.iter().enumerate() {
            at += step.ids.len() * width;
            let wanted = &hidden[at - step.wanted() * width..at];
            if step.logits.is_hidden() {
                outputs.push_hidden(first + i, &self.normed(wanted));
            } else if !wanted.is_empty() {
                rows.extend(self.normed(wanted));
                largest = largest.zip(step.logits.largest()).map(|(a, b)| a.and(b));
            }
        }
        let logits = outputs.next_logits(rows.len() / width * vocab);
        match largest {
            _ if logits.is_empty() => (),
            Some(largest) => _ = self.largest(&rows, largest, logits),
            None => self.head(&rows, logits),
        }
    }

    /// Rows `(T, D)` after the final norm.
    fn normed(&self, rows: &[f32]) -> Vec<f32> {
        let (width, norm) = (self.config.hidden_size, &self.final_norm);
        let mut normed = vec![0.0; rows.len()];
        for (x, y) in rows.chunks_exact(width).zip(normed.chunks_exact_mut(width)) {
            nn::rms_norm(x, &norm.weight, norm.eps, y);
        }
        normed
    }
}

/// Which ids go through the layers together, of steps with so many ids: for every pass, steps that
/// follow each other, by their indices, and ids of each.
fn passes(lengths: impl Iterator<Item = usize>) -> Vec<Vec<(usize, Range<usize>)>> {
    let (mut passes, mut room) = (Vec::new(), 0);
    for (index, len) in lengths.enumerate() {
        let mut from = 0;
        while from < len {
            if room == 0 {
                passes.push(Vec::new());
                room = PASS;
            }
            let to = len.min(from + room);
            passes.last_mut().expect("a pass with room").push((index, from..to));
            room -= to - from;
            from = to;
        }
    }
    passes
}

/// Which rows of a pass have adapters: those of steps that follow each other with the same one are
/// multiplied together.
fn adapted(steps: &[Step<'_>]) -> Vec<Adapted> {
    let (mut adapted, mut at) = (Vec::<Adapted>::new(), 0);
    for step in steps {
        let rows = at..at + step.ids.len();
        at = rows.end;
        let Some(adapter) = step.sequence.adapter() else { continue };
        match adapted.last_mut() {
            Some(last)
                if last.rows.end == rows.start && same(Some(&last.adapter), Some(adapter)) =>
            {
                last.rows.end = rows.end;
            }
            _ => adapted.push(Adapted { adapter: adapter.clone(), rows }),
        }
    }
    adapted
}

/// Scratch of a pass, which all layers use one after another.
struct Pass<'m> {
    model: &'m Model,
    tokens: usize,
    /// Of every token's position, `(T, d/2)` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// What lies between projections: room for the larger of the two parts of a layer.
    buffer: AlignedBuf<f32>,
    /// The tokens that have adapters.
    adapted: Vec<Adapted>,
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
        let width = (2 * heads * config.head_dim).max(config.intermediate_size);
        let buffer = AlignedBuf::new(tokens * width);
        Self { model, tokens, cos, sin, buffer, adapted: adapted(steps) }
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
        let input = Input::new(x, self.tokens, Some(&layer.input_norm), &self.adapted);
        forward_all([&layer.q, &layer.k, &layer.v], &input, [&mut *q, k, v]);

        let (cos, sin) = (&self.cos, &self.sin);
        let rotate = |heads: usize, data: &mut [f32]| {
            let width = heads * d;
            parallel::for_each_chunk(data, ROTATED * width, |chunk, tokens| {
                for (t, token) in tokens.chunks_exact_mut(width).enumerate() {
                    let at = (chunk * ROTATED + t) * (d / 2);
                    nn::rope(token, &cos[at..][..d / 2], &sin[at..][..d / 2]);
                }
            });
        };
        rotate(heads, q);
        rotate(kv_heads, k);

        let (mut keys, mut values) = (&*k, &*v);
        let mut writes = Vec::new();
        for step in &mut *steps {
            let (key, value);
            (key, keys) = keys.split_at(step.ids.len() * kv_heads * d);
            (value, values) = values.split_at(key.len());
            writes.extend(step.sequence.writes(index, key, value));
        }
        match self.tokens {
            0..ROTATED => writes.iter_mut().for_each(Write::run),
            _ => parallel::for_each(&mut writes, |_, write| write.run()),
        }
        let pages: Vec<_> = steps.iter().map(|step| step.sequence.pages()).collect();
        let views = steps.iter().zip(&pages);
        let views: Vec<_> =
            views.map(|(step, pages)| step.sequence.view(pages, index, step.ids.len())).collect();
        nn::attention_kv(self.model.kv, heads, kv_heads, &views, q, y);
        let input = Input::new(y, self.tokens, layer.attn_sub_norm.as_ref(), &self.adapted);
        layer.o.add_to(&input, x);
    }

    /// Adds the feed-forward part of a layer to `x` `(T, D)`.
    fn feed_forward(&mut self, layer: &Layer, x: &mut [f32]) {
        let input = Input::new(x, self.tokens, Some(&layer.post_attention_norm), &self.adapted);
        // (T, F)
        let h = &mut self.buffer[..self.tokens * self.model.config.intermediate_size];
        forward_gated(self.model.gate(), &layer.gate, &layer.up, &input, h);
        let input = Input::new(h, self.tokens, layer.ffn_sub_norm.as_ref(), &self.adapted);
        layer.down.add_to(&input, x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_take_as_many_ids_as_fit_in_the_order_of_steps() {
        let found = |lengths: &[usize]| passes(lengths.iter().copied());
        assert!(found(&[]).is_empty());
        assert_eq!(found(&[PASS]), [[(0, 0..PASS)]]);
        let expected =
            [vec![(0, 0..100), (1, 0..156)], vec![(1, 156..412)], vec![(1, 412..413), (2, 0..1)]];
        assert_eq!(found(&[100, 413, 1]), expected);
    }
}
