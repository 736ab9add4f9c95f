//! Ternary Weight Networks (Li and Liu, arXiv 1605.04711).
//!
//! A weight is 0 within `d = 0.7 mean abs(w)`, and the scale is the mean magnitude of the weights
//! beyond: the best threshold and scale for weights from a normal distribution, where absmean only
//! takes the scale of all and half of it.

use trine_ternary::{TernaryError, absmean, ternarize};

use super::WeightQuantizer;

/// Threshold 0.7 of the mean magnitude, scale the mean of what is beyond it.
pub(super) struct Twn;

impl WeightQuantizer for Twn {
    fn quantize(
        &self,
        weights: &[f32],
        _learned: Option<f32>,
        trits: &mut [i8],
    ) -> Result<f32, TernaryError> {
        let threshold = 0.7 * absmean(weights)?;
        // Rounding turns at one half, so a weight in units of two thresholds turns at one.
        ternarize(weights, 2.0 * threshold, trits)?;
        let beyond = weights.iter().zip(&*trits).filter(|(_, trit)| **trit != 0);
        let (sum, count) =
            beyond.fold((0.0, 0u32), |(sum, count), (w, _)| (sum + f64::from(w.abs()), count + 1));
        Ok((sum / f64::from(count.max(1))) as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::seen;
    use super::*;

    #[test]
    fn twn_is_the_formula() {
        // The mean magnitude is 2, the threshold 1.4, the mean beyond it (1.5 + 5.25) / 2.
        let weights = [0.25, -1.5, 5.25, 1.0];
        assert_eq!(seen(&Twn, &weights, None), [0.0, -3.375, 3.375, 0.0]);
    }
}
