//! What ternary training does that a loss does not show: the state of every projection, every N
//! steps.
//!
//! Masters move a little in every step, trits change only where a master crosses half the scale. So
//! a run can stand still while its loss does not yet show it: trits stop flipping, or masters
//! gather at the thresholds and the same few trits flip back and forth. What is collected, per
//! projection:
//!
//! | field | what it says |
//! | --- | --- |
//! | `negative`, `zero`, `positive` | shares of the three trits |
//! | `flips`, `flips_by_update` | share of trits that changed since the last collection, and by one update |
//! | `near_threshold`, `threshold_distance` | how far masters are from changing their trit |
//! | `scale` | the absmean scale |
//! | `grad_norm` | L2 norm of the gradient, before clipping |
//! | `saturated`, `zero_codes` | share of int8 activations at their ends, and at 0 |
//!
//! The trits are those of `trine-ternary`, made from the masters once more, so nothing is watched
//! that is not trained. Between collections the trits are kept at 2 bits each, a sixteenth of the
//! masters; for the one update of a collection a second copy.

mod collector;
mod layer;

pub use collector::Collector;
pub use layer::LayerDiagnostics;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What is watched beside the loss.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [diagnostics]")]
pub struct DiagnosticsConfig {
    /// Updates between collections; 0 turns them off.
    pub every: usize,
    /// Also write everything that is logged as TensorBoard event files.
    pub tensorboard: bool,
}

impl Default for DiagnosticsConfig {
    fn default() -> Self {
        Self { every: 50, tensorboard: false }
    }
}

/// The state of all projections after an update.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Diagnostics {
    /// The step with which `flips` compares; none where there was no earlier collection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<usize>,
    /// Mean over all weights of the shares of single projections.
    pub all: LayerDiagnostics,
    /// By the name of the projection, e.g. `model.layers.0.self_attn.q_proj`.
    pub layers: BTreeMap<String, LayerDiagnostics>,
}
