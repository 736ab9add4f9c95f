//! The files of a run directory other than checkpoints: metrics, `run.json`, the lock.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use trine_data::Mixture;
use trine_format::AtomicFile;

use crate::base::Base;
use crate::{Bitnet, RunConfig, TrainError, checkpoint, machine};

/// `metrics.jsonl`: one JSON object a step, validation or event, each with its `step`.
pub(crate) struct Metrics {
    path: PathBuf,
    /// None where another process writes it.
    file: Option<File>,
}

impl Metrics {
    /// Opens the metrics of a run, which may not have any yet.
    pub(crate) fn open(run_dir: &Path) -> Result<Self, TrainError> {
        let path = run_dir.join("metrics.jsonl");
        let file = Some(append(&path)?);
        Ok(Self { path, file })
    }

    /// Of a process that writes none.
    pub(crate) fn of_another(run_dir: &Path) -> Self {
        Self { path: run_dir.join("metrics.jsonl"), file: None }
    }

    /// Adds a line.
    pub(crate) fn log(&mut self, line: &Value) -> Result<(), TrainError> {
        let Some(file) = &mut self.file else { return Ok(()) };
        // One write, so that a kill leaves no half line but where the system does.
        file.write_all(format!("{line}\n").as_bytes()).map_err(write_error(&self.path))
    }

    /// Drops the lines of steps after `step`, which are going to be made again, and what `drop`
    /// says. A line that a killed run did not finish is dropped as well.
    pub(crate) fn forget(
        &mut self,
        step: usize,
        drop: impl Fn(&Value) -> bool,
    ) -> Result<(), TrainError> {
        if self.file.is_none() {
            return Ok(());
        }
        let read = |source| TrainError::Read { path: self.path.clone(), source };
        let mut kept = Vec::new();
        for line in BufReader::new(File::open(&self.path).map_err(read)?).split(b'\n') {
            let line = line.map_err(read)?;
            let Ok(value) = serde_json::from_slice::<Value>(&line) else { continue };
            let at = value.get("step").and_then(Value::as_u64);
            if at.is_some_and(|at| at <= step as u64) && !drop(&value) {
                kept.extend_from_slice(&line);
                kept.push(b'\n');
            }
        }
        AtomicFile::replace(&self.path, &kept)?;
        self.file = Some(append(&self.path)?);
        Ok(())
    }

    /// The last step that was logged.
    pub(crate) fn last_step(run_dir: &Path) -> Option<u64> {
        let text = std::fs::read(run_dir.join("metrics.jsonl")).ok()?;
        let lines = text.split(|b| *b == b'\n');
        let step = |line| serde_json::from_slice::<Value>(line).ok()?.get("step")?.as_u64();
        lines.filter_map(step).max()
    }
}

fn append(path: &Path) -> Result<File, TrainError> {
    OpenOptions::new().create(true).append(true).open(path).map_err(write_error(path))
}

/// Keeps a second process from training in the directory, until it is dropped or this process ends
/// in whatever way. A file system without locks goes without.
pub(crate) fn lock(run_dir: &Path) -> Result<File, TrainError> {
    let path = run_dir.join(".lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(write_error(&path))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            let message = "another process is training in this directory".to_owned();
            Err(TrainError::RunDir { path: run_dir.to_owned(), message })
        }
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

/// Writes what a run is made from and with.
pub(crate) fn write_about(
    run_dir: &Path,
    data: &Mixture,
    model: &Bitnet,
    base: Option<&Base>,
) -> Result<(), TrainError> {
    let mut about = json!({
        "train_tokens": data.train_tokens(),
        "val_tokens": data.val_tokens(),
        "data_hash": data_hash(data)?,
        "parameters": model.trained().count(),
    });
    if let Some(base) = base {
        about["base"] = json!({ "path": base.path(), "hash": base.hash() });
    }
    if let (Value::Object(about), Value::Object(machine)) = (&mut about, machine::describe()) {
        about.extend(machine);
    }
    replace(run_dir, &about)
}

/// Adds to `run.json` that the run was taken up at a step, and with what.
pub(crate) fn add_resumption(run_dir: &Path, step: usize) -> Result<(), TrainError> {
    let mut about = read(run_dir)?;
    let mut entry = json!({ "step": step });
    if let (Value::Object(entry), Value::Object(machine)) = (&mut entry, machine::describe()) {
        entry.extend(machine);
    }
    match &mut about["resumed"] {
        Value::Array(resumed) => resumed.push(entry),
        other => *other = json!([entry]),
    }
    replace(run_dir, &about)
}

fn replace(run_dir: &Path, about: &Value) -> Result<(), TrainError> {
    let text = serde_json::to_vec_pretty(about).expect("plain data serializes");
    Ok(AtomicFile::replace(&run_dir.join("run.json"), &text)?)
}

/// `run.json`, which is an object.
fn read(run_dir: &Path) -> Result<Value, TrainError> {
    let path = run_dir.join("run.json");
    let text =
        std::fs::read(&path).map_err(|source| TrainError::Read { path: path.clone(), source })?;
    match serde_json::from_slice(&text) {
        Ok(about @ Value::Object(_)) => Ok(about),
        Ok(_) => Err(TrainError::RunDir { path, message: "expected a JSON object".to_owned() }),
        Err(e) => Err(TrainError::RunDir { path, message: e.to_string() }),
    }
}

/// Why a new run cannot begin where another one is, and what to do about it.
pub(crate) fn in_the_way(run_dir: &Path) -> TrainError {
    let message = match checkpoint::latest(run_dir) {
        Some(_) => "holds a run already: resume it or choose another directory",
        None => {
            "holds a run that ended before its first checkpoint: resume it, delete it, or choose \
             another directory"
        }
    };
    TrainError::RunDir { path: run_dir.to_owned(), message: message.to_owned() }
}

/// Whether a run without a checkpoint may begin again: it must not have come past its first.
pub(crate) fn check_never_saved(config: &RunConfig, run_dir: &Path) -> Result<(), TrainError> {
    let refuse = |message: &str| {
        Err(TrainError::RunDir { path: run_dir.to_owned(), message: message.to_owned() })
    };
    if !run_dir.join("config.toml").exists() {
        return refuse("no checkpoint to resume from");
    }
    // A kill while the first one was written leaves the steps up to it.
    let first = config.train.checkpoint_every as u64;
    match Metrics::last_step(run_dir) {
        Some(step) if step > first => {
            refuse("no checkpoint to resume from, though the run had made some: they were deleted")
        }
        _ => Ok(()),
    }
}

/// Refuses to go on with a run on other data or with settings that change what its steps do.
pub(crate) fn check_same_run(
    config: &RunConfig,
    data: &Mixture,
    base: Option<&Base>,
    run_dir: &Path,
) -> Result<(), TrainError> {
    let refuse = |message| Err(TrainError::RunDir { path: run_dir.to_owned(), message });
    let path = run_dir.join("config.toml");
    let changed = RunConfig::load(&path, &[])?.changed_keys(config);
    if !changed.is_empty() {
        let keys = changed.join(", ");
        return refuse(format!("cannot be resumed with another {keys}: that would be another run"));
    }
    let (about, hash) = (read(run_dir)?, data_hash(data)?);
    if about["data_hash"] != hash.as_str() {
        let expected = &about["data_hash"];
        return refuse(format!("expected the data it began with, {expected}, found {hash}"));
    }
    if let Some(base) = base
        && about["base"]["hash"] != base.hash()
    {
        let (expected, found) = (&about["base"]["hash"], base.hash());
        return refuse(format!("expected the model it began with, {expected}, found {found}"));
    }
    Ok(())
}

/// Identifies what a run was trained on: the tokens of all shards and their tokenizer.
fn data_hash(data: &Mixture) -> Result<String, TrainError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&data.tokenizer.hash());
    for shard in data.sources.iter().flat_map(|source| [&source.train, &source.val]) {
        let path = shard.path();
        let file = File::open(path).and_then(|file| hasher.update_reader(file).map(|_| ()));
        file.map_err(|source| TrainError::Read { path: path.to_owned(), source })?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

pub(crate) fn write_error(path: &Path) -> impl FnOnce(std::io::Error) -> TrainError {
    let path = path.to_owned();
    move |source| TrainError::Write { path, source }
}
