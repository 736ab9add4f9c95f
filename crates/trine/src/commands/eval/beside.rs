//! Scores of a checkpoint of a run, kept beside the metrics of the run, where `trine report` finds
//! them.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::results::{ModelResults, line};

/// The file in a run directory.
const FILE: &str = "evaluations.jsonl";

/// The run that a checkpoint belongs to, and the step after which it was written.
fn run_of(checkpoint: &Path) -> Option<(PathBuf, u64)> {
    let checkpoint = checkpoint.canonicalize().ok()?;
    let step = checkpoint.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?;
    let run = checkpoint.parent().filter(|dir| dir.ends_with("checkpoints"))?.parent()?;
    run.join("metrics.jsonl").exists().then(|| (run.to_owned(), step))
}

/// Adds a line for each task to the run of a checkpoint; nothing where it is of none.
pub(super) fn keep(checkpoint: &Path, results: &ModelResults) -> anyhow::Result<()> {
    let Some((run, step)) = run_of(checkpoint) else { return Ok(()) };
    let path = run.join(FILE);
    let scored = results.tasks.iter().filter(|task| task.summary.scored > 0);
    let lines: String = scored.map(|task| format!("{}\n", line(task, step))).collect();
    // In one piece, so that two evaluations do not write into each other.
    let file = OpenOptions::new().append(true).create(true).open(&path);
    let written = file.and_then(|mut file| file.write_all(lines.as_bytes()));
    written.with_context(|| format!("cannot write {}", path.display()))
}
