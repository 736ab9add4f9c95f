//! TQ1_0, llama.cpp's layout with five weights in a byte and a scale for every 256.
//!
//! A digit is trit + 1. A block of 256 values is 48 bytes with five digits, 4 bytes with four, and
//! an f16 scale:
//!
//! | values | bytes | digit `k` of byte `j` |
//! | --- | --- | --- |
//! | 0 to 159 | 0 to 31 | `v[j + 32 k]` |
//! | 160 to 239 | 32 to 47 | `v[160 + j + 16 k]` |
//! | 240 to 255 | 48 to 51 | `v[240 + j + 4 k]`, four digits and a fifth of 0 |
//!
//! Digits `d0` to `d4`, most significant first, make `q = 81 d0 + 27 d1 + 9 d2 + 3 d3 + d4`, which
//! is stored as the fraction `ceil(256 q / 243)` of 256, so that a digit is the integer part after
//! multiplying by 3. Blocks do not cross rows, so rows must be multiples of 256.

use trine_ternary::TernaryMatrix;

use super::codec::{decode_blocks, encode_blocks};
use super::{CodecError, GgmlType};

/// Values in a block.
const BLOCK: usize = 256;
/// Bytes of a block.
const BLOCK_BYTES: usize = 54;

/// First value, first byte, number of bytes, digits in a byte: the rows of the table above.
const PARTS: [(usize, usize, usize, usize); 3] = [(0, 0, 32, 5), (160, 32, 16, 5), (240, 48, 4, 4)];

/// Stores a matrix; the scale is rounded to f16.
///
/// # Errors
/// Columns that are no multiple of 256, or a scale that overflows or vanishes in f16.
pub fn encode(matrix: &TernaryMatrix) -> Result<Vec<u8>, CodecError> {
    encode_blocks::<BLOCK, BLOCK_BYTES>(GgmlType::TQ1_0, matrix, |trits, out| {
        for (value, first, bytes, digits) in PARTS {
            for (j, out) in out[first..first + bytes].iter_mut().enumerate() {
                let trit = |k| if k < digits { trits[value + j + k * bytes] } else { -1 };
                let q = (0..5).fold(0, |q, k| 3 * q + (trit(k) + 1) as u16);
                *out = (256 * q).div_ceil(243) as u8;
            }
        }
    })
}

/// Takes a matrix `(rows, cols)` as it is stored.
///
/// # Errors
/// A wrong number of bytes, a byte that encodes no trits, or block scales that differ, are negative
/// or not finite.
pub fn decode(data: &[u8], rows: usize, cols: usize) -> Result<TernaryMatrix, CodecError> {
    let kind = GgmlType::TQ1_0;
    decode_blocks::<BLOCK, BLOCK_BYTES>(kind, data, rows, cols, find_bad, |codes, out| {
        for (value, first, bytes, digits) in PARTS {
            let codes = &codes[first..first + bytes];
            for (k, power) in [1u8, 3, 9, 27, 81].into_iter().take(digits).enumerate() {
                for (trit, byte) in out[value + k * bytes..][..bytes].iter_mut().zip(codes) {
                    let fraction = byte.wrapping_mul(power);
                    *trit = ((3 * u16::from(fraction)) >> 8) as i8 - 1;
                }
            }
        }
    })
}

/// Position of the first byte that encoding never makes: damage, as is a digit where none belongs.
fn find_bad(codes: &[u8]) -> Option<usize> {
    let (five, four) = codes.split_at(PARTS[2].1);
    let bad = |digits: u8| move |&byte: &u8| VALID[usize::from(byte)] & digits == 0;
    let any = five.iter().any(bad(FIVE)) | four.iter().any(bad(FOUR));
    if !any {
        return None;
    }
    let first = five.iter().position(bad(FIVE));
    first.or_else(|| four.iter().position(bad(FOUR)).map(|at| five.len() + at))
}

/// Flags of a byte that five digits make, and of one that four do.
const FIVE: u8 = 1;
const FOUR: u8 = 2;

/// What makes each byte.
static VALID: [u8; 256] = {
    let mut valid = [0; 256];
    let mut q = 0;
    while q < 243u16 {
        let byte = (256 * q).div_ceil(243) as usize;
        valid[byte] = if q % 3 == 0 { FIVE | FOUR } else { FIVE };
        q += 1;
    }
    valid
};
