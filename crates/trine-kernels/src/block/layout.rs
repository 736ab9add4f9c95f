//! Matrices in blocks, as they lie in memory.
//!
//! Like trits (see `packed`), rows come in panels of sixteen and a panel is a sequence of lines of 64
//! bytes: byte `4 r + i` of a line belongs to row `r`, and to column `4 k + i` for one or more `k`.
//!
//! | type | lines of a block, in order |
//! | --- | --- |
//! | [`BlockKind::Q8_0`] | 8 lines for 32 columns: a byte is the code plus 128 of one column |
//! | [`BlockKind::Q4_0`] | 4 lines for 32 columns: a byte is two codes, of column `4 k + i` in its low and of column `4 (k + 1) + i` in its high half |
//! | [`BlockKind::Q6_K`] | 52 lines for 256 columns: 4 lines with the signed scales of 16 rows for 16 columns after 16 columns; then, for each 16 columns, 2 lines with the low 4 bits of codes, as those of Q4_0, and one with the high 2 bits, of column `i`, `4 + i`, `8 + i`, `12 + i` from the low bits up |
//! | [`BlockKind::Q3_K`] | 28 lines for 256 columns: 4 lines with scales, as those of Q6_K; then, for each 32 columns, 2 lines with the low 2 bits of codes, of 16 columns each as the high ones of Q6_K, and one with the high bits, of which bit `2 q` is that of column `4 q + i` and bit `2 q + 1` that of column `16 + 4 q + i` |
//!
//! Scales of Q3_K have 6 bits in a file and 8 here; everything else is as large. The f16 scales lie apart, sixteen rows for every block of a panel. Rows are padded with zeros to
//! whole panels.

use half::f16;

use crate::aligned::AlignedBuf;
use crate::packed::{Line, PANEL};
use crate::parallel;

/// Types of numbers in blocks, with the layout that a row has in a file of ggml.
///
/// `d` is a scale in f16, little-endian; codes of all but Q8_0 are unsigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum BlockKind {
    /// 34 bytes for 32 numbers: `d`, and 32 signed codes `q`. A number is `d * q`.
    Q8_0,
    /// 210 bytes for 256 numbers `(d * s[i / 16]) * (q[i] - 32)`: the low 4 bits of the codes in 128
    /// bytes, their high 2 bits in 64, 16 signed scales `s`, and `d`. In each half of 128 numbers, low
    /// byte `j < 32` holds `q[j]` and `q[j + 64]`, low byte `j + 32` holds `q[j + 32]` and `q[j + 96]`,
    /// and high byte `j` holds `q[j]`, `q[j + 32]`, `q[j + 64]`, `q[j + 96]`, from the low bits up.
    Q6_K,
    /// 18 bytes for 32 numbers: `d`, and 16 bytes of which `j` holds `q[j]` in its low and `q[j + 16]`
    /// in its high half. A number is `d * (q - 8)`.
    Q4_0,
    /// 110 bytes for 256 numbers `(d * s[i / 16]) * (q[i] - 4)`: the high bit of the codes in 32 bytes, their
    /// low 2 bits in 64, 16 scales in 12, and `d`. High byte `j` holds `q[j]`, `q[32 + j]`, ... from the low
    /// bit up; in each half of 128 numbers, low byte `j < 32` holds `q[j]`, `q[j + 32]`, `q[j + 64]`,
    /// `q[j + 96]`. Scales are 32 less than what is stored, of which byte `j < 8` holds the low 4 bits for
    /// `s[j]` and `s[j + 8]`, and byte `8 + j` the high 2 for `s[j]`, `s[j + 4]`, `s[j + 8]`, `s[j + 12]`.
    Q3_K,
}

impl BlockKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Q8_0, Self::Q6_K, Self::Q4_0, Self::Q3_K];

    /// Numbers in a block; rows are whole blocks.
    pub const fn block(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 => 32,
            Self::Q6_K | Self::Q3_K => 256,
        }
    }

    /// Bytes of a block in a file.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Q8_0 => 34,
            Self::Q6_K => 210,
            Self::Q4_0 => 18,
            Self::Q3_K => 110,
        }
    }

    /// Bytes of a block in memory.
    pub const fn memory_bytes(self) -> usize {
        self.lines() * size_of::<Line>() / PANEL + size_of::<f16>()
    }

    /// Where in a block of a file `d` is.
    pub(crate) const fn scale_at(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 => 0,
            Self::Q6_K | Self::Q3_K => self.block_bytes() - size_of::<f16>(),
        }
    }

    /// Lines of a block of a panel.
    pub(super) const fn lines(self) -> usize {
        match self {
            Self::Q8_0 => 8,
            Self::Q6_K => 52,
            Self::Q4_0 => 4,
            Self::Q3_K => 28,
        }
    }

    /// Columns of which codes are summed before a scale of their own comes in.
    pub(super) const fn group(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 => 32,
            Self::Q6_K | Self::Q3_K => 16,
        }
    }

    /// Most tokens that are multiplied together: what the registers hold the sums of.
    pub(super) const fn tile(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 => 8,
            Self::Q6_K | Self::Q3_K => 4,
        }
    }

    /// The code of 0, as the lines have it.
    pub(super) const fn zero(self) -> u8 {
        match self {
            Self::Q8_0 => 128,
            Self::Q6_K => 32,
            Self::Q4_0 => 8,
            Self::Q3_K => 4,
        }
    }
}

/// Columns that share a signed scale of Q6_K or Q3_K.
const SUB: usize = 16;
/// Such scales in a block.
const SUBS: usize = 16;
/// Lines of them at the start of a block.
pub(super) const SCALE_LINES: usize = PANEL * SUBS / size_of::<Line>();
/// Most columns in a block.
const LARGEST: usize = 256;

/// A `(rows, cols)` matrix in blocks, ready to multiply: the numbers of the file, bit for bit.
#[derive(Clone, Debug)]
pub struct BlockMatrix {
    kind: BlockKind,
    rows: usize,
    cols: usize,
    /// `(panels, blocks, lines of a block, 64)` bytes.
    lines: AlignedBuf<u8>,
    /// `(panels, blocks, 16)`
    scales: AlignedBuf<f16>,
}

/// The codes and scales of one row in one block.
struct Block {
    d: f16,
    /// As in the lines: unsigned, `zero()` more than the numbers.
    codes: [u8; LARGEST],
    subs: [i8; SUBS],
}

impl BlockMatrix {
    /// Takes the rows of a tensor as a file holds them.
    ///
    /// # Panics
    /// When rows are not whole blocks, or `bytes` are not `rows` such rows.
    pub fn new(kind: BlockKind, rows: usize, cols: usize, bytes: &[u8]) -> Self {
        let row_bytes = row_bytes(kind, cols);
        assert_eq!(Some(bytes.len()), rows.checked_mul(row_bytes), "blocks are not (rows, cols)");
        Self::from_rows(kind, rows, cols, |r, row| {
            row.copy_from_slice(&bytes[r * row_bytes..][..row_bytes]);
        })
    }

    /// Takes rows that `fill` writes as a file would hold them, each called for once, in any order
    /// and on any thread of the pool. `fill` gets a row's number and the bytes of its blocks, zeros.
    ///
    /// # Panics
    /// When rows are not whole blocks.
    pub fn from_rows(
        kind: BlockKind,
        rows: usize,
        cols: usize,
        fill: impl Fn(usize, &mut [u8]) + Sync,
    ) -> Self {
        let row_bytes = row_bytes(kind, cols);
        Self::from_panels(kind, rows, cols, |p, lines, scales| {
            let mut bytes = vec![0; row_bytes];
            for r in 0..PANEL.min(rows - p * PANEL) {
                bytes.fill(0);
                fill(p * PANEL + r, &mut bytes);
                let blocks = lines.chunks_exact_mut(kind.lines()).zip(&mut *scales);
                for ((lines, scales), bytes) in blocks.zip(bytes.chunks_exact(kind.block_bytes())) {
                    let block = Block::read(kind, bytes);
                    scales[r] = block.d;
                    block.put(kind, r, lines);
                }
            }
        })
    }

    /// Takes panels that `fill` writes as they lie in memory, each called for once, in any order and on
    /// any thread of the pool. `fill` gets a panel's number, its lines and its scales, zeros.
    ///
    /// # Panics
    /// When rows are not whole blocks.
    pub(super) fn from_panels(
        kind: BlockKind,
        rows: usize,
        cols: usize,
        fill: impl Fn(usize, &mut [Line], &mut [[f16; PANEL]]) + Sync,
    ) -> Self {
        // Rows that are no whole blocks have no bytes.
        row_bytes(kind, cols);
        // Without rows, columns may be more than there is memory for.
        let blocks = if rows == 0 { 0 } else { cols / kind.block() };
        let panels = rows.div_ceil(PANEL);
        let panel_lines = blocks * kind.lines();
        let mut lines = AlignedBuf::new(panels * panel_lines * size_of::<Line>());
        let mut scales = AlignedBuf::new(panels * blocks * PANEL);
        if blocks > 0 {
            let line_panels = lines.as_chunks_mut().0.chunks_mut(panel_lines);
            let scale_panels = scales.as_chunks_mut().0.chunks_mut(blocks);
            let mut work: Vec<_> = line_panels.zip(scale_panels).collect();
            parallel::for_each(&mut work, |p, (lines, scales)| fill(p, lines, scales));
        }
        Self { kind, rows, cols, lines, scales }
    }

    /// Type of the numbers.
    pub fn kind(&self) -> BlockKind {
        self.kind
    }

    /// Number of rows: output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns: input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes in memory: what one product reads.
    pub fn bytes(&self) -> usize {
        self.lines.len() + self.scales.len() * size_of::<f16>()
    }

    /// Row `r`, `(cols,)`, widened to f32 with the bits that ggml gives it.
    ///
    /// # Panics
    /// When there is no row `r`, or `out` is not `(cols,)`.
    pub fn row(&self, r: usize, out: &mut [f32]) {
        self.widen(r, out);
    }

    /// [`Self::row`], to be compiled for an instruction set.
    #[inline(always)]
    pub(super) fn widen(&self, r: usize, out: &mut [f32]) {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "a row has other columns");
        let (lines, scales) = self.panel(r / PANEL);
        let blocks = lines.chunks_exact(self.kind.lines()).zip(scales);
        for ((lines, scales), out) in blocks.zip(out.chunks_exact_mut(self.kind.block())) {
            let block = Block::get(self.kind, r % PANEL, scales[r % PANEL], lines);
            block.widen(self.kind, out);
        }
    }

    /// Where there are numbers that are not finite, the first of them, as if the matrix were stored
    /// row after row. They are those of blocks whose scale is not finite.
    pub fn first_not_finite(&self) -> Option<usize> {
        let blocks = self.cols / self.kind.block();
        let bad = |(i, d): (usize, &f16)| {
            let (panel, block, row) = (i / PANEL / blocks, i / PANEL % blocks, i % PANEL);
            let at = (panel * PANEL + row) * self.cols + block * self.kind.block();
            (!d.is_finite()).then_some(at)
        };
        self.scales.iter().enumerate().filter_map(bad).min()
    }

    /// Blocks of a row.
    pub(super) fn blocks(&self) -> usize {
        self.cols / self.kind.block()
    }

    /// Number of panels.
    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// The lines of panel `p`, and the scales of its blocks.
    #[inline(always)]
    pub(super) fn panel(&self, p: usize) -> (&[Line], &[[f16; PANEL]]) {
        let blocks = self.blocks();
        let lines = blocks * self.kind.lines();
        let (all, scales) = (self.lines.as_chunks().0, self.scales.as_chunks().0);
        (&all[p * lines..][..lines], &scales[p * blocks..][..blocks])
    }
}

/// Bytes of a row in a file.
fn row_bytes(kind: BlockKind, cols: usize) -> usize {
    let block = kind.block();
    assert!(cols.is_multiple_of(block), "rows of {cols} are not whole blocks of {block}");
    let bytes = (cols / block).checked_mul(kind.block_bytes());
    bytes.expect("a row within the address space")
}

impl Block {
    /// Reads a block of a file.
    #[inline(always)]
    fn read(kind: BlockKind, bytes: &[u8]) -> Self {
        let mut codes = [0; LARGEST];
        let mut subs = [0; SUBS];
        match kind {
            BlockKind::Q8_0 => {
                codes.iter_mut().zip(&bytes[2..]).for_each(|(code, byte)| *code = byte ^ 128);
            }
            BlockKind::Q4_0 => {
                let (low, high) = codes.split_at_mut(16);
                for ((low, high), byte) in low.iter_mut().zip(high).zip(&bytes[2..]) {
                    (*low, *high) = (byte & 15, byte >> 4);
                }
            }
            BlockKind::Q6_K => {
                let (low, rest) = bytes.split_at(128);
                let (high, rest) = rest.split_at(64);
                let halves = low.as_chunks::<64>().0.iter().zip(high.as_chunks::<32>().0);
                for (codes, (low, high)) in codes.as_chunks_mut::<128>().0.iter_mut().zip(halves) {
                    for j in 0..32 {
                        codes[j] = low[j] & 15 | (high[j] & 3) << 4;
                        codes[j + 32] = low[j + 32] & 15 | (high[j] >> 2 & 3) << 4;
                        codes[j + 64] = low[j] >> 4 | (high[j] >> 4 & 3) << 4;
                        codes[j + 96] = low[j + 32] >> 4 | (high[j] >> 6) << 4;
                    }
                }
                subs.iter_mut().zip(rest).for_each(|(sub, &byte)| *sub = byte as i8);
            }
            BlockKind::Q3_K => {
                let (high, rest) = bytes.split_at(32);
                let (low, rest) = rest.split_at(64);
                for (k, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    let low = &low[k / 4 * 32..][..32];
                    for ((code, low), high) in codes.iter_mut().zip(low).zip(high) {
                        *code = low >> (k % 4 * 2) & 3 | (high >> k & 1) << 2;
                    }
                }
                for (s, sub) in subs.iter_mut().enumerate() {
                    let (low, high) = (rest[s % 8] >> (s / 8 * 4), rest[8 + s % 4] >> (s / 4 * 2));
                    *sub = (low & 15 | (high & 3) << 4) as i8 - 32;
                }
            }
        }
        let at = kind.scale_at();
        Self { d: f16::from_le_bytes([bytes[at], bytes[at + 1]]), codes, subs }
    }

    /// Writes row `r` of the lines of a panel's block.
    #[inline(always)]
    fn put(&self, kind: BlockKind, r: usize, lines: &mut [Line]) {
        let words = self.codes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word));
        let mut words = words.take(kind.block() / 4);
        let store = |line: &mut Line, word: u32| {
            line[4 * r..][..4].copy_from_slice(&word.to_le_bytes());
        };
        let mut next = || words.next().unwrap_or(0);
        match kind {
            BlockKind::Q8_0 => lines.iter_mut().for_each(|line| store(line, next())),
            BlockKind::Q4_0 => lines.iter_mut().for_each(|line| store(line, next() | next() << 4)),
            BlockKind::Q6_K => {
                for [a, b, high] in self.put_subs(r, lines).as_chunks_mut::<3>().0 {
                    let [c0, c1, c2, c3] = [next(), next(), next(), next()];
                    let (low, top) = (0x0f0f_0f0f, 0x3030_3030);
                    store(a, c0 & low | (c1 & low) << 4);
                    store(b, c2 & low | (c3 & low) << 4);
                    store(high, (c0 & top) >> 4 | (c1 & top) >> 2 | c2 & top | (c3 & top) << 2);
                }
            }
            BlockKind::Q3_K => {
                for [a, b, high] in self.put_subs(r, lines).as_chunks_mut::<3>().0 {
                    let mut bits = 0;
                    for (g, low) in [a, b].into_iter().enumerate() {
                        let mut word = 0;
                        for q in 0..4 {
                            let codes = next();
                            word |= (codes & 0x0303_0303) << (2 * q);
                            bits |= (codes >> 2 & 0x0101_0101) << (2 * q + g);
                        }
                        store(low, word);
                    }
                    store(high, bits);
                }
            }
        }
    }

    /// Writes the scales of row `r` of the lines of a panel's block; returns the lines after them.
    #[inline(always)]
    fn put_subs<'a>(&self, r: usize, lines: &'a mut [Line]) -> &'a mut [Line] {
        let (scales, lines) = lines.split_at_mut(SCALE_LINES);
        let scales = scales.as_flattened_mut().as_chunks_mut::<PANEL>().0;
        scales.iter_mut().zip(self.subs).for_each(|(to, sub)| to[r] = sub as u8);
        lines
    }

    /// Reads row `r` of the lines of a panel's block.
    #[inline(always)]
    fn get(kind: BlockKind, r: usize, d: f16, lines: &[Line]) -> Self {
        let mut codes = [0; LARGEST];
        let mut subs = [0; SUBS];
        let mut words = codes.as_chunks_mut::<4>().0.iter_mut();
        let mut push = |word: [u8; 4]| words.next().into_iter().for_each(|to| *to = word);
        let load = |line: &Line| [0, 1, 2, 3].map(|i| line[4 * r + i]);
        let load_three =
            |lines: &[Line; 3]| lines.each_ref().map(|line| u32::from_le_bytes(load(line)));
        let mut get_subs = |lines: &[Line]| {
            let scales = lines[..SCALE_LINES].as_flattened().as_chunks::<PANEL>().0;
            subs.iter_mut().zip(scales).for_each(|(sub, from)| *sub = from[r] as i8);
        };
        match kind {
            BlockKind::Q8_0 => lines.iter().for_each(|line| push(load(line))),
            BlockKind::Q4_0 => lines.iter().for_each(|line| {
                push(load(line).map(|byte| byte & 15));
                push(load(line).map(|byte| byte >> 4));
            }),
            BlockKind::Q6_K => {
                get_subs(lines);
                for [a, b, high] in lines[SCALE_LINES..].as_chunks::<3>().0.iter().map(load_three) {
                    for q in 0..4 {
                        let low = if q < 2 { a } else { b } >> (q % 2 * 4) & 0x0f0f_0f0f;
                        push((low | (high >> (2 * q) & 0x0303_0303) << 4).to_le_bytes());
                    }
                }
            }
            BlockKind::Q3_K => {
                get_subs(lines);
                for [a, b, high] in lines[SCALE_LINES..].as_chunks::<3>().0.iter().map(load_three) {
                    for (g, low) in [a, b].into_iter().enumerate() {
                        for q in 0..4 {
                            let high = high >> (2 * q + g) & 0x0101_0101;
                            push((low >> (2 * q) & 0x0303_0303 | high << 2).to_le_bytes());
                        }
                    }
                }
            }
        }
        Self { d, codes, subs }
    }

    /// The numbers of the block, in ggml's order of multiplications.
    #[inline(always)]
    fn widen(&self, kind: BlockKind, out: &mut [f32]) {
        let d = self.d.to_f32();
        let number = |code: u8| f32::from(i16::from(code) - i16::from(kind.zero()));
        for (g, (out, codes)) in out.chunks_mut(SUB).zip(self.codes.chunks(SUB)).enumerate() {
            let scale = match kind {
                BlockKind::Q6_K | BlockKind::Q3_K => d * f32::from(self.subs[g]),
                BlockKind::Q8_0 | BlockKind::Q4_0 => d,
            };
            out.iter_mut().zip(codes).for_each(|(out, &code)| *out = scale * number(code));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of every byte, but for scales that are small numbers.
    fn rows(kind: BlockKind, rows: usize, cols: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            (0..rows * row_bytes(kind, cols)).map(|i| (i * 167 % 251 * 89 % 256) as u8).collect();
        for (i, block) in bytes.chunks_exact_mut(kind.block_bytes()).enumerate() {
            let d = f16::from_f32(((i * 31 % 101) as f32 - 50.0) / 4096.0).to_le_bytes();
            let at = kind.scale_at();
            block[at..at + 2].copy_from_slice(&d);
        }
        bytes
    }

    #[test]
    fn rows_are_those_of_the_file() {
        for kind in BlockKind::ALL {
            let (n, cols) = (19, 3 * kind.block());
            let bytes = rows(kind, n, cols);
            let matrix = BlockMatrix::new(kind, n, cols, &bytes);
            assert_eq!((matrix.kind(), matrix.rows(), matrix.cols()), (kind, n, cols));
            assert_eq!(matrix.bytes(), 32 * (cols / kind.block()) * kind.memory_bytes());
            let wider = kind.memory_bytes() - kind.block_bytes();
            assert_eq!(wider, if kind == BlockKind::Q3_K { 4 } else { 0 });
            let (mut found, mut expected) = (vec![0.0; cols], vec![0.0; cols]);
            for (r, row) in bytes.chunks_exact(row_bytes(kind, cols)).enumerate() {
                matrix.row(r, &mut found);
                let blocks = row.chunks_exact(kind.block_bytes());
                for (bytes, out) in blocks.zip(expected.chunks_exact_mut(kind.block())) {
                    Block::read(kind, bytes).widen(kind, out);
                }
                assert_eq!(found, expected, "{kind:?} row {r}");
            }
        }
    }

    #[test]
    fn a_number_is_that_of_the_definition() {
        let d = f16::from_f32(0.5).to_le_bytes();
        let one = |kind: BlockKind, bytes: &[u8], c: usize| {
            let mut out = vec![0.0; kind.block()];
            BlockMatrix::new(kind, 1, kind.block(), bytes).row(0, &mut out);
            out[c]
        };
        let mut q8 = [&d[..], &[0; 32]].concat();
        q8[2 + 7] = -100i8 as u8;
        assert_eq!((one(BlockKind::Q8_0, &q8, 7), one(BlockKind::Q8_0, &q8, 8)), (-50.0, 0.0));
        let mut q4 = [&d[..], &[0x88; 16]].concat();
        q4[2 + 3] = 0xf1;
        assert_eq!((one(BlockKind::Q4_0, &q4, 3), one(BlockKind::Q4_0, &q4, 19)), (-3.5, 3.5));
        assert_eq!(one(BlockKind::Q4_0, &q4, 4), 0.0);
        let mut q6 = [&[0; 192][..], &[3; 16], &d].concat();
        // Number 128 + 97: low byte 64 + 33, its high half; high byte 32 + 1, its top bits.
        (q6[64 + 33], q6[128 + 33], q6[192 + 14]) = (0x70, 0xc0, -2i8 as u8);
        assert_eq!(one(BlockKind::Q6_K, &q6, 128 + 97), 0.5 * -2.0 * (55.0 - 32.0));
        assert_eq!(one(BlockKind::Q6_K, &q6, 0), 0.5 * 3.0 * -32.0);
        let mut q3 = [&[0; 96][..], &[0x33; 8], &[0xaa; 4], &d].concat();
        // Number 128 + 97: bit 7 of high byte 1, low byte 32 + 1, its top bits; scale 14 is 0x23 less 32.
        (q3[1], q3[32 + 33]) = (0x80, 0xc0);
        assert_eq!(one(BlockKind::Q3_K, &q3, 128 + 97), 0.5 * 3.0 * (7.0 - 4.0));
        assert_eq!(one(BlockKind::Q3_K, &q3, 0), 0.5 * 3.0 * -4.0);
    }

    #[test]
    fn the_first_number_that_is_not_finite_is_found() {
        for kind in BlockKind::ALL {
            let (n, cols) = (37, 2 * kind.block());
            let mut bytes = rows(kind, n, cols);
            assert_eq!(BlockMatrix::new(kind, n, cols, &bytes).first_not_finite(), None);
            let at = kind.scale_at();
            for block in [2 * 34, 2 * 17 + 1, 2 * 16 + 1] {
                let d = f16::INFINITY.to_le_bytes();
                bytes[block * kind.block_bytes() + at..][..2].copy_from_slice(&d);
                let found = BlockMatrix::new(kind, n, cols, &bytes).first_not_finite();
                assert_eq!(found, Some(block * kind.block()));
            }
        }
    }

    #[test]
    fn empty_matrices_are_allowed() {
        for kind in BlockKind::ALL {
            for (rows, cols) in [(0, 0), (3, 0), (0, kind.block())] {
                let matrix = BlockMatrix::new(kind, rows, cols, &[]);
                assert_eq!((matrix.bytes(), matrix.first_not_finite()), (0, None));
            }
        }
    }

    #[test]
    #[should_panic(expected = "rows of 48 are not whole blocks of 32")]
    fn rows_that_are_no_whole_blocks_are_refused() {
        BlockMatrix::new(BlockKind::Q8_0, 1, 48, &[0; 51]);
    }
}
