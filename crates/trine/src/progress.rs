//! Watching long work, tokenizing, training, downloads and conversions: bars where a person looks, plain lines where not.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{FormattedDuration, ProgressBar, ProgressStyle};
use trine_export::{Progress, Stage};
use trine_hub::Observer as DownloadObserver;
use trine_train::samples::Sample;
use trine_train::trainer::{Action, Anomaly, Observer, StepReport};

use crate::output::{self, note};

/// Time between two log lines where nobody watches.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Longest time between two log lines of a training run.
const LOG_EVERY_AT_MOST: Duration = Duration::from_secs(300);

/// Characters of a sample that are shown.
const SAMPLE_CHARS: usize = 100;

/// A download of fewer bytes is over before a line about it is read.
const WORTH_A_LINE: u64 = 1 << 20;

/// Set by ctrl-C, and by SIGUSR1, which launchers and schedulers pass on; long work looks at it. A second
/// ctrl-C ends the process at once. Where several processes are told, one `speaks`.
pub(crate) fn interrupt_flag(speaks: bool) -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    #[cfg(unix)]
    signal_hook::flag::register(signal_hook::consts::SIGUSR1, flag.clone())?;
    let seen = flag.clone();
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        if speaks {
            note!("interrupted: saving a checkpoint after this step (again to stop at once)");
        }
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
    loss: f64,
    speed: f64,
    /// When the display began, and after which step.
    begin: (Instant, usize),
    last_line: Option<Instant>,
}

impl TrainingProgress {
    /// A display for a run that has made `done` of `steps` updates.
    pub(crate) fn new(done: usize, steps: usize, interrupted: Arc<AtomicBool>) -> Self {
        let watched = std::io::stderr().is_terminal();
        let bar = if watched { ProgressBar::new(steps as u64) } else { ProgressBar::hidden() };
        let style = "{bar:24} {pos}/{len}  {msg}  {eta} left";
        bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
        bar.set_position(done as u64);
        bar.reset_eta();
        let (loss, speed, begin) = (f64::NAN, f64::NAN, (Instant::now(), done));
        Self { bar, watched, interrupted, loss, speed, begin, last_line: None }
    }

    /// Whether a log line is due: often in the beginning, when most is wrong, seldom in long runs.
    fn line_is_due(&self) -> bool {
        let every = (self.begin.0.elapsed() / 20).clamp(LOG_EVERY, LOG_EVERY_AT_MOST);
        self.last_line.is_none_or(|at| at.elapsed() >= every)
    }

    /// The time that the rest of the run takes if it goes on as it went.
    fn left(&self, report: &StepReport) -> FormattedDuration {
        let (begin, done) = self.begin;
        let made = report.step.saturating_sub(done).max(1) as f64;
        let rest = report.steps.saturating_sub(report.step) as f64;
        FormattedDuration(Duration::from_secs_f64(begin.elapsed().as_secs_f64() * rest / made))
    }

    fn line(&self, text: &str) {
        self.bar.suspend(|| note!("{text}"));
    }
}

impl Observer for TrainingProgress {
    fn on_step(&mut self, report: &StepReport) {
        let smooth = |old: f64, new: f64| if old.is_nan() { new } else { 0.95 * old + 0.05 * new };
        self.loss = smooth(self.loss, f64::from(report.loss));
        self.speed = smooth(self.speed, report.tokens_per_second);
        let rate = report.learning_rate;
        let message = format!("loss {:.4}  lr {rate:.2e}  {:.0} tok/s", self.loss, self.speed);
        if self.watched {
            self.bar.set_position(report.step as u64);
            self.bar.set_message(message);
        } else if self.line_is_due() || report.step == report.steps {
            self.last_line = Some(Instant::now());
            let left = self.left(report);
            note!("step {}/{}  {message}  {left} left", report.step, report.steps);
        }
    }

    fn on_samples(&mut self, step: usize, samples: &[Sample]) {
        for sample in samples {
            let shown = format!("{}|{}", sample.prompt, sample.text).replace('\n', " ");
            let shown: String = shown.chars().take(SAMPLE_CHARS).collect();
            self.line(&format!("step {step}  {}", output::printable(&shown)));
        }
    }

    fn on_anomaly(&mut self, anomaly: &Anomaly) {
        let done = match anomaly.action {
            Action::Skipped => "batch skipped".to_owned(),
            Action::Rewound { to } => format!("back to step {to}, around these batches"),
        };
        self.line(&format!("step {}  {}; {done}", anomaly.step, anomaly.what));
    }

    fn on_warning(&mut self, message: &str) {
        self.line(&format!("warning: {message}"));
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

/// A training run in a process beside the one that shows it.
pub(crate) struct Beside {
    interrupted: Arc<AtomicBool>,
}

impl Beside {
    pub(crate) fn new(interrupted: Arc<AtomicBool>) -> Self {
        Self { interrupted }
    }
}

impl Observer for Beside {
    fn should_stop(&mut self) -> bool {
        self.interrupted.load(Ordering::SeqCst)
    }
}

/// Shows a download on stderr.
pub(crate) struct DownloadProgress {
    /// Of the file that is downloaded now; hidden where nobody watches.
    bar: ProgressBar,
    watched: bool,
    file: String,
    size: Option<u64>,
    last_line: Option<Instant>,
}

impl DownloadProgress {
    /// A display that shows nothing until a file begins.
    pub(crate) fn new() -> Self {
        Self {
            bar: ProgressBar::hidden(),
            watched: std::io::stderr().is_terminal(),
            file: String::new(),
            size: None,
            last_line: None,
        }
    }
}

impl DownloadObserver for DownloadProgress {
    fn begin(&mut self, file: &str, size: Option<u64>, present: u64) {
        (self.file, self.size, self.last_line) = (file.to_owned(), size, None);
        if self.watched {
            self.bar = ProgressBar::new(size.unwrap_or_default());
            let style = "{msg} {bar:30} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left";
            self.bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
            self.bar.set_message(self.file.clone());
            self.bar.set_position(present);
            self.bar.reset_eta();
        } else if size.is_none_or(|size| size >= WORTH_A_LINE) {
            let size = size.map_or(String::new(), |size| format!(", {}", output::bytes(size)));
            let present = match present {
                0 => String::new(),
                n => format!(", of which {} are here", output::bytes(n)),
            };
            note!("downloading {file}{size}{present}");
            self.last_line = Some(Instant::now());
        }
    }

    fn position(&mut self, bytes: u64) {
        self.bar.set_position(bytes);
        if self.last_line.is_some_and(|at| at.elapsed() >= LOG_EVERY) {
            self.last_line = Some(Instant::now());
            let of = self.size.map_or(String::new(), |size| format!(" of {}", output::bytes(size)));
            note!("{}: {}{of}", self.file, output::bytes(bytes));
        }
    }

    fn end(&mut self) {
        self.bar.finish_and_clear();
    }

    fn note(&mut self, text: &str) {
        self.bar.suspend(|| note!("{text}"));
    }
}

impl Drop for DownloadProgress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Shows a conversion on stderr, where it takes long enough to be watched.
pub(crate) struct ConversionProgress {
    bar: ProgressBar,
    /// Whether a person watches; else lines are printed.
    watched: bool,
    last_line: Mutex<Instant>,
}

impl ConversionProgress {
    pub(crate) fn new() -> Self {
        let watched = std::io::stderr().is_terminal();
        let bar = if watched { ProgressBar::new(1) } else { ProgressBar::hidden() };
        let style = "{bar:30} {percent:>3} %  {msg}  {eta} left";
        bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
        Self { bar, watched, last_line: Mutex::new(Instant::now()) }
    }

    /// Called by the threads that do the work, so what is done may come out of order.
    pub(crate) fn on_progress(&self, Progress { stage, done, total }: Progress) {
        let (name, before) = match stage {
            Stage::Writing => ("writing", 0),
            Stage::Verifying => ("verifying", total),
        };
        if self.watched {
            // The whole way is twice the model: it is written, then read back.
            self.bar.set_length(2 * total);
            self.bar.set_message(name);
            self.bar.set_position((before + done).max(self.bar.position()));
            return;
        }
        let mut last_line = self.last_line.lock().unwrap_or_else(|e| e.into_inner());
        if last_line.elapsed() >= LOG_EVERY {
            *last_line = Instant::now();
            note!("{name}: {} of {} parameters", output::count(done), output::count(total));
        }
    }
}

impl Drop for ConversionProgress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Shows the tokenizing of a corpus on stderr.
pub(crate) struct TokenizingProgress {
    bar: ProgressBar,
    /// Whether a person watches; else lines are printed.
    watched: bool,
    last_line: Instant,
    /// What the bar counts now.
    work: &'static str,
}

impl TokenizingProgress {
    /// A display that shows nothing until there is something to count.
    pub(crate) fn new() -> Self {
        let watched = std::io::stderr().is_terminal();
        Self { bar: ProgressBar::hidden(), watched, last_line: Instant::now(), work: "" }
    }

    /// So many bytes of text were read to make a tokenizer; how many there are is not known yet.
    pub(crate) fn on_reading(&mut self, bytes: u64) {
        self.show("reading", "{msg}  {bytes}  {bytes_per_sec}", bytes, None);
    }

    /// So many bytes of text of all are tokens.
    pub(crate) fn on_text(&mut self, bytes: u64, total: u64) {
        let style = "{msg}  {bar:30} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left";
        self.show("tokenizing", style, bytes, Some(total));
    }

    fn show(&mut self, work: &'static str, style: &str, bytes: u64, total: Option<u64>) {
        if self.watched {
            if self.work != work {
                self.work = work;
                self.bar.finish_and_clear();
                self.bar = total.map_or_else(ProgressBar::no_length, ProgressBar::new);
                self.bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
                self.bar.set_message(work);
            }
            self.bar.set_position(bytes);
        } else if self.last_line.elapsed() >= LOG_EVERY {
            self.last_line = Instant::now();
            let of = total.map_or(String::new(), |total| format!(" of {}", output::bytes(total)));
            note!("{work}: {}{of}", output::bytes(bytes));
        }
    }
}

impl Drop for TokenizingProgress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Shows the steps of a measurement on stderr.
pub(crate) struct BenchProgress {
    bar: ProgressBar,
    /// Whether a person watches; else lines are printed.
    watched: bool,
}

impl BenchProgress {
    /// A display for so many steps.
    pub(crate) fn new(steps: usize) -> Self {
        let watched = std::io::stderr().is_terminal();
        let bar = if watched { ProgressBar::new(steps as u64) } else { ProgressBar::hidden() };
        let style = "{bar:30} {pos}/{len}  {msg}";
        bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
        Self { bar, watched }
    }

    /// There are so many steps.
    pub(crate) fn expect(&self, steps: usize) {
        self.bar.set_length(steps as u64);
    }

    /// Said when a step begins.
    pub(crate) fn step(&self, name: &str) {
        self.bar.inc(1);
        self.bar.set_message(name.to_owned());
        // A bar that is drawn by a thread of its own would take part in what is measured.
        self.bar.tick();
        if !self.watched {
            note!("{name}");
        }
    }
}

impl Drop for BenchProgress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Shows the items of an evaluation on stderr.
pub(crate) struct EvalProgress {
    bar: ProgressBar,
    /// Whether a person watches; else lines are printed.
    watched: bool,
    name: String,
    /// Items, windows or tokens: what is counted.
    unit: &'static str,
    total: u64,
    last_line: Instant,
}

impl EvalProgress {
    /// A display for the task or text `name`, of so many units.
    pub(crate) fn new(name: &str, total: usize, unit: &'static str) -> Self {
        let (watched, total) = (std::io::stderr().is_terminal(), total as u64);
        let bar = if watched { ProgressBar::new(total) } else { ProgressBar::hidden() };
        let style = "{msg}  {bar:30} {pos}/{len}  {per_sec}  {eta} left";
        bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
        bar.set_message(name.to_owned());
        Self { bar, watched, name: name.to_owned(), unit, total, last_line: Instant::now() }
    }

    /// So many are known; the first time these are from before.
    pub(crate) fn on_known(&mut self, known: usize) {
        let first = self.bar.position() == 0;
        self.bar.set_position(known as u64);
        if first {
            self.bar.reset_eta();
        }
        if !self.watched && self.last_line.elapsed() >= LOG_EVERY {
            self.last_line = Instant::now();
            let (known, total) = (output::count(known as u64), output::count(self.total));
            note!("{}: {known} of {total} {}", self.name, self.unit);
        }
    }
}

impl Drop for EvalProgress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
