//! What `run`, `chat` and `demo` share: sampling options and the loop from prompt to text.

use std::time::{Duration, Instant};

use anyhow::Context;
use trine_runtime::{
    Draft, Finish, GeneratorConfig, GeneratorStats, Sampler, SamplerConfig, Session,
};
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
    /// What a command line that says nothing means. With a `top_k`, logits that cannot matter need not be
    /// computed (`--head-sketch`).
    pub(crate) const DEFAULT: Self = Self {
        temperature: 0.8,
        top_k: 40,
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

/// Whether to work ahead.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(crate) struct DraftArgs {
    /// Tokens guessed ahead where the text repeats itself, then checked together: `auto`, `off`, or
    /// a number. It changes the speed, never the text
    #[arg(long, default_value = "auto", value_name = "N", value_parser = parse_draft)]
    pub(crate) draft: Draft,
}

fn parse_draft(text: &str) -> Result<Draft, String> {
    match text {
        "auto" => Ok(Draft::Auto),
        "off" => Ok(Draft::Off),
        _ => text
            .parse()
            .map(Draft::Fixed)
            .map_err(|_| format!("expected `auto`, `off` or a number, found `{text}`")),
    }
}

/// The name of an end in results for programs.
pub(crate) fn name(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::Context => "context",
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
#[derive(Clone, Debug)]
pub(crate) struct Generated {
    /// What came after the prompt.
    pub(crate) ids: Vec<u32>,
    /// Why it ended.
    pub(crate) finish: Finish,
    /// The prompt, all of it at once.
    pub(crate) prefill: Speed,
    /// Tokens that went through the model after the prompt, and sampling. The last one generated is
    /// not among them: nothing follows it. Printing is not part of the time.
    pub(crate) decode: Speed,
    /// Passes, guesses, and those that were right.
    pub(crate) stats: GeneratorStats,
}

/// Continues `prompt`, of which the session may have seen a beginning; `emit` gets the text as it
/// becomes whole.
pub(crate) fn generate(
    session: &mut Session<'_>,
    sampler: &mut Sampler,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    config: GeneratorConfig,
    mut emit: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Generated> {
    let mut text = tokenizer.detokenizer(true);
    let known = session.position();
    let begin = Instant::now();
    let mut generator = session.generate(prompt, sampler, config)?;
    let prefill = Speed { tokens: prompt.len() - known, time: begin.elapsed() };
    let mut ids = Vec::new();
    let mut time = Duration::ZERO;
    loop {
        let begin = Instant::now();
        let next = generator.next();
        time += begin.elapsed();
        let Some(id) = next.transpose()? else { break };
        ids.push(id);
        emit(&text.push(id)?)?;
    }
    emit(&text.finish())?;
    let (finish, stats) = (generator.finish(), generator.stats());
    let finish = finish.context("a generation that did not end")?;
    Ok(Generated { ids, finish, prefill, decode: Speed { tokens: stats.tokens(), time }, stats })
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

    #[test]
    fn drafts_are_words_or_numbers() {
        let numbers = [("0", Draft::Fixed(0)), ("12", Draft::Fixed(12))];
        for (text, draft) in [("auto", Draft::Auto), ("off", Draft::Off)].into_iter().chain(numbers)
        {
            assert_eq!(parse_draft(text), Ok(draft));
        }
        for text in ["", "on", "-1", "1.5"] {
            assert!(parse_draft(text).unwrap_err().contains("`auto`, `off` or a number"), "{text}");
        }
    }
}
