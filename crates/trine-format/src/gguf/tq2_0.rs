//! TQ2_0, llama.cpp's layout with 2 bits a weight and a scale for every 256.
//!
//! A code is trit + 1. A block of 256 values is two groups of 128, each in 32 bytes: byte `j` of a
//! group is `v[j] | v[j + 32] << 2 | v[j + 64] << 4 | v[j + 96] << 6`. An f16 scale follows. Blocks
//! do not cross rows, so rows must be multiples of 256.

use trine_ternary::TernaryMatrix;
use trine_ternary::pack::find_code_three;

use super::codec::{decode_blocks, encode_blocks};
use super::{CodecError, GgmlType};

/// Values in a block.
const BLOCK: usize = 256;
/// Bytes of a block.
const BLOCK_BYTES: usize = 66;
/// Bytes of a group of 128 values.
const GROUP_BYTES: usize = 32;

/// Stores a matrix; the scale is rounded to f16.
///
/// # Errors
/// Columns that are no multiple of 256, or a scale that overflows or vanishes in f16.
pub fn encode(matrix: &TernaryMatrix) -> Result<Vec<u8>, CodecError> {
    encode_blocks::<BLOCK>(GgmlType::TQ2_0, matrix, |trits, out| {
        for group in trits.as_chunks::<128>().0 {
            out.extend((0..GROUP_BYTES).map(|j| {
                let code = |k: usize| ((group[j + k * GROUP_BYTES] + 1) as u8) << (2 * k);
                (0..4).fold(0, |byte, k| byte | code(k))
            }));
        }
    })
}

/// Takes a matrix `(rows, cols)` as it is stored.
///
/// # Errors
/// A wrong number of bytes, a code 3, or block scales that differ, are negative or not finite.
pub fn decode(data: &[u8], rows: usize, cols: usize) -> Result<TernaryMatrix, CodecError> {
    decode_blocks::<BLOCK, BLOCK_BYTES>(GgmlType::TQ2_0, data, rows, cols, |codes, out| {
        find_code_three(codes).map_or(Ok(()), Err)?;
        for (i, trit) in out.iter_mut().enumerate() {
            let (group, value) = (i / 128, i % 128);
            let byte = codes[group * GROUP_BYTES + value % GROUP_BYTES];
            *trit = (byte >> (2 * (value / GROUP_BYTES)) & 3) as i8 - 1;
        }
        Ok(())
    })
}
