//! Q4_0, ggml's layout with 4 bits a number and a scale for every 32.
//!
//! A block of 32 numbers is an f16 scale `d` and 16 bytes; byte `j` is `q[j] | q[j + 16] << 4`, and a
//! number is `d * (q - 8)`. Encoding gives the bits of gguf-py: `d` is the number of the largest
//! magnitude (the first of them) over -8, so that it is held exactly up to the rounding of `d`; `q` is
//! the number times the reciprocal of `d` before its rounding to f16, plus 8.5, cut off, at most 15.
//! Blocks do not cross rows, so rows must be multiples of 32.

use half::f16;

/// Numbers in a block.
pub const BLOCK: usize = 32;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 18;
/// The code of 0.
const ZERO: f32 = 8.0;

/// The first magnitude whose scale is no finite f16.
pub const LIMIT: f32 = super::F16_LIMIT * ZERO;

/// Widens a block; whatever its bytes. A scale that is not finite gives numbers that are not.
#[inline]
pub fn decode(block: &[u8; BLOCK_BYTES], out: &mut [f32; BLOCK]) {
    let (scale, codes) = block.split_at(2);
    let d = f16::from_le_bytes([scale[0], scale[1]]).to_f32();
    let (low, high) = out.split_at_mut(BLOCK / 2);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(codes) {
        *low = d * (i32::from(byte & 15) - 8) as f32;
        *high = d * (i32::from(byte >> 4) - 8) as f32;
    }
}

/// Stores a block of finite numbers below [`LIMIT`].
#[inline]
pub fn encode(values: &[f32; BLOCK], out: &mut [u8; BLOCK_BYTES]) {
    let first = values[0];
    let largest = values.iter().fold(first, |max, &v| if v.abs() > max.abs() { v } else { max });
    let d = largest / -ZERO;
    let inverse = super::reciprocal(d);
    let code = |v: f32| ((v * inverse + (ZERO + 0.5)) as u8).min(15);
    let (scale, codes) = out.split_at_mut(2);
    scale.copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (j, byte) in codes.iter_mut().enumerate() {
        *byte = code(values[j]) | code(values[j + BLOCK / 2]) << 4;
    }
}
