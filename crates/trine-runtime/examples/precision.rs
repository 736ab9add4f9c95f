//! What types of the head and of the key/value cache cost a model: errors of its logits.
//!
//! ```text
//! cargo run --release -p trine-runtime --example precision -- MODEL [POSITIONS [SEEDS]]
//! ```
//!
//! The model writes texts itself, at temperature 1 from its first token, and reads them again with one
//! type in the place of f32: so no tokenizer is needed, and the texts are such as the model knows.

use std::error::Error;

use trine_format::{Dtype, ModelFile};
use trine_kernels::nn::KvType;
use trine_runtime::{GeneratorConfig, LoadOptions, Model, Sampler, SamplerConfig, Session};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: precision MODEL [POSITIONS [SEEDS]]")?;
    let file = ModelFile::open(path.as_ref())?;
    let exact = LoadOptions { head: Some(Dtype::F32), kv: KvType::F32, ..LoadOptions::default() };
    let model = Model::load_with(&file, &exact)?;
    let limit = model.config().max_position_embeddings;
    let positions = args.next().map_or(Ok(limit), |count| count.parse())?.min(limit);
    let seeds = args.next().map_or(Ok(8), |count| count.parse())?;

    let texts: Vec<Vec<u32>> =
        (0..seeds).map(|seed| text(&model, positions, seed)).collect::<Result<_, _>>()?;
    let expected: Vec<Vec<f32>> =
        texts.iter().map(|text| logits(&model, text)).collect::<Result<_, _>>()?;
    println!("{} positions of {seeds} texts", texts.iter().map(Vec::len).sum::<usize>());
    println!(
        "| head, cache | error, root mean square | largest | bits a token more | other first choice |"
    );
    println!("| --- | --- | --- | --- | --- |");
    let heads = [Dtype::F16, Dtype::BF16, Dtype::Q8_0, Dtype::Q6_K, Dtype::Q4_0, Dtype::Q3_K];
    let heads = heads.map(|head| LoadOptions { head: Some(head), ..exact });
    let caches = [KvType::F16, KvType::Int8].map(|kv| LoadOptions { kv, ..exact });
    for options in heads.into_iter().chain(caches) {
        let name = format!("{}, {}", options.head.unwrap_or(Dtype::F32).name(), options.kv);
        let model = match Model::load_with(&file, &options) {
            Ok(model) => model,
            Err(e) => {
                println!("| {name} | {e} | | | |");
                continue;
            }
        };
        let mut errors = Errors::default();
        for (text, expected) in texts.iter().zip(&expected) {
            let found = logits(&model, text)?;
            let vocab = model.config().vocab_size;
            let rows = found.chunks_exact(vocab).zip(expected.chunks_exact(vocab));
            for ((found, expected), next) in rows.zip(text.iter().skip(1).map(Some).chain([None])) {
                errors.add(found, expected, next.map(|id| *id as usize));
            }
        }
        println!("| {name} | {errors} |");
    }
    Ok(())
}

/// What the model writes.
fn text(model: &Model, positions: usize, seed: u64) -> Result<Vec<u32>, Box<dyn Error>> {
    let first = model.config().bos_token_id.unwrap_or(0);
    let mut sampler = Sampler::new(SamplerConfig { temperature: 1.0, seed, ..Default::default() })?;
    let mut session = Session::new(model);
    let config = GeneratorConfig { max_tokens: positions - 1, ..Default::default() };
    let mut text = vec![first];
    for id in session.generate(&[first], &mut sampler, config)? {
        text.push(id?);
    }
    Ok(text)
}

/// `(positions, vocabulary)`, from one token after another, as in decode.
fn logits(model: &Model, text: &[u32]) -> Result<Vec<f32>, Box<dyn Error>> {
    Ok(Session::new(model).logits_of_all(text)?)
}

#[derive(Default)]
struct Errors {
    rows: usize,
    /// Sum of squares, and number, of differences in standard deviations of the position's logits.
    squares: f64,
    count: usize,
    largest: f64,
    /// Of the next token, and how often there was one.
    bits: f64,
    predicted: usize,
    other_choice: usize,
}

impl Errors {
    fn add(&mut self, found: &[f32], expected: &[f32], next: Option<usize>) {
        let mean = expected.iter().map(|y| f64::from(*y)).sum::<f64>() / expected.len() as f64;
        let variance = expected.iter().map(|y| (f64::from(*y) - mean).powi(2)).sum::<f64>();
        let deviation = (variance / expected.len() as f64).sqrt();
        for (a, b) in found.iter().zip(expected) {
            let error = (f64::from(*a) - f64::from(*b)).abs() / deviation;
            self.squares += error * error;
            self.largest = self.largest.max(error);
        }
        self.count += found.len();
        self.rows += 1;
        self.other_choice += usize::from(best(found) != best(expected));
        if let Some(next) = next {
            self.bits += surprise(found, next) - surprise(expected, next);
            self.predicted += 1;
        }
    }
}

impl std::fmt::Display for Errors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rms = (self.squares / self.count as f64).sqrt();
        let bits = self.bits / self.predicted.max(1) as f64;
        let other = 100.0 * self.other_choice as f64 / self.rows.max(1) as f64;
        write!(f, "{rms:.1e} | {:.1e} | {bits:+.5} | {other:.2} %", self.largest)
    }
}

fn best(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

/// Minus the logarithm, to the base of 2, of the probability of a token.
fn surprise(logits: &[f32], id: usize) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, y| y.max(max));
    let sum: f64 = logits.iter().map(|y| f64::from(y - max).exp()).sum();
    (sum.ln() - f64::from(logits[id] - max)) / std::f64::consts::LN_2
}
