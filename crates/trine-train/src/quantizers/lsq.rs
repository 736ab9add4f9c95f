//! LSQ, learned step size quantization (Esser et al., arXiv 1902.08153), with three levels.
//!
//! ```text
//! forward    q = s * clamp(round(w / s), -1, 1)
//! backward   dw = dq where abs(w) < s, else 0
//!            ds = g * sum dq * (round(w / s) - w / s where abs(w) < s, else sign(w))
//! ```
//!
//! with `g = 1 / sqrt(n Q)`, `n` weights that share the scale and `Q = 1` the largest level. The
//! paper begins with `s = 2 mean abs(w) / sqrt(Q)`; here a run begins with `s = mean abs(w)`, with
//! the weights of the default, so that the two differ by what is learned. Rounding is that of
//! `trine-ternary`; a scale that is learned below 1e-5 counts as 1e-5.
//!
//! What is learned is the logarithm of `s`, unless `quantizer.log_scales` is false: AdamW moves every
//! variable by about the learning rate, whatever its gradient's scale, and a few steps of 1e-3 take
//! a scale of 0.02 through zero, after which nothing passes a gradient. (Trained Quantization
//! Thresholds, arXiv 1903.08066, learn logarithms for this reason.)

use trine_ternary::{TernaryError, absmean, ternarize};

use super::{WeightQuantizer, positive};

/// A scale that is a parameter, with the gradient of LSQ.
pub(super) struct Lsq;

impl WeightQuantizer for Lsq {
    fn quantize(
        &self,
        weights: &[f32],
        learned: Option<f32>,
        trits: &mut [i8],
    ) -> Result<f32, TernaryError> {
        let scale = positive(learned.map_or_else(|| absmean(weights), Ok)?)?;
        ternarize(weights, scale, trits)?;
        Ok(scale)
    }

    fn initial_scale(&self, weights: &[f32]) -> Result<Option<f32>, TernaryError> {
        absmean(weights).map(Some)
    }

    fn backward(&self, weights: &[f32], learned: Option<f32>, gradient: &mut [f32]) -> f32 {
        let Some(Ok(scale)) = learned.map(positive) else { return 0.0 };
        let inverse = 1.0 / scale;
        let mut sum = 0.0;
        for (w, d) in weights.iter().zip(gradient) {
            let v = w * inverse;
            if v.abs() < 1.0 {
                sum += f64::from(*d) * f64::from(v.round_ties_even() - v);
            } else {
                sum += f64::from(*d) * f64::from(v.signum());
                *d = 0.0;
            }
        }
        (sum / (weights.len() as f64).sqrt()) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{seen, values};
    use super::*;

    #[test]
    fn lsq_is_the_formula() {
        let weights = [0.3, -0.2, 1.0, -3.0, 0.25];
        assert_eq!(seen(&Lsq, &weights, Some(0.5)), [0.5, -0.0, 0.5, -0.5, 0.0]);
        let mut gradient = [1.0, 2.0, 3.0, 4.0, 5.0];
        let ds = Lsq.backward(&weights, Some(0.5), &mut gradient);
        assert_eq!(gradient, [1.0, 2.0, 0.0, 0.0, 5.0]);
        // Within: 1 - 0.6, 0 + 0.4, 0 - 0.5; beyond: 1 and -1.
        let expected = (1.0 * 0.4 + 2.0 * 0.4 + 3.0 - 4.0 - 5.0 * 0.5) / 5f32.sqrt();
        assert!((ds - expected).abs() < 1e-6, "{ds}, not {expected}");
    }

    #[test]
    fn lsq_begins_with_the_weights_of_absmean() {
        let weights = values(200, 1);
        let scale = Lsq.initial_scale(&weights).unwrap();
        assert_eq!(
            seen(&Lsq, &weights, scale),
            seen(&super::super::absmean::AbsMean, &weights, None)
        );
    }

    /// Beyond the last threshold the output is `s` or `-s`, whose slope needs no estimator.
    #[test]
    fn the_gradient_of_the_scale_is_its_slope_beyond_the_range() {
        let weights = [4.0, -3.0, 2.5];
        let loss = |s: f32| {
            seen(&Lsq, &weights, Some(s))
                .iter()
                .zip([0.5, -1.0, 2.0])
                .map(|(q, d)| q * d)
                .sum::<f32>()
        };
        let slope = (loss(1.001) - loss(0.999)) / 0.002;
        let ds = Lsq.backward(&weights, Some(1.0), &mut [0.5, -1.0, 2.0]);
        assert!((ds * 3f32.sqrt() - slope).abs() < 1e-3, "{ds} {slope}");
    }

    #[test]
    fn scales_that_are_no_positive_number() {
        assert!(Lsq.quantize(&[1.0], Some(f32::NAN), &mut [0]).is_err());
        assert_eq!(Lsq.quantize(&[1.0], Some(-2.0), &mut [0]).unwrap(), 1e-5);
    }
}
