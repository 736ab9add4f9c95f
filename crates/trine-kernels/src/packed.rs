//! Trits in the layouts that the kernels multiply.
//!
//! Rows come in panels of sixteen, so that a register of sixteen 32-bit sums is sixteen outputs and
//! nothing is ever added across lanes. A panel is a sequence of lines of 64 bytes, a cache line: byte
//! `4 r + i` of a line belongs to row `r` of the panel, and holds codes `trit + 1` of some of its
//! columns. Two packings differ in how many:
//!
//! | packing | a byte holds | columns of a line | bits a trit |
//! | --- | --- | --- | --- |
//! | [`Packing::Bits2`] | 4 codes, `c0 + 4 c1 + 16 c2 + 64 c3` | 16 | 2 |
//! | [`Packing::Trits5`] | 5 codes, `c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4` | 20 | 1.6 |
//!
//! Code `q` of byte `4 r + i` of line `l` is that of column `(l * D + q) * 4 + i`, where `D` is the
//! number of codes in a byte. Unpacking a line thus gives `D` vectors of 64 codes, each of four
//! consecutive columns of sixteen rows, and one broadcast of four activations meets all of them.
//! Products of codes become products of trits by one subtraction for each token:
//!
//! ```text
//! sum((trit + 1) * x) - sum(x) = sum(trit * x)
//! ```
//!
//! Rows are padded with trit 0 to whole lines and matrices with such rows to whole panels. The
//! layout lives in memory only. It is made from the canonical packing of `trine-ternary`; what lies
//! in files is the business of `trine-format`.

use trine_ternary::TernaryMatrix;

use crate::aligned::AlignedBuf;
use crate::parallel;

/// Rows of a panel.
pub(crate) const PANEL: usize = 16;

/// A cache line of a panel: four bytes for each of its rows.
pub(crate) type Line = [u8; 4 * PANEL];

/// How trits lie in memory; products are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Packing {
    /// Four trits in a byte: quick to unpack on any CPU.
    #[default]
    Bits2,
    /// Five trits in a byte: a fifth less to read from memory, at more work to unpack.
    Trits5,
}

impl Packing {
    /// Trits in a byte.
    pub fn digits(self) -> usize {
        match self {
            Self::Bits2 => 4,
            Self::Trits5 => 5,
        }
    }

    /// Columns in a line of a panel.
    pub(crate) fn line_cols(self) -> usize {
        4 * self.digits()
    }

    /// What a code is multiplied by for each position in a byte, from the first up.
    fn base(self) -> u32 {
        match self {
            Self::Bits2 => 4,
            Self::Trits5 => 3,
        }
    }
}

/// A `(rows, cols)` ternary matrix with one scale, ready to multiply; a projection's `(out, in)`.
#[derive(Clone, Debug)]
pub struct PackedMatrix {
    rows: usize,
    cols: usize,
    scale: f32,
    packing: Packing,
    /// `(ceil(rows / 16), lines, 64)` bytes.
    bytes: AlignedBuf<u8>,
}

impl PackedMatrix {
    /// Packs `matrix`.
    pub fn new(matrix: &TernaryMatrix, packing: Packing) -> Self {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        // Without rows, columns may be more than there is memory for.
        let lines = if rows == 0 { 0 } else { cols.div_ceil(packing.line_cols()) };
        let panel_bytes = lines * size_of::<Line>();
        let mut bytes = AlignedBuf::new(rows.div_ceil(PANEL) * panel_bytes);
        if !bytes.is_empty() {
            parallel::for_each_chunk(&mut bytes, panel_bytes, |p, panel| {
                let mut trits = vec![0; lines * packing.line_cols()];
                for r in 0..PANEL {
                    // The padding stays 0, the trit that adds nothing.
                    match p * PANEL + r {
                        row if row < rows => matrix.unpack_row(row, &mut trits[..cols]),
                        _ => trits.fill(0),
                    }
                    pack_row(&trits, packing, r, panel);
                }
            });
        }
        Self { rows, cols, scale: matrix.scale(), packing, bytes }
    }

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

    /// How the trits lie in memory.
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// The packed trits: what one product reads from memory.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Number of panels.
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Lines of a panel.
    pub(crate) fn lines(&self) -> usize {
        self.cols.div_ceil(self.packing.line_cols())
    }

    /// The lines of panel `p`.
    #[inline(always)]
    pub(crate) fn panel(&self, p: usize) -> &[Line] {
        let lines = self.lines();
        &self.bytes.as_chunks().0[p * lines..][..lines]
    }
}

impl From<&TernaryMatrix> for PackedMatrix {
    /// Packs in 2 bits, which is the quickest to make.
    fn from(matrix: &TernaryMatrix) -> Self {
        Self::new(matrix, Packing::default())
    }
}

/// Writes row `r` of a panel; `trits` fill its lines.
fn pack_row(trits: &[i8], packing: Packing, r: usize, panel: &mut [u8]) {
    match packing {
        Packing::Bits2 => pack_row_of::<4>(trits, packing.base(), r, panel),
        Packing::Trits5 => pack_row_of::<5>(trits, packing.base(), r, panel),
    }
}

fn pack_row_of<const D: usize>(trits: &[i8], base: u32, r: usize, panel: &mut [u8]) {
    let words = trits.as_chunks::<4>().0.as_chunks::<D>().0;
    for (line, words) in panel.as_chunks_mut::<{ 4 * PANEL }>().0.iter_mut().zip(words) {
        // Four bytes at once: no code, and no sum of codes, reaches into the next byte.
        let code = |word: &[i8; 4]| u32::from_le_bytes(word.map(|trit| (trit + 1) as u8));
        let packed = words.iter().rev().fold(0, |packed, word| packed * base + code(word));
        line[4 * r..][..4].copy_from_slice(&packed.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_four_columns_of_sixteen_rows_in_every_code() {
        for packing in [Packing::Bits2, Packing::Trits5] {
            let (rows, cols, d) = (19, 43, packing.digits());
            let trits: Vec<i8> = (0..rows * cols).map(|i| (i * i % 251 % 3) as i8 - 1).collect();
            let matrix = TernaryMatrix::from_trits(&trits, rows, cols, 0.5).unwrap();
            let m = PackedMatrix::new(&matrix, packing);
            assert_eq!((m.rows(), m.cols(), m.scale(), m.packing()), (rows, cols, 0.5, packing));
            assert_eq!((m.panels(), m.lines()), (2, 3));
            for r in 0..32 {
                for c in 0..m.lines() * 4 * d {
                    let (l, q, i) = (c / (4 * d), c / 4 % d, c % 4);
                    let byte = u32::from(m.panel(r / 16)[l][4 * (r % 16) + i]);
                    let base = if d == 4 { 4u32 } else { 3 };
                    let code = byte / base.pow(q as u32) % base;
                    let trit = if r < rows && c < cols { trits[r * cols + c] } else { 0 };
                    assert_eq!(code as i8 - 1, trit, "{packing:?} row {r} column {c}");
                }
            }
            assert_eq!(m.bytes().as_ptr().align_offset(64), 0);
        }
    }

    #[test]
    fn empty_matrices_are_allowed() {
        for (rows, cols) in [(0, 0), (3, 0), (0, 5), (0, usize::MAX)] {
            let matrix = TernaryMatrix::from_trits(&[], rows, cols, 1.0).unwrap();
            for packing in [Packing::Bits2, Packing::Trits5] {
                let m = PackedMatrix::new(&matrix, packing);
                assert_eq!((m.rows(), m.cols(), m.bytes().len()), (rows, cols, 0));
            }
        }
    }
}
