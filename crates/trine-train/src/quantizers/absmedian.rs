//! Absmedian (BitNet b1.58 Reloaded, arXiv 2407.09527).
//!
//! `s = max(median abs(w), 1e-5)`, trits `clamp(round(w / s), -1, 1)`. The median of an even number
//! of weights is the lower of the two in the middle, as PyTorch's `median` has it. Since the median
//! of magnitudes lies below their mean, fewer trits are 0 than with absmean.

use trine_ternary::{EPSILON, TernaryError, ternarize};

use super::WeightQuantizer;

/// Scale and threshold are the median magnitude and half of it.
pub(super) struct AbsMedian;

impl WeightQuantizer for AbsMedian {
    fn quantize(
        &self,
        weights: &[f32],
        _learned: Option<f32>,
        trits: &mut [i8],
    ) -> Result<f32, TernaryError> {
        let mut magnitudes: Vec<f32> = weights.iter().map(|w| w.abs()).collect();
        let middle = weights.len().saturating_sub(1) / 2;
        let median = match magnitudes.is_empty() {
            true => 0.0,
            false => *magnitudes.select_nth_unstable_by(middle, f32::total_cmp).1,
        };
        let scale = median.max(EPSILON);
        ternarize(weights, scale, trits)?;
        Ok(scale)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{seen, values};
    use super::*;

    #[test]
    fn absmedian_is_the_formula() {
        assert_eq!(seen(&AbsMedian, &[4.0, -1.0, 0.25], None), [1.0, -1.0, 0.0]);
        // Four weights: the lower of 1 and 2.
        assert_eq!(seen(&AbsMedian, &[1.0, 2.0, -0.5, 9.0], None), [1.0, 1.0, -0.0, 1.0]);
        for n in [1, 2, 33, 256] {
            let weights = values(n, 5);
            let mut sorted: Vec<f32> = weights.iter().map(|w| w.abs()).collect();
            sorted.sort_by(f32::total_cmp);
            let s = sorted[(n - 1) / 2].max(1e-5);
            let expected =
                weights.iter().map(|w| (w * (1.0 / s)).round_ties_even().clamp(-1.0, 1.0) * s);
            assert_eq!(seen(&AbsMedian, &weights, None), expected.collect::<Vec<_>>());
        }
    }
}
