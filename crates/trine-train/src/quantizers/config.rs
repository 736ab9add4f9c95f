//! The section `[quantizer]` of a run.

use serde::{Deserialize, Serialize};

use super::{Activations, Granularity, TABLE, WeightQuantizer, find, hadamard};
use crate::TrainError;
use crate::config::{ModelSection, Quantizer, require};

/// How the projections of a ternary model are quantized; the defaults are BitNet b1.58.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [quantizer]")]
pub struct QuantizerConfig {
    /// What weights become: a name of [`TABLE`].
    pub weights: String,
    /// Which weights share a scale: `tensor`, `row` or `group:<size>`.
    pub granularity: Granularity,
    /// How the inputs of projections are rounded: `int8`, `int4`, `int4-absmax` or `none`.
    pub activations: Activations,
    /// Hadamard transform of the inputs of the output and down projections.
    pub hadamard: bool,
    /// Learned scales are parameters as their logarithms, which an optimizer's step changes by a
    /// share and never makes negative; false learns them as they are, as the papers do.
    pub log_scales: bool,
    /// Strength of the bias that masters in the dead zone make (Tequila); 0 turns it off.
    pub dead_zone_bias: f64,
    /// Steps of the warm-up from full precision; 0 quantizes from the first step on.
    pub lambda_steps: usize,
}

impl Default for QuantizerConfig {
    fn default() -> Self {
        Self {
            weights: "absmean".to_owned(),
            granularity: Granularity::Tensor,
            activations: Activations::Int8,
            hadamard: false,
            log_scales: true,
            dead_zone_bias: 0.0,
            lambda_steps: 0,
        }
    }
}

impl QuantizerConfig {
    /// The quantizer that `weights` names.
    ///
    /// # Errors
    /// A name that is not in the table.
    pub(super) fn find(&self) -> Result<std::sync::Arc<dyn WeightQuantizer>, TrainError> {
        find(&self.weights).ok_or_else(|| {
            let names: Vec<_> = TABLE.iter().map(|entry| format!("`{}`", entry.name)).collect();
            TrainError::ConfigValue {
                key: "quantizer.weights".to_owned(),
                expected: names.join(", "),
                found: self.weights.clone(),
            }
        })
    }

    /// Checks the section on its own.
    ///
    /// # Errors
    /// Values out of range, or that make no sense for `weights`.
    pub(super) fn check_for(&self, weights: &dyn WeightQuantizer) -> Result<(), TrainError> {
        let strength = self.dead_zone_bias;
        let key = "quantizer.dead_zone_bias";
        let number = "a number of at least 0";
        require(strength >= 0.0 && strength.is_finite(), key, number, strength)?;
        let expected = format!("0, as `{}` weights have no dead zone", self.weights);
        require(strength == 0.0 || weights.has_zero(), key, &expected, strength)
    }

    /// Checks the section in a run.
    ///
    /// # Errors
    /// A value that makes no sense, or not for this model.
    pub(crate) fn check(&self, model: &ModelSection) -> Result<(), TrainError> {
        self.check_for(&*self.find()?)?;
        require(
            model.quantization == Quantizer::Ternary || *self == Self::default(),
            "model.quantization",
            "\"ternary\", as the section [quantizer] asks for something",
            "none",
        )?;
        let widths = [
            ("model.hidden_size", model.hidden_size),
            ("model.intermediate_size", model.intermediate_size),
        ];
        for (key, width) in widths {
            let even = !self.hadamard || hadamard::block(width) > 1;
            require(even, key, "an even number, as quantizer.hadamard is true", width)?;
        }
        Ok(())
    }
}
