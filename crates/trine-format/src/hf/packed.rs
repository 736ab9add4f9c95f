//! The packed layout of transformers: four rows in a byte.
//!
//! A projection `(out, in)` is uint8 `(R, in)` with `R = ceil(out / 4)`. Packed row `r` holds, from
//! the low bits up, the codes of the rows `r`, `r + R`, `r + 2R` and `r + 3R`; a code is trit + 1.
//! Where `out` is no multiple of 4, the codes of rows past the end are 0 and are not read.

use trine_ternary::pack::find_code_three;
use trine_ternary::{TernaryError, TernaryMatrix};

/// Rows in a byte.
const ROWS: usize = 4;

/// Packed bytes `(ceil(rows / 4), cols)`; the scale is stored elsewhere.
pub fn encode(matrix: &TernaryMatrix) -> Vec<u8> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let packed_rows = rows.div_ceil(ROWS);
    let mut packed = vec![0u8; packed_rows * cols];
    let mut trits = vec![0i8; cols];
    for row in 0..rows {
        matrix.unpack_row(row, &mut trits);
        let (shift, at) = (2 * (row / packed_rows), row % packed_rows * cols);
        for (byte, trit) in packed[at..].iter_mut().zip(&trits) {
            *byte |= ((trit + 1) as u8) << shift;
        }
    }
    packed
}

/// The matrix `(rows, cols)` of packed bytes and a scale.
///
/// # Errors
/// A wrong number of bytes, a code 3, or a scale that is negative or not finite.
pub fn decode(
    packed: &[u8],
    rows: usize,
    cols: usize,
    scale: f32,
) -> Result<TernaryMatrix, TernaryError> {
    let packed_rows = rows.div_ceil(ROWS);
    let too_large = TernaryError::TooLarge { rows, cols };
    let expected = packed_rows.checked_mul(cols).ok_or(too_large)?;
    if packed.len() != expected {
        let found = packed.len();
        return Err(TernaryError::Length { what: "packed bytes", expected, found });
    }
    if let Some(index) = find_code_three(packed) {
        return Err(TernaryError::Code { index, byte: packed[index] });
    }
    TernaryMatrix::from_trit_rows(rows, cols, scale, |row, trits| {
        let (shift, at) = (2 * (row / packed_rows), row % packed_rows * cols);
        for (trit, byte) in trits.iter_mut().zip(&packed[at..]) {
            *trit = (byte >> shift & 3) as i8 - 1;
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_do_not_fill_a_byte_survive() {
        for rows in 0..10 {
            let trits: Vec<i8> = (0..rows * 3).map(|i| (i * 7 % 3) as i8 - 1).collect();
            let matrix = TernaryMatrix::from_trits(&trits, rows, 3, 0.5).unwrap();
            assert_eq!(decode(&encode(&matrix), rows, 3, 0.5).unwrap(), matrix);
        }
    }

    #[test]
    fn code_three_is_refused() {
        let error = decode(&[0b00_00_00_10, 0b00_11_00_00], 4, 2, 1.0);
        assert_eq!(error, Err(TernaryError::Code { index: 1, byte: 0b00_11_00_00 }));
    }
}
