//! What `run`, `chat` and `demo` share: sampling options and the loop from prompt to text.

use std::time::{Duration, Instant};

use trine_runtime::{Sampler, SamplerConfig, Session};
use trine_tokenizer::Tokenizer;

/// How to choose the next token.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct SamplingArgs {
    /// Divides the logits; 0 always takes the likeliest token
    #[arg(short, long, default_value_t = Self::DEFAULT.temperature, value_name = "T", allow_negative_numbers = true)]
    pub(crate) temperature: f32,
    /// Only the K likeliest tokens; 0 for all
    #[arg(long, default_value_t = Self::DEFAULT.top_k, value_name = "K")]
    pub(crate) top_k: usize,
    /// Only the likeliest tokens that together reach probability P
    #[arg(long, default_value_t = Self::DEFAULT.top_p, value_name = "P")]
    pub(crate) top_p: f32,
    /// Only tokens of at least P times the probability of the likeliest
    #[arg(long, default_value_t = Self::DEFAULT.min_p, value_name = "P")]
    pub(crate) min_p: f32,
    /// Pushes down tokens that occurred; 1 turns it off
    #[arg(long, default_value_t = Self::DEFAULT.repetition_penalty, value_name = "F")]
    pub(crate) repetition_penalty: f32,
    /// Same seed, same text
    #[arg(long, default_value_t = Self::DEFAULT.seed, value_name = "N")]
    pub(crate) seed: u64,
}

impl SamplingArgs {
    /// What a command line that says nothing means.
    pub(crate) const DEFAULT: Self = Self {
        temperature: 0.8,
        top_k: 0,
        top_p: 0.95,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed: 0,
    };

    /// A sampler with these settings.
    pub(crate) fn sampler(&self) -> anyhow::Result<Sampler> {
        Ok(Sampler::new(SamplerConfig {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        })?)
    }
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// The model produced an end token.
    Stop,
    /// As many tokens as were asked for.
    Length,
    /// The model has no positions left.
    Context,
}

impl Finish {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Context => "context",
        }
    }
}

/// Tokens and the time they took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Speed {
    pub(crate) tokens: usize,
    pub(crate) time: Duration,
}

impl Speed {
    /// Tokens a second; `None` where there was nothing to measure.
    pub(crate) fn per_second(self) -> Option<f64> {
        (self.tokens > 0).then(|| self.tokens as f64 / self.time.as_secs_f64().max(1e-9))
    }
}

/// How a generation went.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Generated {
    /// Why it ended.
    pub(crate) finish: Finish,
    /// The prompt, all of it at once.
    pub(crate) prefill: Speed,
    /// Tokens that went through the model one by one, and sampling. The last one generated is not
    /// among them: nothing follows it. Printing is not part of the time.
    pub(crate) decode: Speed,
}

/// Continues a sequence: appends `prompt` to the session, then samples until a stop id,
/// `max_tokens`, or the end of the context; `emit` gets the text as it becomes whole.
///
/// `history` holds the ids before the prompt and grows by all ids that follow; a stop id is part of
/// neither the text nor the session.
pub(crate) fn generate(
    session: &mut Session<'_>,
    sampler: &mut Sampler,
    tokenizer: &Tokenizer,
    history: &mut Vec<u32>,
    prompt: &[u32],
    max_tokens: usize,
    stop: &[u32],
    mut emit: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Generated> {
    let limit = session.limit();
    let mut text = tokenizer.detokenizer(true);
    let begin = Instant::now();
    let mut logits = session.prefill(prompt)?;
    let prefill = Speed { tokens: prompt.len(), time: begin.elapsed() };
    let mut decode = Speed::default();
    history.extend(prompt);
    let mut finish = Finish::Length;
    for n in 0..max_tokens {
        let begin = Instant::now();
        let id = sampler.sample(&logits, history)?;
        decode.time += begin.elapsed();
        if stop.contains(&id) {
            finish = Finish::Stop;
            break;
        }
        history.push(id);
        emit(&text.push(id)?)?;
        if session.position() == limit {
            finish = Finish::Context;
            break;
        }
        if n + 1 < max_tokens {
            let begin = Instant::now();
            logits = session.decode(id)?;
            decode.time += begin.elapsed();
            decode.tokens += 1;
        }
    }
    emit(&text.finish())?;
    Ok(Generated { finish, prefill, decode })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_has_no_speed() {
        let speed = |tokens, ms| Speed { tokens, time: Duration::from_millis(ms) }.per_second();
        assert_eq!(speed(0, 3), None);
        assert_eq!(speed(10, 500), Some(20.0));
    }
}
