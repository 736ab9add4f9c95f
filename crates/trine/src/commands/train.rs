//! `trine train`: one configuration file is one run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use trine_data::{Dataset, synth};
use trine_tokenizer::Tokenizer;
use trine_train::trainer::Outcome;
use trine_train::{RunConfig, Trainer, checkpoint};

use crate::output::{self, note};
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
    #[arg(long, value_name = "PATH", conflicts_with = "resume")]
    data: Option<String>,
    /// Run directory; runs/NAME by default
    #[arg(short, long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on from the latest whole checkpoint of the run directory
    #[arg(long)]
    resume: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let (mut config, run_dir) = load_config(args)?;
    if let Some(data) = &args.data {
        config.data.path.clone_from(data);
    }
    let mut trainer = if args.resume {
        let data = match run_dir.join("data").is_dir() {
            true => Dataset::open(&run_dir.join("data"))?,
            false => Dataset::open(Path::new(&config.data.path))?,
        };
        Trainer::resume(config.clone(), data, &run_dir)?
    } else {
        // The trainer refuses too, but only after the text has been tokenized into the directory.
        if run_dir.join("config.toml").exists() {
            if checkpoint::latest(&run_dir).is_none() {
                bail!(
                    "{} holds a run that ended before its first checkpoint: begin it again with \
                     `trine train {} --resume`, or choose another directory with --out",
                    run_dir.display(),
                    run_dir.display()
                );
            }
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
    note!(
        "{}: {} parameters, {} training tokens, {} threads, {}",
        run_dir.display(),
        output::count(model.params().count() as u64),
        output::count(trainer.batches().shard().len() as u64),
        trine_kernels::threads(),
        trine_kernels::isa()
    );
    let outcome = train(&mut trainer)?;
    if !outcome.finished {
        note!(
            "interrupted at step {}; go on with: trine train {} --resume",
            outcome.state.step,
            run_dir.display()
        );
        return Ok(ExitCode::from(130));
    }
    let checkpoint = outcome.checkpoint.display();
    note!("next: trine run {checkpoint}  or  trine convert {checkpoint} model.gguf");
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
    let path = Path::new(source);
    if source.is_empty() {
        bail!("no training data: name a text file with --data or data.path");
    }
    if path.is_dir() {
        return Ok(Dataset::open(path)?);
    }
    let into = run_dir.join("data");
    note!("tokenizing {source} into {}", into.display());
    let spec = &config.data.tokenizer;
    let val_fraction = config.data.val_fraction;
    if source == "synth" {
        let documents = || synth::documents(config.seed, config.data.synth_bytes);
        let tokenizer = tokenizer(spec, documents())?;
        return Ok(Dataset::from_documents(&into, &tokenizer, documents().map(Ok), val_fraction)?);
    }
    prepare(&[path.to_owned()], spec, &into, val_fraction)
}

/// Tokenizes files: one text is cut by position, several files or JSON lines by document.
pub(crate) fn prepare(
    files: &[PathBuf],
    tokenizer_spec: &str,
    into: &Path,
    val_fraction: f64,
) -> anyhow::Result<Dataset> {
    if let [path] = files
        && path.extension().is_none_or(|e| e != "jsonl")
    {
        let text = trine_data::read_text(path)?;
        let tokenizer = tokenizer(tokenizer_spec, std::iter::once(&text))?;
        return Ok(Dataset::from_text(into, &tokenizer, &text, val_fraction)?);
    }
    // Read once to make the tokenizer: an error in a file is found before anything is written.
    let documents = trine_data::read_documents(files).collect::<Result<Vec<_>, _>>()?;
    if let ([path, ..], []) = (files, documents.as_slice()) {
        bail!("{}: the corpus is empty", path.display());
    }
    let tokenizer = tokenizer(tokenizer_spec, documents.iter())?;
    Ok(Dataset::from_documents(into, &tokenizer, documents.into_iter().map(Ok), val_fraction)?)
}

/// The tokenizer that `data.tokenizer` asks for, made from `texts` where it is not a file.
fn tokenizer<S: AsRef<str> + Send>(
    spec: &str,
    texts: impl Iterator<Item = S> + Send,
) -> anyhow::Result<Tokenizer> {
    let expected = "char, byte, bpe:<vocabulary size> or the path of a tokenizer.json";
    Ok(match spec.split_once(':') {
        Some(("bpe", size)) => {
            let size =
                size.parse().with_context(|| format!("tokenizer `{spec}`: expected {expected}"))?;
            Tokenizer::train_bpe(texts, size).with_context(|| format!("tokenizer `{spec}`"))?
        }
        _ if spec == "char" => {
            let alphabet: BTreeSet<char> = texts.fold(BTreeSet::new(), |mut alphabet, text| {
                alphabet.extend(text.as_ref().chars());
                alphabet
            });
            Tokenizer::characters(&alphabet.into_iter().collect::<String>())?
        }
        _ if spec == "byte" => Tokenizer::bytes(),
        _ => Tokenizer::from_file(Path::new(spec))
            .with_context(|| format!("tokenizer `{spec}`: expected {expected}"))?,
    })
}

/// The configuration of a new run, or the one that a run to be resumed was begun with.
fn load_config(args: &Args) -> anyhow::Result<(RunConfig, PathBuf)> {
    let named = |mut config: RunConfig| {
        if config.name.is_empty() {
            let stem = args.config.file_stem().unwrap_or_default();
            config.name = stem.to_string_lossy().into_owned();
        }
        config
    };
    let run_dir = match &args.out {
        Some(dir) => dir.clone(),
        None if args.config.is_dir() => args.config.clone(),
        None => Path::new("runs").join(named(RunConfig::load(&args.config, &[])?).name),
    };
    let path = match args.resume || args.config.is_dir() {
        true => run_dir.join("config.toml"),
        false => args.config.clone(),
    };
    if args.resume && !path.exists() && checkpoint::latest(&run_dir).is_none() {
        bail!("{}: no checkpoint to resume from", run_dir.display());
    }
    Ok((named(RunConfig::load(&path, &args.overrides)?), run_dir))
}
