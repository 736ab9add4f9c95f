//! What is asked of the engine, and what comes back.

use std::sync::Arc;
use std::time::Instant;

use super::constraint::Constraint;
use super::logprobs::Logprob;
use crate::{Adapter, Model, RuntimeError, Sampler, SamplerConfig};

/// A text to be continued.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The ids to continue; at least one.
    pub prompt: Vec<u32>,
    /// What the model is run with, if with any.
    pub adapter: Option<Arc<Adapter>>,
    /// Most ids to generate; fewer where the context ends. With 0, only the prompt is gone through.
    pub max_tokens: usize,
    /// Ids that end the text; they are not part of it.
    pub stop: Vec<u32>,
    /// How ids are chosen.
    pub sampling: Sampling,
    /// What may be chosen, if not everything.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Wants the log-probability of every id that is chosen, and of so many of the likeliest.
    pub logprobs: Option<usize>,
    /// Wants the same of the ids of the prompt. Such a prompt is gone through whole, whatever is in
    /// the prefix cache.
    pub prompt_logprobs: bool,
    /// Wants the prompt's hidden states, pooled, and nothing else: no id is generated. Such a prompt is
    /// gone through whole as well.
    pub embedding: Option<Pooling>,
    /// When it is given up.
    pub deadline: Option<Instant>,
    /// Who asks: requests of different clients take turns. Those that say nothing are one client's.
    pub client: Option<u64>,
}

/// How the hidden states of a text become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The last of them, which has seen the whole text.
    Last,
}

/// How the next id is chosen: what [`Sampler`] does, after logits were moved.
#[derive(Clone, Debug, Default)]
pub struct Sampling {
    /// Temperature, filters, repetition penalty, seed.
    pub sampler: SamplerConfig,
    /// Is subtracted from logits of ids that were generated already.
    pub presence_penalty: f32,
    /// Is subtracted from logits of ids, as often as they were generated.
    pub frequency_penalty: f32,
    /// Is added to the logits of ids; `-inf` forbids them.
    pub logit_bias: Vec<(u32, f32)>,
}

/// What an engine says about a request; the last event is [`Event::End`].
#[derive(Clone, Debug)]
pub enum Event {
    /// It runs now; nothing is generated yet.
    Begin(Usage),
    /// The log-probability of every id of the prompt but the first, if they were asked for.
    Prompt(Vec<Logprob>),
    /// The hidden states of the prompt, pooled, `(D,)`, if they were asked for.
    Embedding(Vec<f32>),
    /// The next id.
    Token(Token),
    /// Nothing follows.
    End(End, Usage),
}

/// An id that was generated.
#[derive(Clone, Debug)]
pub struct Token {
    /// The id.
    pub id: u32,
    /// Its log-probability, if it was asked for.
    pub logprob: Option<Logprob>,
}

/// Why nothing follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A stop id was chosen.
    Stop,
    /// As many ids as were asked for, or the end of the context.
    Length,
    /// The deadline has passed.
    Deadline,
    /// The engine was told to end everything.
    Aborted,
    /// The model gave logits that no id can be chosen from.
    Failed,
}

/// What a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Ids of the prompt.
    pub prompt: usize,
    /// Those of them that the prefix cache had.
    pub cached: usize,
    /// Ids generated.
    pub generated: usize,
}

impl Request {
    /// Whether something is wanted of every id of the prompt, so that none may be left out.
    pub(super) fn needs_whole_prompt(&self) -> bool {
        self.prompt_logprobs || self.embedding.is_some()
    }

    /// Positions that it needs at most: the last id has none.
    pub(super) fn positions(&self, limit: usize) -> usize {
        self.prompt.len().saturating_add(self.max_tokens.saturating_sub(1)).min(limit)
    }

    /// Refuses what could only fail later.
    pub(super) fn check(&self, model: &Model) -> Result<(), RuntimeError> {
        let config = model.config();
        let (vocab_size, limit) = (config.vocab_size, config.max_position_embeddings);
        if self.prompt.is_empty() {
            return Err(RuntimeError::Empty);
        }
        if self.prompt.len() > limit {
            return Err(RuntimeError::ContextFull { requested: self.prompt.len(), limit });
        }
        let biased = self.sampling.logit_bias.iter().map(|(id, _)| id);
        if let Some(&id) = self.prompt.iter().chain(biased).find(|id| **id as usize >= vocab_size) {
            return Err(RuntimeError::TokenId { id, vocab_size });
        }
        if self.adapter.as_ref().is_some_and(|adapter| !adapter.fits(config)) {
            return Err(RuntimeError::ForeignAdapter);
        }
        let finite = |name, value: f32| match value.is_finite() {
            true => Ok(()),
            false => Err(RuntimeError::Setting { name, expected: "a finite number", found: value }),
        };
        finite("presence_penalty", self.sampling.presence_penalty)?;
        finite("frequency_penalty", self.sampling.frequency_penalty)?;
        if let Some((_, nan)) = self.sampling.logit_bias.iter().find(|(_, bias)| bias.is_nan()) {
            let expected = "numbers";
            return Err(RuntimeError::Setting { name: "logit_bias", expected, found: *nan });
        }
        Sampler::new(self.sampling.sampler).map(drop)
    }
}
