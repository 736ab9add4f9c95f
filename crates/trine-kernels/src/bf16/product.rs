//! The product itself, tile by tile.

use std::ops::Range;

use super::operand::{Left, Order, RightPart, pairs};
use super::{COLS, Pair, ROWS, STEP};
use crate::arch::bfloat::{self as arch, Target};
use crate::gemm::Store;
use crate::tiling::for_each_tile;

/// What sums are multiplied by.
#[derive(Clone, Copy, Debug)]
pub enum Scale<'a> {
    /// Nothing.
    One,
    /// All of them.
    All(f32),
    /// Those of each row of the left side, `(rows,)`.
    Rows(&'a [f32]),
}

impl Scale<'_> {
    /// Those of the rows of a block; what there is no row for, 0.
    fn of_block(self, block: usize) -> [f32; ROWS] {
        match self {
            Self::One => [1.0; ROWS],
            Self::All(scale) => [scale; ROWS],
            Self::Rows(scales) => {
                std::array::from_fn(|r| scales.get(block * ROWS + r).copied().unwrap_or(0.0))
            }
        }
    }
}

/// `out = scale * left right`, or that much more, `(rows, cols)`, on the threads of the pool.
///
/// The same bits for any number of threads.
///
/// # Panics
/// When the sides differ in `k`, scales and rows in number, or `out` is not `(rows, cols)`.
pub fn multiply(
    left: &Left,
    right: RightPart<'_>,
    scale: Scale<'_>,
    store: Store,
    out: &mut [f32],
) {
    multiply_on(super::is_native(), left, right, scale, store, Triangle::None, out);
}

/// What a product is spared, of which a triangle is not needed or known to be 0, as in causal attention.
/// Rows `i` are those of the left side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Triangle {
    /// Nothing.
    None,
    /// Outputs of row `i` from column `i + n + 1` on, which may then be anything.
    Outputs(usize),
    /// Terms of row `i` from `k = i + n + 1` on, where the left side is 0.
    TermsAfter(usize),
    /// Terms of row `i` before `k = i - n`, where the left side is 0.
    TermsBefore(usize),
}

impl Triangle {
    /// Whether nothing is needed of the tile in rows up to `last` and columns from `col` on.
    fn leaves_out(self, last: usize, col: usize) -> bool {
        matches!(self, Self::Outputs(n) if col > last + n)
    }

    /// The `k` of which the sums of rows `first..=last` are made.
    fn terms(self, first: usize, last: usize, k: usize) -> Range<usize> {
        match self {
            Self::None | Self::Outputs(_) => 0..k,
            Self::TermsAfter(n) => 0..k.min(last + n + 1),
            Self::TermsBefore(n) => first.saturating_sub(n).min(k)..k,
        }
    }
}

/// As [`multiply`], to the bit, but for what a triangle spares.
///
/// # Panics
/// As [`multiply`].
pub fn multiply_triangle(
    left: &Left,
    right: RightPart<'_>,
    scale: Scale<'_>,
    store: Store,
    triangle: Triangle,
    out: &mut [f32],
) {
    multiply_on(super::is_native(), left, right, scale, store, triangle, out);
}

pub(super) fn multiply_on(
    fast: bool,
    left: &Left,
    right: RightPart<'_>,
    scale: Scale<'_>,
    store: Store,
    triangle: Triangle,
    out: &mut [f32],
) {
    assert_eq!(left.k, right.k, "the sides of a product differ in k");
    if let Scale::Rows(scales) = scale {
        assert_eq!(scales.len(), left.rows, "scales and rows differ in number");
    }
    let panel_bytes = pairs(left.k) * COLS * size_of::<Pair>();
    for_each_tile([left.rows, right.cols], panel_bytes, out, |block, panel, rows| {
        let (first, last) = (block * ROWS, block * ROWS + ROWS - 1);
        if triangle.leaves_out(last, panel * COLS) {
            return;
        }
        let terms = triangle.terms(first, last, left.k);
        // In whole steps, of which the rest is 0 in any case.
        let (start, end) = (terms.start / (2 * STEP) * STEP, pairs(terms.end));
        let a = &left.block(block)[start * ROWS..end * ROWS];
        let b = &right.panel(panel)[start * COLS..end * COLS];
        let mut to = Target { rows, scales: scale.of_block(block), add: store == Store::Add };
        match (fast, left.order) {
            (true, Order::Rows) => arch::tile::<true>(a, b, &mut to),
            (true, Order::Columns) => arch::tile::<false>(a, b, &mut to),
            (false, Order::Rows) => plain_tile::<true>(a, b, &mut to),
            (false, Order::Columns) => plain_tile::<false>(a, b, &mut to),
        }
    });
}

/// A tile without the instruction: sums of products in f32, in the order of `k`.
fn plain_tile<const BY_ROWS: bool>(a: &[Pair], b: &[Pair], to: &mut Target<'_>) {
    let mut sums = [[0.0; COLS]; ROWS];
    let halves = |pair: Pair| [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)];
    for (p, b) in b.as_chunks::<COLS>().0.iter().enumerate() {
        for r in 0..ROWS {
            let at = match BY_ROWS {
                true => p / STEP * STEP * ROWS + r * STEP + p % STEP,
                false => p * ROWS + r,
            };
            let [even, odd] = halves(a[at]);
            for c in 0..COLS {
                let [first, second] = halves(b[c]);
                sums[r][c] += even * first + odd * second;
            }
        }
    }
    for ((row, sums), scale) in to.rows.iter_mut().zip(&sums).zip(to.scales) {
        for (out, sum) in row.iter_mut().zip(sums) {
            let rest = if to.add { *out } else { 0.0 };
            *out = rest + sum * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::operand::Right;
    use super::*;
    use crate::tiling::painted;
    use crate::{Activations, PackedMatrix};
    use trine_ternary::TernaryMatrix;

    fn rounded(x: f32) -> f64 {
        f64::from(half::bf16::from_f32(x).to_f32())
    }

    fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..cols).flat_map(|c| (0..rows).map(move |r| x[r * cols + c])).collect()
    }

    /// `(rows, k)` times `(k, cols)`, both rounded, in f64.
    fn formula(a: &[f32], b: &[f32], [rows, k, cols]: [usize; 3]) -> Vec<f64> {
        let sum = |r: usize, c: usize| {
            (0..k).map(|i| rounded(a[r * k + i]) * rounded(b[i * cols + c])).sum()
        };
        (0..rows).flat_map(|r| (0..cols).map(move |c| sum(r, c))).collect()
    }

    fn check(found: &[f32], expected: &[f64], what: &str) {
        let largest = expected.iter().fold(1.0, |max: f64, v| max.max(v.abs()));
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(*found) - expected).abs() / largest;
            assert!(error < 1e-5, "{what}, output {i}: {found}, not {expected}");
        }
    }

    const SHAPES: [[usize; 3]; 6] =
        [[1, 1, 1], [12, 32, 32], [13, 33, 31], [5, 70, 100], [50, 3, 65], [25, 129, 33]];

    #[test]
    fn products_are_the_formula_in_every_order_and_at_every_edge() {
        for shape in SHAPES {
            let [rows, k, cols] = shape;
            let (a, b) = (painted(rows * k, 1), painted(k * cols, 2));
            let expected = formula(&a, &b, shape);
            let (mut left, mut right) = (Left::default(), Right::default());
            // Sides are filled once with something larger, which must leave no trace.
            left.fill_rows(&painted(60 * 140, 3), 60, 140);
            right.fill_rows(&painted(140 * 110, 4), 140, 110);
            for turn in 0..4 {
                match turn % 2 {
                    0 => left.fill_rows(&a, rows, k),
                    _ => left.fill_columns(&transposed(&a, rows, k), k, rows),
                }
                match turn / 2 {
                    0 => right.fill_rows(&b, k, cols),
                    _ => right.fill_columns(&transposed(&b, k, cols), cols, k),
                }
                for fast in [false, crate::bf16::is_native()] {
                    let what = format!("{shape:?}, turn {turn}, fast {fast}");
                    let mut out = vec![f32::NAN; rows * cols];
                    let product = |scale: Scale<'_>, store, out: &mut [f32]| {
                        multiply_on(fast, &left, right.all(), scale, store, Triangle::None, out);
                    };
                    product(Scale::One, Store::Set, &mut out);
                    check(&out, &expected, &what);
                    product(Scale::All(-0.5), Store::Add, &mut out);
                    let half: Vec<_> = expected.iter().map(|v| v / 2.0).collect();
                    check(&out, &half, &what);
                    let scales = painted(rows, 7);
                    product(Scale::Rows(&scales), Store::Set, &mut out);
                    let scaled = expected.iter().enumerate();
                    let scaled: Vec<_> =
                        scaled.map(|(i, v)| v * f64::from(scales[i / cols])).collect();
                    check(&out, &scaled, &what);
                }
            }
        }
    }

    #[test]
    fn a_triangle_changes_nothing_that_is_needed() {
        // A block of queries behind others, which see keys up to their own.
        let (queries, d) = (50, 70);
        for n in [0, 1, 31, 96] {
            let seen = n + queries;
            let sees = |i: usize| i % seen <= i / seen + n;
            let slopes = painted(queries * seen, 1).into_iter().enumerate();
            let slopes: Vec<_> = slopes.map(|(i, x)| if sees(i) { x } else { 0.0 }).collect();
            let (mut left, mut right) = (Left::default(), Right::default());
            let check = |triangle, left: &Left, right: &Right, needed: &dyn Fn(usize) -> bool| {
                for store in [Store::Set, Store::Add] {
                    let mut expected = painted(left.rows() * right.cols(), 8);
                    let mut found = expected.clone();
                    multiply(left, right.all(), Scale::One, store, &mut expected);
                    multiply_triangle(left, right.all(), Scale::One, store, triangle, &mut found);
                    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                        let same = found.to_bits() == expected.to_bits();
                        assert!(same || !needed(i), "{triangle:?}, {store:?}, {i}");
                    }
                }
            };
            left.fill_rows(&painted(queries * d, 2), queries, d);
            right.fill_columns(&painted(seen * d, 3), seen, d);
            check(Triangle::Outputs(n), &left, &right, &sees);
            left.fill_rows(&slopes, queries, seen);
            right.fill_rows(&painted(seen * d, 4), seen, d);
            check(Triangle::TermsAfter(n), &left, &right, &|_| true);
            left.fill_columns(&slopes, queries, seen);
            right.fill_rows(&painted(queries * d, 5), queries, d);
            check(Triangle::TermsBefore(n), &left, &right, &|_| true);
        }
    }

    #[test]
    fn lines_are_scaled_before_they_are_rounded() {
        let (k, rows) = (7, 14);
        let (x, scales) = (painted(k * rows, 1), painted(k, 9));
        let scaled: Vec<_> = x.iter().enumerate().map(|(i, x)| x * scales[i / rows]).collect();
        let (mut left, mut right) = (Left::default(), Right::default());
        left.fill_scaled_columns(&x, k, rows, |i| scales[i]);
        right.fill_rows(&painted(k * 3, 5), k, 3);
        let mut out = vec![0.0; rows * 3];
        multiply(&left, right.all(), Scale::One, Store::Set, &mut out);
        let expected = formula(&transposed(&scaled, k, rows), &painted(k * 3, 5), [rows, k, 3]);
        check(&out, &expected, "scaled");
    }

    #[test]
    fn a_part_of_the_right_side_is_its_first_lines_and_columns() {
        let b = painted(70 * 100, 2);
        let mut right = Right::default();
        right.fill_rows(&b, 70, 100);
        for [rows, k, cols] in [[5, 70, 64], [13, 33, 100], [12, 1, 1]] {
            let a = painted(rows * k, 1);
            let part: Vec<_> =
                b.chunks(100).take(k).flat_map(|line| line[..cols].to_vec()).collect();
            let mut left = Left::default();
            left.fill_rows(&a, rows, k);
            let mut out = vec![0.0; rows * cols];
            multiply(&left, right.part(k, cols), Scale::One, Store::Set, &mut out);
            check(&out, &formula(&a, &part, [rows, k, cols]), "a part");
        }
    }

    #[test]
    fn trits_and_codes_are_exact() {
        for [rows, k, cols] in SHAPES {
            let a = painted(rows * k, 1);
            let mut left = Left::default();
            left.fill_rows(&a, rows, k);
            let trits: Vec<i8> = (0..k * cols).map(|i| (i * i % 7 % 3) as i8 - 1).collect();
            let codes: Vec<i8> = (0..k * cols).map(|i| (i * 89 % 255) as i8).collect();
            let matrix = TernaryMatrix::from_trits(&trits, k, cols, 0.5).unwrap();
            let activations = Activations::from_codes(&codes, &vec![1.0; k], cols);
            let mut right = Right::default();
            for numbers in [&trits, &codes] {
                match std::ptr::eq(numbers, &trits) {
                    true => right.fill_trits(&PackedMatrix::from(&matrix)),
                    false => right.fill_codes(&activations),
                }
                let b: Vec<f32> = numbers.iter().map(|n| f32::from(*n)).collect();
                let mut out = vec![0.0; rows * cols];
                multiply(&left, right.all(), Scale::One, Store::Set, &mut out);
                check(&out, &formula(&a, &b, [rows, k, cols]), "integers");
            }
        }
    }
}
