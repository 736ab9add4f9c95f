//! `[train]`: length of the run, batches, evaluation, checkpoints, what to do about spikes.

use serde::{Deserialize, Serialize};

use super::{DeviceConfig, require};
use crate::TrainError;
use crate::fused::Precision;

/// Length of the run, batches, evaluation, checkpoints, what to do about spikes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [train]")]
pub struct TrainConfig {
    /// What computes steps: `cpu`; `cuda` or `cuda:N`; `emulator`. Another one may go on with a run.
    pub device: DeviceConfig,
    /// Number of updates.
    pub steps: usize,
    /// Sequences of an update.
    pub batch_size: usize,
    /// Parts in which an update's sequences go through the model one after the other. More parts
    /// need less memory; the update is the same but for the order of float sums.
    pub accumulate: usize,
    /// In what gradients are multiplied: `f32`, `bf16`, `int8`, `int8-all`, `int8-f32`, or `auto` for
    /// `int8-all` or `int8-f32` where the model is ternary and the CPU has instructions for it. Forward
    /// products of ternary projections are exact in any case. All but `f32` and `int8-f32` round factors of
    /// attention and head to bfloats, on a CPU in training alone.
    pub precision: Precision,
    /// Keep only the input of every layer for the backward pass, and run the layer once more there:
    /// less memory, the same bits, a sixth more time.
    pub recompute_activations: bool,
    /// Update each layer as soon as its gradients are there, in the backward pass, so that those of one
    /// layer exist at a time (arXiv 2306.09782): a third of the memory less or more. Then a batch is one
    /// part, `optimizer.clip_grad_norm` is 0, and only a loss that leaps is a spike that can be skipped.
    pub update_in_backward: bool,
    /// Updates in which the batch grows evenly to `batch_size`; 0 begins with all of it.
    pub batch_warmup_steps: usize,
    /// Sequences of the first update where the batch grows.
    pub batch_start: usize,
    /// Updates between validations; the end is always validated.
    pub eval_every: usize,
    /// Most tokens of a validation, but at least one batch; 0 takes all of the held-out text.
    pub eval_tokens: usize,
    /// Updates between checkpoints; the end always has one.
    pub checkpoint_every: usize,
    /// Checkpoints that are kept, counted from the last; 0 keeps all.
    pub keep_last: usize,
    /// Save whenever a validation is better than all before it, and keep the best.
    pub keep_best: bool,
    /// Updates between checkpoints that are kept for good; 0 has none.
    pub milestone_every: usize,
    /// What happens when a loss or a gradient is not finite, or the loss leaps.
    pub on_spike: SpikePolicy,
    /// Losses before a step that its own is compared with; a shorter history judges nothing.
    pub spike_window: usize,
    /// Standard deviations above their mean from which a loss is a spike; 0 looks for none.
    pub spike_sigmas: f64,
    /// Most batches skipped in a row, or rewinds from one checkpoint, before the run stops.
    pub spike_limit: usize,
}

/// What happens when a loss or a gradient is not finite, or the loss leaps. Nothing is ever updated
/// with such a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SpikePolicy {
    /// The run ends with an error.
    Stop,
    /// The batch is left out and the run goes on.
    Skip,
    /// The run goes back to its last checkpoint and leaves out the batches from there to the spike,
    /// as PaLM did (arXiv 2204.02311, section 5.1).
    Rewind,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            device: DeviceConfig::Cpu,
            steps: 1000,
            batch_size: 16,
            accumulate: 1,
            precision: Precision::Auto,
            recompute_activations: false,
            update_in_backward: false,
            batch_warmup_steps: 0,
            batch_start: 1,
            eval_every: 250,
            eval_tokens: 0,
            checkpoint_every: 500,
            keep_last: 3,
            keep_best: true,
            milestone_every: 0,
            on_spike: SpikePolicy::Skip,
            // The values of OLMo-core's `SkipStepOptimizer`.
            spike_window: 128,
            spike_sigmas: 6.0,
            spike_limit: 10,
        }
    }
}

impl TrainConfig {
    pub(super) fn check(&self) -> Result<(), TrainError> {
        for (key, value) in [
            ("train.steps", self.steps),
            ("train.batch_size", self.batch_size),
            ("train.accumulate", self.accumulate),
            ("train.batch_start", self.batch_start),
            ("train.eval_every", self.eval_every),
            ("train.checkpoint_every", self.checkpoint_every),
            ("train.spike_limit", self.spike_limit),
        ] {
            require(value > 0, key, "at least 1", value)?;
        }
        let (batch, warms_up) = (self.batch_size, self.batch_warmup_steps > 0);
        let most = format!("at most train.batch_size {batch}");
        require(self.accumulate <= batch, "train.accumulate", &most, self.accumulate)?;
        let whole = self.accumulate == 1 || !self.update_in_backward;
        let one = "1, as train.update_in_backward is true";
        require(whole, "train.accumulate", one, self.accumulate)?;
        let start = self.batch_start;
        require(!warms_up || start <= batch, "train.batch_start", &most, start)?;
        let window = self.spike_window;
        require((2..=100_000).contains(&window), "train.spike_window", "2 to 100000", window)?;
        let sigmas = self.spike_sigmas;
        let number = "a number of at least 0";
        require(sigmas >= 0.0 && sigmas.is_finite(), "train.spike_sigmas", number, sigmas)
    }
}
