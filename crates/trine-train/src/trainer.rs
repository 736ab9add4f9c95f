//! The training loop.
//!
//! A run is a directory:
//!
//! ```text
//! runs/<name>/
//!   config.toml       the resolved configuration
//!   run.json          version of this code, data hash, machine
//!   data/             tokenizer.json, train.bin, val.bin
//!   metrics.jsonl     one JSON object a step, validation, collection of diagnostics or samples
//!   tensorboard/      the same as event files, if configured
//!   checkpoints/      step-000500/, ...
//! ```
//!
//! Everything a step does is a function of the checkpoint and the step's number (the batch, the
//! learning rate), so a resumed run goes on exactly where it stopped. A run stops early when the
//! [`Observer`] asks for it, after saving a checkpoint.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{Device, Tensor};
use serde_json::json;
use trine_data::{Batch, Batches, DataError, Dataset, Shard, eval_windows};
use trine_format::{AtomicFile, ModelConfig, ModelFile, TokenizerFiles};
use trine_tokenizer::Tokenizer;

use crate::checkpoint::{self, TrainerState};
use crate::diagnostics::Diagnostics;
use crate::optimizer::{self, AdamW, AdamWConfig};
use crate::samples::Sample;
use crate::watch::Watch;
use crate::{Bitnet, Params, RunConfig, TrainError, schedule};

/// What one update did.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Number of updates made, this one included.
    pub step: usize,
    /// Number of updates of the whole run.
    pub steps: usize,
    /// Mean cross entropy of the batch in nats, before the update.
    pub loss: f32,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens trained on since the run began.
    pub tokens: u64,
    /// Speed of this update.
    pub tokens_per_second: f64,
}

/// Whoever watches a run: a terminal, a test, a notebook.
pub trait Observer {
    /// An update was made.
    fn on_step(&mut self, _report: &StepReport) {}
    /// A validation ended: mean cross entropy in nats over the held-out text.
    fn on_validation(&mut self, _step: usize, _loss: f32) {}
    /// Diagnostics were collected after an update.
    fn on_diagnostics(&mut self, _step: usize, _found: &Diagnostics) {}
    /// Texts were written from the prompts of the configuration.
    fn on_samples(&mut self, _step: usize, _samples: &[Sample]) {}
    /// A checkpoint was written.
    fn on_checkpoint(&mut self, _path: &Path) {}
    /// Asked after every update; `true` ends the run with a checkpoint.
    fn should_stop(&mut self) -> bool {
        false
    }
}

/// An observer that sees nothing.
impl Observer for () {}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Whether all steps were made.
    pub finished: bool,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
    /// How far the run came.
    pub state: TrainerState,
}

/// A run in memory.
pub struct Trainer {
    config: RunConfig,
    run_dir: PathBuf,
    batches: Batches,
    val: Shard,
    tokenizer: TokenizerFiles,
    model: Bitnet,
    optimizer: AdamW,
    state: TrainerState,
    metrics: File,
    watch: Watch,
}

impl Trainer {
    /// Starts a run in directory `run_dir`, which must not hold one yet.
    ///
    /// `data` is where the dataset lies: inside the run directory or elsewhere.
    ///
    /// # Errors
    /// A run in the way, a configuration that does not fit the data, a disk that refuses.
    pub fn create(config: RunConfig, data: Dataset, run_dir: &Path) -> Result<Self, TrainError> {
        if run_dir.join("config.toml").exists() {
            return Err(in_the_way(run_dir));
        }
        let model_config = model_config(&config, &data.tokenizer)?;
        let params = Params::init(&model_config, config.model.init_std, config.seed, &Device::Cpu)?;
        let model = Bitnet::new(model_config, params)?;

        let about = json!({
            "trine_version": env!("CARGO_PKG_VERSION"),
            "train_tokens": data.train.len(),
            "val_tokens": data.val.len(),
            "data_hash": data_hash(&data)?,
            "parameters": model.params().count(),
            "isa": trine_kernels::isa().to_string(),
            "threads": rayon::current_num_threads(),
        });
        let about = serde_json::to_vec_pretty(&about).expect("plain data serializes");
        // Data that does not fit is refused before anything is written: a run that never began
        // must not be in the way of the next attempt.
        let parts = Parts::new(&config, data)?;
        std::fs::create_dir_all(run_dir.join("checkpoints")).map_err(write_error(run_dir))?;
        AtomicFile::replace(&run_dir.join("run.json"), &about)?;
        let config_toml = config.to_toml();
        let trainer = Self::assemble(config, parts, run_dir, model)?;
        // Last, because this file is what makes the directory a run.
        AtomicFile::replace(&run_dir.join("config.toml"), config_toml.as_bytes())?;
        Ok(trainer)
    }

    /// Takes up the run in `run_dir` from its latest checkpoint.
    ///
    /// # Errors
    /// No run there, no checkpoint yet, other data than the run began with, or a configuration that
    /// would make it another run: it may be made longer and evaluated otherwise, no more.
    pub fn resume(config: RunConfig, data: Dataset, run_dir: &Path) -> Result<Self, TrainError> {
        let Some(path) = checkpoint::latest(run_dir) else {
            let message = "no checkpoint to resume from".to_owned();
            return Err(TrainError::RunDir { path: run_dir.to_owned(), message });
        };
        check_same_run(&config, &data, run_dir)?;
        let file = ModelFile::open(&path)?;
        let expected = model_config(&config, &data.tokenizer)?;
        if *file.config() != expected {
            let message = differences(&expected, file.config());
            return Err(TrainError::Checkpoint { path, message });
        }
        let model = Bitnet::new(expected, Params::load(&file, &Device::Cpu)?)?;
        let parts = Parts::new(&config, data)?;
        let config_toml = config.to_toml();
        let mut trainer = Self::assemble(config, parts, run_dir, model)?;
        trainer.state = checkpoint::restore(&path, &mut trainer.optimizer)?;
        trainer.forget_metrics_after(trainer.state.step)?;
        // A run that was given more steps has them also when it is resumed the next time.
        AtomicFile::replace(&run_dir.join("config.toml"), config_toml.as_bytes())?;
        Ok(trainer)
    }

    fn assemble(
        config: RunConfig,
        parts: Parts,
        run_dir: &Path,
        model: Bitnet,
    ) -> Result<Self, TrainError> {
        let clip = config.optimizer.clip_grad_norm;
        let adamw = AdamWConfig {
            beta1: config.optimizer.betas[0],
            beta2: config.optimizer.betas[1],
            eps: config.optimizer.eps,
            clip_grad_norm: (clip > 0.0).then_some(clip),
        };
        let optimizer = AdamW::new(adamw, model.params());
        let path = run_dir.join("metrics.jsonl");
        let metrics =
            OpenOptions::new().create(true).append(true).open(&path).map_err(write_error(&path))?;
        Ok(Self {
            tokenizer: tokenizer_files(&parts.tokenizer, model.config().max_position_embeddings),
            watch: Watch::new(&config, &model, parts.tokenizer, &parts.val)?,
            run_dir: run_dir.to_owned(),
            state: TrainerState::default(),
            config,
            batches: parts.batches,
            val: parts.val,
            model,
            optimizer,
            metrics,
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

    /// The model as it is now.
    pub fn model(&self) -> &Bitnet {
        &self.model
    }

    /// How far the run has come.
    pub fn state(&self) -> &TrainerState {
        &self.state
    }

    /// Trains to the end, or until the observer asks to stop.
    ///
    /// # Errors
    /// A loss that is not finite, data with ids outside the vocabulary, a disk that refuses.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<Outcome, TrainError> {
        let train = self.config.train.clone();
        self.watch.begin(&self.config, &self.run_dir, self.state.step + 1)?;
        while self.state.step < train.steps {
            let report = self.step()?;
            self.log(json!({
                "step": report.step,
                "loss": report.loss,
                "learning_rate": report.learning_rate,
                "grad_norm": report.grad_norm,
                "tokens": report.tokens,
                "tokens_per_second": report.tokens_per_second.round(),
            }))?;
            observer.on_step(&report);
            let found = self.watch.after_update(report.step, train.steps, &self.model)?;
            for line in found.lines(report.step) {
                self.log(line)?;
            }
            if let Some(diagnostics) = &found.diagnostics {
                observer.on_diagnostics(report.step, diagnostics);
            }
            if let Some(samples) = &found.samples {
                observer.on_samples(report.step, samples);
            }

            let last = report.step == train.steps;
            let stop = !last && observer.should_stop();
            if last || report.step % train.eval_every == 0 && !stop {
                let loss = self.validate()?;
                self.state.validation = Some((report.step, loss));
                self.log(json!({ "step": report.step, "val_loss": loss }))?;
                observer.on_validation(report.step, loss);
            }
            if last || stop || report.step % train.checkpoint_every == 0 {
                observer.on_checkpoint(&self.save()?);
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

    /// One update.
    fn step(&mut self) -> Result<StepReport, TrainError> {
        let begin = Instant::now();
        let (step, steps) = (self.state.step, self.config.train.steps);
        let (batch, seq_len) = (self.config.train.batch_size, self.config.data.seq_len);
        let (inputs, targets) = tensors(&self.batches.batch(step as u64)?)?;
        let loss = self.model.loss(&inputs, &targets)?;
        let value = loss.to_scalar::<f32>()?;
        if !value.is_finite() {
            return Err(TrainError::Diverged { step, what: format!("the loss became {value}") });
        }
        let gradients = optimizer::collect(self.model.params(), &mut loss.backward()?)?;
        let grad_norm = optimizer::global_norm(&gradients)?;
        if !grad_norm.is_finite() {
            let what = format!("the gradient norm became {grad_norm} at a loss of {value}");
            return Err(TrainError::Diverged { step, what });
        }
        self.watch.before_update(step + 1, self.model.params(), &gradients)?;
        let rates = schedule::rates(&self.config.optimizer, &self.config.schedule, step, steps);
        self.optimizer.update(self.model.params(), &gradients, grad_norm, rates)?;
        let tokens = (batch * seq_len) as u64;
        self.state.step += 1;
        self.state.tokens += tokens;
        Ok(StepReport {
            step: self.state.step,
            steps,
            loss: value,
            learning_rate: rates.learning_rate,
            grad_norm,
            tokens: self.state.tokens,
            tokens_per_second: tokens as f64 / begin.elapsed().as_secs_f64(),
        })
    }

    /// The held-out text in windows that do not overlap, as [`Self::validate`] reads it.
    ///
    /// # Errors
    /// A held-out text that is shorter than one window.
    pub fn validation_batches(
        &self,
    ) -> Result<impl Iterator<Item = Result<Batch, DataError>> + '_, TrainError> {
        let (seq_len, batch) = (self.config.data.seq_len, self.config.train.batch_size);
        let limit = match self.config.train.eval_tokens {
            0 => usize::MAX,
            tokens => (tokens / (seq_len * batch)).max(1),
        };
        Ok(eval_windows(&self.val, batch, seq_len)?.take(limit))
    }

    /// Mean cross entropy in nats over the held-out text.
    ///
    /// # Errors
    /// Ids outside the vocabulary.
    pub fn validate(&self) -> Result<f32, TrainError> {
        let (mut total, mut sequences) = (0.0, 0);
        for batch in self.validation_batches()? {
            let batch = batch?;
            let (inputs, targets) = tensors(&batch)?;
            let loss = self.model.evaluate(&inputs, &targets)?.to_scalar::<f32>()?;
            total += f64::from(loss) * batch.batch as f64;
            sequences += batch.batch;
        }
        Ok((total / sequences as f64) as f32)
    }

    /// Writes a checkpoint of the run as it is now and returns its directory.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn save(&self) -> Result<PathBuf, TrainError> {
        let path = checkpoint::path_of_step(&self.run_dir, self.state.step);
        checkpoint::save(&path, &self.model, &self.tokenizer, &self.optimizer, &self.state)?;
        Ok(path)
    }

    fn log(&mut self, line: serde_json::Value) -> Result<(), TrainError> {
        self.watch.log(&line)?;
        writeln!(self.metrics, "{line}").map_err(write_error(&self.run_dir.join("metrics.jsonl")))
    }

    /// Drops the metrics of steps that a resumed run is going to make again.
    fn forget_metrics_after(&mut self, step: usize) -> Result<(), TrainError> {
        let path = self.run_dir.join("metrics.jsonl");
        let read = |source| TrainError::Read { path: path.clone(), source };
        let mut kept = Vec::new();
        for line in BufReader::new(File::open(&path).map_err(read)?).lines() {
            let line = line.map_err(read)?;
            // A line that a killed run did not finish is dropped as well.
            let at = serde_json::from_str::<serde_json::Value>(&line).ok();
            let at = at.and_then(|line| line.get("step")?.as_u64());
            if at.is_some_and(|at| at <= step as u64) {
                kept.extend_from_slice(line.as_bytes());
                kept.push(b'\n');
            }
        }
        AtomicFile::replace(&path, &kept)?;
        self.metrics = OpenOptions::new().append(true).open(&path).map_err(write_error(&path))?;
        Ok(())
    }
}

/// A dataset, checked to hold at least one window for each purpose.
struct Parts {
    batches: Batches,
    val: Shard,
    tokenizer: Tokenizer,
}

impl Parts {
    fn new(config: &RunConfig, data: Dataset) -> Result<Self, TrainError> {
        let Dataset { tokenizer, train, val } = data;
        let seq_len = config.data.seq_len;
        let batches = Batches::new(train, config.train.batch_size, seq_len, config.seed)?;
        // A held-out text that is too short is said now rather than at the first validation.
        drop(eval_windows(&val, config.train.batch_size, seq_len)?);
        Ok(Self { batches, val, tokenizer })
    }
}

/// Why a new run cannot begin where another one is, and what to do about it.
fn in_the_way(run_dir: &Path) -> TrainError {
    let message = match checkpoint::latest(run_dir) {
        Some(_) => "holds a run already: resume it or choose another directory",
        None => "holds a run that ended before its first checkpoint: delete it or choose another",
    };
    TrainError::RunDir { path: run_dir.to_owned(), message: message.to_owned() }
}

/// Where the model of a checkpoint differs from the run's, as keys of `config.json`.
fn differences(expected: &ModelConfig, found: &ModelConfig) -> String {
    let (expected, found) = (expected.to_hf_json("float32"), found.to_hf_json("float32"));
    let keys = [&expected, &found].into_iter().filter_map(|json| json.as_object());
    let keys: BTreeSet<&String> = keys.flat_map(|map| map.keys()).collect();
    let show = |value: Option<&serde_json::Value>| value.map_or("none".into(), |v| v.to_string());
    let differing = keys.into_iter().filter(|key| expected.get(key) != found.get(key)).map(|key| {
        format!("`{key}`: expected {}, found {}", show(expected.get(key)), show(found.get(key)))
    });
    format!("not this run's model: {}", differing.collect::<Vec<_>>().join("; "))
}

/// The model of a run: the configured network over the tokenizer's vocabulary.
fn model_config(config: &RunConfig, tokenizer: &Tokenizer) -> Result<ModelConfig, TrainError> {
    config.model_config(tokenizer.vocab_size(), tokenizer.bos_id(), tokenizer.eos_id())
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

fn write_error(path: &Path) -> impl FnOnce(std::io::Error) -> TrainError {
    let path = path.to_owned();
    move |source| TrainError::Write { path, source }
}

/// Refuses to go on with a run on other data or with settings that change what its steps do.
fn check_same_run(config: &RunConfig, data: &Dataset, run_dir: &Path) -> Result<(), TrainError> {
    let refuse = |message| Err(TrainError::RunDir { path: run_dir.to_owned(), message });
    let path = run_dir.join("config.toml");
    let changed = RunConfig::load(&path, &[])?.changed_keys(config);
    if !changed.is_empty() {
        let keys = changed.join(", ");
        return refuse(format!("cannot be resumed with another {keys}: that would be another run"));
    }
    let path = run_dir.join("run.json");
    let text =
        std::fs::read(&path).map_err(|e| TrainError::Read { path: path.clone(), source: e })?;
    let about: serde_json::Value = serde_json::from_slice(&text)
        .map_err(|e| TrainError::Checkpoint { path, message: e.to_string() })?;
    let hash = data_hash(data)?;
    if about["data_hash"] != hash.as_str() {
        let expected = &about["data_hash"];
        return refuse(format!("expected the data it began with, {expected}, found {hash}"));
    }
    Ok(())
}

/// Identifies what a run was trained on: the tokens of both shards and their tokenizer.
fn data_hash(data: &Dataset) -> Result<String, TrainError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&data.tokenizer.hash());
    for shard in [&data.train, &data.val] {
        let path = shard.path();
        let file = File::open(path).and_then(|file| hasher.update_reader(file).map(|_| ()));
        file.map_err(|source| TrainError::Read { path: path.to_owned(), source })?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}
