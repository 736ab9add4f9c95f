//! What guessing ahead saves: `repeats MODEL [TOKENS [EVERY]]`.
//!
//! A made-up prompt of TOKENS ids (256) is repeated by the answer, but for one id in EVERY (16),
//! which is another; as an edit of a text, or a summary that quotes, would. The answer is given, so
//! the weights do not matter, only their shape; every pass through the model is computed. Without and
//! with guesses in turn, five times each, and an answer that repeats nothing, where guesses must not
//! cost; prints median tokens a second.

use std::error::Error;
use std::time::Instant;

use trine_format::ModelFile;
use trine_runtime::{Draft, GeneratorConfig, GeneratorStats, Model, RuntimeError, Session};

const REPETITIONS: usize = 5;

/// Ids without a pattern (SplitMix64).
struct Ids {
    state: u64,
    vocab: u64,
}

impl Ids {
    fn next(&mut self) -> u32 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % self.vocab) as u32
    }
}

/// Tokens a second of a session that has seen `prompt` and answers `answer`.
fn speed(
    session: &mut Session<'_>,
    prompt: &[u32],
    answer: &[u32],
    draft: Draft,
) -> Result<(f64, GeneratorStats), RuntimeError> {
    // The last id of the prompt is left to the generation.
    session.truncate(prompt.len() - 1);
    let mut given = |_: &[f32], text: &[u32]| Ok(answer[text.len() - prompt.len()]);
    let config = GeneratorConfig { max_tokens: answer.len(), draft, ..Default::default() };
    let mut ids = session.generate(prompt, &mut given, config)?;
    let begin = Instant::now();
    for id in &mut ids {
        id?;
    }
    let stats = ids.stats();
    Ok((stats.tokens() as f64 / begin.elapsed().as_secs_f64(), stats))
}

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: repeats MODEL [TOKENS [EVERY]]")?;
    let tokens: usize = args.next().map_or(Ok(256), |n| n.parse())?;
    let every: usize = args.next().map_or(Ok(16), |n| n.parse())?;

    let model = Model::load(&ModelFile::open(path.as_ref())?)?;
    let mut ids = Ids { state: 0, vocab: model.config().vocab_size as u64 };
    let prompt: Vec<u32> = (0..tokens).map(|_| ids.next()).collect();
    let changed = |(i, id): (usize, &u32)| if i % every == every - 1 { ids.next() } else { *id };
    let edit: Vec<u32> = prompt.iter().enumerate().map(changed).collect();
    let other: Vec<u32> = (0..tokens).map(|_| ids.next()).collect();

    let mut session = Session::new(&model);
    session.prefill(&prompt)?;
    for (name, answer) in [("repeats its prompt", &edit), ("repeats nothing", &other)] {
        let (mut plain, mut ahead) = (Vec::new(), Vec::new());
        let mut stats = GeneratorStats::default();
        for _ in 0..REPETITIONS {
            plain.push(speed(&mut session, &prompt, answer, Draft::Off)?.0);
            let (speed, took) = speed(&mut session, &prompt, answer, Draft::Auto)?;
            ahead.push(speed);
            stats = took;
        }
        let (plain, ahead) = (median(&mut plain), median(&mut ahead));
        println!(
            "{name}: {plain:.1} tok/s without guesses, {ahead:.1} with, {:.2} times ({stats:?})",
            ahead / plain
        );
    }
    Ok(())
}
