//! `trine train`: one configuration file is one run.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::bail;
use trine_train::config::DeviceConfig;
use trine_train::parallel::Group;
use trine_train::trainer::Outcome;
use trine_train::{RunConfig, Trainer, checkpoint};

use crate::output::{self, note};
use crate::progress::{Beside, TrainingProgress, interrupt_flag};
use crate::{data, launch};

/// Options of `trine train`, and of `trine finetune`.
#[derive(Clone, clap::Args)]
#[group(id = "run")]
pub(crate) struct Args {
    /// Configuration of the run (TOML); with --resume, the run directory or its configuration
    config: PathBuf,
    /// Overrides a value of the configuration, e.g. --set optimizer.learning_rate=3e-3
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// What is trained on; overrides data.path and data.sources
    #[arg(long, value_name = "PATH", conflicts_with = "resume")]
    data: Option<String>,
    /// Run directory; runs/NAME by default
    #[arg(short, long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// What computes the steps: cpu; cuda or cuda:N, an NVIDIA GPU; emulator, what would be done on one,
    /// slowly; overrides train.device
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceConfig>,
    /// Go on from the latest whole checkpoint of the run directory
    #[arg(long)]
    pub(crate) resume: bool,
}

impl Args {
    /// The same with one more override.
    pub(crate) fn with(&self, setting: &str) -> Self {
        let mut args = self.clone();
        args.overrides.push(setting.to_owned());
        args
    }
}

/// A run as its command line says it.
pub(crate) struct Run {
    pub(crate) config: RunConfig,
    pub(crate) dir: PathBuf,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    launch::together(|group| run_in(args, group))
}

fn run_in(args: &Args, group: &Arc<dyn Group>) -> anyhow::Result<ExitCode> {
    let Run { config, dir } = Run::new(args, "train")?;
    // Nobody writes before all have seen that there is no run in the way.
    group.barrier()?;
    if config.finetune.is_some() {
        bail!("{}: has a section [finetune]: use `trine finetune`", args.config.display());
    }
    let trainer = Trainer::builder().group(group.clone());
    let mut trainer = if args.resume {
        let data = data::of_run(&config, &dir)?;
        trainer.resume(config, data, &dir)?
    } else {
        let data = launch::in_turn(&**group, || match group.leads() {
            true => data::of_new_run(&config, &dir),
            false => data::of_run(&config, &dir),
        })?;
        trainer.create(config, data, &dir)?
    };
    describe(&trainer, &dir);
    let (code, checkpoint) = finish(&mut trainer, &dir, "train")?;
    if let Some(checkpoint) = checkpoint {
        let checkpoint = checkpoint.display();
        note!("next: trine run {checkpoint}  or  trine convert {checkpoint} model.gguf");
    }
    Ok(code)
}

impl Run {
    /// The run that a command line asks for; a new one has no directory yet.
    pub(crate) fn new(args: &Args, command: &str) -> anyhow::Result<Self> {
        let (mut config, dir) = load_config(args)?;
        if let Some(device) = args.device {
            config.train.device = device;
        }
        if let Some(data) = &args.data {
            config.data.path.clone_from(data);
            config.data.sources.clear();
        }
        // The trainer refuses too, but only after the text has been tokenized into the directory.
        if !args.resume && dir.join("config.toml").exists() {
            let shown = dir.display();
            if checkpoint::latest(&dir).is_none() {
                bail!(
                    "{shown} holds a run that ended before its first checkpoint: begin it again with \
                     `trine {command} {shown} --resume`, or choose another directory with --out"
                );
            }
            bail!(
                "{shown} holds a run already: go on with `trine {command} {shown} --resume`, or choose \
                 another directory with --out"
            );
        }
        Ok(Self { config, dir })
    }
}

/// Says what is about to be trained, and by how many.
pub(crate) fn describe(trainer: &Trainer, dir: &Path) {
    let group = trainer.group();
    if !group.leads() {
        return;
    }
    let processes = match group.size() {
        1 => String::new(),
        size => format!("{size} processes, here with "),
    };
    let cpu = || format!("{} threads, {}", trine_kernels::threads(), trine_kernels::isa());
    note!(
        "{}: {} parameters, {} training tokens, {processes}{}",
        dir.display(),
        output::count(trainer.model().trained().count() as u64),
        output::count(trainer.batches().tokens() as u64),
        trainer.device().unwrap_or_else(cpu),
    );
}

/// Trains, and returns the last checkpoint if the run came to its end and this process is the first.
pub(crate) fn finish(
    trainer: &mut Trainer,
    dir: &Path,
    command: &str,
) -> anyhow::Result<(ExitCode, Option<PathBuf>)> {
    let outcome = train(trainer)?;
    let leads = trainer.group().leads();
    if outcome.finished {
        return Ok((ExitCode::SUCCESS, Some(outcome.checkpoint).filter(|_| leads)));
    }
    let step = outcome.state.step;
    if !leads {
        return Ok((ExitCode::from(130), None));
    }
    note!("interrupted at step {step}; go on with: trine {command} {} --resume", dir.display());
    Ok((ExitCode::from(130), None))
}

/// Runs a trainer to its end with progress on stderr; ctrl-C saves and stops.
pub(crate) fn train(trainer: &mut Trainer) -> anyhow::Result<Outcome> {
    let interrupted = interrupt_flag(trainer.group().leads())?;
    if !trainer.group().leads() {
        return Ok(trainer.run(&mut Beside::new(interrupted))?);
    }
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
