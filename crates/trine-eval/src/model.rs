//! What is evaluated: ids in, log-likelihoods and ids out.
//!
//! Everything above this module asks for no more than [`LanguageModel`], so the runtime, a trainer's
//! forward pass or a remote server can stand behind it. [`OneByOne`] makes one of any function from
//! ids to logits; it is slow and plain, and what the runtime's shared passes are tested against.

use std::borrow::Cow;

use trine_runtime::log_sum_exp;

use crate::EvalError;
use crate::writing::Writing;

/// Texts to be scored: continuations, each after a context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What is scored. Contexts that are equal, or begin alike, are computed once.
    pub options: Vec<Continuation>,
}

/// A continuation after a context. Neither is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// What is given.
    pub context: Vec<u32>,
    /// What is scored.
    pub ids: Vec<u32>,
}

impl Continuation {
    /// Positions that a model needs: nothing follows the last id.
    pub fn positions(&self) -> usize {
        self.context.len() + self.ids.len() - 1
    }

    /// What goes through the model: everything but the last id.
    pub fn input(&self) -> Vec<u32> {
        [&self.context[..], &self.ids[..self.ids.len() - 1]].concat()
    }
}

/// How likely a continuation is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Likelihood {
    /// Natural logarithm of its probability, summed over its ids.
    pub log: f64,
    /// Whether each of its ids is the likeliest at its place (of equals, the lowest id).
    pub greedy: bool,
}

impl Likelihood {
    /// Of no ids at all.
    pub(crate) const CERTAIN: Self = Self { log: 0.0, greedy: true };

    /// Takes one more id into account.
    pub(crate) fn and(&mut self, next: Self) {
        self.log += next.log;
        self.greedy &= next.greedy;
    }

    /// Of `id` under logits `(V,)` with this [`log_sum_exp`].
    pub(crate) fn of(logits: &[f32], total: f64, id: u32) -> Self {
        let (before, logit) = (&logits[..id as usize], logits[id as usize]);
        // Without a branch for each logit, as there are many.
        let larger = logits.iter().fold(false, |any, other| any | (*other > logit));
        let same = before.iter().fold(false, |any, other| any | (*other == logit));
        Self { log: f64::from(logit) - total, greedy: !larger && !same }
    }
}

/// The first of the largest.
pub(crate) fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// Tokens that went through a model, and that would have if nothing were shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Positions that were computed.
    pub computed: usize,
    /// Positions of all contexts with all their continuations, each by itself.
    pub alone: usize,
}

/// When a generation ends: asked after every id, with the number of the prompt and what was generated
/// for it, of which the last id is new.
pub type Done<'a> = dyn FnMut(usize, &[u32]) -> Result<bool, EvalError> + 'a;

/// A model that can be evaluated.
pub trait LanguageModel {
    /// Most positions of a text.
    fn limit(&self) -> usize;

    /// The likelihoods of every item's options.
    ///
    /// # Errors
    /// Those of the model: more positions than it has, ids that it does not know.
    fn score(&mut self, items: &[Item]) -> Result<Vec<Vec<Likelihood>>, EvalError>;

    /// What it writes after each prompt when it always takes the likeliest token.
    ///
    /// # Errors
    /// As [`Self::score`], and ids that are no text.
    fn write(
        &mut self,
        prompts: &[Vec<u32>],
        writing: &Writing<'_>,
    ) -> Result<Vec<String>, EvalError>;

    /// What went through the model until now.
    fn work(&self) -> Work;
}

/// Any function from ids `(T,)` to logits `(T, V)`, asked for one text at a time.
pub struct OneByOne<F> {
    logits: F,
    limit: usize,
    work: Work,
}

impl<F, E> OneByOne<F>
where
    F: FnMut(&[u32]) -> Result<Vec<f32>, E>,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// `limit` is the most ids that `logits` takes.
    pub fn new(limit: usize, logits: F) -> Self {
        Self { logits, limit, work: Work::default() }
    }

    /// The likeliest ids after each prompt, at most `max_tokens`, until `done` or the context is full.
    ///
    /// # Errors
    /// Those of the function, and what `done` returns.
    pub fn generate(
        &mut self,
        prompts: &[Vec<u32>],
        max_tokens: usize,
        done: &mut Done<'_>,
    ) -> Result<Vec<Vec<u32>>, EvalError> {
        let mut all = Vec::new();
        for (index, prompt) in prompts.iter().enumerate() {
            let mut text = Cow::from(prompt);
            while text.len() - prompt.len() < max_tokens && text.len() <= self.limit {
                let logits = self.logits(&text)?;
                let vocab = logits.len() / text.len();
                text.to_mut().push(argmax(&logits[logits.len() - vocab..]));
                if done(index, &text[prompt.len()..])? {
                    break;
                }
            }
            all.push(text[prompt.len()..].to_vec());
        }
        Ok(all)
    }

    fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>, EvalError> {
        self.work.computed += ids.len();
        self.work.alone += ids.len();
        (self.logits)(ids).map_err(|source| EvalError::Logits { source: source.into() })
    }
}

impl<F, E> LanguageModel for OneByOne<F>
where
    F: FnMut(&[u32]) -> Result<Vec<f32>, E>,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    fn limit(&self) -> usize {
        self.limit
    }

    fn score(&mut self, items: &[Item]) -> Result<Vec<Vec<Likelihood>>, EvalError> {
        let mut score = |option: &Continuation| {
            let input = option.input();
            let logits = self.logits(&input)?;
            let vocab = logits.len() / input.len();
            let rows = logits.chunks_exact(vocab).skip(option.context.len() - 1);
            let mut likelihood = Likelihood::CERTAIN;
            for (row, id) in rows.zip(&option.ids) {
                likelihood.and(Likelihood::of(row, log_sum_exp(row), *id));
            }
            Ok(likelihood)
        };
        items.iter().map(|item| item.options.iter().map(&mut score).collect()).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits that favour the id after the last one, of five.
    fn next(ids: &[u32]) -> Result<Vec<f32>, EvalError> {
        let row = |id: u32| (0..5).map(move |v| if v == (id + 1) % 5 { 2.0 } else { 0.0 });
        Ok(ids.iter().copied().flat_map(row).collect())
    }

    #[test]
    fn likelihoods_are_those_of_the_softmax() {
        let option = |context: &[u32], ids: &[u32]| Continuation {
            context: context.to_vec(),
            ids: ids.to_vec(),
        };
        let item = Item { options: vec![option(&[0], &[1, 2]), option(&[0, 1], &[2, 4])] };
        let found = OneByOne::new(9, next).score(&[item]).unwrap().remove(0);
        let (likely, rest) = (2.0 - (2f64.exp() + 4.0).ln(), -(2f64.exp() + 4.0).ln());
        assert!((found[0].log - 2.0 * likely).abs() < 1e-6 && found[0].greedy);
        assert!((found[1].log - likely - rest).abs() < 1e-6 && !found[1].greedy);
    }

    #[test]
    fn a_generation_ends_when_it_is_done_or_full() {
        let mut model = OneByOne::new(3, next);
        let mut to = |stop| {
            let prompts = [vec![0], vec![2, 3]];
            model.generate(&prompts, 9, &mut |_, ids| Ok(ids.last() == Some(&stop))).unwrap()
        };
        assert_eq!(to(4), [vec![1, 2, 3], vec![4]]);
        assert_eq!(to(9), [vec![1, 2, 3], vec![4, 0]]);
    }

    #[test]
    fn the_first_of_equals_is_the_likeliest() {
        let logits = [0.0, 3.0, 3.0, 1.0];
        assert_eq!(argmax(&logits), 1);
        let greedy = |id| Likelihood::of(&logits, log_sum_exp(&logits), id).greedy;
        assert_eq!([0, 1, 2, 3].map(greedy), [false, true, false, false]);
    }
}
