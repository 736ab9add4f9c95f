//! The training loop.
//!
//! A run is a directory:
//!
//! ```text
//! runs/<name>/
//!   config.toml       the resolved configuration
//!   run.json          version of this code, data hash, machine, command line; each resumption
//!   data/             tokenizer.json, train.bin, val.bin
//!   metrics.jsonl     one JSON object a step, validation (with the loss of each source), event,
//!                     collection of diagnostics or samples
//!   tensorboard/      the same as event files, if configured
//!   checkpoints/      step-000500/, ...
//! ```
//!
//! Everything a step does is a function of the checkpoint and the step's number (the batch, the
//! learning rate, the rounding of masters, what counts as a spike), so a resumed run goes on exactly
//! where it stopped. A run stops early when the [`Observer`] asks for it, after saving a checkpoint.
//!
//! A batch whose loss or gradient is not finite, or whose loss leaps, never reaches a parameter;
//! `train.on_spike` says what happens then. In `metrics.jsonl` it is a line with an `event`, `skip`
//! or `rewind`, which names the reason and a parameter.
//!
//! Several processes may train one run: see [`crate::parallel`].

mod builder;
mod preferences;
mod start;
mod step;
mod together;
mod validation;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde_json::json;
use trine_data::{Batch, Batches, Boundaries, Mixture, Shard, eval_windows};
use trine_format::{AtomicFile, Quantization, TokenizerFiles};
use trine_tokenizer::Tokenizer;

use crate::base::Base;
use crate::batching::BatchPlan;
use crate::card::{self, Card};
use crate::checkpoint::{self, Found, TrainerState};
use crate::config::{DeviceConfig, FinetuneConfig};
use crate::fused::{self, Engine, Precision};
use crate::optimizer::Optimizer;
use crate::parallel::{Group, Sums};
use crate::run_dir::{self, Metrics, write_error};
use crate::teaching::Teaching;
use crate::watch::Watch;
use crate::{Bitnet, RunConfig, TrainError};
use start::Start;

pub use builder::TrainerBuilder;

pub use crate::observer::{Observer, Outcome, StepReport};
pub use crate::stability::{Action, Anomaly};

/// A run in memory.
pub struct Trainer {
    config: RunConfig,
    run_dir: PathBuf,
    /// The processes that train it; all but the first write nothing.
    group: Arc<dyn Group>,
    /// Sums their gradients.
    sums: Sums,
    batches: Batches,
    plan: BatchPlan,
    /// Held-out text of each source.
    val: Vec<Shard>,
    /// What tells documents apart, where the configuration wants it.
    boundaries: Option<Boundaries>,
    tokenizer: TokenizerFiles,
    start: Start,
    model: Bitnet,
    /// What preferences are compared with, unless that is the model without its adapters.
    reference: Option<Bitnet>,
    /// What the run learns from besides its data.
    teaching: Option<Teaching>,
    optimizer: Optimizer,
    /// Computes steps where the network is one that it knows; otherwise Candle's graph does.
    engine: Engine,
    /// Computes steps instead, where the run is not on the CPU.
    card: Option<Card>,
    state: TrainerState,
    metrics: Metrics,
    watch: Watch,
    /// What a rewind goes back to; without one it begins anew.
    last_checkpoint: Option<PathBuf>,
    /// What was noticed before there was an observer.
    warnings: Vec<String>,
    /// Whether the directory has yet to be told that the run was taken up.
    resumed: bool,
}

impl Trainer {
    /// How a run is begun or taken up otherwise than by one process alone.
    pub fn builder() -> TrainerBuilder {
        TrainerBuilder::default()
    }

    /// Starts a run in directory `run_dir`, which must not hold one yet.
    ///
    /// `data` is one dataset or a mixture of several; where they lie is not looked at.
    ///
    /// # Errors
    /// A run in the way, a configuration that does not fit the data, a disk that refuses.
    pub fn create(
        config: RunConfig,
        data: impl Into<Mixture>,
        run_dir: &Path,
    ) -> Result<Self, TrainError> {
        Self::builder().create(config, data, run_dir)
    }

    /// As [`Self::create`], with a model to begin with: a run whose configuration has `[finetune]`.
    ///
    /// # Errors
    /// As [`Self::create`]; a model that cannot be read, or that the data was not made for.
    pub fn finetune(
        config: RunConfig,
        data: impl Into<Mixture>,
        base: Base,
        run_dir: &Path,
    ) -> Result<Self, TrainError> {
        Self::builder().finetune(config, data, base, run_dir)
    }

    fn begin(
        builder: TrainerBuilder,
        mut config: RunConfig,
        data: Mixture,
        base: Option<Base>,
        run_dir: &Path,
    ) -> Result<Self, TrainError> {
        let TrainerBuilder { group } = builder;
        together::check(&config, &*group)?;
        if !group.leads() {
            // The first process begins the run, the others take it up.
            group.barrier()?;
            return Self::go_on(group, config, data, base, run_dir, None);
        }
        if run_dir.join("config.toml").exists() {
            return Err(run_dir::in_the_way(run_dir));
        }
        let start = Start::new(&config, &data.tokenizer, base)?;
        // What this machine chooses, another one that takes up the run does too.
        let ternary = start.config().quantization != Quantization::None;
        config.train.precision = match config.train.device {
            DeviceConfig::Cpu => config.train.precision.resolved(ternary),
            _ => config.train.precision.on_card(),
        };
        // Data that does not fit is refused before anything is written: a run that never began
        // must not be in the way of the next attempt.
        check_windows(&config, &data)?;
        let parts = start.fresh(&config)?;
        std::fs::create_dir_all(run_dir.join("checkpoints")).map_err(write_error(run_dir))?;
        run_dir::write_about(run_dir, &data, &parts.0, start.base())?;
        let config_toml = config.to_toml();
        let trainer = Self::assemble(group, config, data, run_dir, start, parts, None)?;
        // Last, because this file is what makes the directory a run.
        AtomicFile::replace(&run_dir.join("config.toml"), config_toml.as_bytes())?;
        trainer.group.barrier()?;
        Ok(trainer)
    }

    /// Takes up the run in `run_dir` from its latest checkpoint whose files are what was written; a
    /// run that was killed before its first one begins again.
    ///
    /// # Errors
    /// No run there, only damaged checkpoints, other data than the run began with, or a
    /// configuration that would make it another run: it may be made longer, be evaluated and saved
    /// otherwise, and have another policy for spikes, no more.
    pub fn resume(
        config: RunConfig,
        data: impl Into<Mixture>,
        run_dir: &Path,
    ) -> Result<Self, TrainError> {
        Self::builder().resume(config, data, run_dir)
    }

    /// As [`Self::resume`], of a run that began with a model.
    ///
    /// # Errors
    /// As [`Self::resume`], and another model than it began with.
    pub fn resume_finetune(
        config: RunConfig,
        data: impl Into<Mixture>,
        base: Base,
        run_dir: &Path,
    ) -> Result<Self, TrainError> {
        Self::builder().resume_finetune(config, data, base, run_dir)
    }

    fn take_up_from(
        builder: TrainerBuilder,
        config: RunConfig,
        data: Mixture,
        base: Option<Base>,
        run_dir: &Path,
    ) -> Result<Self, TrainError> {
        let TrainerBuilder { group } = builder;
        together::check(&config, &*group)?;
        let found = together::latest_whole(&*group, run_dir, || {
            let found = checkpoint::latest_whole(run_dir)?;
            if found.is_none() {
                run_dir::check_never_saved(&config, run_dir)?;
            }
            Ok(found)
        })?;
        Self::go_on(group, config, data, base, run_dir, found)
    }

    /// Goes on from a checkpoint, or begins again without one.
    fn go_on(
        group: Arc<dyn Group>,
        mut config: RunConfig,
        data: Mixture,
        base: Option<Base>,
        run_dir: &Path,
        found: Option<Found>,
    ) -> Result<Self, TrainError> {
        if config.train.precision == Precision::Auto {
            // Chosen when the run began.
            let begun = RunConfig::load(&run_dir.join("config.toml"), &[])?;
            config.train.precision = begun.train.precision;
        }
        run_dir::check_same_run(&config, &data, base.as_ref(), run_dir)?;
        let start = Start::new(&config, &data.tokenizer, base)?;
        let (model, optimizer, state) = match &found {
            Some(found) => start.load(&config, &found.path)?,
            None => {
                let (model, optimizer) = start.fresh(&config)?;
                (model, optimizer, TrainerState::default())
            }
        };
        let path = found.as_ref().map(|found| found.path.clone());
        let parts = (model, optimizer);
        let mut trainer = Self::assemble(group, config, data, run_dir, start, parts, path)?;
        for e in found.map(|found| found.damaged).unwrap_or_default() {
            let at = state.step;
            trainer.warnings.push(format!("{e}; going on from the whole checkpoint of step {at}"));
        }
        (trainer.state, trainer.resumed) = (state, true);
        Ok(trainer)
    }

    fn assemble(
        group: Arc<dyn Group>,
        config: RunConfig,
        data: Mixture,
        run_dir: &Path,
        start: Start,
        (model, optimizer): (Bitnet, Optimizer),
        last_checkpoint: Option<PathBuf>,
    ) -> Result<Self, TrainError> {
        let Mixture { tokenizer, sources } = data;
        let (seq_len, batch) = (config.data.seq_len, config.train.batch_size);
        let boundaries = boundaries(&config, &tokenizer)?;
        let (train, val): (Vec<_>, Vec<_>) =
            sources.into_iter().map(|source| ((source.train, source.weight), source.val)).unzip();
        let fits = Engine::fits(&model);
        if config.train.update_in_backward && !fits {
            return Err(TrainError::ConfigValue {
                key: "train.update_in_backward".to_owned(),
                expected:
                    "false, as only the default quantizer without norms of projections has it"
                        .to_owned(),
                found: "true".to_owned(),
            });
        }
        let taught = config.finetune.as_ref().is_some_and(FinetuneConfig::is_taught);
        if taught && !fits {
            let message = "has norms of projections, with which it cannot learn from a teacher or from \
                           preferences";
            let path = start.base().map_or(run_dir, Base::path).to_owned();
            return Err(TrainError::Checkpoint { path, message: message.to_owned() });
        }
        let watch = match group.leads() {
            true => Watch::new(&config, &model, tokenizer.clone(), &val[0])?,
            false => {
                let config = together::unwatched(&config);
                Watch::new(&config, &model, tokenizer.clone(), &val[0])?
            }
        };
        let mut batches = Batches::mixed(train, batch, seq_len, config.seed)?;
        if let Some(boundaries) = boundaries {
            batches = batches.with_documents(boundaries);
        }
        let card = match card::open(config.train.device)? {
            Some(device) => Some(Card::new(device, &config, &model, &optimizer, group.clone())?),
            None => None,
        };
        let options = fused::Options {
            precision: config.train.precision,
            recompute: config.train.recompute_activations,
        };
        Ok(Self {
            sums: Sums::new(model.trained()),
            engine: Engine::new(options, model.config().quantization != Quantization::None),
            card,
            batches,
            plan: BatchPlan::new(&config.train),
            val,
            boundaries,
            tokenizer: match start.base() {
                Some(base) => base.tokenizer_files().clone(),
                None => tokenizer_files(&tokenizer, model.config().max_position_embeddings),
            },
            reference: start.reference(&config, &model)?,
            teaching: match start.base() {
                Some(base) => base.teaching(config.train.precision)?,
                None => None,
            },
            start,
            metrics: match group.leads() {
                true => Metrics::open(run_dir)?,
                false => Metrics::of_another(run_dir),
            },
            group,
            watch,
            run_dir: run_dir.to_owned(),
            state: TrainerState::default(),
            config,
            model,
            optimizer,
            last_checkpoint,
            warnings: Vec::new(),
            resumed: false,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &RunConfig {
        &self.config
    }

    /// The batches it trains on.
    pub fn batches(&self) -> &Batches {
        &self.batches
    }

    /// What computes the steps, where it is not the CPU.
    pub fn device(&self) -> Option<String> {
        self.card.as_ref().map(Card::name)
    }

    /// The model as it is now; on a device other than the CPU, as it was when it was last looked at.
    pub fn model(&self) -> &Bitnet {
        &self.model
    }

    /// The optimizer as it is now.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// How far the run has come.
    pub fn state(&self) -> &TrainerState {
        &self.state
    }

    /// Trains to the end, or until the observer asks to stop.
    ///
    /// # Errors
    /// Batches that the policy for spikes does not get over, data with ids outside the vocabulary, a
    /// disk that refuses, another process that trains in the directory.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<Outcome, TrainError> {
        let leads = self.group.leads();
        let _lock = leads.then(|| run_dir::lock(&self.run_dir)).transpose()?;
        // From here on all processes have read what they begin with.
        if let Some(card) = &mut self.card {
            card.meet()?;
        }
        self.check_alike()?;
        if leads {
            checkpoint::clean(&self.run_dir)?;
        }
        if std::mem::take(&mut self.resumed) && leads {
            self.take_up()?;
        }
        for warning in std::mem::take(&mut self.warnings) {
            observer.on_warning(&warning);
        }
        if leads {
            self.watch.begin(&self.config, &self.run_dir, self.state.step + 1)?;
        }
        let train = self.config.train.clone();
        if self.validation_is_missing() && self.validated(observer)? {
            self.checkpoint(observer)?;
        }
        while self.state.step < train.steps {
            if !self.step(observer)? {
                continue;
            }
            let step = self.state.step;
            let last = step == train.steps;
            let stop = !last && self.any(observer.should_stop())?;
            let milestone = train.milestone_every > 0 && step.is_multiple_of(train.milestone_every);
            let mut save = milestone || last || stop || step.is_multiple_of(train.checkpoint_every);
            if last || step.is_multiple_of(train.eval_every) && !stop {
                save |= self.validated(observer)?;
            }
            if save {
                self.checkpoint(observer)?;
            }
            if stop {
                break;
            }
        }
        Ok(Outcome {
            finished: self.state.step >= train.steps,
            checkpoint: checkpoint::path_of_step(&self.run_dir, self.state.step),
            state: self.state.clone(),
        })
    }

    fn log(&mut self, line: &serde_json::Value) -> Result<(), TrainError> {
        self.watch.log(line)?;
        self.metrics.log(line)
    }

    /// Brings the directory to where a resumed run begins; only now, since it may have been in use.
    fn take_up(&mut self) -> Result<(), TrainError> {
        let step = self.state.step;
        // A rewind to this very step is going to happen again.
        let again = |line: &serde_json::Value| line["event"] == "rewind" && line["step"] == step;
        self.metrics.forget(step, again)?;
        run_dir::add_resumption(&self.run_dir, step)?;
        // A run that was given more steps has them also when it is resumed the next time.
        let path = self.run_dir.join("config.toml");
        Ok(AtomicFile::replace(&path, self.config.to_toml().as_bytes())?)
    }

    /// Whether a run that was stopped in time for a validation has not made it.
    fn validation_is_missing(&self) -> bool {
        let step = self.state.step;
        step > 0
            && step.is_multiple_of(self.config.train.eval_every)
            && self.state.validation.is_none_or(|(at, _)| at != step)
    }

    /// Saves a checkpoint, then deletes what is no longer kept.
    fn checkpoint(&mut self, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let path = self.save()?;
        if !self.group.leads() {
            return Ok(());
        }
        observer.on_checkpoint(&path);
        if let Err(e) = checkpoint::prune(&self.run_dir, &self.state, &self.config.train) {
            observer.on_warning(&format!("an old checkpoint stays: {e}"));
        }
        Ok(())
    }

    /// Writes a checkpoint of the run as it is now and returns its directory.
    ///
    /// # Errors
    /// When the disk refuses, and processes whose parameters are not the same.
    pub fn save(&mut self) -> Result<PathBuf, TrainError> {
        let path = checkpoint::path_of_step(&self.run_dir, self.state.step);
        if let Some(card) = &self.card {
            card.fetch(&mut self.model)?;
            card.fetch_moments(&mut self.optimizer)?;
        }
        // Rewinds are counted from one checkpoint to the next.
        self.state.rewinds = 0;
        self.check_alike()?;
        if self.group.leads() {
            checkpoint::save(&path, &self.model, &self.tokenizer, &self.optimizer, &self.state)?;
        }
        self.group.barrier()?;
        self.last_checkpoint = Some(path.clone());
        Ok(path)
    }
}

/// Checks that data holds at least one window for each purpose, before it is needed.
fn check_windows(config: &RunConfig, data: &Mixture) -> Result<(), TrainError> {
    let (batch, seq_len) = (config.train.batch_size, config.data.seq_len);
    let pairs = preferences::beta(config.finetune.as_ref()).is_some();
    for shard in data.sources.iter().flat_map(|source| [&source.train, &source.val]) {
        drop(eval_windows(shard, batch, seq_len, None)?);
        if pairs != shard.row().is_some_and(|row| row > seq_len + 1) {
            let found = if pairs { "others" } else { "preferences" };
            return Err(TrainError::ConfigValue {
                key: "finetune.objective".to_owned(),
                expected: "dpo for data of preferences, and for these alone".to_owned(),
                found: format!("{}, which has {found}", shard.path().display()),
            });
        }
    }
    boundaries(config, &data.tokenizer).map(|_| ())
}

/// What tells documents apart, where the configuration wants it.
fn boundaries(config: &RunConfig, tokenizer: &Tokenizer) -> Result<Option<Boundaries>, TrainError> {
    let boundaries = Boundaries::of(tokenizer);
    match config.data.document_mask {
        true if boundaries.is_none() => Err(TrainError::ConfigValue {
            key: "data.document_mask".to_owned(),
            expected: "false, as the tokenizer has no token that begins or ends a document"
                .to_owned(),
            found: "true".to_owned(),
        }),
        wanted => Ok(wanted.then_some(boundaries)),
    }
}

/// Inputs and targets of a batch, `(B, T)` u32.
fn tensors(batch: &Batch) -> candle_core::Result<(Tensor, Tensor)> {
    let tensor = |ids: &[u32]| Tensor::from_slice(ids, (batch.batch, batch.seq_len), &Device::Cpu);
    Ok((tensor(&batch.inputs)?, tensor(&batch.targets)?))
}

/// The files that make transformers load the tokenizer.
fn tokenizer_files(tokenizer: &Tokenizer, max_length: usize) -> TokenizerFiles {
    let token = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": false,
    });
    for (key, token) in
        [("bos_token", token(tokenizer.bos_id())), ("eos_token", token(tokenizer.eos_id()))]
    {
        if let Some(token) = token {
            config[key] = token.into();
        }
    }
    TokenizerFiles { tokenizer_json: tokenizer.json().to_owned(), tokenizer_config: Some(config) }
}
