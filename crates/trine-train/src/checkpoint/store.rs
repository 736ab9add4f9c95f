//! The checkpoints of a run directory: which is the latest, which the best, which are deleted.

use std::fs;
use std::path::{Path, PathBuf};

use super::{TrainerState, read_state, verify};
use crate::TrainError;
use crate::config::TrainConfig;

/// The latest checkpoint that is whole.
#[derive(Debug)]
pub struct Found {
    /// Its directory.
    pub path: PathBuf,
    /// What is wrong with later ones.
    pub damaged: Vec<TrainError>,
}

/// The checkpoint directory of a step.
pub fn path_of_step(run_dir: &Path, step: usize) -> PathBuf {
    directory(run_dir).join(format!("step-{step:06}"))
}

/// The checkpoint of the most steps in a run directory, whole or not.
pub fn latest(run_dir: &Path) -> Option<PathBuf> {
    all(run_dir).pop().map(|(_, path)| path)
}

/// The checkpoint of the most steps whose files are what was written.
///
/// # Errors
/// When there are checkpoints and all are damaged: what is wrong with the latest.
pub fn latest_whole(run_dir: &Path) -> Result<Option<Found>, TrainError> {
    let mut damaged = Vec::new();
    for (_, path) in all(run_dir).into_iter().rev() {
        match verify(&path) {
            Ok(()) => return Ok(Some(Found { path, damaged })),
            Err(e) => damaged.push(e),
        }
    }
    damaged.into_iter().next().map_or(Ok(None), Err)
}

/// The checkpoint of the lowest validation loss, as far as the latest one knows.
pub fn best(run_dir: &Path) -> Option<PathBuf> {
    let (step, _) = read_state(&latest(run_dir)?).ok()?.best?;
    Some(path_of_step(run_dir, step)).filter(|path| path.is_dir())
}

/// Deletes the checkpoints that are not to be kept: not among the last `train.keep_last`, not the
/// best, not a milestone. Those of later steps than the run's, which a damaged one leaves behind,
/// stay until the run gets there.
///
/// # Errors
/// When the disk refuses.
pub fn prune(run_dir: &Path, state: &TrainerState, train: &TrainConfig) -> Result<(), TrainError> {
    if train.keep_last == 0 {
        return Ok(());
    }
    let past = all(run_dir).into_iter().filter(|(step, _)| *step <= state.step);
    let past: Vec<_> = past.collect();
    let old = past.len().saturating_sub(train.keep_last);
    for (step, path) in &past[..old] {
        let best = train.keep_best && state.best.is_some_and(|(best, _)| best == *step);
        let milestone = train.milestone_every > 0 && step % train.milestone_every == 0;
        if !best && !milestone {
            remove(path)?;
        }
    }
    Ok(())
}

/// Removes what a killed process left half written or half deleted, and puts back a checkpoint that
/// it had moved aside to replace it. Nobody else may be working in the directory.
///
/// # Errors
/// When the disk refuses.
pub fn clean(run_dir: &Path) -> Result<(), TrainError> {
    for dir in [run_dir.to_owned(), directory(run_dir)] {
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        for path in entries.filter_map(|entry| entry.ok().map(|e| e.path())) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !name.starts_with(".trine-") || !name.ends_with(".tmp") {
                continue;
            }
            // `AtomicDir::commit_replacing` moves what it replaces to this name.
            let aside = path.join("old");
            if let Ok(state) = read_state(&aside) {
                let place = path_of_step(run_dir, state.step);
                if !place.exists() {
                    fs::rename(&aside, &place).map_err(refused(&place))?;
                }
            }
            let removed = match path.is_dir() {
                true => fs::remove_dir_all(&path),
                false => fs::remove_file(&path),
            };
            removed.map_err(refused(&path))?;
        }
    }
    Ok(())
}

/// Deletes a checkpoint. It loses its name first, so that a process killed meanwhile leaves no half
/// of one.
fn remove(path: &Path) -> Result<(), TrainError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!(".trine-{name}.tmp"));
    fs::rename(path, &aside).map_err(refused(path))?;
    fs::remove_dir_all(&aside).map_err(refused(path))
}

/// All checkpoints of a run by step, in ascending order.
fn all(run_dir: &Path) -> Vec<(usize, PathBuf)> {
    let step = |path: &Path| -> Option<usize> {
        path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
    };
    let Ok(entries) = fs::read_dir(directory(run_dir)) else { return Vec::new() };
    let paths = entries.filter_map(|entry| entry.ok().map(|e| e.path()));
    let mut all: Vec<_> = paths.filter_map(|path| Some((step(&path)?, path))).collect();
    all.sort();
    all
}

fn directory(run_dir: &Path) -> PathBuf {
    run_dir.join("checkpoints")
}

fn refused(path: &Path) -> impl FnOnce(std::io::Error) -> TrainError {
    let path = path.to_owned();
    move |source| TrainError::Write { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run directory with empty checkpoints of these steps.
    fn run(steps: &[usize]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for step in steps {
            fs::create_dir_all(path_of_step(dir.path(), *step)).unwrap();
        }
        dir
    }

    fn steps(dir: &Path) -> Vec<usize> {
        all(dir).into_iter().map(|(step, _)| step).collect()
    }

    #[test]
    fn the_last_the_best_and_milestones_are_kept() {
        let dir = run(&[10, 20, 30, 40, 50, 60, 90]);
        let mut train = TrainConfig { keep_last: 2, milestone_every: 20, ..Default::default() };
        let state = TrainerState { step: 60, best: Some((30, 1.0)), ..Default::default() };
        prune(dir.path(), &state, &train).unwrap();
        // 90 is of a later step than the run's.
        assert_eq!(steps(dir.path()), [20, 30, 40, 50, 60, 90]);
        (train.milestone_every, train.keep_best) = (0, false);
        prune(dir.path(), &state, &train).unwrap();
        assert_eq!(steps(dir.path()), [50, 60, 90]);
        train.keep_last = 0;
        prune(dir.path(), &state, &train).unwrap();
        assert_eq!(steps(dir.path()), [50, 60, 90]);
        assert_eq!(fs::read_dir(directory(dir.path())).unwrap().count(), 3);
    }

    #[test]
    fn what_a_killed_save_left_is_removed_and_what_it_moved_aside_is_put_back() {
        let dir = run(&[10]);
        let checkpoints = directory(dir.path());
        fs::create_dir(checkpoints.join(".trine-abc.tmp")).unwrap();
        fs::write(checkpoints.join(".trine-abc.tmp/config.json"), "{").unwrap();
        fs::write(dir.path().join(".trine-def.tmp"), "").unwrap();
        let aside = checkpoints.join(".trine-ghi.tmp/old");
        fs::create_dir_all(&aside).unwrap();
        let state = TrainerState { step: 20, ..Default::default() };
        fs::write(aside.join("trainer_state.json"), serde_json::to_vec(&state).unwrap()).unwrap();
        clean(dir.path()).unwrap();
        assert_eq!(steps(dir.path()), [10, 20]);
        assert_eq!(read_state(&path_of_step(dir.path(), 20)).unwrap(), state);
        assert_eq!(fs::read_dir(checkpoints).unwrap().count(), 2);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
