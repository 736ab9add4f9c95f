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
//! | [`Packing::Trits5`] | 5 codes, as `trits5` says | 20 | 1.6 |
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

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use rayon::prelude::*;
use trine_ternary::{TernaryError, TernaryMatrix, absmean, ternarize};

use crate::aligned::AlignedBuf;
use crate::arch::{Kernel, Simd, dispatch};
use crate::isa::isa;
use crate::parallel;
use crate::trits5::{BYTES, DIGITS};

/// Rows of a panel.
pub(crate) const PANEL: usize = 16;

/// A cache line of a panel: four bytes for each of its rows.
pub(crate) type Line = [u8; 4 * PANEL];

/// How trits lie in memory; products are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Packing {
    /// Four trits in a byte: quick to unpack on any CPU.
    Bits2,
    /// Five trits in a byte: a fifth less to read from memory, at more work to unpack.
    Trits5,
}

impl Packing {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Bits2, Self::Trits5];

    /// A name, which parses back.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bits2 => "2bit",
            Self::Trits5 => "1.6bit",
        }
    }

    /// Trits in a byte.
    pub fn digits(self) -> usize {
        match self {
            Self::Bits2 => 4,
            Self::Trits5 => DIGITS,
        }
    }

    /// Columns in a line of a panel.
    pub(crate) fn line_cols(self) -> usize {
        4 * self.digits()
    }
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Packing {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|packing| packing.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            format!("unknown packing {name:?}: expected one of {known}")
        })
    }
}

/// A `(rows, cols)` ternary matrix with one scale, ready to multiply; a projection's `(out, in)`.
#[derive(Clone, Debug)]
pub struct PackedMatrix {
    rows: usize,
    cols: usize,
    scale: f32,
    packing: Packing,
    /// Holds the trits, perhaps of other matrices too.
    buffer: Arc<AlignedBuf<u8>>,
    /// Where they are: `(ceil(rows / 16), lines, 64)` bytes.
    bytes: Range<usize>,
}

impl PackedMatrix {
    /// Packs `matrix`.
    pub fn new(matrix: &TernaryMatrix, packing: Packing) -> Self {
        let size = size(matrix.rows(), matrix.cols(), packing);
        let mut buffer = AlignedBuf::new(size);
        pack(matrix, packing, &mut buffer);
        let (rows, cols, scale) = (matrix.rows(), matrix.cols(), matrix.scale());
        Self { rows, cols, scale, packing, buffer: Arc::new(buffer), bytes: 0..size }
    }

    /// Quantizes full-precision weights, `(rows, cols)` row-major, as
    /// [`TernaryMatrix::from_weights`] does, and packs them in 2 bits, on all threads.
    ///
    /// # Errors
    /// Weights that are not finite, or not `rows * cols` of them.
    pub fn from_weights(weights: &[f32], rows: usize, cols: usize) -> Result<Self, TernaryError> {
        let mut packed = Self::default();
        packed.refill(weights, rows, cols)?;
        Ok(packed)
    }

    /// As [`Self::from_weights`], in the memory of what was here, unless other matrices share it.
    ///
    /// # Errors
    /// As [`Self::from_weights`]; the matrix is then what it was.
    pub fn refill(
        &mut self,
        weights: &[f32],
        rows: usize,
        cols: usize,
    ) -> Result<(), TernaryError> {
        let expected = rows.saturating_mul(cols);
        if weights.len() != expected {
            return Err(TernaryError::Length { what: "weights", expected, found: weights.len() });
        }
        let (packing, scale) = (Packing::Bits2, absmean(weights)?);
        let size = size(rows, cols, packing);
        let buffer = self.own();
        buffer.resize(size);
        let ternarized = |row: usize, trits: &mut [i8]| {
            // All weights are finite and the scale is theirs: the only errors there are.
            dispatch(isa(), Ternarize { weights: &weights[row * cols..][..cols], scale, trits });
        };
        pack_rows(rows, cols, packing, buffer, ternarized);
        (self.rows, self.cols, self.scale, self.packing) = (rows, cols, scale, packing);
        self.bytes = 0..size;
        Ok(())
    }

    /// Becomes the transpose of `of`, with `factor` times its scale, in the memory of what was here.
    ///
    /// # Panics
    /// When the trits of `of` are not packed in 2 bits.
    pub fn transpose(&mut self, of: &Self, factor: f32) {
        assert_eq!(of.packing, Packing::Bits2, "trits that are transposed");
        let (rows, cols, packing) = (of.cols, of.rows, Packing::Bits2);
        let size = size(rows, cols, packing);
        let panel_size = panel_size(cols, packing);
        let buffer = self.own();
        buffer.resize(size);
        if size > 0 {
            // A line of a panel is a square of sixteen rows and columns, and so is that which it becomes.
            parallel::for_each_chunk(buffer, panel_size, |p, panel| {
                let lines = panel.as_chunks_mut::<{ 4 * PANEL }>().0.iter_mut().enumerate();
                lines.for_each(|(l, line)| *line = transposed(&of.panel(l)[p]));
            });
        }
        (self.rows, self.cols, self.scale, self.packing) = (rows, cols, factor * of.scale, packing);
        self.bytes = 0..size;
    }

    /// The memory of this matrix, another if there are more matrices in it.
    fn own(&mut self) -> &mut AlignedBuf<u8> {
        if Arc::get_mut(&mut self.buffer).is_none() {
            self.buffer = Arc::default();
        }
        Arc::get_mut(&mut self.buffer).expect("a buffer of its own")
    }

    /// Packs matrices of the given shapes `(rows, cols)` into one stretch of memory, one after
    /// another: a pass over all of them then reads on and on, mostly in large pages. `matrix` makes
    /// the one of an index; it is called once for each, from several threads.
    ///
    /// # Errors
    /// The first error of `matrix`, in the order of the indices.
    ///
    /// # Panics
    /// When a matrix is not of its shape.
    pub fn pack_all<E: Send>(
        shapes: &[(usize, usize)],
        packing: Packing,
        matrix: impl Fn(usize) -> Result<TernaryMatrix, E> + Sync,
    ) -> Result<Vec<Self>, E> {
        let sizes: Vec<_> = shapes.iter().map(|&(rows, cols)| size(rows, cols, packing)).collect();
        let mut buffer = AlignedBuf::new(sizes.iter().sum());
        let mut rest = &mut buffer[..];
        let parts = sizes.iter().filter_map(|&size| rest.split_off_mut(..size)).collect::<Vec<_>>();
        let packed: Vec<_> = parts
            .into_par_iter()
            .enumerate()
            .map(|(i, bytes)| {
                let matrix = matrix(i)?;
                assert_eq!((matrix.rows(), matrix.cols()), shapes[i], "a matrix of another shape");
                pack(&matrix, packing, bytes);
                // Its trits are not needed any more.
                Ok((matrix.rows(), matrix.cols(), matrix.scale()))
            })
            .collect();
        let buffer = Arc::new(buffer);
        let mut start = 0;
        let place = |(described, size): (Result<_, E>, usize)| {
            let (rows, cols, scale) = described?;
            start += size;
            let bytes = start - size..start;
            Ok(Self { rows, cols, scale, packing, buffer: Arc::clone(&buffer), bytes })
        };
        packed.into_iter().zip(sizes).map(place).collect()
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
        &self.buffer[self.bytes.clone()]
    }

    /// Writes what the trits stand for, `trit * scale`, `(rows, cols)`.
    ///
    /// # Panics
    /// When `out` is not `(rows, cols)`, or the trits are not packed in 2 bits.
    pub fn dequantize(&self, out: &mut [f32]) {
        assert_eq!(out.len(), self.rows * self.cols, "output is not (rows, cols)");
        assert_eq!(self.packing, Packing::Bits2, "trits that are dequantized");
        parallel::for_each_chunk(out, self.cols.max(1), |r, row| {
            self.floats_from(r, 0, row);
            row.iter_mut().for_each(|v| *v *= self.scale);
        });
    }

    /// Writes the trits of row `r` to `out`, `(cols,)`.
    ///
    /// # Panics
    /// When there is no row `r`, or the trits are not packed in 2 bits.
    pub fn unpack_row(&self, r: usize, out: &mut [i8]) {
        assert!(r < self.rows && out.len() == self.cols, "not a row of the matrix");
        assert_eq!(self.packing, Packing::Bits2, "trits that are unpacked");
        self.row_from(r, 0, out, |trit| trit);
    }

    /// Writes the trits of row `r` from column `first` on, of a matrix in 2 bits; `first` is a multiple
    /// of sixteen.
    #[inline(always)]
    pub(crate) fn floats_from(&self, r: usize, first: usize, out: &mut [f32]) {
        self.row_from(r, first, out, f32::from);
    }

    /// As that, what `make` makes of them.
    #[inline(always)]
    fn row_from<T: Copy>(&self, r: usize, first: usize, out: &mut [T], make: impl Fn(i8) -> T) {
        let lines = &self.panel(r / PANEL)[first / 16..];
        for (out, line) in out.chunks_mut(16).zip(lines) {
            let word: [u8; 4] = std::array::from_fn(|i| line[4 * (r % PANEL) + i]);
            let column = |c: usize| make((word[c % 4] >> (c / 4 * 2) & 3) as i8 - 1);
            match out.first_chunk_mut::<16>() {
                Some(out) => *out = std::array::from_fn(column),
                None => out.iter_mut().enumerate().for_each(|(c, out)| *out = column(c)),
            }
        }
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
        &self.bytes().as_chunks().0[p * lines..][..lines]
    }
}

impl Default for PackedMatrix {
    /// No rows and no columns.
    fn default() -> Self {
        let (packing, buffer) = (Packing::Bits2, Arc::default());
        Self { rows: 0, cols: 0, scale: 1.0, packing, buffer, bytes: 0..0 }
    }
}

impl From<&TernaryMatrix> for PackedMatrix {
    /// Packs in 2 bits, which is the quickest to make.
    fn from(matrix: &TernaryMatrix) -> Self {
        Self::new(matrix, Packing::Bits2)
    }
}

/// Bytes of a packed matrix.
fn size(rows: usize, cols: usize, packing: Packing) -> usize {
    // Without rows, columns may be more than there is memory for.
    if rows == 0 { 0 } else { rows.div_ceil(PANEL) * panel_size(cols, packing) }
}

fn panel_size(cols: usize, packing: Packing) -> usize {
    cols.div_ceil(packing.line_cols()) * size_of::<Line>()
}

/// The definition's trits of a row. It is dispatched like a kernel, so that it can compile to the
/// instructions of the CPU; the result is the same.
struct Ternarize<'a> {
    weights: &'a [f32],
    scale: f32,
    trits: &'a mut [i8],
}

impl Kernel for Ternarize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        ternarize(self.weights, self.scale, self.trits).expect("finite weights and their scale");
    }
}

/// Writes the panels of a matrix.
fn pack(matrix: &TernaryMatrix, packing: Packing, bytes: &mut [u8]) {
    pack_rows(matrix.rows(), matrix.cols(), packing, bytes, |row, trits| {
        matrix.unpack_row(row, trits);
    });
}

/// Writes panels of the rows that `unpack` gives, `(cols,)` trits each.
fn pack_rows(
    rows: usize,
    cols: usize,
    packing: Packing,
    bytes: &mut [u8],
    unpack: impl Fn(usize, &mut [i8]) + Sync,
) {
    if bytes.is_empty() {
        return;
    }
    let panel_size = panel_size(cols, packing);
    parallel::for_each_chunk(bytes, panel_size, |p, panel| {
        let mut trits = vec![0; cols.next_multiple_of(packing.line_cols())];
        for r in 0..PANEL {
            // The padding stays 0, the trit that adds nothing.
            match p * PANEL + r {
                row if row < rows => unpack(row, &mut trits[..cols]),
                _ => trits.fill(0),
            }
            pack_row(&trits, packing, r, panel);
        }
    });
}

/// Writes row `r` of a panel; `trits` fill its lines.
fn pack_row(trits: &[i8], packing: Packing, r: usize, panel: &mut [u8]) {
    match packing {
        Packing::Bits2 => pack_row_of::<4, 4>(trits, r, panel, |packed| packed),
        Packing::Trits5 => {
            pack_row_of::<DIGITS, 3>(trits, r, panel, |code| BYTES[usize::from(code)])
        }
    }
}

fn pack_row_of<const D: usize, const BASE: u32>(
    trits: &[i8],
    r: usize,
    panel: &mut [u8],
    byte: impl Fn(u8) -> u8,
) {
    let words = trits.as_chunks::<4>().0.as_chunks::<D>().0;
    for (line, words) in panel.as_chunks_mut::<{ 4 * PANEL }>().0.iter_mut().zip(words) {
        // Four bytes at once: no code, and no sum of codes, reaches into the next byte.
        let packed = words.iter().rev().fold(0, |packed, word| packed * BASE + codes(*word));
        let [a, b, c, d] = packed.to_le_bytes();
        line[4 * r..][..4].copy_from_slice(&[byte(a), byte(b), byte(c), byte(d)]);
    }
}

/// The square of sixteen rows and columns that a line in 2 bits holds, on its side.
#[inline(always)]
fn transposed(line: &Line) -> Line {
    const CODES: u32 = 0x0303_0303;
    let words: [u32; PANEL] = std::array::from_fn(|r| u32::from_le_bytes(line.as_chunks().0[r]));
    let mut turned = [0; 4 * PANEL];
    for (q, rows) in turned.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
        // Byte `i` of word `j`: what row `4 q + i` has in the columns `j`, `4 + j`, `8 + j`, `12 + j`.
        let word = |j: usize| {
            (0..4).fold(0, |word, s| word | (words[4 * s + j] >> (2 * q) & CODES) << (2 * s))
        };
        let bytes: [[u8; 4]; 4] = std::array::from_fn(|j| word(j).to_le_bytes());
        *rows = std::array::from_fn(|at| bytes[at % 4][at / 4]);
    }
    turned
}

/// The codes of four trits: their two low bits, which are one less, plus one.
#[inline(always)]
fn codes(trits: [i8; 4]) -> u32 {
    const FOUR: u32 = 0x0303_0303;
    let [a, b, c, d] = trits;
    let low = u32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]) & FOUR;
    (low + 0x0101_0101) & FOUR
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trits5;

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
                    let byte = m.panel(r / 16)[l][4 * (r % 16) + i];
                    let code = match packing {
                        Packing::Bits2 => byte >> (2 * q) & 3,
                        Packing::Trits5 => trits5::digits(byte)[q],
                    };
                    let trit = if r < rows && c < cols { trits[r * cols + c] } else { 0 };
                    assert_eq!(code as i8 - 1, trit, "{packing:?} row {r} column {c}");
                }
            }
            assert_eq!(m.bytes().as_ptr().align_offset(64), 0);
        }
    }

    #[test]
    fn a_transpose_has_columns_for_rows() {
        let mut turned = PackedMatrix::default();
        for (rows, cols) in [(40, 70), (16, 16), (19, 43), (1, 33), (5, 0), (0, 3), (160, 90)] {
            let trits: Vec<i8> = (0..rows * cols).map(|i| (i * i % 251 % 3) as i8 - 1).collect();
            let other: Vec<i8> =
                (0..rows * cols).map(|i| trits[i % rows * cols + i / rows]).collect();
            let packed = |trits: &[i8], rows, cols| {
                PackedMatrix::from(&TernaryMatrix::from_trits(trits, rows, cols, 0.5).unwrap())
            };
            turned.transpose(&packed(&trits, rows, cols), 0.25);
            let expected = packed(&other, cols, rows);
            assert_eq!((turned.rows(), turned.cols(), turned.scale()), (cols, rows, 0.125));
            assert!(turned.bytes() == expected.bytes(), "{rows} x {cols}");
        }
    }

    #[test]
    fn matrices_packed_together_are_those_packed_alone() {
        let shapes = [(19, 43), (0, 5), (16, 20), (3, 0), (33, 16)];
        let matrix = |i: usize| {
            let (rows, cols) = shapes[i];
            let trits: Vec<i8> = (0..rows * cols).map(|j| ((i + j * j) % 3) as i8 - 1).collect();
            TernaryMatrix::from_trits(&trits, rows, cols, 1.0 + i as f32)
        };
        for packing in [Packing::Bits2, Packing::Trits5] {
            let packed = PackedMatrix::pack_all(&shapes, packing, matrix).unwrap();
            for (i, m) in packed.iter().enumerate() {
                let alone = PackedMatrix::new(&matrix(i).unwrap(), packing);
                assert_eq!(
                    (m.rows(), m.cols(), m.scale()),
                    (shapes[i].0, shapes[i].1, alone.scale)
                );
                assert_eq!(m.bytes(), alone.bytes());
            }
        }
        let fail = |i| if i % 2 == 1 { Err(i) } else { Ok(matrix(i).unwrap()) };
        assert_eq!(PackedMatrix::pack_all(&shapes, Packing::Bits2, fail).unwrap_err(), 1);
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
