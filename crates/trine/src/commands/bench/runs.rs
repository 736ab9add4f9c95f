//! The work that is timed.

use std::time::Instant;

use trine_runtime::{Model, RuntimeError, Session};

use super::machine::{Energy, Reading};

/// Tokens that go through a session before it is timed.
const WARM_UP: usize = 8;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Test {
    /// A prompt of so many tokens in an empty context, at once, and the logits after the last.
    Prefill { tokens: usize },
    /// So many tokens one by one after a context of `depth` tokens, the logits after each, and the
    /// likeliest next token.
    Decode { tokens: usize, depth: usize },
}

impl Test {
    /// The name that llama-bench would give it: pp512, tg128, tg128@d2048.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Prefill { tokens } => format!("pp{tokens}"),
            Self::Decode { tokens, depth: 0 } => format!("tg{tokens}"),
            Self::Decode { tokens, depth } => format!("tg{tokens}@d{depth}"),
        }
    }

    /// Positions that it needs.
    pub(crate) fn positions(self) -> usize {
        match self {
            Self::Prefill { tokens } => tokens,
            Self::Decode { tokens, depth } => depth + tokens,
        }
    }
}

/// What was measured.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) test: Test,
    /// Tokens a second of every repetition.
    pub(crate) samples: Vec<f64>,
    /// Joules a token, over all repetitions; `None` without counters.
    pub(crate) joules: Option<f64>,
}

/// Runs a test on `model`, after a warm-up, `repetitions` times.
pub(crate) fn measure(
    model: &Model,
    test: Test,
    repetitions: usize,
    energy: Option<&Energy>,
) -> Result<Measured, RuntimeError> {
    let mut ids = Ids::new(model.config().vocab_size);
    let mut session = Session::new(model);
    let mut samples = Vec::with_capacity(repetitions);
    let (tokens, depth) = match test {
        Test::Prefill { tokens } => (tokens, 0),
        Test::Decode { tokens, depth } => (tokens, depth),
    };
    if depth > 0 {
        session.prefill(&ids.take(depth))?;
    }
    let mut begin_energy: Option<Reading> = None;
    for repetition in 0..=repetitions {
        let warm_up = repetition == 0;
        let ids = ids.take(tokens);
        let begin = Instant::now();
        match test {
            Test::Prefill { .. } => drop(session.prefill(&ids)?),
            Test::Decode { .. } => {
                for id in ids.iter().take(if warm_up { WARM_UP } else { tokens }) {
                    likeliest(&session.decode(*id)?);
                }
            }
        }
        let seconds = begin.elapsed().as_secs_f64();
        session.truncate(depth);
        if warm_up {
            begin_energy = energy.and_then(|energy| energy.read().ok());
        } else {
            samples.push(tokens as f64 / seconds.max(1e-9));
        }
    }
    let joules = energy.zip(begin_energy).and_then(|(energy, begin)| {
        Some(energy.joules_since(&begin).ok()? / (repetitions * tokens) as f64)
    });
    Ok(Measured { test, samples, joules })
}

/// Seconds from a prompt of `tokens` tokens to the token that follows it, in a new session.
pub(crate) fn first_token(model: &Model, tokens: usize) -> Result<f64, RuntimeError> {
    let prompt = Ids::new(model.config().vocab_size).take(tokens);
    let begin = Instant::now();
    likeliest(&Session::new(model).prefill(&prompt)?);
    Ok(begin.elapsed().as_secs_f64())
}

/// Greedy sampling. The result is not fed back: what a model of random weights would say is no
/// better a text than random ids.
fn likeliest(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    std::hint::black_box(best)
}

/// Ids without end, the same in every run (SplitMix64).
struct Ids {
    state: u64,
    vocab: u64,
}

impl Ids {
    fn new(vocab: usize) -> Self {
        Self { state: 0, vocab: vocab as u64 }
    }

    fn take(&mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| self.next()).collect()
    }

    fn next(&mut self) -> u32 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % self.vocab) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_named_as_llama_bench_names_them() {
        assert_eq!(Test::Prefill { tokens: 512 }.name(), "pp512");
        assert_eq!(Test::Decode { tokens: 128, depth: 0 }.name(), "tg128");
        assert_eq!(Test::Decode { tokens: 32, depth: 2048 }.name(), "tg32@d2048");
        assert_eq!(Test::Decode { tokens: 32, depth: 2048 }.positions(), 2080);
    }

    #[test]
    fn ids_are_in_the_vocabulary_and_the_same_every_time() {
        let ids = Ids::new(1000).take(5000);
        assert!(ids.iter().all(|id| *id < 1000));
        let distinct: std::collections::BTreeSet<_> = ids.iter().collect();
        assert!(distinct.len() > 950, "{}", distinct.len());
        assert_eq!(Ids::new(1000).take(5000), ids);
    }
}
