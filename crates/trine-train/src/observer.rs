//! Watching a run: what the loop tells whoever listens.

use std::path::{Path, PathBuf};

use crate::Bitnet;
use crate::checkpoint::TrainerState;
use crate::diagnostics::Diagnostics;
use crate::optimizer::Gradients;
use crate::samples::Sample;
use crate::stability::Anomaly;

/// What one update did.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Number of steps made, this one included.
    pub step: usize,
    /// Number of steps of the whole run.
    pub steps: usize,
    /// Mean cross entropy of the batch in nats, before the update.
    pub loss: f32,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Sequences of the batch.
    pub batch_size: usize,
    /// Tokens trained on since the run began.
    pub tokens: u64,
    /// Speed of this update.
    pub tokens_per_second: f64,
}

/// Whoever watches a run: a terminal, a test, a notebook.
pub trait Observer {
    /// An update is about to be made: the model as it is and the gradients, before clipping; none with
    /// `train.update_in_backward`, where they do not exist together.
    fn before_update(&mut self, _step: usize, _model: &Bitnet, _gradients: &Gradients) {}
    /// An update was made: the model as it is now. [`Self::on_step`] follows.
    fn after_update(&mut self, _step: usize, _model: &Bitnet) {}
    /// An update was made.
    fn on_step(&mut self, _report: &StepReport) {}
    /// A batch was left out, or the run went back.
    fn on_anomaly(&mut self, _anomaly: &Anomaly) {}
    /// A validation ended: mean cross entropy in nats over the held-out text.
    fn on_validation(&mut self, _step: usize, _loss: f32) {}
    /// Diagnostics were collected after an update.
    fn on_diagnostics(&mut self, _step: usize, _found: &Diagnostics) {}
    /// Texts were written from the prompts of the configuration.
    fn on_samples(&mut self, _step: usize, _samples: &[Sample]) {}
    /// A checkpoint was written.
    fn on_checkpoint(&mut self, _path: &Path) {}
    /// Something is wrong that does not stop the run.
    fn on_warning(&mut self, _message: &str) {}
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
