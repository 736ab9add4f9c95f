//! From a row of activations to int8 codes, and from an integer sum back to a float.

use crate::{ACT_MAX, EPSILON, round::round_half_even};

/// Bits of the f32 magnitude; as integers, magnitudes order like their values, NaN above infinity.
const MAGNITUDE: u32 = 0x7fff_ffff;
const INFINITY: u32 = 0x7f80_0000;

/// Quantizes one token's activations to int8 and returns the scale
/// `s = 127 * (1 / max(max|x|, 1e-5))`.
///
/// Codes are `clamp(round_half_even(x * s), -128, 127)`; the value a code stands for is `code / s`.
/// A row with a NaN or an infinity gets codes 0 and the scale NaN, so that its output is NaN.
///
/// # Panics
/// When `out` does not have the length of `x`.
#[inline]
pub fn quantize_activations(x: &[f32], out: &mut [i8]) -> f32 {
    assert_eq!(x.len(), out.len(), "codes and activations differ in length");
    let max_bits = x.iter().fold(0, |max, v| (v.to_bits() & MAGNITUDE).max(max));
    if max_bits >= INFINITY {
        out.fill(0);
        return f32::NAN;
    }
    let scale = ACT_MAX * (1.0 / f32::from_bits(max_bits).max(EPSILON));
    for (code, v) in out.iter_mut().zip(x) {
        *code = round_half_even::<-128, 127>(v * scale);
    }
    scale
}

/// The float value of an integer sum: `sum * (weight_scale / activation_scale)`, in this order.
#[inline]
pub fn rescale(sum: i32, weight_scale: f32, activation_scale: f32) -> f32 {
    sum as f32 * (weight_scale / activation_scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_round_to_even() {
        let x = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.5, -126.5];
        let mut codes = [0; 8];
        assert_eq!(quantize_activations(&x, &mut codes), 1.0);
        assert_eq!(codes, [127, 0, 2, 2, 0, -2, 4, -126]);
    }

    #[test]
    fn zero_row_and_row_under_epsilon_use_epsilon() {
        let mut codes = [1; 2];
        assert_eq!(quantize_activations(&[0.0, -0.0], &mut codes), 127.0 * (1.0 / EPSILON));
        assert_eq!(codes, [0, 0]);
        assert_eq!(quantize_activations(&[1e-6, -5e-6], &mut codes), 127.0 * (1.0 / EPSILON));
        assert_eq!(codes, [13, -64]);
    }

    #[test]
    fn non_finite_rows_poison_their_output() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut codes = [1; 3];
            let scale = quantize_activations(&[1.0, bad, 2.0], &mut codes);
            assert_eq!(codes, [0; 3]);
            assert!(rescale(0, 1.0, scale).is_nan());
        }
    }

    #[test]
    fn extreme_magnitudes_stay_in_range() {
        let mut codes = [0; 3];
        assert!(quantize_activations(&[f32::MAX, f32::MIN_POSITIVE, -f32::MAX], &mut codes) > 0.0);
        assert_eq!(codes, [127, 0, -127]);
    }
}
