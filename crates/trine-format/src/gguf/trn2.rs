//! TRN2, our own layout: 2 bits a weight for a matrix of any shape, and one exact f32 scale.
//!
//! Version 1. A matrix `(rows, cols)` takes `rows * ceil(cols / 4) + 4` bytes: its rows one after
//! the other, each in the canonical 2-bit packing of [`trine_ternary::pack`] (a code is trit + 1;
//! byte `j` of a row is `v[4j] | v[4j + 1] << 2 | v[4j + 2] << 4 | v[4j + 3] << 6`, filled up with
//! code 1), then the scale as f32. A code 3, another filling, or a scale that is negative or not
//! finite is refused.
//!
//! For the shapes that the layouts of other programs cannot hold. Its type id spells `TRN2` in a
//! file, far from the small numbers that ggml gives; a change of the layout would get another name
//! and id.

use trine_ternary::pack::row_bytes_2bit;
use trine_ternary::{TernaryError, TernaryMatrix};

use super::codec::check;
use super::{CodecError, GgmlType};

/// Bytes of the scale.
pub(super) const SCALE_BYTES: usize = 4;

/// Stores a matrix in `rows * ceil(cols / 4) + 4` bytes.
///
/// # Errors
/// A matrix without values.
pub fn encode(matrix: &TernaryMatrix) -> Result<Vec<u8>, CodecError> {
    let mut out = matrix.packed().to_vec();
    out.extend(matrix.scale().to_le_bytes());
    check(GgmlType::TRN2, out.len(), matrix.rows(), matrix.cols())?;
    Ok(out)
}

/// Takes a matrix `(rows, cols)` as it is stored.
///
/// # Errors
/// A wrong number of bytes, bytes that encode no trits, or a scale that is negative or not finite.
pub fn decode(data: &[u8], rows: usize, cols: usize) -> Result<TernaryMatrix, CodecError> {
    check(GgmlType::TRN2, data.len(), rows, cols)?;
    let too_short =
        TernaryError::Length { what: "bytes", expected: SCALE_BYTES, found: data.len() };
    let (codes, scale) = data.split_last_chunk::<SCALE_BYTES>().ok_or(too_short)?;
    debug_assert_eq!(codes.len(), rows * row_bytes_2bit(cols));
    Ok(TernaryMatrix::from_packed(codes.to_vec(), rows, cols, f32::from_le_bytes(*scale))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_of_any_shape_survive_bit_for_bit() {
        for (rows, cols) in [(1, 1), (3, 5), (7, 4), (2, 129), (128, 128)] {
            let trits: Vec<i8> = (0..rows * cols).map(|i| (i * 7 % 3) as i8 - 1).collect();
            let matrix = TernaryMatrix::from_trits(&trits, rows, cols, 0.1).unwrap();
            let bytes = encode(&matrix).unwrap();
            assert_eq!(Some(bytes.len()), GgmlType::TRN2.tensor_bytes(&[rows, cols]));
            assert_eq!(decode(&bytes, rows, cols).unwrap(), matrix);
        }
    }

    #[test]
    fn bytes_are_as_specified() {
        let matrix = TernaryMatrix::from_trits(&[-1, 0, 1, 1, 1], 1, 5, 1.0).unwrap();
        let bytes = [0b10_10_01_00, 0b01_01_01_10, 0, 0, 0x80, 0x3f];
        assert_eq!(encode(&matrix).unwrap(), bytes);
        assert_eq!(&GgmlType::TRN2.id().to_le_bytes(), b"TRN2");
        let refused = |bytes: &[u8]| decode(bytes, 1, 5).unwrap_err().to_string();
        assert!(refused(&bytes[..5]).contains("bytes"));
        assert!(refused(&[0b11, 0b01_01_01_10, 0, 0, 0x80, 0x3f]).contains("byte 0"));
        assert!(refused(&[0, 0b10, 0, 0, 0x80, 0x3f]).contains("byte 1"));
        assert!(refused(&[0, 0b01_01_01_10, 0, 0, 0x80, 0xff]).contains("scale"));
    }
}
