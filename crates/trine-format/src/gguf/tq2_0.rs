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
/// Values in a group.
const GROUP: usize = 128;
/// Bytes of a group.
const GROUP_BYTES: usize = 32;

/// Stores a matrix; the scale is rounded to f16.
///
/// # Errors
/// Columns that are no multiple of 256, or a scale that overflows or vanishes in f16.
pub fn encode(matrix: &TernaryMatrix) -> Result<Vec<u8>, CodecError> {
    encode_blocks::<BLOCK, BLOCK_BYTES>(GgmlType::TQ2_0, matrix, |trits, out| {
        let groups = trits.as_chunks::<GROUP>().0.iter();
        for (group, out) in groups.zip(out.as_chunks_mut::<GROUP_BYTES>().0) {
            for (j, byte) in out.iter_mut().enumerate() {
                let code = |k: usize| ((group[j + k * GROUP_BYTES] + 1) as u8) << (2 * k);
                *byte = code(0) | code(1) | code(2) | code(3);
            }
        }
    })
}

/// Takes a matrix `(rows, cols)` as it is stored.
///
/// # Errors
/// A wrong number of bytes, a code 3, or block scales that differ, are negative or not finite.
pub fn decode(data: &[u8], rows: usize, cols: usize) -> Result<TernaryMatrix, CodecError> {
    let kind = GgmlType::TQ2_0;
    decode_blocks::<BLOCK, BLOCK_BYTES>(kind, data, rows, cols, find_code_three, |codes, out| {
        let groups = codes.as_chunks::<GROUP_BYTES>().0.iter();
        for (codes, out) in groups.zip(out.as_chunks_mut::<GROUP>().0) {
            for (k, out) in out.as_chunks_mut::<GROUP_BYTES>().0.iter_mut().enumerate() {
                for (trit, byte) in out.iter_mut().zip(codes) {
                    *trit = (byte >> (2 * k) & 3) as i8 - 1;
                }
            }
        }
    })
}
