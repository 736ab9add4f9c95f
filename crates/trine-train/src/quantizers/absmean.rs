//! Absmean (BitNet b1.58, arXiv 2402.17764), of parts of a matrix.
//!
//! `s = max(mean abs(w), 1e-5)`, trits `clamp(round(w / s), -1, 1)`: the definition of
//! `trine-ternary`, applied to the weights that share a scale.

use trine_ternary::{TernaryError, absmean, ternarize};

use super::WeightQuantizer;

/// Scale and threshold are the mean magnitude and half of it.
pub(super) struct AbsMean;

impl WeightQuantizer for AbsMean {
    fn quantize(
        &self,
        weights: &[f32],
        _learned: Option<f32>,
        trits: &mut [i8],
    ) -> Result<f32, TernaryError> {
        let scale = absmean(weights)?;
        ternarize(weights, scale, trits)?;
        Ok(scale)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{seen, values};
    use super::*;
    use trine_ternary::TernaryMatrix;

    #[test]
    fn absmean_is_the_definition() {
        for n in [1, 7, 300] {
            let weights = values(n, 3);
            let expected = TernaryMatrix::from_weights(&weights, 1, n).unwrap().dequantize();
            assert_eq!(seen(&AbsMean, &weights, None), expected);
        }
    }
}
