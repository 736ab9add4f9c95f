//! `trine train`: one configuration file is one run.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use trine_data::Dataset;
use trine_tokenizer::Tokenizer;
use trine_train::trainer::Outcome;
use trine_train::{RunConfig, Trainer};

use crate::output;
use crate::progress::{TrainingProgress, interrupt_flag};

/// Options of `trine train`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Configuration of the run (TOML); with --resume, the run directory or its configuration
    config: PathBuf,
    /// Overrides a value of the configuration, e.g. --set optimizer.learning_rate=3e-3
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Text file, directory of `trine data prepare`, or `synth`; overrides data.path
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// Run directory; runs/<name> by default
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on from the latest checkpoint of the run directory
    #[arg(long)]
    resume: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut config = load_config(args)?;
    if let Some(data) = &args.data {
        config.data.path.clone_from(data);
    }
    let run_dir = run_dir(args, &config)?;
    let mut trainer = if args.resume {
        let data = match run_dir.join("data").is_dir() {
            true => Dataset::open(&run_dir.join("data"))?,
            false => Dataset::open(Path::new(&config.data.path))?,
        };
        Trainer::resume(config.clone(), data, &run_dir)?
    } else {
        if run_dir.join("config.toml").exists() {
            bail!(
                "{} holds a run already: go on with `trine train {} --resume`, or choose another \
                 directory with --out",
                run_dir.display(),
                run_dir.display()
            );
        }
        let data = dataset(&config, &run_dir)?;
        Trainer::create(config.clone(), data, &run_dir)?
    };
    let model = trainer.model();
    eprintln!(
        "{}: {} parameters, {} training tokens, {} threads, {}",
        run_dir.display(),
        output::count(model.params().count() as u64),
        output::count(trainer.data().train().len() as u64),
        trine_kernels::threads(),
        trine_kernels::isa()
    );
    let outcome = train(&mut trainer)?;
    if !outcome.finished {
        eprintln!(
            "interrupted at step {}; go on with: trine train {} --resume",
            outcome.state.step,
            run_dir.display()
        );
        return Ok(ExitCode::from(130));
    }
    let checkpoint = outcome.checkpoint.display();
    eprintln!("next: trine run {checkpoint}  or  trine convert {checkpoint} model.gguf");
    Ok(ExitCode::SUCCESS)
}

/// Runs a trainer to its end with progress on stderr; ctrl-C saves and stops.
pub(crate) fn train(trainer: &mut Trainer) -> anyhow::Result<Outcome> {
    let interrupted = interrupt_flag()?;
    let steps = trainer.config().train.steps;
    let mut progress = TrainingProgress::new(trainer.state().step, steps, interrupted);
    Ok(trainer.run(&mut progress)?)
}

/// The tokens of a run: prepared already, or made now and kept in the run directory.
pub(crate) fn dataset(config: &RunConfig, run_dir: &Path) -> anyhow::Result<Dataset> {
    let source = &config.data.path;
    if source.is_empty() {
        bail!("no training data: name a text file with --data or data.path");
    }
    let path = Path::new(source);
    if path.is_dir() {
        return Ok(Dataset::open(path)?);
    }
    let text = match source.as_str() {
        "synth" => trine_data::synth::generate(config.data.synth_bytes, config.seed),
        _ => trine_data::read_text(path)?,
    };
    let tokenizer = tokenizer(&config.data.tokenizer, &text)?;
    std::fs::create_dir_all(run_dir).with_context(|| format!("cannot create {}", run_dir.display()))?;
    eprintln!("tokenizing {source} into {}", run_dir.join("data").display());
    Ok(Dataset::prepare(&text, &tokenizer, config.data.val_fraction, &run_dir.join("data"))?)
}

/// The tokenizer of a configuration's `data.tokenizer`, trained on `text` where it says so.
pub(crate) fn tokenizer(spec: &str, text: &str) -> anyhow::Result<Tokenizer> {
    Ok(match spec.split_once(':') {
        Some(("bpe", size)) => {
            let size = size.parse().with_context(|| {
                format!("data.tokenizer: expected bpe:<vocabulary size>, found {spec}")
            })?;
            Tokenizer::train_bpe(trine_data::documents(text), size)?
        }
        _ if spec == "char" => Tokenizer::characters(text)?,
        _ if spec == "byte" => Tokenizer::bytes(),
        _ => Tokenizer::from_file(Path::new(spec)).with_context(|| {
            format!("data.tokenizer: expected char, byte, bpe:<size> or a file, found {spec}")
        })?,
    })
}

fn load_config(args: &Args) -> anyhow::Result<RunConfig> {
    let inside = args.config.join("config.toml");
    let path = if args.config.is_dir() { &inside } else { &args.config };
    let mut config = RunConfig::load(path, &args.overrides)?;
    if config.name.is_empty() {
        config.name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    }
    Ok(config)
}

fn run_dir(args: &Args, config: &RunConfig) -> anyhow::Result<PathBuf> {
    Ok(match &args.out {
        Some(dir) => dir.clone(),
        None if args.config.is_dir() => args.config.clone(),
        None => Path::new("runs").join(&config.name),
    })
}
