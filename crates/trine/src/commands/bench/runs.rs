//! The work that is timed.

use std::time::Instant;

use trine_kernels::limits::Limits;
use trine_runtime::{
    Draft, GeneratorConfig, Largest, Logits, Model, Outputs, RuntimeError, Sampler, SamplerConfig,
    Sequence, Session, Step,
};

use super::machine::Energy;

/// Steps of decode before it is timed.
const WARM_UP: usize = 8;

/// Passes of which it is counted how much of a head they read beside its sketch.
const SKETCHED: usize = 16;

/// One token in so many of a repeated text is another.
const CHANGED: usize = 16;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Test {
    /// A prompt of so many tokens in an empty context, at once, and the logits after the last.
    Prefill { tokens: usize },
    /// So many steps of `batch` sequences together, each a token after a context of `depth` tokens:
    /// the logits after each, of the whole head or by its sketch, and the likeliest next token.
    Decode { tokens: usize, depth: usize, batch: usize, sketch: bool },
    /// An answer of so many tokens that repeats the prompt before it but for one in [`CHANGED`], as an
    /// edit or a summary that quotes would; with guesses, if `ahead`. The answer is given, so that
    /// weights do not matter, only their shape: every pass that it takes is computed.
    Repeat { tokens: usize, ahead: bool },
}

impl Test {
    /// The name that llama-bench would give it: pp512, tg128, tg128@d2048; several sequences add
    /// their number, x8. It has none for a sketch of the head, tg128 sketch, and for repeated text: rp256,
    /// and rp256 ahead.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Prefill { tokens } => format!("pp{tokens}"),
            Self::Decode { tokens, depth, batch, sketch } => {
                let depth = if depth > 0 { format!("@d{depth}") } else { String::new() };
                let batch = if batch > 1 { format!(" x{batch}") } else { String::new() };
                let sketch = if sketch { " sketch" } else { "" };
                format!("tg{tokens}{depth}{batch}{sketch}")
            }
            Self::Repeat { tokens, ahead: false } => format!("rp{tokens}"),
            Self::Repeat { tokens, ahead: true } => format!("rp{tokens} ahead"),
        }
    }

    /// Positions that it needs in each sequence.
    pub(crate) fn positions(self) -> usize {
        match self {
            Self::Prefill { tokens } => tokens,
            Self::Decode { tokens, depth, .. } => depth + tokens,
            Self::Repeat { tokens, .. } => 2 * tokens,
        }
    }

    /// Tokens that go through the model each time.
    fn tokens(self) -> usize {
        match self {
            Self::Prefill { tokens } | Self::Repeat { tokens, .. } => tokens,
            Self::Decode { tokens, batch, .. } => tokens * batch,
        }
    }

    /// The test, and after a generation the same by the sketch of the head.
    pub(crate) fn and_sketch(self) -> Vec<Self> {
        match self {
            Self::Decode { tokens, depth, batch, sketch: false } => {
                vec![self, Self::Decode { tokens, depth, batch, sketch: true }]
            }
            _ => vec![self],
        }
    }
}

/// What was measured.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) test: Test,
    pub(crate) samples: Vec<Sample>,
    /// Joules a token, over all samples; `None` without counters.
    pub(crate) joules: Option<f64>,
}

/// One repetition of a test.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Tokens a second.
    pub(crate) speed: f64,
    /// What the machine could do right before and right after.
    pub(crate) limits: [Limits; 2],
}

/// A test that is ready to run.
pub(crate) struct Runner<'m> {
    test: Test,
    /// Runs the test, or some steps of it, and returns the seconds that it took.
    run: Box<dyn FnMut(Part) -> Result<f64, RuntimeError> + 'm>,
}

/// How much of a test is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    WarmUp,
    Whole,
}

impl<'m> Runner<'m> {
    /// Prepares tests on `model`, and runs each for a warm-up. Contexts are filled once: a test of less
    /// depth has the beginning of a deeper one's.
    pub(crate) fn all(model: &'m Model, tests: &[Test]) -> Result<Vec<Self>, RuntimeError> {
        let (mut deepest, mut most) = (0, 0);
        for test in tests {
            if let Test::Decode { depth: depth @ 1.., batch, .. } = test {
                (deepest, most) = (deepest.max(*depth), most.max(*batch));
            }
        }
        let mut ids = Ids::new(model.config().vocab_size);
        let mut contexts = Vec::with_capacity(most);
        for _ in 0..most {
            contexts.push(filled(model, &ids.take(deepest))?);
        }
        let mut runners = Vec::with_capacity(tests.len());
        for test in tests {
            let mut runner = Self::new(model, *test, &contexts)?;
            (runner.run)(Part::WarmUp)?;
            runners.push(runner);
        }
        Ok(runners)
    }

    fn new(model: &'m Model, test: Test, contexts: &[Sequence]) -> Result<Self, RuntimeError> {
        let mut ids = Ids::new(model.config().vocab_size);
        let run: Box<dyn FnMut(Part) -> Result<f64, RuntimeError> + 'm> = match test {
            Test::Prefill { tokens } => Box::new(move |_| {
                let ids = ids.take(tokens);
                let mut session = Session::new(model);
                let begin = Instant::now();
                greedy()?.sample(&session.prefill(&ids)?, &[])?;
                Ok(begin.elapsed().as_secs_f64())
            }),
            Test::Decode { tokens, depth, batch, sketch } => {
                let logits = if sketch { Logits::Largest(Largest::ONE) } else { Logits::Last };
                let mut sequences = match depth {
                    0 => vec![Sequence::new(model); batch],
                    _ => contexts[..batch].to_vec(),
                };
                sequences.iter_mut().for_each(|sequence| sequence.truncate(depth));
                let (mut outputs, mut sampler) = (Outputs::default(), greedy()?);
                Box::new(move |part| {
                    let steps = if part == Part::WarmUp { tokens.min(WARM_UP) } else { tokens };
                    let ids = ids.take(batch * steps);
                    let begin = Instant::now();
                    for ids in ids.chunks_exact(batch) {
                        let pairs = sequences.iter_mut().zip(ids.chunks_exact(1));
                        let step = |(sequence, ids)| Step { sequence, ids, logits };
                        model.step_into(&mut pairs.map(step).collect::<Vec<_>>(), &mut outputs)?;
                        outputs.iter().try_for_each(|row| sampler.sample(row, &[]).map(drop))?;
                    }
                    let seconds = begin.elapsed().as_secs_f64();
                    sequences.iter_mut().for_each(|sequence| sequence.truncate(depth));
                    Ok(seconds)
                })
            }
            Test::Repeat { tokens, ahead } => {
                let prompt = ids.take(tokens);
                let other = ids.take(tokens);
                let answer = prompt.iter().zip(&other).enumerate();
                let answer: Vec<u32> = answer
                    .map(|(i, (same, other))| if (i + 1) % CHANGED == 0 { *other } else { *same })
                    .collect();
                let mut session = Session::new(model);
                session.prefill(&prompt)?;
                let mut sampler = greedy()?;
                Box::new(move |_| {
                    // The last id of the prompt is left to the generation.
                    session.truncate(tokens - 1);
                    let mut given = |logits: &[f32], text: &[u32]| {
                        sampler.sample(logits, text)?;
                        Ok(answer[text.len() - tokens])
                    };
                    let draft = if ahead { Draft::Auto } else { Draft::Off };
                    let config =
                        GeneratorConfig { max_tokens: tokens, draft, ..Default::default() };
                    let mut ids = session.generate(&prompt, &mut given, config)?;
                    let begin = Instant::now();
                    ids.try_for_each(|id| id.map(drop))?;
                    Ok(begin.elapsed().as_secs_f64())
                })
            }
        };
        Ok(Self { test, run })
    }

    /// Runs the test: tokens a second, and joules, where there are counters.
    pub(crate) fn sample(
        &mut self,
        energy: Option<&Energy>,
    ) -> Result<(f64, Option<f64>), RuntimeError> {
        let begin = energy.and_then(|energy| energy.read().ok());
        let seconds = (self.run)(Part::Whole)?.max(1e-9);
        let joules = energy.zip(begin).and_then(|(energy, begin)| energy.joules_since(&begin).ok());
        Ok((self.test.tokens() as f64 / seconds, joules))
    }
}

impl Measured {
    /// Nothing yet; `joules` says whether there are counters.
    pub(crate) fn new(test: Test, joules: bool) -> Self {
        Self { test, samples: Vec::new(), joules: joules.then_some(0.0) }
    }

    /// Takes up a sample and the joules that it took.
    pub(crate) fn push(&mut self, sample: Sample, joules: Option<f64>) {
        let before = (self.samples.len() * self.test.tokens()) as f64;
        self.samples.push(sample);
        let tokens = self.test.tokens() as f64;
        let all = self.joules.zip(joules);
        self.joules = all.map(|(mean, joules)| (mean * before + joules) / (before + tokens));
    }
}

/// A sequence that has seen `ids`.
fn filled(model: &Model, ids: &[u32]) -> Result<Sequence, RuntimeError> {
    let mut sequence = Sequence::new(model);
    model.step(&mut [Step { sequence: &mut sequence, ids, logits: Logits::None }])?;
    Ok(sequence)
}

/// Seconds from a prompt of `tokens` tokens to the token that follows it, in a new session.
pub(crate) fn first_token(model: &Model, tokens: usize) -> Result<f64, RuntimeError> {
    let prompt = Ids::new(model.config().vocab_size).take(tokens);
    let begin = Instant::now();
    greedy()?.sample(&Session::new(model).prefill(&prompt)?, &[])?;
    Ok(begin.elapsed().as_secs_f64())
}

/// Logits that a pass of `batch` tokens computes from rows of the head where only the largest of each is
/// asked for: the mean over some passes.
pub(crate) fn logits_of_sketch(model: &Model, batch: usize) -> Result<f64, RuntimeError> {
    let config = model.config();
    let ids = Ids::new(config.vocab_size).take(SKETCHED.min(config.max_position_embeddings));
    let (mut sequence, logits) = (Sequence::new(model), Logits::Hidden);
    let step = Step { sequence: &mut sequence, ids: &ids, logits };
    let outputs = model.step(&mut [step])?;
    let hidden = &outputs[0];
    let mut logits = vec![0.0; batch * config.vocab_size];
    // Batches are of any of these states.
    let pass = |start: usize| {
        let states = hidden.chunks_exact(config.hidden_size).cycle().skip(start).take(batch);
        model.largest(&states.collect::<Vec<_>>().concat(), Largest::ONE, &mut logits)
    };
    let computed: usize = (0..ids.len()).map(pass).sum();
    Ok(computed as f64 / ids.len() as f64)
}

/// Takes the likeliest id. It is not fed back: what a model of random weights would say is no better a
/// text than random ids.
fn greedy() -> Result<Sampler, RuntimeError> {
    Sampler::new(SamplerConfig { temperature: 0.0, ..SamplerConfig::default() })
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
        let decode = |depth, batch| Test::Decode { tokens: 32, depth, batch, sketch: false };
        assert_eq!(decode(0, 1).name(), "tg32");
        assert_eq!(decode(2048, 1).name(), "tg32@d2048");
        assert_eq!(decode(2048, 8).name(), "tg32@d2048 x8");
        let names: Vec<_> = decode(0, 8).and_sketch().into_iter().map(Test::name).collect();
        assert_eq!(names, ["tg32 x8", "tg32 x8 sketch"]);
        assert_eq!(Test::Prefill { tokens: 9 }.and_sketch(), [Test::Prefill { tokens: 9 }]);
        assert_eq!((decode(2048, 8).positions(), decode(2048, 8).tokens()), (2080, 256));
        let repeat = |ahead| Test::Repeat { tokens: 256, ahead };
        assert_eq!(
            (repeat(false).name(), repeat(true).name()),
            ("rp256".into(), "rp256 ahead".into())
        );
        assert_eq!((repeat(true).positions(), repeat(true).tokens()), (512, 256));
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
