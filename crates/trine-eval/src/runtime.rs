//! The packed runtime as a [`LanguageModel`]: what texts have in common is computed once.
//!
//! Items are scored a group at a time. First what all of a group begin with (few-shot examples, which
//! stay for the groups after it), then the common context of each item, all of them in one call, then
//! the options' own ids, all of them in passes that are full. Sequences share the pages of what they
//! have in common. A token's logits have the same bits alone and in a batch, so scores do too.

use std::sync::Arc;

use rayon::prelude::*;
use trine_runtime::{Adapter, Logits, Model, Sequence, Step};

use crate::EvalError;
use crate::model::{Continuation, Done, Item, LanguageModel, Likelihood, Work, argmax};
use crate::writing::Writing;

/// Ids of a group, about: enough to fill passes, few enough that the keys and values of its options
/// take little memory.
const GROUP: usize = 512;

/// Ids of which logits are held at a time: a pass of the runtime.
const ROWS: usize = 256;

/// Common beginnings of fewer ids than this are computed with each item.
const WORTH_SHARING: usize = 16;

/// Prompts that are continued together.
const BATCH: usize = 16;

/// A model of the runtime, with what the last texts began with.
pub struct RuntimeModel<'m> {
    model: &'m Model,
    /// A text, and the sequence that has seen it.
    common: (Vec<u32>, Sequence),
    work: Work,
}

/// One option while it is scored.
struct Branch<'a> {
    sequence: Sequence,
    option: &'a Continuation,
    /// Its ids that the sequence has not seen.
    rest: Vec<u32>,
    /// Ids of `option` that were scored.
    scored: usize,
    likelihood: Likelihood,
}

impl<'m> RuntimeModel<'m> {
    /// Nothing is computed yet.
    pub fn new(model: &'m Model) -> Self {
        Self::with_adapter(model, None)
    }

    /// The same beside an adapter, if there is one.
    pub fn with_adapter(model: &'m Model, adapter: Option<Arc<Adapter>>) -> Self {
        let sequence = Sequence::with_adapter(model, adapter);
        Self { model, common: (Vec::new(), sequence), work: Work::default() }
    }

    fn step(&mut self, steps: &mut [Step<'_>]) -> Result<Vec<Vec<f32>>, EvalError> {
        self.work.computed += steps.iter().map(|step| step.ids.len()).sum::<usize>();
        Ok(self.model.step(steps)?)
    }

    /// A sequence that has seen as much of `ids` as is known, but not all of it.
    fn begun(&self, ids: &[u32]) -> Sequence {
        let (known, sequence) = &self.common;
        let mut sequence = sequence.clone();
        sequence.truncate(common(known, ids).min(ids.len().saturating_sub(1)));
        sequence
    }

    /// Computes what all of `contexts` begin with, where that is worth it, for them and what follows.
    fn share(&mut self, contexts: &[&[u32]]) -> Result<(), EvalError> {
        let Some((first, rest)) = contexts.split_first() else { return Ok(()) };
        let shared = rest.iter().map(|context| common(first, context)).min();
        // The last id of a context is computed with it, as its logits are wanted.
        let shared = &first[..shared.unwrap_or(first.len()).min(first.len() - 1)];
        let mut sequence = self.begun(first);
        let new = shared.get(sequence.positions()..).unwrap_or_default();
        if new.len() < WORTH_SHARING {
            return Ok(());
        }
        self.step(&mut [Step { sequence: &mut sequence, ids: new, logits: Logits::None }])?;
        self.common = (shared.to_vec(), sequence);
        Ok(())
    }

    fn score_group(&mut self, items: &[Item]) -> Result<Vec<Vec<Likelihood>>, EvalError> {
        let contexts: Vec<&[u32]> = items.iter().map(shared_context).collect();
        let long: Vec<&[u32]> = contexts.iter().filter(|c| !c.is_empty()).copied().collect();
        self.share(&long)?;
        let mut sequences: Vec<_> = contexts.iter().map(|context| self.begun(context)).collect();
        let mut steps = Vec::new();
        for (sequence, context) in sequences.iter_mut().zip(&contexts) {
            let ids = &context[sequence.positions()..];
            if !ids.is_empty() {
                steps.push(Step { sequence, ids, logits: Logits::Last });
            }
        }
        let mut last = self.step(&mut steps)?.into_iter();
        let mut branches = Vec::new();
        for ((item, context), sequence) in items.iter().zip(&contexts).zip(sequences) {
            let logits =
                if context.is_empty() { Vec::new() } else { last.next().unwrap_or_default() };
            for option in &item.options {
                self.work.alone += option.positions();
                let rest = option.input().split_off(context.len());
                let whole = context.len() == option.context.len();
                let likelihood = match whole {
                    true => Likelihood::of(&logits, option.ids[0]),
                    false => Likelihood::CERTAIN,
                };
                let (sequence, scored) = (sequence.clone(), usize::from(whole));
                branches.push(Branch { sequence, option, rest, scored, likelihood });
            }
        }
        self.run(&mut branches)?;
        let mut scores = branches.into_iter().map(|branch| branch.likelihood);
        Ok(items.iter().map(|item| scores.by_ref().take(item.options.len()).collect()).collect())
    }

    /// Computes what is left of all branches, in passes that are full.
    fn run(&mut self, branches: &mut [Branch<'_>]) -> Result<(), EvalError> {
        loop {
            let mut room = ROWS;
            let mut parts: Vec<(&mut Branch<'_>, Vec<u32>)> = Vec::new();
            for branch in branches.iter_mut().filter(|branch| !branch.rest.is_empty()) {
                let part: Vec<u32> = branch.rest.drain(..room.min(branch.rest.len())).collect();
                room -= part.len();
                parts.push((branch, part));
                if room == 0 {
                    break;
                }
            }
            if parts.is_empty() {
                return Ok(());
            }
            let mut steps: Vec<_> = parts
                .iter_mut()
                .map(|(branch, ids)| Step {
                    sequence: &mut branch.sequence,
                    ids,
                    logits: Logits::All,
                })
                .collect();
            let logits = self.step(&mut steps)?;
            let vocab = self.model.config().vocab_size;
            parts.par_iter_mut().zip(logits).for_each(|((branch, part), logits)| {
                // Rows of what is still context say nothing of the continuation.
                let seen = branch.sequence.positions() - part.len();
                let context = branch.option.context.len().saturating_sub(seen + 1);
                let rows = logits.chunks_exact(vocab).skip(context);
                for (row, id) in rows.zip(&branch.option.ids[branch.scored..]) {
                    branch.likelihood.and(Likelihood::of(row, *id));
                    branch.scored += 1;
                }
            });
        }
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
        let whole: Vec<&[u32]> = prompts.iter().map(|prompt| &prompt[..]).collect();
        self.share(&whole)?;
        self.work.alone += prompts.iter().map(Vec::len).sum::<usize>();
        let mut sequences: Vec<_> = prompts.iter().map(|prompt| self.begun(prompt)).collect();
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
            let logits = self.step(&mut steps)?;
            for (index, logits) in running.into_iter().zip(logits) {
                let id = argmax(&logits);
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
        let mut scores = Vec::new();
        let mut from = 0;
        while from < items.len() {
            let mut ids = 0;
            let fits = items[from..].iter().take_while(|item| {
                let fits = ids < GROUP;
                ids += size(item);
                fits
            });
            let to = from + fits.count();
            scores.extend(self.score_group(&items[from..to])?);
            from = to;
        }
        Ok(scores)
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

/// Number of ids with which both begin.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// What the contexts of all options begin with: the whole context, where they are the same.
///
/// Otherwise each keeps at least one id of its own, whose logits its continuation needs.
fn shared_context(item: &Item) -> &[u32] {
    let Some((first, rest)) = item.options.split_first() else { return &[] };
    let context = &first.context;
    if rest.iter().all(|option| option.context == *context) {
        return context;
    }
    let shared =
        rest.iter().map(|option| common(context, &option.context).min(option.context.len() - 1));
    let shared = shared.min().unwrap_or(context.len());
    &context[..shared.min(context.len() - 1)]
}

/// Ids of an item when its context is computed once.
fn size(item: &Item) -> usize {
    let context = shared_context(item).len();
    context + item.options.iter().map(|option| option.positions() - context).sum::<usize>()
}
