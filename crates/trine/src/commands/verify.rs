//! `trine verify`: do two models hold the same trits, do they compute the same logits.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;
use trine_export::compare;
use trine_runtime::{Model, Session};

use crate::{model, output};

/// Built-in prompts: how many, and how long each.
const PROMPTS: (usize, usize) = (4, 32);

/// Options of `trine verify`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// GGUF file, Hugging Face directory, run directory, or hf://owner/name
    a: PathBuf,
    /// The model to compare it with
    b: PathBuf,
    /// Token ids to compute logits for, separated by commas; a few built-in sequences by default
    #[arg(long, value_delimiter = ',', value_name = "ID,ID")]
    ids: Vec<u32>,
    /// Largest relative error of the logits, and of a scale, that counts as equal
    #[arg(long, default_value_t = 0.0, value_name = "E")]
    tolerance: f64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Differences of logits over all prompts.
#[derive(Default)]
struct Logits {
    positions: usize,
    /// Positions at which both find the same token likeliest.
    agree: usize,
    largest: f64,
    /// Sums of squares: of the differences, and of the first model's logits.
    squares: (f64, f64),
}

impl Logits {
    fn relative_error(&self) -> f64 {
        (self.squares.0 / self.squares.1.max(f64::MIN_POSITIVE)).sqrt()
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let (a, b) = (model::open(&args.a)?, model::open(&args.b)?);
    let tensors = compare(&a, &b)?;
    let vocab = a.config().vocab_size;
    let length = PROMPTS.1.min(a.config().max_position_embeddings);
    let prompts =
        if args.ids.is_empty() { built_in(vocab, length) } else { vec![args.ids.clone()] };
    let (model_a, model_b) = (Model::load(&a)?, Model::load(&b)?);
    let mut logits = Logits::default();
    for prompt in &prompts {
        let x = Session::new(&model_a).logits_of_all(prompt)?;
        let y = Session::new(&model_b).logits_of_all(prompt)?;
        measure(&x, &y, vocab, &mut logits);
    }
    let error = logits.relative_error();
    let equal = tensors.trits_differ == 0
        && f64::from(tensors.largest_scale_change) <= args.tolerance
        && error <= args.tolerance;
    if args.json {
        let result = json!({
            "equal": equal,
            "trits": tensors.trits,
            "trits_differ": tensors.trits_differ,
            "scales": tensors.scales,
            "scales_differ": tensors.scales_differ,
            "largest_scale_change": tensors.largest_scale_change,
            "dense_tensors": tensors.dense_tensors,
            "dense_differ": tensors.dense_differ,
            "largest_dense_change": tensors.largest_dense_change,
            "differing_tensors": tensors.differing,
            "logits": {
                "positions": logits.positions,
                "top1_agreement": logits.agree as f64 / logits.positions.max(1) as f64,
                "largest_difference": logits.largest,
                "relative_error": error,
            },
        });
        output::print_line(&result.to_string())?;
    } else {
        output::print_line(&format!(
            "trits   {} of {} differ\n\
             scales  {} of {} differ, by up to {:.1e} of the scale\n\
             others  {} of {} tensors differ, by up to {:.1e} of the largest in a row\n\
             logits  relative error {error:.1e}, largest difference {:.1e}, same likeliest token \
             at {} of {} positions\n{}",
            output::count(tensors.trits_differ),
            output::count(tensors.trits),
            tensors.scales_differ,
            tensors.scales,
            tensors.largest_scale_change,
            tensors.dense_differ,
            tensors.dense_tensors,
            tensors.largest_dense_change,
            logits.largest,
            logits.agree,
            logits.positions,
            if equal { "equal" } else { "different" }
        ))?;
    }
    Ok(if equal { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Sequences of ids spread over the vocabulary.
fn built_in(vocab: usize, length: usize) -> Vec<Vec<u32>> {
    let id = |prompt: usize, i: usize| ((i * 7919 + prompt * 104_729 + i * i * 31) % vocab) as u32;
    (0..PROMPTS.0).map(|prompt| (0..length).map(|i| id(prompt, i)).collect()).collect()
}

fn measure(a: &[f32], b: &[f32], vocab: usize, into: &mut Logits) {
    let likeliest =
        |row: &[f32]| (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best });
    for (a, b) in a.chunks_exact(vocab).zip(b.chunks_exact(vocab)) {
        into.positions += 1;
        into.agree += usize::from(likeliest(a) == likeliest(b));
        for (a, b) in a.iter().zip(b) {
            let difference = f64::from(*a) - f64::from(*b);
            into.largest = into.largest.max(difference.abs());
            into.squares.0 += difference * difference;
            into.squares.1 += f64::from(*a) * f64::from(*a);
        }
    }
}
