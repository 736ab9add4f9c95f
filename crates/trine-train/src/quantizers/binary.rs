//! Binary weights, as a comparison (BitNet, arXiv 2310.11453).
//!
//! `sign(w - c) * mean abs(w)`, where `sign` is -1 at 0. BitNet takes `c = mean w`; without
//! centring, `c = 0`, it is the quantizer of XNOR-Net (arXiv 1603.05279). There is no trit 0, but
//! the formats hold -1 and +1 as well.

use trine_ternary::{TernaryError, absmean};

use super::WeightQuantizer;

/// Signs, times the mean magnitude.
pub(super) struct Binary {
    /// Whether signs are taken after the mean is.
    pub(super) centred: bool,
}

impl WeightQuantizer for Binary {
    fn quantize(
        &self,
        weights: &[f32],
        _learned: Option<f32>,
        trits: &mut [i8],
    ) -> Result<f32, TernaryError> {
        let scale = absmean(weights)?;
        let sum: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        let centre = if self.centred { (sum / weights.len().max(1) as f64) as f32 } else { 0.0 };
        for (trit, w) in trits.iter_mut().zip(weights) {
            *trit = if *w > centre { 1 } else { -1 };
        }
        Ok(scale)
    }

    fn has_zero(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::seen;
    use super::*;

    #[test]
    fn binary_is_the_formula() {
        // The mean magnitude is 2, the mean 1.
        let weights = [0.5, -2.0, 5.0, 0.5];
        assert_eq!(seen(&Binary { centred: false }, &weights, None), [2.0, -2.0, 2.0, 2.0]);
        assert_eq!(seen(&Binary { centred: true }, &weights, None), [-2.0, -2.0, 2.0, -2.0]);
        assert_eq!(seen(&Binary { centred: false }, &[0.0, 4.0], None), [-2.0, 2.0]);
    }
}
