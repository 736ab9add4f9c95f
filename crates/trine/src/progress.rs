//! Watching long work: bars where a person looks, plain lines where not.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use trine_train::trainer::{Observer, StepReport};

use crate::output::note;

/// Time between two log lines where nobody watches.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Set by ctrl-C; long work looks at it. A second ctrl-C ends the process at once.
pub(crate) fn interrupt_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let seen = flag.clone();
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        note!("interrupted: saving a checkpoint after this step (again to stop at once)");
    })?;
    Ok(flag)
}

/// Shows a training run on stderr.
pub(crate) struct TrainingProgress {
    bar: ProgressBar,
    /// Whether a person watches; else lines are printed.
    watched: bool,
    interrupted: Arc<AtomicBool>,
    /// Smoothed loss and speed, so that the display does not flicker.
    loss: f32,
    speed: f64,
    last_line: Option<Instant>,
}

impl TrainingProgress {
    /// A display for a run that has made `done` of `steps` updates.
    pub(crate) fn new(done: usize, steps: usize, interrupted: Arc<AtomicBool>) -> Self {
        let watched = std::io::stderr().is_terminal();
        let bar = if watched { ProgressBar::new(steps as u64) } else { ProgressBar::hidden() };
        let style = "{bar:30} {pos}/{len}  {msg}  {eta} left";
        bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
        bar.set_position(done as u64);
        bar.reset_eta();
        let (loss, speed) = (f32::NAN, f64::NAN);
        Self { bar, watched, interrupted, loss, speed, last_line: None }
    }

    fn line(&self, text: &str) {
        self.bar.suspend(|| note!("{text}"));
    }
}

impl Observer for TrainingProgress {
    fn on_step(&mut self, report: &StepReport) {
        let smooth = |old: f64, new: f64| if old.is_nan() { new } else { 0.95 * old + 0.05 * new };
        self.loss = smooth(f64::from(self.loss), f64::from(report.loss)) as f32;
        self.speed = smooth(self.speed, report.tokens_per_second);
        let message = format!("loss {:.4}  {:.0} tok/s", self.loss, self.speed);
        if self.watched {
            self.bar.set_position(report.step as u64);
            self.bar.set_message(message);
        } else if self.last_line.is_none_or(|at| at.elapsed() >= LOG_EVERY)
            || report.step == report.steps
        {
            self.last_line = Some(Instant::now());
            let rate = report.learning_rate;
            note!("step {}/{}  {message}  lr {rate:.2e}", report.step, report.steps);
        }
    }

    fn on_validation(&mut self, step: usize, loss: f32) {
        self.line(&format!("step {step}  validation loss {loss:.4}"));
    }

    fn on_checkpoint(&mut self, path: &Path) {
        self.line(&format!("saved {}", path.display()));
    }

    fn should_stop(&mut self) -> bool {
        self.interrupted.load(Ordering::SeqCst)
    }
}

impl Drop for TrainingProgress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
