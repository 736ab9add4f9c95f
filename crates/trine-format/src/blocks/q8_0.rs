//! Q8_0, ggml's layout with 8 bits a number and a scale for every 32.
//!
//! A block of 32 numbers is an f16 scale `d` and 32 signed bytes `q`, in order; a number is
//! `d * q`. Encoding gives the bits of gguf-py: `d` is the largest magnitude over 127, `q` the number
//! times the reciprocal of `d` before its rounding to f16, rounded half away from zero. Blocks do not
//! cross rows, so rows must be multiples of 32.

use half::f16;

/// Numbers in a block.
pub const BLOCK: usize = 32;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 34;
/// The largest magnitude of a code that is written.
const LARGEST: f32 = 127.0;

/// The first magnitude whose scale is no finite f16.
pub const LIMIT: f32 = super::F16_LIMIT * LARGEST;

/// Widens a block; whatever its bytes. A scale that is not finite gives numbers that are not.
#[inline]
pub fn decode(block: &[u8; BLOCK_BYTES], out: &mut [f32; BLOCK]) {
    let (scale, codes) = block.split_at(2);
    let d = f16::from_le_bytes([scale[0], scale[1]]).to_f32();
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = f32::from(code as i8) * d;
    }
}

/// Stores a block of finite numbers below [`LIMIT`].
#[inline]
pub fn encode(values: &[f32; BLOCK], out: &mut [u8; BLOCK_BYTES]) {
    let largest = values.iter().fold(0f32, |max, v| if v.abs() > max { v.abs() } else { max });
    let d = largest / LARGEST;
    let inverse = super::reciprocal(d);
    let (scale, codes) = out.split_at_mut(2);
    scale.copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (code, v) in codes.iter_mut().zip(values) {
        let x = v * inverse;
        // Half away from zero, in the steps of gguf-py: `x + 0.5` would round up the number below.
        let whole = x.abs() as i32;
        let magnitude = whole + (2.0 * (x.abs() - whole as f32)) as i32;
        *code = (if x < 0.0 { -magnitude } else { magnitude }) as i8 as u8;
    }
}
