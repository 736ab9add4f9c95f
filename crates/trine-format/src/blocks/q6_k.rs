//! Q6_K, ggml's layout with 6 bits a number, a scale for every 16 and one for every 256.
//!
//! A block of 256 numbers is
//!
//! ```text
//! 128 bytes   low 4 bits of the codes
//!  64 bytes   high 2 bits of the codes
//!  16 bytes   signed scales s, one for every 16 numbers
//!   2 bytes   f16 scale d of the block
//! ```
//!
//! and number `i` is `(d * s[i / 16]) * (q[i] - 32)`. The codes lie in two groups of 128, each in 64
//! bytes of low and 32 bytes of high bits: for `j` from 0 to 31, low byte `j` is
//! `q[j] | q[j + 64] << 4`, low byte `j + 32` is `q[j + 32] | q[j + 96] << 4` (each `q` without its high
//! bits), and high byte `j` is `q[j] | q[j + 32] << 2 | q[j + 64] << 4 | q[j + 96] << 6` (each `q`
//! without its low bits). Blocks do not cross rows, so rows must be multiples of 256.
//!
//! The layout leaves open how scales are chosen. Here `d` is such that the largest magnitude of the
//! block has the code -32 at a scale of 112, which leaves room above, and then each scale is the one
//! of 32 candidates with the least squared error, as decoded: those from just under where the largest
//! magnitude of the 16 has the code -32, and those of the other sign from where it has 31. More
//! candidates or more values of `d` gain under 1 %. For 2^20 numbers of a Gaussian (of a Laplace)
//! distribution of scale 0.02 the error is 3.31e-4 (5.77e-4) root mean square; that of ggml's
//! `quantize_row_q6_K_ref`, which weights errors by the square of the number, is 3.55e-4 (6.14e-4).

use half::f16;

/// Numbers in a block.
pub const BLOCK: usize = 256;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 210;
/// Numbers that share a scale.
const SUB: usize = 16;
/// Scales in a block.
const SUBS: usize = BLOCK / SUB;
/// The code of 0, and so the largest magnitude of a code below it.
const ZERO: f32 = 32.0;
/// The largest code above that of 0.
const TOP: f32 = 31.0;
/// The scale at which the largest magnitude of a block has the lowest code.
const NOMINAL: f32 = 112.0;
/// The largest scale.
const LARGEST: i32 = 127;
/// Candidates that are compared at a time.
const LANES: usize = 8;
/// Adding and subtracting it rounds a small number half to even.
const ROUND: f32 = 12_582_912.0;
/// Where in a block the high bits, the scales and the block's own scale begin.
const HIGH: usize = BLOCK / 2;
const SCALES: usize = HIGH + BLOCK / 4;
const SCALE: usize = SCALES + SUBS;

/// The first magnitude whose scale is no finite f16.
pub const LIMIT: f32 = super::F16_LIMIT * ZERO * NOMINAL;

/// Widens a block; whatever its bytes. A scale that is not finite gives numbers that are not.
#[inline]
pub fn decode(block: &[u8; BLOCK_BYTES], out: &mut [f32; BLOCK]) {
    let d = f16::from_le_bytes([block[SCALE], block[SCALE + 1]]).to_f32();
    let halves = block[..HIGH].as_chunks::<64>().0.iter().zip(block[HIGH..].as_chunks::<32>().0);
    for (group, (low, high)) in out.as_chunks_mut::<128>().0.iter_mut().zip(halves) {
        for j in 0..32 {
            let code = |low: u8, high: u8| f32::from((low & 15 | (high & 3) << 4) as i8 - 32);
            group[j] = code(low[j], high[j]);
            group[j + 32] = code(low[j + 32], high[j] >> 2);
            group[j + 64] = code(low[j] >> 4, high[j] >> 4);
            group[j + 96] = code(low[j + 32] >> 4, high[j] >> 6);
        }
    }
    for (sub, &scale) in out.as_chunks_mut::<SUB>().0.iter_mut().zip(&block[SCALES..SCALE]) {
        let scale = d * f32::from(scale as i8);
        sub.iter_mut().for_each(|v| *v *= scale);
    }
}

/// Stores a block of finite numbers below [`LIMIT`].
pub fn encode(values: &[f32; BLOCK], out: &mut [u8; BLOCK_BYTES]) {
    let d = block_scale(largest(values).abs());
    let mut codes = [0; BLOCK];
    let subs = values.as_chunks::<SUB>().0.iter().zip(codes.as_chunks_mut::<SUB>().0);
    for ((sub, codes), out) in subs.zip(&mut out[SCALES..SCALE]) {
        let scale = sub_scale(sub, d.to_f32());
        *out = scale as i8 as u8;
        let inverse = super::reciprocal(d.to_f32() * scale as f32);
        for (code, v) in codes.iter_mut().zip(sub) {
            *code = (nearest(v * inverse) + ZERO) as i32 as u8;
        }
    }
    out[SCALE..].copy_from_slice(&d.to_le_bytes());
    let (low, high) = out[..SCALES].split_at_mut(HIGH);
    let halves = low.as_chunks_mut::<64>().0.iter_mut().zip(high.as_chunks_mut::<32>().0);
    for (group, (low, high)) in codes.as_chunks::<128>().0.iter().zip(halves) {
        for j in 0..32 {
            let [a, b, c, d] = [group[j], group[j + 32], group[j + 64], group[j + 96]];
            low[j] = a & 15 | c << 4;
            low[j + 32] = b & 15 | d << 4;
            high[j] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6;
        }
    }
}

/// The first number of the largest magnitude.
fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max: f32, &v| if v.abs() > max.abs() { v } else { max })
}

/// The scale of a block whose largest magnitude this is.
fn block_scale(largest: f32) -> f16 {
    let d = f16::from_f32(largest / (ZERO * NOMINAL));
    // Among the subnormal numbers of f16, rounding down can take more than the room there is.
    let reached = d.to_f32() * LARGEST as f32 * ZERO >= largest;
    if reached { d } else { f16::from_bits(d.to_bits() + 1) }
}

/// The nearest code to `x`, less that of 0.
#[inline]
fn nearest(x: f32) -> f32 {
    // Comparisons that are one instruction each, unlike `clamp`, whose NaN these lack.
    let x = if x < -ZERO { -ZERO } else { x };
    let x = if x > TOP { TOP } else { x };
    (x + ROUND) - ROUND
}

/// The scale of least squared error for numbers in a block of scale `d`; 0 when none helps.
fn sub_scale(values: &[f32; SUB], d: f32) -> i32 {
    let largest = largest(values);
    if largest == 0.0 {
        return 0;
    }
    let (mut best, mut least) = (0, values.iter().fold(0.0, |sum, v| sum + v * v));
    let exact = largest.abs() / (ZERO * d);
    let sign = if largest > 0.0 { -1 } else { 1 };
    // Where the code of the largest is positive there is one less of them.
    for (sign, exact) in [(sign, exact), (-sign, exact * (ZERO / (TOP + 0.5)))] {
        let from = (exact * 0.98).ceil() as i32;
        for from in [from, from + LANES as i32] {
            let from = from.clamp(1, LARGEST - (LANES as i32 - 1));
            let candidates = std::array::from_fn(|lane| sign * (from + lane as i32));
            let errors = squared_errors(values, d, &candidates);
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
fn squared_errors(values: &[f32; SUB], d: f32, scales: &[i32; LANES]) -> [f32; LANES] {
    let steps = scales.map(|scale| d * scale as f32);
    let inverses = steps.map(|step| 1.0 / step);
    let mut errors = [0.0; LANES];
    for v in values {
        for lane in 0..LANES {
            let error = v - nearest(v * inverses[lane]) * steps[lane];
            errors[lane] += error * error;
        }
    }
    errors
}
