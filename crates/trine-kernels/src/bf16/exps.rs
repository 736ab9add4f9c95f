//! Softmaxes over rows of scores, and their gradients, rounded and laid out as sides of products.
//!
//! The weights of a softmax, `exp(x - largest) / sum`, are the left side of a product in the sums of
//! attention and in the gradient of a head's input; transposed, in the gradients of values and of the head
//! itself. So are the gradients of scores in those of queries and keys. Here the exponentials, of which the
//! largest is 1, go from registers into both layouts, without ever being a matrix in f32; what a row is to
//! be divided by is a factor of the product's rows ([`Scale::Rows`](super::Scale)), or of the other side's.

use std::ops::Range;

use super::operand::{self, Left, Order, pairs};
use super::{Pair, ROWS, STEP, WIDTH, is_native};
use crate::arch::bfloat as arch;
use crate::dense::sum_lanes;
use crate::nn;
use crate::parallel::{self, SharedMut};

/// Columns of two rows that are joined at a time: whole steps, and whole blocks of the transpose's rows.
const SPAN: usize = ROWS * WIDTH;

/// What the softmax of a row is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Softmax {
    /// The largest score; -inf where nothing is seen.
    pub largest: f32,
    /// Of `exp(scale (x - largest))` over the scores that are seen.
    pub sum: f32,
}

/// Fills `by_rows` with `exp(scale (x - largest))`, rounded, of the scores `x` `(rows, cols)`, `largest` being
/// that of the scores that a row sees; all others become 0, whatever they are. `by_columns` becomes the
/// transpose. Returns what the softmax of each row is made of.
///
/// Where the CPU has products of bfloats, an exponential is within 1e-6 of its size before it is rounded.
///
/// # Panics
/// When `scores` is not `(rows, cols)`, or a row sees more columns than there are.
pub fn exps(
    scores: &[f32],
    shape: [usize; 2],
    scale: f32,
    seen: impl Fn(usize) -> Range<usize> + Sync,
    by_rows: &mut Left,
    by_columns: Option<&mut Left>,
) -> Vec<Softmax> {
    exps_on(is_native(), scores, shape, scale, seen, by_rows, by_columns)
}

fn exps_on(
    fast: bool,
    scores: &[f32],
    shape: [usize; 2],
    scale: f32,
    seen: impl Fn(usize) -> Range<usize> + Sync,
    by_rows: &mut Left,
    by_columns: Option<&mut Left>,
) -> Vec<Softmax> {
    let sides = Sides::new(shape, by_rows, by_columns);
    let mut found = vec![Softmax::default(); shape[0]];
    parallel::for_each_chunk(&mut found, ROWS, |i, found| {
        let block = Block::new(scores, shape, i, &seen);
        let mut largest = [0.0; ROWS];
        for (r, largest) in largest.iter_mut().enumerate() {
            let x = &block.rows[r][block.seen[r].clone()];
            *largest = if fast { arch::largest(x) } else { nn::largest(x) };
        }
        let mut sums = [[0.0; STEP]; ROWS];
        sides.fill(i, |q, at, to| {
            let (two, sums) = (block.two(q), &mut sums.as_chunks_mut().0[q]);
            let largest = [largest[2 * q], largest[2 * q + 1]];
            if fast {
                return arch::join_exps(two, largest, scale, at, to, sums);
            }
            join(two, at, to, |i, c, x| {
                let exp = nn::exp((x - largest[i]) * scale);
                sums[i][c % STEP] += exp;
                exp
            });
        });
        for (r, found) in found.iter_mut().enumerate() {
            *found = Softmax { largest: largest[r], sum: sum_lanes(sums[r]) };
        }
    });
    found
}

/// The backward pass of a softmax, but for a factor of each row: `by_rows` becomes
/// `e (s - mean)`, and `by_columns` its transpose. `e` are the exponentials `(rows, cols)` that
/// [`exps`] has filled `weights` with, `s` the gradients of the softmax's weights, of which nothing is
/// read but what a row sees, and `mean` is the sum of `e s` over that of `e`.
///
/// The gradients of the scores are these times `scale / sum`.
///
/// # Panics
/// When `slopes` is not of the shape of `weights`, or a row sees more columns than there are.
pub fn softmax_slopes(
    weights: &Left,
    softmaxes: &[Softmax],
    slopes: &[f32],
    seen: impl Fn(usize) -> Range<usize> + Sync,
    by_rows: &mut Left,
    by_columns: &mut Left,
) {
    softmax_slopes_on(is_native(), weights, softmaxes, slopes, seen, by_rows, by_columns);
}

fn softmax_slopes_on(
    fast: bool,
    weights: &Left,
    softmaxes: &[Softmax],
    slopes: &[f32],
    seen: impl Fn(usize) -> Range<usize> + Sync,
    by_rows: &mut Left,
    by_columns: &mut Left,
) {
    assert_eq!(weights.order, Order::Rows, "weights that are not laid out by rows");
    let shape = [weights.rows, weights.k];
    assert_eq!(softmaxes.len(), shape[0], "softmaxes and rows differ in number");
    let sides = Sides::new(shape, by_rows, Some(by_columns));
    parallel::run(shape[0].div_ceil(ROWS), |i| {
        let (block, exps) = (Block::new(slopes, shape, i, &seen), weights.block(i));
        let mut means = [0.0; ROWS];
        for (r, softmax) in softmaxes[i * ROWS..].iter().take(ROWS).enumerate() {
            let (exps, seen) = (&exps[r * STEP..], block.seen[r].clone());
            let product = match fast {
                true => arch::product(exps, block.rows[r], seen),
                false => seen.map(|c| element(exps, c) * block.rows[r][c]).sum(),
            };
            means[r] = product / softmax.sum;
        }
        sides.fill(i, |q, at, to| {
            let (two, means) = (block.two(q), [means[2 * q], means[2 * q + 1]]);
            let exps = &exps[at / 2 * ROWS + 2 * q * STEP..];
            if fast {
                return arch::join_slopes(two, exps, means, at, to);
            }
            join(two, at, to, |i, c, x| element(&exps[i * STEP..], c) * (x - means[i]));
        });
    });
}

/// Column `c` of a row, whose steps lie in `block`.
fn element(block: &[Pair], c: usize) -> f32 {
    let pair = block[c / WIDTH * ROWS * STEP + c % WIDTH / 2];
    f32::from_bits(if c.is_multiple_of(2) { pair << 16 } else { pair & 0xffff_0000 })
}

/// Twelve rows of numbers; those that there are not are empty, and see nothing.
struct Block<'a> {
    rows: [&'a [f32]; ROWS],
    seen: [Range<usize>; ROWS],
}

impl<'a> Block<'a> {
    fn new(
        x: &'a [f32],
        [rows, cols]: [usize; 2],
        i: usize,
        seen: impl Fn(usize) -> Range<usize>,
    ) -> Self {
        assert_eq!(Some(x.len()), rows.checked_mul(cols), "numbers are not (rows, cols)");
        let mut block = Self { rows: [&[]; ROWS], seen: [const { 0..0 }; ROWS] };
        for (r, row) in (i * ROWS..rows).take(ROWS).enumerate() {
            block.rows[r] = &x[row * cols..][..cols];
            block.seen[r] = seen(row);
        }
        block
    }

    /// Rows `2 q` and `2 q + 1`.
    fn two(&self, q: usize) -> Two<'a> {
        let both = [2 * q, 2 * q + 1];
        Two { rows: both.map(|r| self.rows[r]), seen: both.map(|r| self.seen[r].clone()) }
    }
}

/// Two neighbouring rows; where they are joined, the first is in the low halves of pairs.
pub(crate) struct Two<'a> {
    /// Their numbers, of which nothing is read but what they see.
    pub(crate) rows: [&'a [f32]; 2],
    pub(crate) seen: [Range<usize>; 2],
}

/// Where two rows go.
pub(crate) struct To<'a> {
    /// The steps of the first row in a block of rows, beside those of the second.
    pub(crate) block: &'a mut [Pair],
    /// Pairs of the two, of each column; whole steps.
    pub(crate) joined: &'a mut [Pair],
}

/// Rounds what `f` makes of the row, the column and the number, from column `at` on.
fn join(two: Two<'_>, at: usize, to: To<'_>, mut f: impl FnMut(usize, usize, f32) -> f32) {
    for c in 0..to.joined.len() {
        to.joined[c] = 0;
        for i in 0..2 {
            let seen = two.seen[i].contains(&(at + c));
            let x = if seen { f(i, c, two.rows[i][at + c]) } else { 0.0 };
            let half =
                |high: bool| if high { operand::join(0.0, x) } else { operand::join(x, 0.0) };
            to.joined[c] |= half(i == 1);
            // Two columns are a pair.
            let pair = &mut to.block[c / WIDTH * ROWS * STEP + i * STEP + c % WIDTH / 2];
            *pair = if c % 2 == 0 { half(false) } else { *pair | half(true) };
        }
    }
}

/// A left side and, if wanted, another one that is its transpose, of which tasks fill blocks.
struct Sides<'a> {
    rows: usize,
    cols: usize,
    by_rows: SharedMut<'a, Pair>,
    by_columns: Option<SharedMut<'a, Pair>>,
}

impl<'a> Sides<'a> {
    fn new(
        [rows, cols]: [usize; 2],
        by_rows: &'a mut Left,
        by_columns: Option<&'a mut Left>,
    ) -> Self {
        let by_rows = SharedMut::new(by_rows.prepare(rows, cols, Order::Rows));
        let turned = |left: &'a mut Left| SharedMut::new(left.prepare(cols, rows, Order::Columns));
        Self { rows, cols, by_rows, by_columns: by_columns.map(turned) }
    }

    /// Fills block `i` of rows. `join` is given the numbers of two neighbouring rows and of a column, and
    /// where they go from there. Every block has one task.
    fn fill(&self, i: usize, mut join: impl FnMut(usize, usize, To<'_>)) {
        let width = 2 * pairs(self.cols);
        let len = width / 2 * ROWS;
        // SAFETY: a block is of one task.
        #[allow(unsafe_code)]
        let block = unsafe { self.by_rows.slice(i * len, len) };
        let mut joined = [0; SPAN];
        for at in (0..width).step_by(SPAN) {
            let span = SPAN.min(width - at);
            joined[span..].fill(0);
            for q in 0..ROWS / 2 {
                let block = &mut block[at / 2 * ROWS + 2 * q * STEP..];
                join(q, at, To { block, joined: &mut joined[..span] });
                self.put(at, i * ROWS / 2 + q, &joined);
            }
        }
        if (i + 1) * ROWS >= self.rows {
            // Pairs that no block has.
            for pair in (i + 1) * ROWS / 2..pairs(self.rows) {
                (0..width).step_by(SPAN).for_each(|at| self.put(at, pair, &[0; SPAN]));
            }
        }
    }

    /// Puts a pair of each column from `at` on into the transpose, which may have room for fewer.
    fn put(&self, at: usize, pair: usize, joined: &[Pair; SPAN]) {
        let line = pairs(self.rows);
        let Some(columns) = self.by_columns.filter(|_| pair < line) else { return };
        let blocks = at / ROWS..self.cols.min(at + SPAN).div_ceil(ROWS);
        for (block, from) in blocks.zip(joined.as_chunks::<ROWS>().0) {
            // SAFETY: a pair of rows is of one task.
            #[allow(unsafe_code)]
            let to = unsafe { columns.slice((block * line + pair) * ROWS, ROWS) };
            *to.first_chunk_mut().expect("a pair of each of twelve columns") = *from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Right, Scale, Store, multiply};
    use super::*;
    use crate::tiling::painted;

    /// The numbers of a left side, `(rows, k)`, by its product with the unit matrix.
    fn numbers(left: &Left) -> Vec<f32> {
        let k = left.k();
        let unit: Vec<_> = (0..k * k).map(|i| f32::from(i / k == i % k)).collect();
        let mut right = Right::default();
        right.fill_rows(&unit, k, k);
        let mut out = vec![f32::NAN; left.rows() * k];
        multiply(left, right.all(), Scale::One, Store::Set, &mut out);
        out
    }

    #[test]
    fn exponentials_are_the_formula_in_both_orders() {
        for [rows, cols] in [[1, 1], [12, 32], [13, 33], [5, 800], [96, 128], [97, 385], [31, 12]] {
            for from in [0, 3] {
                let mut scores = painted(rows * cols, 4);
                scores.iter_mut().for_each(|x| *x *= 20.0);
                let seen = |r: usize| from.min(r).min(cols - 1)..(r + 1).min(cols);
                // Nothing else is read.
                for (i, x) in scores.iter_mut().enumerate() {
                    if !seen(i / cols).contains(&(i % cols)) {
                        *x = f32::NAN;
                    }
                }
                for fast in [false, is_native()] {
                    let (mut left, mut turned) = (Left::default(), Left::default());
                    // Sides are filled once with something larger, which must leave no trace.
                    for side in [&mut left, &mut turned] {
                        side.fill_rows(&vec![f32::NAN; 120 * 900], 120, 900);
                    }
                    let found = exps_on(
                        fast,
                        &scores,
                        [rows, cols],
                        0.25,
                        seen,
                        &mut left,
                        Some(&mut turned),
                    );
                    assert_eq!(found.len(), rows);
                    let (left, turned) = (numbers(&left), numbers(&turned));
                    for (r, found) in found.into_iter().enumerate() {
                        let what = format!("{rows}x{cols} from {from}, row {r}, fast {fast}");
                        let row = &scores[r * cols..][..cols];
                        let most = row[seen(r)].iter().copied().fold(f32::NEG_INFINITY, f32::max);
                        assert_eq!(found.largest, most, "{what}");
                        let exp = |x: f32| (f64::from(x - most) * 0.25).exp();
                        let sum: f64 = row[seen(r)].iter().map(|x| exp(*x)).sum();
                        assert!((f64::from(found.sum) / sum - 1.0).abs() < 2e-6, "{what}");
                        for c in 0..cols {
                            let expected = if seen(r).contains(&c) { exp(row[c]) } else { 0.0 };
                            let number = left[r * cols + c];
                            // Half of a last place of a bfloat, and what the exponential is off.
                            let off = (f64::from(number) - expected).abs();
                            assert!(off <= expected / 255.0, "{what}, {c}: {number}, {expected}");
                            assert_eq!(turned[c * rows + r].to_bits(), number.to_bits(), "{what}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn slopes_are_the_gradients_of_a_softmax() {
        for [rows, cols] in [[1, 1], [13, 33], [5, 800], [96, 128], [31, 12]] {
            let seen = |r: usize| 3.min(r).min(cols - 1)..(r + 1).min(cols);
            let scores = painted(rows * cols, 4);
            let mut slopes = painted(rows * cols, 5);
            for (i, x) in slopes.iter_mut().enumerate() {
                if !seen(i / cols).contains(&(i % cols)) {
                    *x = f32::NAN;
                }
            }
            for fast in [false, is_native()] {
                let mut weights = Left::default();
                let shape = [rows, cols];
                let softmaxes = exps_on(fast, &scores, shape, 0.25, seen, &mut weights, None);
                let [mut left, mut turned] = [Left::default(), Left::default()];
                let sides = [&mut left, &mut turned];
                let [by_rows, by_columns] = sides;
                softmax_slopes_on(fast, &weights, &softmaxes, &slopes, seen, by_rows, by_columns);
                let weights = numbers(&weights);
                let (left, turned) = (numbers(&left), numbers(&turned));
                for r in 0..rows {
                    let e = |c: usize| f64::from(weights[r * cols + c]);
                    let s = |c: usize| f64::from(slopes[r * cols + c]);
                    let product: f64 = seen(r).map(|c| e(c) * s(c)).sum();
                    let mean = product / f64::from(softmaxes[r].sum);
                    for c in 0..cols {
                        let what = format!("{rows}x{cols}, row {r}, {c}, fast {fast}");
                        let expected =
                            if seen(r).contains(&c) { e(c) * (s(c) - mean) } else { 0.0 };
                        let number = left[r * cols + c];
                        let off = (f64::from(number) - expected).abs();
                        let most = expected.abs() / 255.0 + 1e-5 * e(c);
                        assert!(off <= most, "{what}: {number}, {expected}");
                        assert_eq!(turned[c * rows + r].to_bits(), number.to_bits(), "{what}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_is_in_the_sum() {
        let mut scores = painted(40, 4);
        scores[17] = f32::NAN;
        for fast in [false, is_native()] {
            let mut left = Left::default();
            let found = exps_on(fast, &scores, [2, 20], 1.0, |_| 0..20, &mut left, None);
            assert!(found[0].sum.is_nan() && found[1].sum.is_finite(), "{found:?}");
        }
    }
}
