//! Outputs of BitLinear in half their bytes: the integer sums that they are made of.
//!
//! An output is its sum times a factor that all outputs of a token have in common
//! ([`trine_ternary::rescale`]), so the sum says everything about it. Sums of some thousand products
//! hardly ever leave 16 bits, but may: such a one is marked, and added up again when it is needed. So
//! what comes back is what [`bitlinear`](crate::bitlinear) returns, to the bit.

use trine_ternary::rescale;

use crate::activations::Activations;
use crate::arch::{Kernel, Simd, dispatch};
use crate::isa::{Isa, isa};
use crate::packed::{PANEL, PackedMatrix};
use crate::ternary::{Finish, Product, compute};

/// Stands for a sum that does not fit.
const MARK: i16 = i16::MIN;

/// The integer products of some matrices with the same activations, `(tokens, rows)` each, in one
/// parallel loop. They are read by [`rescale_sums`].
///
/// # Panics
/// When columns differ or an output is not `(tokens, rows)`.
pub fn bitlinear_sums(products: &mut [(&PackedMatrix, &mut [i16])], x: &Activations) {
    bitlinear_sums_on(isa(), products, x);
}

pub(crate) fn bitlinear_sums_on(
    isa: Isa,
    products: &mut [(&PackedMatrix, &mut [i16])],
    x: &Activations,
) {
    let products = products.iter_mut().map(|(w, out)| Product { weights: [*w], out });
    compute(isa, products, x, Narrow);
}

/// The outputs `(rows,)` of token `t`, of the sums that [`bitlinear_sums`] has made of the same weights
/// and activations.
///
/// # Panics
/// When `sums` or `out` is not `(rows,)`, or there is no token `t`.
pub fn rescale_sums(
    sums: &[i16],
    weights: &PackedMatrix,
    x: &Activations,
    t: usize,
    out: &mut [f32],
) {
    rescale_sums_on(isa(), sums, weights, x, t, out);
}

pub(crate) fn rescale_sums_on(
    isa: Isa,
    sums: &[i16],
    weights: &PackedMatrix,
    x: &Activations,
    t: usize,
    out: &mut [f32],
) {
    assert_eq!([sums.len(), out.len()], [weights.rows(); 2], "sums or outputs are not (rows,)");
    let scales = [weights.scale(), x.scale(t)];
    if dispatch(isa, Rescale { sums, scales, out }) {
        add_up_marked(sums, weights, x, t, out);
    }
}

/// The outputs whose sums are marked.
#[cold]
fn add_up_marked(sums: &[i16], weights: &PackedMatrix, x: &Activations, t: usize, out: &mut [f32]) {
    let (codes, mut trits) = (x.codes(t), vec![0; weights.cols()]);
    for (r, out) in out.iter_mut().enumerate().filter(|(r, _)| sums[*r] == MARK) {
        weights.unpack_row(r, &mut trits);
        let products = trits.iter().zip(&codes).map(|(w, x)| i32::from(*w) * i32::from(*x));
        *out = rescale(products.fold(0, i32::wrapping_add), weights.scale(), x.scale(t));
    }
}

#[derive(Clone, Copy)]
struct Narrow;

impl Finish<1> for Narrow {
    type Out = i16;

    #[inline(always)]
    fn finish(self, sums: [&[i32; PANEL]; 1], _: [f32; 1], _: f32, out: &mut [i16; PANEL]) {
        for r in 0..PANEL {
            let sum = sums[0][r];
            let fits = sum.clamp(-i32::from(i16::MAX), i32::from(i16::MAX)) == sum;
            out[r] = if fits { sum as i16 } else { MARK };
        }
    }
}

/// Turns sums into outputs; returns whether one is marked.
struct Rescale<'a> {
    sums: &'a [i16],
    /// Of the weights and of the token.
    scales: [f32; 2],
    out: &'a mut [f32],
}

impl Kernel for Rescale<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> bool {
        let (mut least, [weights, x]) = (i16::MAX, self.scales);
        for (out, sum) in self.out.iter_mut().zip(self.sums) {
            least = least.min(*sum);
            *out = rescale(i32::from(*sum), weights, x);
        }
        least == MARK
    }
}
