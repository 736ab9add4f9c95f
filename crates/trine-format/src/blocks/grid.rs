//! What the types with a scale for every 16 numbers and one for every 256 have in common: how scales are
//! chosen, which ggml's layouts leave open.
//!
//! The block's own scale is such that its largest magnitude has the lowest code at a scale of
//! [`Grid::nominal`], which leaves room above, and then each scale is the one of 32 candidates with the
//! least squared error, as decoded.

use half::f16;

/// Numbers in a block.
pub(super) const BLOCK: usize = 256;
/// Numbers that share a scale.
pub(super) const SUB: usize = 16;
/// Scales in a block.
pub(super) const SUBS: usize = BLOCK / SUB;
/// Candidates that are compared at a time.
const LANES: usize = 8;
/// Adding and subtracting it rounds a small number half to even.
const ROUND: f32 = 12_582_912.0;

/// The codes and scales of a type.
pub(super) struct Grid {
    /// The code of 0, and so the largest magnitude of a code below it.
    pub(super) zero: f32,
    /// The largest code above that of 0.
    pub(super) top: f32,
    /// The scale at which the largest magnitude of a block has the lowest code.
    pub(super) nominal: f32,
    /// The largest scale, of either sign.
    pub(super) largest: i32,
    /// Where candidates for a scale begin, as a share of the scale at which the largest magnitude of the 16
    /// has the lowest code.
    pub(super) from: f32,
}

/// A block: its scale, those of its parts, and codes from 0.
pub(super) struct Block {
    pub(super) d: f16,
    pub(super) scales: [i8; SUBS],
    pub(super) codes: [u8; BLOCK],
}

impl Grid {
    /// The first magnitude whose scale is no finite f16.
    pub(super) const fn limit(&self) -> f32 {
        super::F16_LIMIT * self.zero * self.nominal
    }

    /// The scales and codes of finite numbers below [`Self::limit`].
    pub(super) fn encode(&self, values: &[f32; BLOCK]) -> Block {
        let d = self.block_scale(largest(values).abs());
        let mut block = Block { d, scales: [0; SUBS], codes: [0; BLOCK] };
        let subs = values.as_chunks::<SUB>().0.iter().zip(block.codes.as_chunks_mut::<SUB>().0);
        for ((sub, codes), out) in subs.zip(&mut block.scales) {
            let scale = self.sub_scale(sub, d.to_f32());
            *out = scale as i8;
            let inverse = super::reciprocal(d.to_f32() * scale as f32);
            for (code, v) in codes.iter_mut().zip(sub) {
                *code = (self.nearest(v * inverse) + self.zero) as i32 as u8;
            }
        }
        block
    }

    /// The scale of a block whose largest magnitude this is.
    fn block_scale(&self, largest: f32) -> f16 {
        let d = f16::from_f32(largest / (self.zero * self.nominal));
        // Among the subnormal numbers of f16, rounding down can take more than the room there is.
        let reached = d.to_f32() * self.largest as f32 * self.zero >= largest;
        if reached { d } else { f16::from_bits(d.to_bits() + 1) }
    }

    /// The nearest code to `x`, less that of 0.
    #[inline]
    fn nearest(&self, x: f32) -> f32 {
        // Comparisons that are one instruction each, unlike `clamp`, whose NaN these lack.
        let x = if x < -self.zero { -self.zero } else { x };
        let x = if x > self.top { self.top } else { x };
        (x + ROUND) - ROUND
    }

    /// The scale of least squared error for numbers in a block of scale `d`; 0 when none helps.
    fn sub_scale(&self, values: &[f32; SUB], d: f32) -> i32 {
        let largest = largest(values);
        if largest == 0.0 {
            return 0;
        }
        let (mut best, mut least) = (0, values.iter().fold(0.0, |sum, v| sum + v * v));
        let exact = largest.abs() / (self.zero * d);
        let sign = if largest > 0.0 { -1 } else { 1 };
        // Where the code of the largest is positive there is one less of them.
        for (sign, exact) in [(sign, exact), (-sign, exact * (self.zero / (self.top + 0.5)))] {
            let from = (exact * self.from).ceil() as i32;
            for from in [from, from + LANES as i32] {
                let from = from.clamp(1, self.largest - (LANES as i32 - 1));
                let candidates = std::array::from_fn(|lane| sign * (from + lane as i32));
                let errors = self.squared_errors(values, d, &candidates);
                for (candidate, error) in candidates.into_iter().zip(errors) {
                    if error < least {
                        (best, least) = (candidate, error);
                    }
                }
            }
        }
        best
    }

    /// Sum of the squared errors of `values` for each of the scales, none of them 0.
    fn squared_errors(&self, values: &[f32; SUB], d: f32, scales: &[i32; LANES]) -> [f32; LANES] {
        let steps = scales.map(|scale| d * scale as f32);
        let inverses = steps.map(|step| 1.0 / step);
        let mut errors = [0.0; LANES];
        for v in values {
            for lane in 0..LANES {
                let error = v - self.nearest(v * inverses[lane]) * steps[lane];
                errors[lane] += error * error;
            }
        }
        errors
    }
}

/// The first number of the largest magnitude.
fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max: f32, &v| if v.abs() > max.abs() { v } else { max })
}
