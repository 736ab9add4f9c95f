//! `[optimizer]`: how parameters are updated.

use serde::{Deserialize, Serialize};

use super::require;
use crate::TrainError;

/// How parameters are updated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [optimizer]")]
pub struct OptimizerConfig {
    /// What updates the matrices of the layers; AdamW updates everything else.
    pub kind: OptimizerKind,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// AdamW: decay of the first and second moment.
    pub betas: [f64; 2],
    /// AdamW: added to the root of the second moment.
    pub eps: f64,
    /// Weight decay of matrices at its peak.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 turns clipping off.
    pub clip_grad_norm: f64,
    /// Muon: peak learning rate of the matrices it updates, which follows the same schedule; 0
    /// takes `learning_rate`, as updates have the size of AdamW's.
    pub muon_learning_rate: f64,
    /// Muon: decay of the running mean of the gradient.
    pub muon_momentum: f64,
    /// How moments are kept: 8 bytes a parameter in f32 (4 with Muon), a quarter of it in int8.
    pub moments: MomentStorage,
    /// How exact masters are.
    pub masters: MasterPrecision,
}

/// What updates the matrices of the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OptimizerKind {
    /// AdamW (arXiv 1711.05101).
    Adamw,
    /// Muon (Jordan et al. 2024), scaled to the size of AdamW's updates (arXiv 2502.16982).
    Muon,
}

/// How moments are kept between updates; an update itself is always computed in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MomentStorage {
    /// As they are.
    F32,
    /// A byte each with a scale for every 256 (arXiv 2110.02861); parameters of fewer than 4096
    /// elements stay in f32.
    Int8,
}

/// How exact masters are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MasterPrecision {
    /// As they are.
    F32,
    /// Rounded stochastically to bf16 after every update. Checkpoints are half as large; memory is
    /// as before, since the variables themselves remain f32.
    Bf16,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::Adamw,
            learning_rate: 1e-3,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            clip_grad_norm: 1.0,
            muon_learning_rate: 0.0,
            muon_momentum: 0.95,
            moments: MomentStorage::F32,
            masters: MasterPrecision::F32,
        }
    }
}

impl OptimizerConfig {
    /// How many times the learning rate of the rest the matrices of Muon have.
    pub(crate) fn muon_ratio(&self) -> f64 {
        match self.muon_learning_rate {
            0.0 => 1.0,
            rate => rate / self.learning_rate,
        }
    }

    pub(super) fn check(&self) -> Result<(), TrainError> {
        for (key, value) in
            [("optimizer.learning_rate", self.learning_rate), ("optimizer.eps", self.eps)]
        {
            require(value > 0.0 && value.is_finite(), key, "a positive number", value)?;
        }
        for (key, value) in [
            ("optimizer.weight_decay", self.weight_decay),
            ("optimizer.clip_grad_norm", self.clip_grad_norm),
            ("optimizer.muon_learning_rate", self.muon_learning_rate),
        ] {
            require(value >= 0.0 && value.is_finite(), key, "a number of at least 0", value)?;
        }
        for beta in self.betas {
            require((0.0..1.0).contains(&beta), "optimizer.betas", "numbers in [0, 1)", beta)?;
        }
        let momentum = self.muon_momentum;
        let share = "a number in [0, 1)";
        require((0.0..1.0).contains(&momentum), "optimizer.muon_momentum", share, momentum)
    }
}
