//! A ternary matrix as it passes between the trainer, files and kernels.

use crate::pack::{TRITS_PER_BYTE_2BIT, find_code_three, pack_2bit, row_bytes_2bit, unpack_2bit};
use crate::weight::AbsSum;
use crate::{Ambiguity, TernaryError, absmean, error::check_len, ternarize};

/// A `(rows, cols)` matrix of trits with one scale; a projection's `(out, in)`.
///
/// Trits are held in the canonical 2-bit packing, each row padded to a whole byte.
#[derive(Clone, Debug, PartialEq)]
pub struct TernaryMatrix {
    rows: usize,
    cols: usize,
    /// What a trit is multiplied by; `absmean` of the master weights.
    scale: f32,
    /// `(rows, ceil(cols / 4))` bytes.
    packed: Vec<u8>,
}

impl TernaryMatrix {
    /// Quantizes full-precision weights, `(rows, cols)` row-major.
    ///
    /// # Errors
    /// Weights that are not finite, or not `rows * cols` of them.
    pub fn from_weights(weights: &[f32], rows: usize, cols: usize) -> Result<Self, TernaryError> {
        check_len("weights", area(rows, cols)?, weights.len())?;
        let scale = absmean(weights)?;
        Self::pack_rows(rows, cols, scale, |r, out| {
            ternarize(&weights[r * cols..][..cols], scale, out)
        })
    }

    /// As [`Self::from_weights`], of weights that are stored as another type: `widen` writes the
    /// weights of a row, `(cols,)`. It is asked twice for every row, so that no more than one row
    /// is ever held as f32.
    ///
    /// # Errors
    /// Weights that are not finite.
    pub fn from_weight_rows(
        rows: usize,
        cols: usize,
        widen: impl FnMut(usize, &mut [f32]),
    ) -> Result<Self, TernaryError> {
        Self::in_two_passes(rows, cols, widen, |_| |_: &[f32]| ())
    }

    /// As [`Self::from_weight_rows`], and counts the weights whose trit is not the same in all
    /// implementations.
    ///
    /// # Errors
    /// As [`Self::from_weight_rows`].
    pub fn from_weight_rows_counted(
        rows: usize,
        cols: usize,
        widen: impl FnMut(usize, &mut [f32]),
    ) -> Result<(Self, Ambiguity), TernaryError> {
        let mut found = Ambiguity::default();
        let matrix = Self::in_two_passes(rows, cols, widen, |scale| {
            let count = Ambiguity::counter(scale);
            let found = &mut found;
            move |row: &[f32]| *found = [*found, count(row)].into_iter().sum()
        })?;
        Ok((matrix, found))
    }

    /// A first pass over the rows for the scale, a second one for the trits; `see` is told the scale
    /// between the two, and what it returns sees the rows of the second.
    fn in_two_passes<S: FnMut(&[f32])>(
        rows: usize,
        cols: usize,
        mut widen: impl FnMut(usize, &mut [f32]),
        see: impl FnOnce(f32) -> S,
    ) -> Result<Self, TernaryError> {
        area(rows, cols)?;
        let mut weights = vec![0.0; if rows > 0 { cols } else { 0 }];
        let mut sum = AbsSum::default();
        for r in 0..rows {
            widen(r, &mut weights);
            sum.add(&weights);
        }
        let Some(scale) = sum.absmean() else {
            for r in 0..rows {
                widen(r, &mut weights);
                absmean(&weights).map_err(|e| e.in_row(r, cols))?;
            }
            // Only a `widen` that changes its mind comes here.
            return Err(TernaryError::NonFinite { index: 0, value: f32::NAN });
        };
        let mut see = see(scale);
        Self::pack_rows(rows, cols, scale, |r, out| {
            widen(r, &mut weights);
            see(&weights);
            ternarize(&weights, scale, out)
        })
    }

    /// Takes trits and scale as they are, `(rows, cols)` row-major.
    ///
    /// # Errors
    /// Values that are no trits, not `rows * cols` of them, or a scale that is negative or not
    /// finite.
    pub fn from_trits(
        trits: &[i8],
        rows: usize,
        cols: usize,
        scale: f32,
    ) -> Result<Self, TernaryError> {
        check_len("trits", area(rows, cols)?, trits.len())?;
        Self::from_trit_rows(rows, cols, scale, |r, out| {
            out.copy_from_slice(&trits[r * cols..][..cols]);
        })
    }

    /// As [`Self::from_trits`], of trits that are stored in another way: `unpack` writes the trits
    /// of a row, `(cols,)`.
    ///
    /// # Errors
    /// Values that are no trits, or a scale that is negative or not finite.
    pub fn from_trit_rows(
        rows: usize,
        cols: usize,
        scale: f32,
        mut unpack: impl FnMut(usize, &mut [i8]),
    ) -> Result<Self, TernaryError> {
        Self::pack_rows(rows, cols, scale, |r, out| {
            unpack(r, out);
            Ok(())
        })
    }

    /// Packs rows of trits as they are made, one at a time.
    fn pack_rows(
        rows: usize,
        cols: usize,
        scale: f32,
        mut trits_of: impl FnMut(usize, &mut [i8]) -> Result<(), TernaryError>,
    ) -> Result<Self, TernaryError> {
        area(rows, cols)?;
        check_scale(scale)?;
        let row_bytes = row_bytes_2bit(cols);
        let mut packed = vec![0; rows * row_bytes];
        if !packed.is_empty() {
            let mut trits = vec![0; cols];
            for (r, out) in packed.chunks_exact_mut(row_bytes).enumerate() {
                let row = trits_of(r, &mut trits).and_then(|()| pack_2bit(&trits, out));
                row.map_err(|e| e.in_row(r, cols))?;
            }
        }
        Ok(Self { rows, cols, scale, packed })
    }

    /// Takes the canonical 2-bit packing and a scale as they are.
    ///
    /// # Errors
    /// [`TernaryError::Code`] for a byte that encodes no trits, or whose padding at the end of a row
    /// holds one that is not 0; not [`row_bytes_2bit`] bytes for each row; a scale that is negative
    /// or not finite.
    pub fn from_packed(
        packed: Vec<u8>,
        rows: usize,
        cols: usize,
        scale: f32,
    ) -> Result<Self, TernaryError> {
        area(rows, cols)?;
        let row_bytes = row_bytes_2bit(cols);
        check_len("packed bytes", area(rows, row_bytes)?, packed.len())?;
        check_scale(scale)?;
        if let Some(index) = find_code_three(&packed) {
            return Err(TernaryError::Code { index, byte: packed[index] });
        }
        let used = cols % TRITS_PER_BYTE_2BIT;
        if used != 0 {
            let padding = 0b01_01_01_01 >> (2 * used);
            let ends = packed.chunks_exact(row_bytes).map(|row| row[row_bytes - 1]);
            if let Some(row) = ends.map(|end| end >> (2 * used)).position(|end| end != padding) {
                let index = (row + 1) * row_bytes - 1;
                return Err(TernaryError::Code { index, byte: packed[index] });
            }
        }
        Ok(Self { rows, cols, scale, packed })
    }

    /// The same trits with another scale.
    ///
    /// # Errors
    /// A scale that is negative or not finite.
    pub fn with_scale(self, scale: f32) -> Result<Self, TernaryError> {
        check_scale(scale)?;
        Ok(Self { scale, ..self })
    }

    /// The matrix whose row `r` is row `source(r)` of this one.
    ///
    /// # Panics
    /// When `source` names a row that there is not.
    #[must_use]
    pub fn select_rows(&self, source: impl Fn(usize) -> usize) -> Self {
        let row_bytes = row_bytes_2bit(self.cols);
        let mut packed = Vec::with_capacity(self.packed.len());
        for r in 0..self.rows {
            packed.extend_from_slice(&self.packed[source(r) * row_bytes..][..row_bytes]);
        }
        Self { packed, ..*self }
    }

    /// Number of rows: output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns: input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// What a trit is multiplied by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The canonical 2-bit packing, `(rows, ceil(cols / 4))` bytes.
    pub fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// Writes the trits of row `r` to `out`, `(cols,)`.
    ///
    /// # Panics
    /// When there is no row `r` or `out` has another length.
    pub fn unpack_row(&self, r: usize, out: &mut [i8]) {
        let row_bytes = row_bytes_2bit(self.cols);
        unpack_2bit(&self.packed[r * row_bytes..][..row_bytes], out)
            .expect("the constructor packed this row, and out has its length");
    }

    /// All trits, `(rows, cols)` row-major.
    pub fn trits(&self) -> Vec<i8> {
        let mut trits = vec![0; self.rows * self.cols];
        if self.cols > 0 {
            for (r, row) in trits.chunks_exact_mut(self.cols).enumerate() {
                self.unpack_row(r, row);
            }
        }
        trits
    }

    /// The weights that the product sees, `trit * scale`, `(rows, cols)` row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        self.trits().into_iter().map(|t| f32::from(t) * self.scale).collect()
    }

    /// How many trits are -1, 0 and +1.
    pub fn counts(&self) -> [usize; 3] {
        // The low bit of a code is set for 0, the high bit for +1.
        let ones = |mask: u64| {
            let (words, rest) = self.packed.as_chunks();
            let words = words.iter().map(|word| (u64::from_le_bytes(*word) & mask).count_ones());
            let rest = rest.iter().map(|byte| (u64::from(*byte) & mask).count_ones());
            words.chain(rest).map(|n| n as usize).sum::<usize>()
        };
        // Rows are filled up with zeros.
        let all = self.packed.len() * TRITS_PER_BYTE_2BIT;
        let padding = all - self.rows * self.cols;
        let (zero, plus) = (ones(0x5555_5555_5555_5555), ones(0xaaaa_aaaa_aaaa_aaaa));
        [all - zero - plus, zero - padding, plus]
    }
}

fn area(rows: usize, cols: usize) -> Result<usize, TernaryError> {
    rows.checked_mul(cols).ok_or(TernaryError::TooLarge { rows, cols })
}

fn check_scale(scale: f32) -> Result<(), TernaryError> {
    let expected = "a finite number of at least 0";
    let allowed = scale.is_finite() && scale >= 0.0;
    if allowed { Ok(()) } else { Err(TernaryError::Scale { expected, scale }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requantizing_a_ternary_matrix_shrinks_its_scale() {
        // Why stored models are never quantized again (absmean is not idempotent).
        let m = TernaryMatrix::from_trits(&[1, 0, -1, 0], 2, 2, 0.5).unwrap();
        let again = TernaryMatrix::from_weights(&m.dequantize(), 2, 2).unwrap();
        assert_eq!(again.trits(), m.trits());
        assert_eq!(again.scale(), 0.25);
    }

    #[test]
    fn bad_trits_scales_and_shapes_are_refused() {
        let trit = TernaryMatrix::from_trits(&[0, 0, 0, 3], 2, 2, 1.0);
        assert_eq!(trit, Err(TernaryError::Trit { index: 3, value: 3 }));
        for scale in [f32::NAN, f32::INFINITY, -1.0] {
            let error = TernaryMatrix::from_trits(&[0], 1, 1, scale).unwrap_err();
            assert!(matches!(error, TernaryError::Scale { .. }));
            assert!(error.to_string().contains("at least 0"), "{error}");
        }
        assert_eq!(TernaryMatrix::from_trits(&[0], 1, 1, 0.0).unwrap().scale(), 0.0);
        assert!(matches!(
            TernaryMatrix::from_trits(&[0; 3], 2, 2, 1.0),
            Err(TernaryError::Length { .. })
        ));
        assert!(matches!(
            TernaryMatrix::from_weights(&[], usize::MAX, 2),
            Err(TernaryError::TooLarge { .. })
        ));
    }

    #[test]
    fn packed_bytes_are_taken_as_they_are_or_refused() {
        for cols in 1..10 {
            let trits: Vec<i8> = (0..3 * cols).map(|i| (i * 5 % 3) as i8 - 1).collect();
            let m = TernaryMatrix::from_trits(&trits, 3, cols, 0.5).unwrap();
            let from = |packed| TernaryMatrix::from_packed(packed, 3, cols, 0.5);
            assert_eq!(from(m.packed().to_vec()).unwrap(), m);
            // Every code of every byte, padding included, turned into a 3 and into another trit.
            for (index, shift) in (0..m.packed().len()).flat_map(|i| [0, 2, 4, 6].map(|s| (i, s))) {
                let column = index % cols.div_ceil(4) * 4 + shift / 2;
                let mut packed = m.packed().to_vec();
                packed[index] |= 3 << shift;
                let byte = packed[index];
                assert_eq!(from(packed.clone()), Err(TernaryError::Code { index, byte }));
                packed[index] = m.packed()[index] & !(3 << shift);
                packed[index] |= (((m.packed()[index] >> shift & 3) + 1) % 3) << shift;
                assert_eq!(from(packed).is_ok(), column < cols, "column {column} of {cols}");
            }
        }
        let short = TernaryMatrix::from_packed(vec![0; 2], 3, 4, 1.0);
        assert!(matches!(short, Err(TernaryError::Length { .. })));
        let scale = TernaryMatrix::from_packed(vec![0], 1, 4, f32::NAN);
        assert!(matches!(scale, Err(TernaryError::Scale { .. })));
        let large = TernaryMatrix::from_packed(vec![], usize::MAX, 9, 1.0);
        assert!(matches!(large, Err(TernaryError::TooLarge { .. })));
    }

    #[test]
    fn rows_move_whole() {
        let m = TernaryMatrix::from_trits(&[1, 0, 0, -1, 1, 1], 3, 2, 0.5).unwrap();
        assert_eq!(m.select_rows(|r| (r + 1) % 3).trits(), [0, -1, 1, 1, 1, 0]);
        assert_eq!(
            m.clone().with_scale(2.0).unwrap().dequantize(),
            [2.0, 0.0, 0.0, -2.0, 2.0, 2.0]
        );
        assert!(m.with_scale(-1.0).is_err());
    }

    #[test]
    fn positions_in_rows_are_positions_in_the_matrix() {
        let widen = |r: usize, out: &mut [f32]| {
            out.copy_from_slice(&[[1.0, 2.0, 3.0], [4.0, f32::INFINITY, 6.0]][r]);
        };
        let error = TernaryMatrix::from_weight_rows(2, 3, widen).unwrap_err();
        assert_eq!(error, TernaryError::NonFinite { index: 4, value: f32::INFINITY });
        let unpack = |r: usize, out: &mut [i8]| out.fill(r as i8);
        let error = TernaryMatrix::from_trit_rows(3, 3, 1.0, unpack).unwrap_err();
        assert_eq!(error, TernaryError::Trit { index: 6, value: 2 });
    }

    #[test]
    fn empty_matrices_are_allowed() {
        for (rows, cols) in [(0, 0), (3, 0), (0, 5)] {
            let m = TernaryMatrix::from_weights(&[], rows, cols).unwrap();
            assert_eq!(m.counts(), [0, 0, 0]);
        }
    }
}
