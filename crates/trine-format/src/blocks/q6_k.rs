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
//! Scales are chosen as the module `grid` says: codes of the largest magnitudes of 16 are at -32, or at 31
//! with the other sign, or just under. More candidates or more values of `d` gain under 1 %. For 2^20 numbers
//! of a Gaussian (of a Laplace) distribution of scale 0.02 the error is 3.31e-4 (5.77e-4) root mean square;
//! that of ggml's `quantize_row_q6_K_ref`, which weights errors by the square of the number, is 3.55e-4
//! (6.14e-4).

use half::f16;

use super::grid::{self, Grid, SUB, SUBS};

/// Numbers in a block.
pub const BLOCK: usize = grid::BLOCK;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 210;
/// Where in a block the high bits, the scales and the block's own scale begin.
const HIGH: usize = BLOCK / 2;
const SCALES: usize = HIGH + BLOCK / 4;
const SCALE: usize = SCALES + SUBS;

const GRID: Grid = Grid { zero: 32.0, top: 31.0, nominal: 112.0, largest: 127, from: 0.98 };

/// The first magnitude whose scale is no finite f16.
pub const LIMIT: f32 = GRID.limit();

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
    let grid::Block { d, scales, codes } = GRID.encode(values);
    out[SCALES..SCALE].copy_from_slice(&scales.map(|scale| scale as u8));
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
