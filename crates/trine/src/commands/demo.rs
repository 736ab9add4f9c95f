//! `trine demo`: one model's whole life in minutes, without a network.
//!
//! Text is made from a seed, a ternary model is trained on it, exported, verified, loaded by the
//! runtime, compared with the trainer, and writes. It is the ordinary `train`, `convert` and `run`
//! on the configuration below, so everything it leaves behind can be used with them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use trine_data::{Dataset, synth};
use trine_export::{Target, convert};
use trine_format::ModelFile;
use trine_runtime::{GeneratorConfig, LoadOptions, Model, Session, cross_entropy};
use trine_train::{RunConfig, Trainer};

use super::data::describe;
use super::generate::{SamplingArgs, generate};
use crate::output::{self, note};
use crate::{data, model};

/// The run that the demo makes; the same file is configs/train/demo.toml.
const CONFIG: &str = include_str!("../../../../configs/train/demo.toml");

/// Documents that are generated to be scored.
const SCORED: usize = 24;

/// Sums that are asked.
const SUMS: usize = 25;

/// Options of `trine demo`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Directory of the run; one that holds a run already is continued
    #[arg(short, long, default_value = "runs/demo", value_name = "DIR")]
    out: PathBuf,
    /// Number of updates; fewer for a quicker look
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Seed of corpus and model
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let dir = &args.out;
    let mut trainer = trainer(args)?;
    let outcome = super::train::train(&mut trainer)?;
    if !outcome.finished {
        note!("interrupted; go on with: trine demo --out {}", dir.display());
        return Ok(ExitCode::from(130));
    }

    let gguf = dir.join("model.gguf");
    let report = convert(&ModelFile::open(&outcome.checkpoint)?, &gguf, Target::default())?;
    note!(
        "exported {}: {} trits equal to the trainer's, the embedding stored as f16 (changed by up \
         to {:.1e} of the largest in its row)",
        gguf.display(),
        output::count(report.trits),
        report.largest_dense_change
    );
    let loaded = model::load(&gguf, None, &LoadOptions::default())?;
    let trained = trainer.validate()?;
    let packed = runtime_loss(&trainer, &loaded.model)?;
    let masters = outcome.checkpoint.join("model.safetensors").metadata()?.len();
    output::print_line("\n                              held-out loss         size")?;
    let row = |name: &str, loss: f64, size: u64| {
        output::print_line(&format!("{name:28}  {loss:13.5}  {:>11}", output::bytes(size)))
    };
    row("trainer, f32 masters", f64::from(trained), masters)?;
    row("runtime, packed GGUF", packed, report.bytes)?;

    output::print_line("\nsamples (prompt | continuation):")?;
    for prompt in synth::prompts() {
        let text = sample(&loaded, prompt, 0.7, 7)?;
        output::print_line(&format!("\n  {prompt}|{}", text.trim_end().replace('\n', "\n  ")))?;
    }
    let mut text = String::new();
    for seed in 0..SCORED {
        text.push_str(&sample(&loaded, "", 0.7, seed as u64)?);
        text.push_str("\n\n");
    }
    let mut score = synth::score(&text);
    score.arithmetic = sums(&loaded)?;
    output::print_line(&format!(
        "\n{SCORED} stories from nothing and {SUMS} sums: {}",
        describe(&score)
    ))?;
    next_steps(dir, &gguf)
}

/// How many sums the model completes rightly, taking the likeliest tokens.
fn sums(loaded: &model::Loaded) -> anyhow::Result<synth::Tally> {
    let mut lines = String::new();
    for i in 0..SUMS {
        // Operands of the corpus' size, spread over all pairs.
        let sum = format!("{} + {} =", (7 * i + 3) % 25, (11 * i + 5) % 25);
        let rest = sample(loaded, &sum, 0.0, 0)?;
        lines.push_str(&format!("{sum}{}\n", rest.lines().next().unwrap_or_default()));
    }
    Ok(synth::score(&lines).arithmetic)
}

/// A new run, or the one that is there already.
fn trainer(args: &Args) -> anyhow::Result<Trainer> {
    let dir = &args.out;
    let steps: Vec<String> = args.steps.iter().map(|n| format!("train.steps={n}")).collect();
    if dir.join("config.toml").exists() {
        let config = RunConfig::load(&dir.join("config.toml"), &steps)?;
        if let Some(seed) = args.seed.filter(|&seed| seed != config.seed) {
            bail!(
                "{} holds a run of seed {}: to make one of seed {seed}, choose another directory \
                 with --out",
                dir.display(),
                config.seed
            );
        }
        let data = Dataset::open(&dir.join("data"))?;
        note!("going on with the run in {} (delete it to start over)", dir.display());
        return Ok(Trainer::resume(config, data, dir)?);
    }
    let mut config = RunConfig::parse(CONFIG, Path::new("demo.toml"), &steps)?;
    config.seed = args.seed.unwrap_or(config.seed);
    let data = data::of_new_run(&config, dir)?;
    note!(
        "training a ternary model on {} tokens of made-up stories; it takes some two minutes",
        output::count(data.train_tokens() as u64)
    );
    Ok(Trainer::create(config, data, dir)?)
}

/// Mean cross entropy in nats of the runtime on the text that the trainer validates on.
fn runtime_loss(trainer: &Trainer, model: &Model) -> anyhow::Result<f64> {
    let vocab = model.config().vocab_size;
    let (mut total, mut count) = (0.0, 0);
    for batch in trainer.validation_batches()? {
        let batch = batch?;
        let windows =
            batch.inputs.chunks_exact(batch.seq_len).zip(batch.targets.chunks_exact(batch.seq_len));
        for (inputs, targets) in windows {
            let logits = Session::new(model).logits_of_all(inputs)?;
            total += cross_entropy(&logits, vocab, targets);
            count += targets.len();
        }
    }
    Ok(total / count as f64)
}

/// One document, or the rest of one that begins with `prompt`.
fn sample(
    loaded: &model::Loaded,
    prompt: &str,
    temperature: f32,
    seed: u64,
) -> anyhow::Result<String> {
    let sampling = SamplingArgs { temperature, seed, ..SamplingArgs::DEFAULT };
    let mut text = String::new();
    generate(
        &mut Session::new(&loaded.model),
        &mut sampling.sampler()?,
        &loaded.tokenizer,
        &loaded.prompt_ids(prompt)?,
        GeneratorConfig { max_tokens: 200, stop: loaded.stop_ids(), ..Default::default() },
        |piece| {
            text.push_str(piece);
            Ok(())
        },
    )?;
    Ok(text)
}

fn next_steps(dir: &Path, gguf: &Path) -> anyhow::Result<ExitCode> {
    let (dir, gguf) = (dir.display(), gguf.display());
    // As this program was called, so that the lines can be pasted.
    let trine = std::env::args().next().unwrap_or_else(|| "trine".to_owned());
    output::print_line(&format!(
        "\nnext:\n  \
         {trine} run {gguf} -p \"Once upon a time\"    # let it write\n  \
         {trine} chat {gguf}    # type openings yourself\n  \
         {trine} inspect {gguf}    # what is in the file\n  \
         {trine} train {dir}/config.toml --out runs/longer --set train.steps=5000\n  \
         {trine} train configs/train/shakespeare-char.toml --data your.txt"
    ))?;
    Ok(ExitCode::SUCCESS)
}
