//! Quantizers as a research axis: other ways from masters to what a projection multiplies with.
//!
//! The default, absmean over the whole matrix with int8 activations, is [`crate::ops::bitlinear`]
//! and never comes through here. Everything else is computed the general way: masters and
//! activations are rounded by operations with a straight-through backward pass, and multiplied in
//! f32. That is slower, and as easy to change as a formula.
//!
//! | `quantizer.weights` | weights that share a scale become | source |
//! | --- | --- | --- |
//! | `absmean` | `round(w / mean abs(w))`, clamped, times the mean | BitNet b1.58, arXiv 2402.17764 |
//! | `absmedian` | the same with the median | BitNet b1.58 Reloaded, arXiv 2407.09527 |
//! | `twn` | trits beyond `0.7 mean abs(w)`, times the mean of what is beyond | Ternary Weight Networks, arXiv 1605.04711 |
//! | `lsq` | `round(w / s)`, clamped, times `s`, which is learned | LSQ, arXiv 1902.08153 |
//! | `seq` | the same levels, with the gradients of a stretched range | ParetoQ, arXiv 2502.02631 |
//! | `binary` | `sign(w)` times `mean abs(w)` | XNOR-Net, arXiv 1603.05279; BitNet without its centring |
//! | `binary-centred` | `sign(w - mean w)` times `mean abs(w)` | BitNet, arXiv 2310.11453 |
//!
//! Beside them, in any combination: which weights share a scale ([`Granularity`]), how activations
//! are rounded ([`Activations`]), the Hadamard transform before two of the projections, the bias of
//! the dead zone (Tequila), and the warm-up from full precision (lambda). [`QuantizerConfig`] is the
//! section `[quantizer]` that names them.
//!
//! A quantizer of your own is one file with a [`WeightQuantizer`] and one line in [`TABLE`];
//! `docs/add-a-quantizer.md` shows it. Without touching this crate:
//!
//! ```
//! use std::sync::Arc;
//! use trine_ternary::{TernaryError, ternarize};
//! use trine_train::quantizers::{QuantizerConfig, Scheme, WeightQuantizer};
//!
//! /// Half of the largest magnitude is the threshold, and the largest magnitude the scale.
//! struct AbsMax;
//!
//! impl WeightQuantizer for AbsMax {
//!     fn quantize(
//!         &self,
//!         weights: &[f32],
//!         _learned: Option<f32>,
//!         trits: &mut [i8],
//!     ) -> Result<f32, TernaryError> {
//!         let largest = weights.iter().fold(1e-5f32, |max, w| max.max(w.abs()));
//!         ternarize(weights, largest, trits)?;
//!         Ok(largest)
//!     }
//! }
//!
//! let config = QuantizerConfig { weights: "absmax".to_owned(), ..QuantizerConfig::default() };
//! let scheme = Scheme::custom(config, Arc::new(AbsMax))?;
//! // `Bitnet::new(..)?.with_scheme(scheme)?` trains with it.
//! # Ok::<(), trine_train::TrainError>(())
//! ```

mod absmean;
mod absmedian;
mod activations;
mod binary;
mod config;
mod fake;
mod granularity;
mod hadamard;
mod lambda;
mod lsq;
mod scheme;
mod seq;
pub(crate) mod stored;
mod tequila;
mod twn;

use std::sync::Arc;

use trine_ternary::{EPSILON, TernaryError};

pub use activations::Activations;
pub use config::QuantizerConfig;
pub use granularity::Granularity;
pub use scheme::Scheme;
pub use stored::open;

/// A way from weights that share a scale to trits and that scale.
///
/// [`Granularity`] decides which weights share one: those of a matrix, a row or a group. What the
/// product sees is `trit * scale`.
pub trait WeightQuantizer: Send + Sync {
    /// Writes the trits of `weights` and returns their scale. `trits` is as long as `weights`;
    /// `learned` is the present value of what [`Self::initial_scale`] began with.
    ///
    /// # Errors
    /// Weights that are not finite, or a scale that is no positive number.
    fn quantize(
        &self,
        weights: &[f32],
        learned: Option<f32>,
        trits: &mut [i8],
    ) -> Result<f32, TernaryError>;

    /// What a learned scale begins with; none where nothing is learned.
    ///
    /// # Errors
    /// Weights that are not finite.
    fn initial_scale(&self, _weights: &[f32]) -> Result<Option<f32>, TernaryError> {
        Ok(None)
    }

    /// Turns the gradient of `trit * scale` into that of the weights, in place, and returns that of
    /// the learned scale.
    ///
    /// By default the straight-through estimator (BitNet, arXiv 2310.11453): quantizing counts as
    /// the identity and nothing is masked.
    fn backward(&self, _weights: &[f32], _learned: Option<f32>, _gradient: &mut [f32]) -> f32 {
        0.0
    }

    /// Whether there is a trit 0, and so a dead zone.
    fn has_zero(&self) -> bool {
        true
    }
}

/// A quantizer under the name that `quantizer.weights` gives it.
pub struct Entry {
    /// The name.
    pub name: &'static str,
    /// Makes it.
    pub make: fn() -> Arc<dyn WeightQuantizer>,
}

/// Every quantizer. A new one is one more line.
pub const TABLE: [Entry; 7] = [
    Entry { name: "absmean", make: || Arc::new(absmean::AbsMean) },
    Entry { name: "absmedian", make: || Arc::new(absmedian::AbsMedian) },
    Entry { name: "twn", make: || Arc::new(twn::Twn) },
    Entry { name: "lsq", make: || Arc::new(lsq::Lsq) },
    Entry { name: "seq", make: || Arc::new(seq::Seq) },
    Entry { name: "binary", make: || Arc::new(binary::Binary { centred: false }) },
    Entry { name: "binary-centred", make: || Arc::new(binary::Binary { centred: true }) },
];

/// The quantizer of that name.
fn find(name: &str) -> Option<Arc<dyn WeightQuantizer>> {
    TABLE.iter().find(|entry| entry.name == name).map(|entry| (entry.make)())
}

/// A learned scale as it is used: at least the epsilon of the definition.
fn positive(scale: f32) -> Result<f32, TernaryError> {
    let expected = "a finite number";
    if scale.is_finite() {
        Ok(scale.max(EPSILON))
    } else {
        Err(TernaryError::Scale { expected, scale })
    }
}

#[cfg(test)]
mod testing {
    //! What the tests of the quantizers share.

    use super::WeightQuantizer;

    /// Values in about -1..1 with a prime period, different for every `phase`.
    pub(super) fn values(n: usize, phase: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + phase * 101) % 257) as f32 / 128.0 - 1.0).collect()
    }

    /// What the product sees.
    pub(super) fn seen(q: &dyn WeightQuantizer, weights: &[f32], learned: Option<f32>) -> Vec<f32> {
        let mut trits = vec![9; weights.len()];
        let scale = q.quantize(weights, learned, &mut trits).unwrap();
        trits.iter().map(|t| f32::from(*t) * scale).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct() {
        for (i, entry) in TABLE.iter().enumerate() {
            assert!(TABLE[..i].iter().all(|other| other.name != entry.name), "{}", entry.name);
        }
    }

    /// Weights that are not numbers end in an error in every quantizer, zeros in none.
    #[test]
    fn every_quantizer_refuses_what_is_not_finite_and_takes_zeros() {
        for entry in &TABLE {
            let q = (entry.make)();
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let weights = [0.5, bad, -0.25];
                assert!(q.quantize(&weights, None, &mut [0; 3]).is_err(), "{} {bad}", entry.name);
            }
            let scale = q.quantize(&[0.0; 3], None, &mut [0; 3]).unwrap();
            assert!(scale.is_finite() && scale >= 0.0, "{}: {scale}", entry.name);
        }
    }

    #[test]
    fn the_guide_holds_the_file_it_explains() {
        let guide = include_str!("../../../../docs/add-a-quantizer.md");
        assert!(guide.contains(include_str!("twn.rs")), "twn.rs has changed: so must the guide");
        assert!(guide.contains(r#"Entry { name: "twn", make: || Arc::new(twn::Twn) },"#));
    }
}
