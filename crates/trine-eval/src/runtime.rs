//! The packed runtime as a [`LanguageModel`]: what texts have in common is computed once.
//!
//! The texts that are scored together (contexts, each with an option) are a [tree](crate::tree): few-shot
//! examples are its trunk, questions its branches, and options, as far as they differ, its leaves. Its
//! nodes go through the model in passes that are full, a node as soon as what stands before it is known;
//! of those that could go, the deepest go first, so that few of them are in memory. Sequences share the
//! pages of what they have in common. The head makes logits only of what is before a scored id, some rows
//! at a time. A token's logits have the same bits alone and in a batch, so scores do too.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;
use trine_runtime::{Adapter, Logits, Model, Outputs, Sequence, Step, log_sum_exp};

use crate::EvalError;
use crate::model::{Continuation, Done, Item, LanguageModel, Likelihood, Work, argmax};
use crate::tree::{Node, common, tree};
use crate::writing::Writing;

/// Ids that go through the model together: a pass of the runtime.
const PASS: usize = 256;

/// Bytes of logits at a time, and rows of them at least.
const LOGIT_BYTES: usize = 16 << 20;
const LEAST_ROWS: usize = 32;

/// Common beginnings of fewer ids than this are not kept for the texts that come later.
const WORTH_KEEPING: usize = 16;

/// Prompts that are continued together.
const BATCH: usize = 16;

/// A model of the runtime, with what the last texts began with.
pub struct RuntimeModel<'m> {
    model: &'m Model,
    /// A text, and the sequence that has seen it.
    known: (Vec<u32>, Sequence),
    /// Logits `(rows, V)` of the last rows.
    logits: Vec<f32>,
    /// Of the last step.
    outputs: Outputs,
    work: Work,
}

/// A context and an option as they go through the model.
struct Text<'a> {
    ids: Vec<u32>,
    option: &'a Continuation,
    /// Number of its item, and its own.
    item: usize,
    index: usize,
    likelihood: Likelihood,
}

impl AsRef<[u32]> for Text<'_> {
    fn as_ref(&self) -> &[u32] {
        &self.ids
    }
}

impl Text<'_> {
    /// The position after which the first id is scored.
    fn first(&self) -> usize {
        self.option.context.len() - 1
    }

    /// The id that is scored after a position, if one is.
    fn target(&self, position: usize) -> Option<u32> {
        self.option.ids.get(position.checked_sub(self.first())?).copied()
    }
}

/// A part of a node in a pass.
struct Part {
    node: usize,
    ids: Range<usize>,
    sequence: Sequence,
}

/// What is left of a node, and a sequence that has seen all before it.
type Rest = (Range<usize>, Sequence);

/// A tree while it is computed.
struct Growth<'a, 't> {
    texts: &'t mut [Text<'a>],
    nodes: Vec<Node>,
    /// The node that is kept for later texts.
    keep: Option<usize>,
    /// Of nodes that are done: their sequences, and how many of their children have not begun.
    done: Vec<Option<(Sequence, usize)>>,
    /// Nodes that can be computed, the next one last; those that have begun with what is left of them.
    open: Vec<(usize, Option<Rest>)>,
}

impl Growth<'_, '_> {
    /// After which position of a node the first id is scored.
    fn first(&self, node: &Node) -> usize {
        self.texts[node.texts.clone()].iter().map(Text::first).min().unwrap_or(0)
    }

    /// The ids of a node and of all before it.
    fn ids(&self, node: &Node) -> &[u32] {
        &self.texts[node.texts.start].ids[..node.ids.end]
    }

    /// A sequence that has seen all before a node.
    fn before(&mut self, node: usize) -> Option<Sequence> {
        let parent = &mut self.done[self.nodes[node].parent?];
        let (sequence, children) = parent.as_mut()?;
        *children -= 1;
        match *children {
            // The last of them need not copy the page that it writes to.
            0 => parent.take().map(|(sequence, _)| sequence),
            _ => Some(sequence.clone()),
        }
    }

    /// A node is computed: its children can be.
    fn finish(&mut self, node: usize, sequence: Sequence) {
        let children = &self.nodes[node].children;
        if !children.is_empty() {
            self.done[node] = Some((sequence, children.len()));
            self.open.extend(children.iter().rev().map(|child| (*child, None)));
        }
    }
}

impl<'m> RuntimeModel<'m> {
    /// Nothing is computed yet.
    pub fn new(model: &'m Model) -> Self {
        Self::with_adapter(model, None)
    }

    /// The same beside an adapter, if there is one.
    pub fn with_adapter(model: &'m Model, adapter: Option<Arc<Adapter>>) -> Self {
        let sequence = Sequence::with_adapter(model, adapter);
        let (known, outputs) = ((Vec::new(), sequence), Outputs::default());
        Self { model, known, logits: Vec::new(), outputs, work: Work::default() }
    }

    /// Makes [`Self::outputs`] those of a pass.
    fn step(&mut self, steps: &mut [Step<'_>]) -> Result<(), EvalError> {
        self.work.computed += steps.iter().map(|step| step.ids.len()).sum::<usize>();
        Ok(self.model.step_into(steps, &mut self.outputs)?)
    }

    /// A sequence that has seen as much of `ids` as is known, but at most so many.
    fn begun(&self, ids: &[u32], most: usize) -> Sequence {
        let (known, sequence) = &self.known;
        let mut sequence = sequence.clone();
        sequence.truncate(common(known, ids).min(most));
        sequence
    }

    /// Computes what all of `prompts` begin with, where that is worth it, for them and what follows.
    fn share(&mut self, prompts: &[Vec<u32>]) -> Result<(), EvalError> {
        let Some((first, rest)) = prompts.split_first() else { return Ok(()) };
        let shared = rest.iter().map(|prompt| common(first, prompt)).min();
        // The last id of a prompt is computed with it, as its logits are wanted.
        let shared = &first[..shared.unwrap_or(first.len()).min(first.len() - 1)];
        let mut sequence = self.begun(shared, shared.len());
        let new = &shared[sequence.positions()..];
        if new.len() < WORTH_KEEPING {
            return Ok(());
        }
        self.step(&mut [Step { sequence: &mut sequence, ids: new, logits: Logits::None }])?;
        self.known = (shared.to_vec(), sequence);
        Ok(())
    }

    /// Which node is kept: the deepest that the last item has in common with another one, if it is more
    /// than what is kept already.
    fn keep(&self, texts: &[Text<'_>], nodes: &[Node]) -> Option<usize> {
        let last = texts.iter().map(|text| text.item).max()?;
        let shared = |node: &&(usize, &Node)| {
            let texts = &texts[node.1.texts.clone()];
            texts.iter().any(|text| text.item == last) && texts.iter().any(|text| text.item != last)
        };
        let nodes: Vec<_> = nodes.iter().enumerate().collect();
        let (index, node) = nodes.iter().filter(shared).max_by_key(|(_, node)| node.ids.end)?;
        let ids = &texts[node.texts.start].ids[..node.ids.end];
        (ids.len() >= common(&self.known.0, ids) + WORTH_KEEPING).then_some(*index)
    }

    /// Scores all texts, which are sorted.
    fn grow(&mut self, texts: &mut [Text<'_>]) -> Result<(), EvalError> {
        let nodes = tree(texts);
        let keep = self.keep(texts, &nodes);
        let roots = nodes.iter().enumerate().filter(|(_, node)| node.parent.is_none());
        let open = roots.map(|(index, _)| (index, None)).rev().collect();
        let done = nodes.iter().map(|_| None).collect();
        let mut growth = Growth { texts, nodes, keep, done, open };
        loop {
            let mut parts = self.pass(&mut growth);
            if parts.is_empty() {
                return Ok(());
            }
            self.compute(&mut growth, &mut parts)?;
            for Part { node, ids, sequence } in parts {
                let end = growth.nodes[node].ids.end;
                if ids.end < end {
                    growth.open.push((node, Some((ids.end..end, sequence))));
                    continue;
                }
                if growth.keep == Some(node) {
                    self.known = (growth.ids(&growth.nodes[node]).to_vec(), sequence.clone());
                }
                growth.finish(node, sequence);
            }
        }
    }

    /// What goes through the model next.
    fn pass(&self, growth: &mut Growth<'_, '_>) -> Vec<Part> {
        let (mut room, mut parts) = (PASS, Vec::new());
        while room > 0
            && let Some((node, begun)) = growth.open.pop()
        {
            let (left, sequence) = begun.unwrap_or_else(|| self.begin(growth, node));
            if left.is_empty() {
                growth.finish(node, sequence);
                continue;
            }
            let ids = left.start..left.end.min(left.start + room);
            room -= ids.len();
            parts.push(Part { node, ids, sequence });
        }
        parts
    }

    /// What of a node is not known.
    fn begin(&self, growth: &mut Growth<'_, '_>, index: usize) -> Rest {
        let before = growth.before(index);
        let node = &growth.nodes[index];
        // What is scored after a position is not known.
        let known = self.begun(growth.ids(node), growth.first(node));
        let sequence = match before {
            Some(before) if before.positions() >= known.positions() => before,
            _ => known,
        };
        (sequence.positions()..node.ids.end, sequence)
    }

    /// Sends parts of a tree through the model, and scores what is to be scored in them.
    fn compute(
        &mut self,
        growth: &mut Growth<'_, '_>,
        parts: &mut [Part],
    ) -> Result<(), EvalError> {
        let (mut steps, mut rows) = (Vec::new(), Vec::new());
        for part in &mut *parts {
            let node = &growth.nodes[part.node];
            let scored = part.ids.start.max(growth.first(node))..part.ids.end;
            let ids = &growth.texts[node.texts.start].ids[part.ids.clone()];
            let logits = Logits::LastHidden(scored.len());
            steps.push(Step { sequence: &mut part.sequence, ids, logits });
            rows.extend(scored.map(|position| (node.texts.clone(), position)));
        }
        self.step(&mut steps)?;
        let hidden = self.outputs.iter().collect::<Vec<_>>().concat();
        let (width, vocab) = (self.model.config().hidden_size, self.model.config().vocab_size);
        let together = (LOGIT_BYTES / size_of::<f32>() / vocab).max(LEAST_ROWS);
        for (rows, hidden) in rows.chunks(together).zip(hidden.chunks(together * width)) {
            let len = rows.len() * vocab;
            self.logits.resize(self.logits.len().max(len), 0.0);
            let logits = &mut self.logits[..len];
            self.model.head(hidden, logits);
            let texts = &*growth.texts;
            let scored = rows.par_iter().zip(logits.par_chunks_exact(vocab));
            let scored: Vec<Vec<(usize, Likelihood)>> = scored
                .map(|((texts_of, position), logits)| {
                    let total = log_sum_exp(logits);
                    let targets = texts_of
                        .clone()
                        .filter_map(|text| Some((text, texts[text].target(*position)?)));
                    targets.map(|(text, id)| (text, Likelihood::of(logits, total, id))).collect()
                })
                .collect();
            for (text, likelihood) in scored.into_iter().flatten() {
                growth.texts[text].likelihood.and(likelihood);
            }
        }
        Ok(())
    }

    /// The likeliest ids after each prompt, at most `max_tokens`, until `done` or the context is full.
    ///
    /// # Errors
    /// Those of the model, and what `done` returns.
    pub fn generate(
        &mut self,
        prompts: &[Vec<u32>],
        max_tokens: usize,
        done: &mut Done<'_>,
    ) -> Result<Vec<Vec<u32>>, EvalError> {
        let mut texts = Vec::new();
        for batch in prompts.chunks(BATCH) {
            texts.extend(self.generate_batch(texts.len(), batch, max_tokens, done)?);
        }
        Ok(texts)
    }

    fn generate_batch(
        &mut self,
        first: usize,
        prompts: &[Vec<u32>],
        max_tokens: usize,
        done: &mut Done<'_>,
    ) -> Result<Vec<Vec<u32>>, EvalError> {
        self.share(prompts)?;
        self.work.alone += prompts.iter().map(Vec::len).sum::<usize>();
        let mut sequences: Vec<_> = prompts
            .iter()
            .map(|prompt| self.begun(prompt, prompt.len().saturating_sub(1)))
            .collect();
        let mut texts = vec![Vec::new(); prompts.len()];
        let mut next: Vec<Vec<u32>> = sequences
            .iter()
            .zip(prompts)
            .map(|(sequence, prompt)| prompt[sequence.positions()..].to_vec())
            .collect();
        for _ in 0..max_tokens {
            let mut running = Vec::new();
            let mut steps = Vec::new();
            for (index, (sequence, ids)) in sequences.iter_mut().zip(&next).enumerate() {
                if !ids.is_empty() {
                    running.push(index);
                    steps.push(Step { sequence, ids, logits: Logits::Last });
                }
            }
            if running.is_empty() {
                break;
            }
            self.step(&mut steps)?;
            let ids: Vec<u32> = self.outputs.iter().map(argmax).collect();
            for (index, id) in running.into_iter().zip(ids) {
                texts[index].push(id);
                let full = sequences[index].positions() >= self.limit();
                let ended = done(first + index, &texts[index])? || full;
                next[index] = if ended { Vec::new() } else { vec![id] };
                self.work.alone += usize::from(!ended);
            }
        }
        Ok(texts)
    }
}

impl LanguageModel for RuntimeModel<'_> {
    fn limit(&self) -> usize {
        self.model.config().max_position_embeddings
    }

    fn score(&mut self, items: &[Item]) -> Result<Vec<Vec<Likelihood>>, EvalError> {
        let mut texts = Vec::new();
        for (item, Item { options }) in items.iter().enumerate() {
            for option in options {
                let (index, ids) = (texts.len(), option.input());
                texts.push(Text { ids, option, item, index, likelihood: Likelihood::CERTAIN });
            }
        }
        self.work.alone += texts.iter().map(|text| text.ids.len()).sum::<usize>();
        texts.sort_by(|a, b| a.ids.cmp(&b.ids));
        self.grow(&mut texts)?;
        texts.sort_by_key(|text| text.index);
        let mut scores = texts.iter().map(|text| text.likelihood);
        Ok(items.iter().map(|item| scores.by_ref().take(item.options.len()).collect()).collect())
    }

    fn write(
        &mut self,
        prompts: &[Vec<u32>],
        writing: &Writing<'_>,
    ) -> Result<Vec<String>, EvalError> {
        let mut done = |_: usize, ids: &[u32]| writing.is_done(ids);
        writing.texts(self.generate(prompts, writing.max_tokens, &mut done)?)
    }

    fn work(&self) -> Work {
        self.work
    }
}
