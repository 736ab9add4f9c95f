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
    encode_blocks::<BLOCK>(GgmlType::TQ1_0, matrix, |trits, out| {
        for (value, _, bytes, digits) in PARTS {
            out.extend((0..bytes).map(|j| {
                let digit = |k| (k < digits).then(|| trits[value + j + k * bytes] + 1);
                byte_of(std::array::from_fn(|k| digit(k).unwrap_or(0) as u8))
            }));
        }
    })
}

/// Takes a matrix `(rows, cols)` as it is stored.
///
/// # Errors
/// A wrong number of bytes, a byte that encodes no trits, or block scales that differ, are negative
/// or not finite.
pub fn decode(data: &[u8], rows: usize, cols: usize) -> Result<TernaryMatrix, CodecError> {
    decode_blocks::<BLOCK, BLOCK_BYTES>(GgmlType::TQ1_0, data, rows, cols, |codes, out| {
        for (value, first, bytes, used) in PARTS {
            for j in 0..bytes {
                let digits = digits_of(codes[first + j]);
                // A byte that encoding never makes is damage, as is a digit where none belongs.
                let padded = digits[used..].iter().all(|&d| d == 0);
                if !padded || byte_of(digits) != codes[first + j] {
                    return Err(first + j);
                }
                for (k, &digit) in digits[..used].iter().enumerate() {
                    out[value + j + k * bytes] = digit as i8 - 1;
                }
            }
        }
        Ok(())
    })
}

fn byte_of(digits: [u8; 5]) -> u8 {
    let q = digits.iter().fold(0u32, |q, &digit| 3 * q + u32::from(digit));
    (256 * q).div_ceil(243) as u8
}

fn digits_of(byte: u8) -> [u8; 5] {
    let mut fraction = byte;
    std::array::from_fn(|_| {
        let tripled = 3 * u16::from(fraction);
        fraction = tripled as u8;
        (tripled >> 8) as u8
    })
}
