//! What tests of whole runs share.

use std::path::Path;

use trine_data::Dataset;
use trine_tokenizer::Tokenizer;
use trine_train::diagnostics::Diagnostics;
use trine_train::samples::Sample;
use trine_train::trainer::{Observer, StepReport};

/// Remembers what a run says, and may stop it.
#[derive(Default)]
#[allow(dead_code, reason = "no test looks at everything")]
pub(crate) struct Watch {
    /// Stop when so many steps have been made since the run was begun or taken up.
    pub(crate) stop_after: Option<usize>,
    /// Of every step.
    pub(crate) losses: Vec<f32>,
    /// Losses.
    pub(crate) validations: Vec<f32>,
    pub(crate) warnings: Vec<String>,
    pub(crate) collected: Vec<(usize, Diagnostics)>,
    pub(crate) samples: Vec<(usize, Vec<Sample>)>,
}

impl Observer for Watch {
    fn on_step(&mut self, report: &StepReport) {
        self.losses.push(report.loss);
    }
    fn on_validation(&mut self, _step: usize, loss: f32) {
        self.validations.push(loss);
    }
    fn on_warning(&mut self, message: &str) {
        self.warnings.push(message.to_owned());
    }
    fn on_diagnostics(&mut self, step: usize, found: &Diagnostics) {
        self.collected.push((step, found.clone()));
    }
    fn on_samples(&mut self, step: usize, samples: &[Sample]) {
        self.samples.push((step, samples.to_vec()));
    }
    fn should_stop(&mut self) -> bool {
        self.stop_after.is_some_and(|steps| self.losses.len() >= steps)
    }
}

/// A small text of which a model learns something in a few steps.
#[allow(dead_code, reason = "some tests have texts of their own")]
pub(crate) fn dataset(dir: &Path) -> Dataset {
    let text = "the cat sat on the mat and the dog ate the hat. ".repeat(60);
    let tokenizer = Tokenizer::characters(&text).unwrap();
    std::fs::create_dir_all(dir).unwrap();
    Dataset::from_text(dir, &tokenizer, &text, 0.1).unwrap()
}
