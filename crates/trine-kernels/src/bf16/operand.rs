//! The two sides of a product, rounded to bfloat16 and laid out for tiles.
//!
//! A side is filled anew for each product and keeps its memory: the sides of a training step are some
//! megabytes each, and clearing fresh pages would take longer than filling them.

use super::{COLS, GROUP, Pair, ROWS, STEP, is_native};
use crate::activations::Activations;
use crate::aligned::AlignedBuf;
use crate::arch::{Kernel, Simd, bfloat as arch, dispatch};
use crate::isa::isa;
use crate::packed::{PackedMatrix, Packing};
use crate::parallel;

/// The left side of a product, `(rows, k)`.
#[derive(Debug, Default)]
pub struct Left {
    pub(super) rows: usize,
    pub(super) k: usize,
    /// How pairs lie in a block of rows.
    pub(super) order: Order,
    /// `(ceil(rows / 12), pairs, 12)` pairs in the order of columns, `(.., pairs / 16, 12, 16)` in that
    /// of rows.
    data: AlignedBuf<Pair>,
}

/// How the pairs of twelve rows lie: as they are made without turning what they are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Order {
    /// Sixteen pairs of a row, then those of the next.
    #[default]
    Rows,
    /// A pair of each row, then the next.
    Columns,
}

/// The right side of a product, `(k, cols)`.
#[derive(Debug, Default)]
pub struct Right {
    pub(super) k: usize,
    pub(super) cols: usize,
    /// `(ceil(cols / 32), pairs, 32)` pairs.
    data: AlignedBuf<Pair>,
}

/// Pairs along `k`, in whole steps.
pub(super) fn pairs(k: usize) -> usize {
    k.div_ceil(2).next_multiple_of(STEP)
}

impl Left {
    /// Takes `x` `(rows, k)`.
    ///
    /// # Panics
    /// When `x` is not `(rows, k)`.
    pub fn fill_rows(&mut self, x: &[f32], rows: usize, k: usize) {
        assert_eq!(Some(x.len()), rows.checked_mul(k), "the left side is not (rows, k)");
        self.fill_each_row(rows, k, |row| &x[row * k..][..k]);
    }

    /// Takes rows `(k,)`.
    pub fn fill_each_row<'x>(
        &mut self,
        rows: usize,
        k: usize,
        row: impl Fn(usize) -> &'x [f32] + Sync,
    ) {
        let data = self.prepare(rows, k, Order::Rows);
        parallel::for_each_chunk(data, pairs(k) * ROWS, |i, block| {
            for r in 0..ROWS {
                let at = i * ROWS + r;
                let row = if at < rows { &row(at)[..k] } else { &[] };
                fill_row(row, &mut block[r * STEP..], ROWS * STEP);
            }
        });
    }

    /// Takes the transpose of `x` `(k, rows)`.
    ///
    /// # Panics
    /// When `x` is not `(k, rows)`.
    pub fn fill_columns(&mut self, x: &[f32], k: usize, rows: usize) {
        self.fill_scaled_columns(x, k, rows, |_| 1.0);
    }

    /// Takes the transpose of `x` `(k, rows)`, of which line `i` is multiplied by `scale(i)`.
    ///
    /// # Panics
    /// When `x` is not `(k, rows)`.
    pub fn fill_scaled_columns(
        &mut self,
        x: &[f32],
        k: usize,
        rows: usize,
        scale: impl Fn(usize) -> f32 + Sync,
    ) {
        assert_eq!(Some(x.len()), rows.checked_mul(k), "the left side is not (k, rows)");
        (self.rows, self.k, self.order) = (rows, k, Order::Columns);
        fill_lines::<ROWS>(
            &mut self.data,
            k,
            rows,
            &Scaled { k, row: |i: usize| &x[i * rows..][..rows], scale },
        );
    }

    /// Takes a shape, and returns the pairs, which are to be filled.
    pub(super) fn prepare(&mut self, rows: usize, k: usize, order: Order) -> &mut [Pair] {
        (self.rows, self.k, self.order) = (rows, k, order);
        self.data.resize(rows.div_ceil(ROWS) * pairs(k) * ROWS);
        &mut self.data
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Length of the sums.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The pairs of rows `12 i..12 i + 12`.
    pub(super) fn block(&self, i: usize) -> &[Pair] {
        let len = pairs(self.k) * ROWS;
        &self.data[i * len..][..len]
    }
}

impl Right {
    /// Takes `x` `(k, cols)`.
    ///
    /// # Panics
    /// When `x` is not `(k, cols)`.
    pub fn fill_rows(&mut self, x: &[f32], k: usize, cols: usize) {
        assert_eq!(Some(x.len()), cols.checked_mul(k), "the right side is not (k, cols)");
        self.fill(k, cols, &Plain { x, len: cols });
    }

    /// Takes lines `(cols,)`, of which line `i` is multiplied by `scale(i)`.
    pub fn fill_each_row<'x>(
        &mut self,
        k: usize,
        cols: usize,
        row: impl Fn(usize) -> &'x [f32] + Sync,
        scale: impl Fn(usize) -> f32 + Sync,
    ) {
        self.fill(k, cols, &Scaled { k, row, scale });
    }

    /// Takes the transpose of `x` `(cols, k)`.
    ///
    /// # Panics
    /// When `x` is not `(cols, k)`.
    pub fn fill_columns(&mut self, x: &[f32], cols: usize, k: usize) {
        assert_eq!(Some(x.len()), cols.checked_mul(k), "the right side is not (cols, k)");
        self.fill_each_column(cols, k, |column| &x[column * k..][..k]);
    }

    /// Takes columns `(k,)`.
    pub fn fill_each_column<'x>(
        &mut self,
        cols: usize,
        k: usize,
        column: impl Fn(usize) -> &'x [f32] + Sync,
    ) {
        (self.k, self.cols) = (k, cols);
        let panel = pairs(k) * COLS;
        self.data.resize(cols.div_ceil(COLS) * panel);
        parallel::for_each_chunk(&mut self.data, panel, |i, panel| {
            let mut columns = [[0; STEP]; COLS];
            for (s, step) in panel.chunks_exact_mut(STEP * COLS).enumerate() {
                for (c, to) in columns.iter_mut().enumerate().take(cols - i * COLS) {
                    let column = &column(i * COLS + c)[..k];
                    let at = 2 * STEP * s;
                    fill_row(&column[at.min(k)..k.min(at + 2 * STEP)], to, STEP);
                }
                dispatch(isa(), Turn { columns: &columns, to: step });
            }
        });
    }

    /// Takes the trits of `weights` `(k, cols)`, without their scale.
    ///
    /// # Panics
    /// When they are not packed in 2 bits.
    pub fn fill_trits(&mut self, weights: &PackedMatrix) {
        assert_eq!(weights.packing(), Packing::Bits2, "trits of a right side");
        self.fill(weights.rows(), weights.cols(), &Trits(weights));
    }

    /// Takes the codes of `x` `(k, cols)`, k being its tokens, without their scales.
    pub fn fill_codes(&mut self, x: &Activations) {
        self.fill(x.tokens(), x.cols(), &Codes(x));
    }

    fn fill(&mut self, k: usize, cols: usize, lines: &impl Lines) {
        (self.k, self.cols) = (k, cols);
        fill_lines::<COLS>(&mut self.data, k, cols, lines);
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Length of the sums.
    pub fn k(&self) -> usize {
        self.k
    }

    /// All of it.
    pub fn all(&self) -> RightPart<'_> {
        self.part(self.k, self.cols)
    }

    /// The first `k` lines and `cols` columns; what the left side has beyond `k` must be 0.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn part(&self, k: usize, cols: usize) -> RightPart<'_> {
        assert!(k <= self.k && cols <= self.cols, "a part of more lines or columns than there are");
        RightPart { k, cols, panel: pairs(self.k) * COLS, data: &self.data }
    }
}

/// The first lines and columns of a [`Right`].
#[derive(Clone, Copy)]
pub struct RightPart<'a> {
    pub(super) k: usize,
    pub(super) cols: usize,
    /// Pairs from one panel to the next.
    panel: usize,
    data: &'a [Pair],
}

impl RightPart<'_> {
    /// The pairs of columns `32 i..32 i + 32`.
    pub(super) fn panel(&self, i: usize) -> &[Pair] {
        &self.data[i * self.panel..][..pairs(self.k) * COLS]
    }
}

/// Two numbers, rounded to nearest even; of NaN, a NaN or infinity.
#[inline(always)]
pub(super) fn join(even: f32, odd: f32) -> Pair {
    let round = |x: f32| {
        let bits = x.to_bits();
        bits.wrapping_add(0x7fff + (bits >> 16 & 1))
    };
    round(even) >> 16 | round(odd) & 0xffff_0000
}

/// Puts a row to `to`, a step of pairs every so many.
fn fill_row(row: &[f32], to: &mut [Pair], every: usize) {
    if !(is_native() && arch::join_row(row, to, every)) {
        dispatch(isa(), FillRow { row, to, every });
    }
}

/// A step of a panel, of its columns; dispatched as [`FillRow`].
struct Turn<'a> {
    columns: &'a [[Pair; STEP]; COLS],
    /// `(16, 32)`
    to: &'a mut [Pair],
}

impl Kernel for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (p, to) in self.to.as_chunks_mut::<COLS>().0.iter_mut().enumerate() {
            for (to, column) in to.iter_mut().zip(self.columns) {
                *to = column[p];
            }
        }
    }
}

/// A row of a left side in the order of rows. It is dispatched like a kernel, as is [`FillGroup`], for
/// the instructions of the CPU.
struct FillRow<'a> {
    /// `(k,)`, or nothing.
    row: &'a [f32],
    /// From the row's first step on.
    to: &'a mut [Pair],
    /// From one step to the next.
    every: usize,
}

impl Kernel for FillRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (whole, rest) = self.row.as_chunks::<{ 2 * STEP }>();
        let mut steps = self.to.chunks_mut(self.every);
        let mut put = |numbers: &[f32; 2 * STEP]| {
            if let Some(to) = steps.next().and_then(|to| to.first_chunk_mut::<STEP>()) {
                for p in 0..STEP {
                    to[p] = join(numbers[2 * p], numbers[2 * p + 1]);
                }
            }
        };
        whole.iter().for_each(&mut put);
        let mut last = [0.0; 2 * STEP];
        last[..rest.len()].copy_from_slice(rest);
        put(&last);
        steps.filter_map(|to| to.first_chunk_mut::<STEP>()).for_each(|to| to.fill(0));
    }
}

/// Lines of numbers, `(k, width)`. `#[inline(always)]`, as part of a [`Kernel`].
trait Lines: Sync {
    /// The numbers of line `i` from `first` on.
    fn line(&self, i: usize, first: usize, out: &mut [f32]);

    /// Asks memory for `len` numbers of line `i` from `first` on. Lines of a group lie too far apart for
    /// the hardware to see that they are read in turn.
    #[inline(always)]
    fn prefetch<S: Simd>(&self, _: S, _i: usize, _first: usize, _len: usize) {}
}

/// How many lines ahead of their use memory is asked for them.
const AHEAD: usize = 8;

/// Asks memory for `len` numbers of `x` from `at` on, as far as there are.
#[inline(always)]
fn prefetch<S: Simd>(simd: S, x: &[f32], at: usize, len: usize) {
    if let Some(x) = x.get(at..at + len) {
        x.chunks(16).for_each(|line| simd.prefetch(line.as_ptr(), 0));
    }
}

struct Plain<'a> {
    x: &'a [f32],
    len: usize,
}

impl Lines for Plain<'_> {
    #[inline(always)]
    fn line(&self, i: usize, first: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.x[i * self.len + first..][..out.len()]);
    }

    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, i: usize, first: usize, len: usize) {
        prefetch(simd, self.x, i * self.len + first, len);
    }
}

/// `k` lines that are multiplied by something each.
struct Scaled<R, F> {
    k: usize,
    row: R,
    scale: F,
}

impl<'x, R, F> Lines for Scaled<R, F>
where
    R: Fn(usize) -> &'x [f32] + Sync,
    F: Fn(usize) -> f32 + Sync,
{
    #[inline(always)]
    fn line(&self, i: usize, first: usize, out: &mut [f32]) {
        let (from, scale) = (&(self.row)(i)[first..][..out.len()], (self.scale)(i));
        out.iter_mut().zip(from).for_each(|(to, from)| *to = from * scale);
    }

    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, i: usize, first: usize, len: usize) {
        if i < self.k {
            prefetch(simd, (self.row)(i), first, len);
        }
    }
}

struct Trits<'a>(&'a PackedMatrix);

impl Lines for Trits<'_> {
    #[inline(always)]
    fn line(&self, i: usize, first: usize, out: &mut [f32]) {
        self.0.floats_from(i, first, out);
    }
}

struct Codes<'a>(&'a Activations);

impl Lines for Codes<'_> {
    #[inline(always)]
    fn line(&self, i: usize, first: usize, out: &mut [f32]) {
        self.0.floats_from(i, first, out);
    }
}

/// Fills `data` `(ceil(width / W), pairs, W)` with lines, in pairs.
fn fill_lines<const W: usize>(
    data: &mut AlignedBuf<Pair>,
    k: usize,
    width: usize,
    lines: &impl Lines,
) {
    let panel = pairs(k) * W;
    data.resize(width.div_ceil(W) * panel);
    parallel::for_each_chunk(data, GROUP / W * panel, |i, data| {
        let first = i * (GROUP / W * W);
        dispatch(isa(), FillGroup::<_, W> { lines, k, first, width, data });
    });
}

/// Some neighbouring panels of a side.
struct FillGroup<'a, L, const W: usize> {
    lines: &'a L,
    k: usize,
    /// The first column.
    first: usize,
    /// Of all panels.
    width: usize,
    data: &'a mut [Pair],
}

impl<L: Lines, const W: usize> Kernel for FillGroup<'_, L, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { lines, k, first, width, data } = self;
        let (pairs, len) = (pairs(k), (GROUP / W * W).min(width - first));
        // What follows the last column stays 0, and so does what follows the last line.
        let mut both = [[0.0; GROUP]; 2];
        let fast = is_native();
        for p in 0..pairs {
            for (i, line) in both.iter_mut().enumerate() {
                lines.prefetch(simd, 2 * p + i + AHEAD, first, len);
                match 2 * p + i {
                    at if at < k => lines.line(at, first, &mut line[..len]),
                    _ => line[..len].fill(0.0),
                }
            }
            let [even, odd] = &both;
            if fast && arch::join_lines::<W>([even, odd], &mut data[p * W..], pairs * W) {
                continue;
            }
            let [even, odd] = [even, odd].map(|line| line.as_chunks::<W>().0);
            for (panel, (even, odd)) in data.chunks_exact_mut(pairs * W).zip(even.iter().zip(odd)) {
                let to = &mut panel[p * W..][..W];
                for c in 0..W {
                    to[c] = join(even[c], odd[c]);
                }
            }
        }
    }
}
