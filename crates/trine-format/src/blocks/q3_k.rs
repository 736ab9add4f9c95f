//! Q3_K, ggml's layout with 3 bits a number, a scale for every 16 and one for every 256.
//!
//! A block of 256 numbers is
//!
//! ```text
//!  32 bytes   high bit of the codes
//!  64 bytes   low 2 bits of the codes
//!  12 bytes   scales s + 32, of 6 bits, one for every 16 numbers
//!   2 bytes   f16 scale d of the block
//! ```
//!
//! and number `i` is `(d * s[i / 16]) * (q[i] - 4)`. Bit `k` of high byte `j` is that of
//! `q[32 k + j]`. The low bits lie in two groups of 128 numbers, each in 32 bytes, of which byte `j` is
//! `q[j] | q[j + 32] << 2 | q[j + 64] << 4 | q[j + 96] << 6`. Of the scales, byte `j < 8` has the low 4 bits
//! of those of `j` and `j + 8`, and byte `8 + j` for `j < 4` the high 2 bits of those of `j`, `j + 4`, `j + 8`
//! and `j + 12`, from the low bits up. Blocks do not cross rows, so rows must be multiples of 256.
//!
//! Scales are chosen as the module `grid` says: of so few codes, the largest magnitude may well be cut off.
//! All scales as candidates gain less than 0.1 %, 14 more values of `d` 0.3 %. For 2^20 numbers of a Gaussian
//! (of a Laplace) distribution the error is 0.144 (0.168) of their root mean square.

use half::f16;

use super::grid::{self, Grid, SUB, SUBS};

/// Numbers in a block.
pub const BLOCK: usize = grid::BLOCK;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 110;
/// Where in a block the low bits, the scales, their high bits, and the block's own scale begin.
const LOW: usize = BLOCK / 8;
const SCALES: usize = LOW + BLOCK / 4;
const SCALES_HIGH: usize = SCALES + SUBS / 2;
const SCALE: usize = SCALES_HIGH + SUBS / 4;
/// What a stored scale is more than the scale.
const SCALE_ZERO: i8 = 32;

const GRID: Grid = Grid { zero: 4.0, top: 3.0, nominal: 30.0, largest: 31, from: 0.53 };

/// The first magnitude whose scale is no finite f16.
pub const LIMIT: f32 = GRID.limit();

/// Widens a block; whatever its bytes. A scale that is not finite gives numbers that are not.
#[inline]
pub fn decode(block: &[u8; BLOCK_BYTES], out: &mut [f32; BLOCK]) {
    let d = f16::from_le_bytes([block[SCALE], block[SCALE + 1]]).to_f32();
    let (high, low) = block.split_at(LOW);
    for (k, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let low = &low[k / 4 * 32..][..32];
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            *out = f32::from((low >> (k % 4 * 2) & 3 | (high >> k & 1) << 2) as i8 - 4);
        }
    }
    for (s, sub) in out.as_chunks_mut::<SUB>().0.iter_mut().enumerate() {
        let low = block[SCALES + s % 8] >> (s / 8 * 4) & 15;
        let high = block[SCALES_HIGH + s % 4] >> (s / 4 * 2) & 3;
        let scale = d * f32::from((low | high << 4) as i8 - SCALE_ZERO);
        sub.iter_mut().for_each(|v| *v *= scale);
    }
}

/// Stores a block of finite numbers below [`LIMIT`].
pub fn encode(values: &[f32; BLOCK], out: &mut [u8; BLOCK_BYTES]) {
    let grid::Block { d, scales, codes } = GRID.encode(values);
    out.fill(0);
    out[SCALE..].copy_from_slice(&d.to_le_bytes());
    for (s, scale) in scales.into_iter().enumerate() {
        let scale = (scale + SCALE_ZERO) as u8;
        out[SCALES + s % 8] |= (scale & 15) << (s / 8 * 4);
        out[SCALES_HIGH + s % 4] |= scale >> 4 << (s / 4 * 2);
    }
    let (high, low) = out.split_at_mut(LOW);
    for (i, code) in codes.into_iter().enumerate() {
        low[i / 128 * 32 + i % 32] |= (code & 3) << (i % 128 / 32 * 2);
        high[i % 32] |= code >> 2 << (i / 32);
    }
}
