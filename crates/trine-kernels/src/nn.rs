//! The float parts of a decoder layer, in one documented order.
//!
//! The runtime calls them, and so does the trainer's forward pass: activations are rounded to int8
//! right after them, so that a difference in the last place could flip a code. Products and sums
//! are rounded separately and run in these orders, the same on every instruction set:
//!
//! | sum over | order |
//! | --- | --- |
//! | features, in a norm | that of [`dot`](crate::dot) |
//! | features, in a score `q . k` | feature by feature |
//! | positions, in a softmax | 16 lanes, as in [`dot`](crate::dot) |
//! | positions, in a weighted sum of values | position by position |
//!
//! The exponential is our own for the same reason: the C library's depends on the CPU.
//! Each function works on one token or one head; callers loop and parallelize.

use crate::arch::{Kernel, LANES, ROUND, Simd, dispatch, exp2};
use crate::dense::{add_scaled, dots, sum_lanes};
use crate::isa::{Isa, isa};

pub(crate) mod attention;
mod causal;
pub(crate) mod exp;
mod gradients;
pub(crate) mod kv;

pub use attention::{Blocks, Rows, attention};
pub use causal::{Causal, attention_causal};
pub use exp::{exp, exp_sum, exp_sum_in_place, largest};
pub use gradients::{attention_slopes, gate_backward, rms_norm_backward};
pub use kv::{KV_BLOCK, KvLayout, KvPage, KvSequence, KvType, attention_kv};

/// RMSNorm (arXiv 1910.07467): `out = x * (1 / sqrt(mean(x^2) + eps)) * weight`.
///
/// `x`, `weight` and `out` are `(n,)`. Returns the reciprocal root, which a backward pass needs.
///
/// # Panics
/// When the lengths differ.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> f32 {
    rms_norm_on(isa(), x, weight, eps, out)
}

pub(crate) fn rms_norm_on(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> f32 {
    assert_eq!((x.len(), x.len()), (weight.len(), out.len()), "vectors differ in length");
    dispatch(isa, RmsNorm { x, weight, eps, out })
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let inverse = inverse_root(simd, self.x, self.eps);
        for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *out = x * inverse * weight;
        }
        inverse
    }
}

/// As [`rms_norm`], of `x` in its place.
///
/// # Panics
/// When the lengths differ.
pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) -> f32 {
    assert_eq!(x.len(), weight.len(), "vectors differ in length");
    dispatch(isa(), RmsNormInPlace { x, weight, eps })
}

struct RmsNormInPlace<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    eps: f32,
}

impl Kernel for RmsNormInPlace<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let inverse = inverse_root(simd, self.x, self.eps);
        for (x, weight) in self.x.iter_mut().zip(self.weight) {
            *x = *x * inverse * weight;
        }
        inverse
    }
}

/// `1 / sqrt(mean(x^2) + eps)`
#[inline(always)]
fn inverse_root<S: Simd>(simd: S, x: &[f32], eps: f32) -> f32 {
    let mean_square = dots(simd, [x], [x])[0][0] / x.len() as f32;
    1.0 / (mean_square + eps).sqrt()
}

/// Rotary embedding (arXiv 2104.09864) of a token's heads in place, "rotate half": pairs
/// `(i, i + d/2)`.
///
/// `heads` is `(n, d)`; `cos` and `sin` are `(d/2,)`, those of the token's position. With `sin`
/// negated it is its own inverse, and so its own backward pass.
///
/// # Panics
/// When the lengths do not fit together.
pub fn rope(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    assert_eq!(cos.len(), sin.len(), "cos and sin differ in length");
    let whole = heads.len().checked_rem(2 * cos.len()).is_none_or(|rest| rest == 0);
    assert!(whole, "{} features are not heads of {}", heads.len(), 2 * cos.len());
    dispatch(isa(), Rope { heads, cos, sin });
}

struct Rope<'a> {
    heads: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for Rope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for head in self.heads.chunks_exact_mut((2 * self.cos.len()).max(1)) {
            let (first, second) = head.split_at_mut(self.cos.len());
            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(self.cos).zip(self.sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

/// What a gated feed-forward layer does to its gate before it multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `relu(x)^2` (arXiv 2109.08668).
    Relu2,
    /// `x / (1 + exp(-x))` (SwiGLU, arXiv 2002.05202).
    Silu,
}

impl Gate {
    #[inline(always)]
    pub(crate) fn relu2(x: f32) -> f32 {
        let positive = x.max(0.0);
        positive * positive
    }

    #[inline(always)]
    pub(crate) fn silu(x: f32) -> f32 {
        x / (1.0 + exp(-x))
    }
}

/// `values = gate(values) * up`, elementwise.
///
/// # Panics
/// When the lengths differ.
pub fn gate(gate: Gate, values: &mut [f32], up: &[f32]) {
    gate_on(isa(), gate, values, up);
}

pub(crate) fn gate_on(isa: Isa, gate: Gate, values: &mut [f32], up: &[f32]) {
    assert_eq!(values.len(), up.len(), "gate and input differ in length");
    match gate {
        Gate::Relu2 => dispatch(isa, Gated { values, up, activation: Gate::relu2 }),
        Gate::Silu => dispatch(isa, Gated { values, up, activation: Gate::silu }),
    }
}

struct Gated<'a, A> {
    values: &'a mut [f32],
    up: &'a [f32],
    activation: A,
}

impl<A: Fn(f32) -> f32> Kernel for Gated<'_, A> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (value, up) in self.values.iter_mut().zip(self.up) {
            *value = (self.activation)(*value) * up;
        }
    }
}

/// `out = gate(values) * up`, elementwise: [`gate`] that leaves its input.
///
/// # Panics
/// When the lengths differ.
pub fn gate_into(gate: Gate, values: &[f32], up: &[f32], out: &mut [f32]) {
    assert_eq!([up.len(), out.len()], [values.len(); 2], "vectors differ in length");
    match gate {
        Gate::Relu2 => dispatch(isa(), GatedInto { values, up, out, activation: Gate::relu2 }),
        Gate::Silu => dispatch(isa(), GatedInto { values, up, out, activation: Gate::silu }),
    }
}

struct GatedInto<'a, A> {
    values: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
    activation: A,
}

impl<A: Fn(f32) -> f32> Kernel for GatedInto<'_, A> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for ((out, value), up) in self.out.iter_mut().zip(self.values).zip(self.up) {
            *out = (self.activation)(*value) * up;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_in_place_and_elsewhere_is_the_same() {
        let (x, up): (Vec<f32>, Vec<f32>) =
            (0..37).map(|i| ((i * 7 % 19) as f32 / 5.0 - 1.5, (i * 5 % 23) as f32 - 11.0)).unzip();
        for act in [Gate::Relu2, Gate::Silu] {
            let (mut there, mut elsewhere) = (x.clone(), vec![0.0; 37]);
            gate(act, &mut there, &up);
            gate_into(act, &x, &up, &mut elsewhere);
            assert_eq!(there, elsewhere);
        }
        let (mut there, mut elsewhere) = (x.clone(), vec![0.0; 37]);
        let inverse = rms_norm_in_place(&mut there, &up, 1e-5);
        assert_eq!(inverse, rms_norm(&x, &up, 1e-5, &mut elsewhere));
        assert_eq!(there, elsewhere);
    }

    #[test]
    fn rope_with_negated_sines_undoes_rope() {
        let angles = [0.0f32, 0.3, 2.0];
        let (cos, sin) = (angles.map(f32::cos), angles.map(f32::sin));
        let head = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let mut rotated = head;
        rope(&mut rotated, &cos, &sin);
        assert_eq!((rotated[0], rotated[3]), (head[0], head[3]));
        assert!((rotated[1] - (head[1] * cos[1] - head[4] * sin[1])).abs() < 1e-6);
        rope(&mut rotated, &cos, &sin.map(|s| -s));
        assert!(rotated.iter().zip(&head).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn rms_norm_divides_by_the_root_mean_square() {
        let mut out = [0.0; 2];
        let inverse = rms_norm(&[3.0, 4.0], &[1.0, 2.0], 0.0, &mut out);
        assert!((inverse - (2.0f32 / 25.0).sqrt()).abs() < 1e-7);
        assert!((out[0] - 3.0 * inverse).abs() < 1e-6 && (out[1] - 8.0 * inverse).abs() < 1e-6);
    }

    #[test]
    fn gates_are_their_formulas() {
        let mut gate = [-1.0, 0.0, 3.0];
        super::gate(Gate::Relu2, &mut gate, &[5.0, 5.0, 2.0]);
        assert_eq!(gate, [0.0, 0.0, 18.0]);
        let mut gate = [0.0, 1.0];
        super::gate(Gate::Silu, &mut gate, &[5.0, 2.0]);
        assert_eq!(gate[0], 0.0);
        assert!((gate[1] - 2.0 / (1.0 + (-1.0f32).exp())).abs() < 1e-6);
    }

    #[test]
    #[should_panic(expected = "gate and input differ in length")]
    fn a_short_input_of_a_relu2_gate_is_refused() {
        gate(Gate::Relu2, &mut [1.0; 3], &[1.0; 2]);
    }

    #[test]
    #[should_panic(expected = "gate and input differ in length")]
    fn a_long_input_of_a_silu_gate_is_refused() {
        gate(Gate::Silu, &mut [1.0; 3], &[1.0; 4]);
    }

    #[test]
    #[should_panic(expected = "cos and sin differ in length")]
    fn short_sines_are_refused() {
        rope(&mut [1.0; 6], &[1.0; 3], &[0.0; 2]);
    }

    #[test]
    #[should_panic(expected = "8 features are not heads of 6")]
    fn a_long_head_is_refused() {
        rope(&mut [1.0; 8], &[1.0; 3], &[0.0; 3]);
    }
}
