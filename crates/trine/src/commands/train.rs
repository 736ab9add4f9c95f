//! `trine train`: one configuration file is one run.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use trine_train::trainer::Outcome;
use trine_train::{RunConfig, Trainer, checkpoint};

use crate::data;
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
    /// File of text, directory of `trine data prepare`, or `synth`; overrides data.path and
    /// data.sources
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
        config.data.sources.clear();
    }
    let mut trainer = if args.resume {
        let data = data::of_run(&config, &run_dir)?;
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
        let data = data::of_new_run(&config, &run_dir)?;
        Trainer::create(config.clone(), data, &run_dir)?
    };
    let model = trainer.model();
    note!(
        "{}: {} parameters, {} training tokens, {} threads, {}",
        run_dir.display(),
        output::count(model.params().count() as u64),
        output::count(trainer.batches().tokens() as u64),
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
