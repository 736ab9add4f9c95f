//! Trits times int8: the exact integer product, and BitLinear on top of it.

use trine_ternary::rescale;

use crate::activations::Activations;
use crate::arch::Simd;
use crate::isa::{Isa, isa};
use crate::packed::{PackedMatrix, WeightBlock};
use crate::product::{Product, Shape, compute};

/// The integer product: `out[t, r] = sum over c of trits[r, c] * codes[t, c]`, `(tokens, rows)`.
///
/// Exact, so the same on every instruction set and thread count, wherever the sum fits an i32: up
/// to 16 million columns of the largest codes.
///
/// # Panics
/// When columns differ, `out` is not `(tokens, rows)`, or the CPU does not have `isa`.
pub fn matmul_i32(isa: Isa, weights: &PackedMatrix, x: &Activations, out: &mut [i32]) {
    compute(isa, &Ternary::new(weights, x, |_, sum| sum), out);
}

/// The forward pass of a BitLinear layer, `(tokens, rows)`: the integer product, rescaled as
/// [`trine_ternary::rescale`] defines. Runs on [`isa()`].
///
/// # Panics
/// When columns differ or `out` is not `(tokens, rows)`.
pub fn bitlinear(weights: &PackedMatrix, x: &Activations, out: &mut [f32]) {
    bitlinear_on(isa(), weights, x, out);
}

pub(crate) fn bitlinear_on(isa: Isa, weights: &PackedMatrix, x: &Activations, out: &mut [f32]) {
    let finish = |token, sum| rescale(sum, weights.scale(), x.scale(token));
    compute(isa, &Ternary::new(weights, x, finish), out);
}

/// A ternary product, and what becomes of its sums.
struct Ternary<'a, F> {
    weights: &'a PackedMatrix,
    x: &'a Activations,
    /// From a token and its integer sum to an output.
    finish: F,
}

impl<'a, O, F: Fn(usize, i32) -> O> Ternary<'a, F> {
    fn new(weights: &'a PackedMatrix, x: &'a Activations, finish: F) -> Self {
        assert_eq!(weights.cols(), x.cols(), "weights and activations differ in columns");
        Self { weights, x, finish }
    }
}

impl<O: Copy + Default + Send, F: Fn(usize, i32) -> O + Sync> Product for Ternary<'_, F> {
    type Out = O;

    fn shape(&self) -> Shape {
        Shape { rows: self.weights.rows(), cols: self.x.cols(), tokens: self.x.tokens() }
    }

    fn row_bytes(&self) -> usize {
        self.weights.bytes().len() / self.weights.rows().max(1)
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize, const T: usize>(
        &self,
        simd: S,
        row: usize,
        token: usize,
    ) -> [[O; R]; T] {
        let weights: [&[WeightBlock]; R] = std::array::from_fn(|r| self.weights.row(row + r));
        let codes: [_; T] = std::array::from_fn(|t| self.x.blocks(token + t));
        let mut acc = [[simd.zero(); T]; R];
        for b in 0..weights[0].len() {
            let weights = std::array::from_fn(|r| &weights[r][b]);
            let codes = std::array::from_fn(|t| &codes[t][b]);
            simd.step(&mut acc, weights, codes);
        }
        let mut out = [[O::default(); R]; T];
        for t in 0..T {
            // The codes that were multiplied are trits plus one; see `packed`.
            let excess = self.x.sum(token + t);
            for r in 0..R {
                out[t][r] = (self.finish)(token + t, simd.sum(acc[r][t]).wrapping_sub(excess));
            }
        }
        out
    }
}
