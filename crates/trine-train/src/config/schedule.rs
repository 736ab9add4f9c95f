//! `[schedule]`: learning rate and weight decay over time.

use serde::{Deserialize, Serialize};

use super::{OptimizerConfig, require};
use crate::TrainError;

/// Learning rate and weight decay over time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [schedule]")]
pub struct ScheduleConfig {
    /// Shape of the schedule.
    pub kind: ScheduleKind,
    /// Steps of linear warm-up.
    pub warmup_steps: usize,
    /// Learning rate at the end.
    pub min_learning_rate: f64,
    /// `two-stage`: where the second stage begins, as a share of all steps.
    pub switch_at: f64,
    /// `two-stage`: peak of the cosine that the second stage follows; at most the first peak.
    pub second_learning_rate: f64,
    /// `wsd`: the share of all steps, at the end, in which the rate falls.
    pub decay_fraction: f64,
    /// `wsd`: how it falls.
    pub decay_shape: DecayShape,
}

/// Shape of the schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// The peak throughout.
    Constant,
    /// From the peak to the minimum on a cosine.
    Cosine,
    /// From the peak to the minimum on a line.
    Linear,
    /// The BitNet recipe: two cosines, weight decay off in the second.
    TwoStage,
    /// Warm-up, stable, decay (MiniCPM, arXiv 2404.06395): the peak, then a fall to the minimum.
    Wsd,
}

/// How the rate falls at the end of `wsd`, `p` being how much of the fall is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DecayShape {
    /// `1 - p`.
    #[serde(rename = "linear")]
    Linear,
    /// `1 - sqrt(p)`, which Hägele et al. (arXiv 2405.18392) found the better one.
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self {
            kind: ScheduleKind::TwoStage,
            warmup_steps: 100,
            min_learning_rate: 0.0,
            switch_at: 0.5,
            second_learning_rate: 7e-4,
            decay_fraction: 0.2,
            decay_shape: DecayShape::OneMinusSqrt,
        }
    }
}

impl ScheduleConfig {
    /// Shares are shares, and the second stage of a schedule is the lower one.
    pub(super) fn check(&self, optimizer: &OptimizerConfig) -> Result<(), TrainError> {
        for (key, value) in [
            ("schedule.min_learning_rate", self.min_learning_rate),
            ("schedule.second_learning_rate", self.second_learning_rate),
        ] {
            require(value >= 0.0 && value.is_finite(), key, "a number of at least 0", value)?;
        }
        for (key, share) in [
            ("schedule.switch_at", self.switch_at),
            ("schedule.decay_fraction", self.decay_fraction),
        ] {
            require((0.0..=1.0).contains(&share), key, "a share in [0, 1]", share)?;
        }
        let (first, second) = (optimizer.learning_rate, self.second_learning_rate);
        require(
            self.kind != ScheduleKind::TwoStage || second <= first,
            "schedule.second_learning_rate",
            &format!("at most optimizer.learning_rate {first}"),
            second,
        )
    }
}
