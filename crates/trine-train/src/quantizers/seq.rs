//! SEQ, the stretched elastic quantizer of ParetoQ (arXiv 2502.02631), with three levels.
//!
//! ```text
//! forward    q = a * round(1.5 * clamp(w / a, -1, 1)) / 1.5
//! backward   dw = dq where abs(w) < 0.99 a, else 0
//!            da = g * sum dq * (q / a - w / a where abs(w) < 0.99 a, else q / a)
//! ```
//!
//! The range of `a` is cut into three equal parts, at a third of it on either side, so the levels
//! are those of LSQ with `s = a / 1.5`, and masters pass a gradient up to `1.485 s` instead of `s`.
//! As in LSQ `g = 1 / sqrt(n)` for `n` weights that share the scale; the factor 0.99 is that of the
//! code that was published with the paper. That code differs in two things that change no direction:
//! it takes the weights of the whole matrix for `n`, and 1 for `q / a` beyond the range, where the
//! forward pass has 2/3. A run begins with `a = 1.5 mean abs(w)`, with the weights of the default,
//! where ParetoQ begins with the largest magnitude, for it fine-tunes. As in LSQ the logarithm of `a`
//! is learned, unless `quantizer.log_scales` is false.

use trine_ternary::{TernaryError, absmean, ternarize};

use super::{WeightQuantizer, positive};

/// Levels in a range of one, from the middle to the end.
const LEVELS: f32 = 1.5;

/// Share of the range in which masters pass a gradient.
const CLIP: f32 = 0.99;

/// A range that is a parameter.
pub(super) struct Seq;

impl WeightQuantizer for Seq {
    fn quantize(
        &self,
        weights: &[f32],
        learned: Option<f32>,
        trits: &mut [i8],
    ) -> Result<f32, TernaryError> {
        let range = learned.map_or_else(|| absmean(weights).map(|s| s * LEVELS), Ok)?;
        let scale = positive(range / LEVELS)?;
        ternarize(weights, scale, trits)?;
        Ok(scale)
    }

    fn initial_scale(&self, weights: &[f32]) -> Result<Option<f32>, TernaryError> {
        Ok(Some(absmean(weights)? * LEVELS))
    }

    fn backward(&self, weights: &[f32], learned: Option<f32>, gradient: &mut [f32]) -> f32 {
        let Some(Ok(scale)) = learned.map(|range| positive(range / LEVELS)) else { return 0.0 };
        let inverse = 1.0 / scale;
        let mut sum = 0.0;
        for (w, d) in weights.iter().zip(gradient) {
            // In units of the scale, whose trit is the rounding.
            let v = w * inverse;
            let trit = v.round_ties_even().clamp(-1.0, 1.0);
            if v.abs() < CLIP * LEVELS {
                sum += f64::from(*d) * f64::from((trit - v) / LEVELS);
            } else {
                sum += f64::from(*d) * f64::from(trit / LEVELS);
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

    /// The formula as it is printed above, in f64.
    fn formula(w: f64, a: f64) -> f64 {
        a * (1.5 * (w / a).clamp(-1.0, 1.0) * 0.999_999).round() / 1.5
    }

    #[test]
    fn seq_is_the_formula() {
        for a in [0.3f32, 0.9, 2.0] {
            let weights = values(250, 2);
            for (q, w) in seen(&Seq, &weights, Some(a)).iter().zip(&weights) {
                let expected = formula(f64::from(*w), f64::from(a));
                assert!((f64::from(*q) - expected).abs() < 1e-6, "{w} in {a}: {q}, not {expected}");
            }
        }
    }

    #[test]
    fn gradients_are_those_of_the_formula() {
        let weights = [0.2, 0.5, -1.2, 1.6, -4.0];
        let mut gradient = [1.0, 2.0, 3.0, 4.0, 5.0];
        let da = Seq.backward(&weights, Some(1.5), &mut gradient);
        assert_eq!(gradient, [1.0, 2.0, 3.0, 0.0, 0.0]);
        let q_over_a = [0.0, 0.0, -2.0 / 3.0, 2.0 / 3.0, -2.0 / 3.0];
        let w_over_a = [0.2 / 1.5, 0.5 / 1.5, -1.2 / 1.5, 0.0, 0.0];
        let sum: f32 = (0..5).map(|i| (i + 1) as f32 * (q_over_a[i] - w_over_a[i])).sum();
        assert!((da - sum / 5f32.sqrt()).abs() < 1e-6, "{da}");
    }

    #[test]
    fn seq_begins_with_the_weights_of_absmean() {
        let weights = values(200, 1);
        let range = Seq.initial_scale(&weights).unwrap();
        let expected = seen(&super::super::absmean::AbsMean, &weights, None);
        for (q, expected) in seen(&Seq, &weights, range).iter().zip(expected) {
            assert!((q - expected).abs() < 1e-6, "{q}, not {expected}");
        }
    }
}
