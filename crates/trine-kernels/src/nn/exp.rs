//! The exponential, and the two passes over a row of logits that are made of it.
//!
//! `exp(x) = 2^n exp(r)` with `n = round(x / ln 2)`, and `exp(r)` a polynomial of degree 7 on
//! `|r| <= ln(2) / 2` (the coefficients of Cephes' `expf`). Every step is one correctly rounded
//! operation, so the result is the same on every CPU; it is within 2 units in the last place.

use super::{Isa, Kernel, LANES, ROUND, Simd, dispatch, isa, sum_lanes};

/// ln 2 in two parts; the first has few bits, so that its product with `n` is exact.
const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
/// Below, the result would be denormal; it is 0.
const SMALLEST: f32 = -87.336_54;
/// Above, the result is infinite.
const LARGEST: f32 = 88.722_83;

/// `e^x`, within 2 units in the last place and the same on every CPU. 0 below -87.3, infinity above
/// 88.7, NaN for NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let clamped = if x > SMALLEST { x } else { SMALLEST };
    let clamped = if clamped < LARGEST { clamped } else { LARGEST };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let y = exp_rest(clamped - n * LN_2.0 - n * LN_2.1);
    // The last bits of `shifted` are n, from -126 to 128; half of 2^n twice, as 2^128 is no float.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    let y = y * power(half) * power(n - half);
    let y = if x < SMALLEST { 0.0 } else { y };
    let y = if x > LARGEST { f32::INFINITY } else { y };
    if x.is_nan() { x } else { y }
}

/// [`exp`] of what is not above 0, to the bit; NaN for NaN.
#[inline(always)]
pub(super) fn exp_down(x: f32) -> f32 {
    let clamped = if x < SMALLEST { SMALLEST } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let y = exp_rest(clamped - n * LN_2.0 - n * LN_2.1);
    // From -126 to 0, so that a power of 2 is a float.
    let y = y * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < SMALLEST { 0.0 } else { y }
}

/// `exp(r)` of `|r| <= ln(2) / 2`.
#[inline(always)]
fn exp_rest(r: f32) -> f32 {
    let mut p = 1.987_569_2e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + c;
    }
    p * (r * r) + r + 1.0
}

/// The largest of `row` and the sum of `exp(x - largest)` over it: what a softmax divides by.
pub fn exp_sum(row: &[f32]) -> (f32, f32) {
    exp_sum_on(isa(), row)
}

pub(crate) fn exp_sum_on(isa: Isa, row: &[f32]) -> (f32, f32) {
    dispatch(isa, ExpSum { row })
}

struct ExpSum<'a> {
    row: &'a [f32],
}

impl Kernel for ExpSum<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (f32, f32) {
        let max = largest(self.row);
        let mut lanes = [0.0; LANES];
        let (chunks, rest) = self.row.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane += exp_down(x - max);
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane += exp_down(x - max);
        }
        (max, sum_lanes(lanes))
    }
}

/// As [`exp_sum`], and `row` becomes `exp(row - largest)`.
pub fn exp_sum_in_place(row: &mut [f32]) -> (f32, f32) {
    exp_sum_in_place_on(isa(), row)
}

pub(crate) fn exp_sum_in_place_on(isa: Isa, row: &mut [f32]) -> (f32, f32) {
    dispatch(isa, ExpSumInPlace { row })
}

struct ExpSumInPlace<'a> {
    row: &'a mut [f32],
}

impl Kernel for ExpSumInPlace<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (f32, f32) {
        let max = largest(self.row);
        (max, to_exps(self.row, max))
    }
}

/// `row` becomes its softmax after it was multiplied by `scale`. Part of kernels.
#[inline(always)]
pub(super) fn softmax(row: &mut [f32], scale: f32) {
    let max = scaled_largest(row, scale);
    let sum = to_exps(row, max);
    row.iter_mut().for_each(|x| *x /= sum);
}

/// `row` becomes `exp(row - max)`, `max` being the largest of it; returns the sum.
#[inline(always)]
fn to_exps(row: &mut [f32], max: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *x = exp_down(*x - max);
            *lane += *x;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *x = exp_down(*x - max);
        *lane += *x;
    }
    sum_lanes(lanes)
}

/// Multiplies `row` by `scale`, and returns the [`largest`] of it.
#[inline(always)]
pub(super) fn scaled_largest(row: &mut [f32], scale: f32) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *x *= scale;
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *x *= scale;
        *lane = if *x > *lane { *x } else { *lane };
    }
    largest_lane(lanes)
}

/// The largest element, -inf of none; NaN elements are passed over.
#[inline(always)]
pub fn largest(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = if *x > *lane { *x } else { *lane };
    }
    largest_lane(lanes)
}

/// The largest of sixteen numbers, none of them NaN.
#[inline(always)]
pub(crate) fn largest_lane(mut lanes: [f32; LANES]) -> f32 {
    for width in [8, 4, 2, 1] {
        for l in 0..width {
            lanes[l] = if lanes[l] > lanes[l + width] { lanes[l] } else { lanes[l + width] };
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::exp2;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in -872_000..=887_000 {
            let x = i as f32 / 1e4;
            let (y, expected) = (exp(x), f64::from(x).exp());
            let ulp = f64::from((expected as f32).next_up()) - f64::from(expected as f32);
            assert!((f64::from(y) - expected).abs() <= 2.0 * ulp, "exp({x}) = {y}, not {expected}");
        }
    }

    #[test]
    fn exp_of_what_is_not_above_0_is_exp() {
        let all = (0..=1_100_000).map(|i| -(i as f32) / 1e4);
        let around = [SMALLEST, SMALLEST.next_up(), SMALLEST.next_down(), -0.0, f32::NEG_INFINITY];
        for x in all.chain(around) {
            assert_eq!(exp_down(x).to_bits(), exp(x).to_bits(), "{x}");
        }
        assert!(exp_down(f32::NAN).is_nan());
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_of_exponentials_are_those_of_the_softmax() {
        for n in [1, 15, 16, 17, 100] {
            let row: Vec<f32> = (0..n).map(|i| ((i * 37) % 23) as f32 / 3.0 - 90.0).collect();
            let (max, sum) = exp_sum(&row);
            assert_eq!(max, row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let expected: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
            assert!((f64::from(sum) / expected - 1.0).abs() < 1e-6);
            let mut exps = row;
            assert_eq!(exp_sum_in_place(&mut exps), (max, sum));
            assert!((exps.iter().sum::<f32>() / sum - 1.0).abs() < 1e-5);
        }
    }

    #[test]
    fn exp2_is_within_a_millionth() {
        for i in 0..=1_260_000 {
            let x = -(i as f32) / 1e4;
            let expected = f64::from(x).exp2();
            assert!((f64::from(exp2(x)) / expected - 1.0).abs() < 1e-6, "2^{x} = {}", exp2(x));
        }
        assert_eq!((exp2(0.0), exp2(-1.0), exp2(-126.0)), (1.0, 0.5, f32::MIN_POSITIVE));
        assert_eq!((exp2(-126.1), exp2(f32::NEG_INFINITY)), (0.0, 0.0));
        assert!(exp2(f32::NAN).is_nan());
    }
}
