//! Trits in the layout that the kernels multiply.
//!
//! A row is padded with trit 0 to a multiple of 256 columns. A block of 256 trits takes 64 bytes, a
//! cache line: byte `j` holds the codes `trit + 1` of `v[j]`, `v[j + 64]`, `v[j + 128]` and
//! `v[j + 192]`, from the low bits up. One 64-byte load, three shifts and four masks thus give four
//! vectors of unsigned codes, whose columns are 64 apart as those of the activations are; nothing
//! is shuffled. Products of codes become products of trits by one subtraction for each token:
//!
//! ```text
//! sum((trit + 1) * x) - sum(x) = sum(trit * x)
//! ```
//!
//! The layout lives in memory only. It is made from, and can be remade into, the canonical packing
//! of `trine-ternary`; what lies in files is the business of `trine-format`.

use rayon::prelude::*;
use trine_ternary::TernaryMatrix;

use crate::aligned::AlignedBuf;

/// Columns in a block: rows are padded to a multiple of it.
pub(crate) const BLOCK: usize = 256;

/// The trits of a block, in a quarter of its bytes.
pub(crate) type WeightBlock = [u8; BLOCK / 4];

/// A `(rows, cols)` ternary matrix with one scale, ready to multiply; a projection's `(out, in)`.
#[derive(Clone, Debug)]
pub struct PackedMatrix {
    rows: usize,
    cols: usize,
    scale: f32,
    /// `(rows, ceil(cols / 256), 64)` bytes.
    bytes: AlignedBuf<u8>,
}

impl PackedMatrix {
    /// Number of rows: output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns: input features, without the padding.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// What a trit is multiplied by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The packed trits, `(rows, ceil(cols / 256), 64)` bytes: what one product reads from memory.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The blocks of row `r`, `(ceil(cols / 256),)`.
    #[inline(always)]
    pub(crate) fn row(&self, r: usize) -> &[WeightBlock] {
        let blocks = self.cols.div_ceil(BLOCK);
        &self.bytes.as_chunks().0[r * blocks..][..blocks]
    }
}

impl From<&TernaryMatrix> for PackedMatrix {
    fn from(matrix: &TernaryMatrix) -> Self {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let row_bytes = cols.div_ceil(BLOCK) * size_of::<WeightBlock>();
        let mut bytes = AlignedBuf::new(rows * row_bytes);
        if !bytes.is_empty() {
            bytes.par_chunks_exact_mut(row_bytes).enumerate().for_each_init(
                // The padding stays 0, the trit that adds nothing.
                || vec![0i8; row_bytes * 4],
                |trits, (r, row)| {
                    matrix.unpack_row(r, &mut trits[..cols]);
                    for (block, trits) in row.as_chunks_mut().0.iter_mut().zip(trits.as_chunks().0)
                    {
                        *block = pack_block(trits);
                    }
                },
            );
        }
        Self { rows, cols, scale: matrix.scale(), bytes }
    }
}

fn pack_block(trits: &[i8; BLOCK]) -> WeightBlock {
    let code = |i: usize| (trits[i] + 1) as u8;
    std::array::from_fn(|j| code(j) | code(j + 64) << 2 | code(j + 128) << 4 | code(j + 192) << 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_holds_trits_64_apart_from_the_low_bits_up() {
        let mut trits = [0; 300];
        (trits[5], trits[69], trits[133], trits[197]) = (-1, 1, 0, 1);
        trits[256] = -1;
        let m = PackedMatrix::from(&TernaryMatrix::from_trits(&trits, 1, 300, 0.5).unwrap());
        assert_eq!((m.rows(), m.cols(), m.scale(), m.bytes().len()), (1, 300, 0.5, 128));
        assert_eq!(m.bytes()[4], 0b01_01_01_01);
        assert_eq!(m.bytes()[5], 0b10_01_10_00);
        assert_eq!(m.bytes()[64], 0b01_01_01_00);
        assert_eq!(m.bytes()[127], 0b01_01_01_01, "padding is trit 0");
        assert_eq!(m.bytes().as_ptr().align_offset(64), 0);
    }

    #[test]
    fn empty_matrices_are_allowed() {
        for (rows, cols) in [(0, 0), (3, 0), (0, 5), (0, usize::MAX)] {
            let m = PackedMatrix::from(&TernaryMatrix::from_trits(&[], rows, cols, 1.0).unwrap());
            assert_eq!((m.rows(), m.cols(), m.bytes().len()), (rows, cols, 0));
        }
    }
}
