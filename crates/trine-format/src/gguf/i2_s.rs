//! I2_S, bitnet.cpp's layout: 2 bits a weight and one f32 scale.
//!
//! A code is trit + 1. Blocks of 128 values lie in 32 bytes; byte `j` of a block is
//! `v[j] << 6 | v[j + 32] << 4 | v[j + 64] << 2 | v[j + 96]`. Blocks run row-major over the whole
//! tensor and may cross rows. After `n / 4` bytes comes the scale, then 28 bytes that are written
//! as 0 and not read (bitnet.cpp leaves them as they were).
//!
//! This is what bitnet.cpp's converter and its x86 builds write. Its ARM builds write blocks of 64
//! values in 16 bytes under the same type id, and nothing in a file tells the two apart; every byte
//! of the one is valid in the other, so such a file cannot be refused either.

use trine_ternary::pack::find_code_three;
use trine_ternary::{TernaryError, TernaryMatrix};

use super::codec::{bytes, check};
use super::{CodecError, GgmlType};

/// Values in a block.
const BLOCK: usize = 128;
/// Bytes of a block.
const BLOCK_BYTES: usize = 32;
/// Where in a byte each quarter of a block lies.
const SHIFTS: [u32; 4] = [6, 4, 2, 0];

/// Stores a matrix in `rows * cols / 4 + 32` bytes.
///
/// # Errors
/// [`CodecError::Blocks`] when `rows * cols` is no multiple of 128.
pub fn encode(matrix: &TernaryMatrix) -> Result<Vec<u8>, CodecError> {
    let mut out = vec![0; bytes(GgmlType::I2_S, matrix.rows(), matrix.cols())?];
    let trits = matrix.trits();
    for (block, out) in trits.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut().0) {
        let out: &mut [u8; BLOCK_BYTES] = out;
        for (quarter, shift) in block.as_chunks::<BLOCK_BYTES>().0.iter().zip(SHIFTS) {
            for (byte, trit) in out.iter_mut().zip(quarter) {
                *byte |= ((trit + 1) as u8) << shift;
            }
        }
    }
    out[trits.len() / 4..][..4].copy_from_slice(&matrix.scale().to_le_bytes());
    Ok(out)
}

/// Takes a matrix `(rows, cols)` as it is stored.
///
/// # Errors
/// [`CodecError::Blocks`] when `rows * cols` is no multiple of 128; a wrong number of bytes, a code
/// 3, or a scale that is negative or not finite.
pub fn decode(data: &[u8], rows: usize, cols: usize) -> Result<TernaryMatrix, CodecError> {
    let values = check(GgmlType::I2_S, data.len(), rows, cols)?;
    let (codes, tail) = data.split_at(values / 4);
    if let Some(index) = find_code_three(codes) {
        return Err(TernaryError::Code { index, byte: codes[index] }.into());
    }
    let mut trits = vec![0i8; values];
    for (block, codes) in trits.as_chunks_mut::<BLOCK>().0.iter_mut().zip(codes.as_chunks().0) {
        let codes: &[u8; BLOCK_BYTES] = codes;
        for (quarter, shift) in block.as_chunks_mut::<BLOCK_BYTES>().0.iter_mut().zip(SHIFTS) {
            for (trit, byte) in quarter.iter_mut().zip(codes) {
                *trit = (byte >> shift & 3) as i8 - 1;
            }
        }
    }
    let scale = f32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]);
    Ok(TernaryMatrix::from_trits(&trits, rows, cols, scale)?)
}
