//! The float parts of a decoder layer, in one documented order.
//!
//! The runtime calls them, and so does the trainer's forward pass: activations are rounded to int8
//! right after them, so that a difference in the last place could flip a code. Sums over features
//! run in the order of [`dot`](crate::dot), sums over positions in the order of positions, products
//! and sums rounded separately; so the results are the same bits on every instruction set.
//! Each function works on one token or one head; callers loop and parallelize.

use crate::arch::{Kernel, Simd, dispatch};
use crate::dense::{add_scaled, dots};
use crate::isa::{Isa, isa};

/// RMSNorm (arXiv 1910.07467): `out = x * (1 / sqrt(mean(x^2) + eps)) * weight`.
///
/// `x`, `weight` and `out` are `(n,)`. Returns the reciprocal root, which a backward pass needs.
///
/// # Panics
/// When the lengths differ.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> f32 {
    assert_eq!((x.len(), x.len()), (weight.len(), out.len()), "vectors differ in length");
    dispatch(isa(), RmsNorm { x, weight, eps, out })
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
        let mean_square = dots(simd, [self.x], [self.x])[0][0] / self.x.len() as f32;
        let inverse = 1.0 / (mean_square + self.eps).sqrt();
        for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *out = x * inverse * weight;
        }
        inverse
    }
}

/// Rotary embedding (arXiv 2104.09864) of one head in place, "rotate half": pairs `(i, i + d/2)`.
///
/// `head` is `(d,)`; `cos` and `sin` are `(d/2,)`, those of the token's position. With `sin`
/// negated it is its own inverse, and so its own backward pass.
pub fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// Keys or values of one key/value head over positions: position `j` is `data[j * stride..][..d]`.
#[derive(Clone, Copy, Debug)]
pub struct Positions<'a> {
    /// The numbers, beginning with the head's at position 0.
    pub data: &'a [f32],
    /// Distance from one position to the next.
    pub stride: usize,
}

impl<'a> Positions<'a> {
    #[inline(always)]
    fn at(&self, position: usize, d: usize) -> &'a [f32] {
        &self.data[position * self.stride..][..d]
    }
}

/// The softmax weights of one query head over the positions `0..weights.len()`.
///
/// `q` is `(d,)`: `weights[j] = softmax over j of (q . key_j / sqrt(d))`.
///
/// # Panics
/// When there are fewer keys than weights.
pub fn attention_weights(q: &[f32], keys: Positions<'_>, weights: &mut [f32]) {
    dispatch(isa(), Attention { q, keys, values: None, weights, out: &mut [] });
}

/// Attention of one query head over the positions `0..weights.len()`.
///
/// `q` and `out` are `(d,)`; `out = sum over j of weights[j] * value_j`. `weights` is scratch whose
/// contents are replaced by the softmax weights.
///
/// # Panics
/// When there are fewer keys or values than weights.
pub fn attention(
    q: &[f32],
    keys: Positions<'_>,
    values: Positions<'_>,
    weights: &mut [f32],
    out: &mut [f32],
) {
    attention_on(isa(), q, keys, values, weights, out);
}

pub(crate) fn attention_on(
    isa: Isa,
    q: &[f32],
    keys: Positions<'_>,
    values: Positions<'_>,
    weights: &mut [f32],
    out: &mut [f32],
) {
    assert_eq!(q.len(), out.len(), "query and output differ in length");
    dispatch(isa, Attention { q, keys, values: Some(values), weights, out });
}

struct Attention<'a> {
    q: &'a [f32],
    keys: Positions<'a>,
    /// `None` when only the weights are asked for.
    values: Option<Positions<'a>>,
    weights: &'a mut [f32],
    out: &'a mut [f32],
}

impl Kernel for Attention<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { q, keys, values, weights, out } = self;
        let d = q.len();
        let scale = 1.0 / (d as f32).sqrt();
        let mut max = f32::NEG_INFINITY;
        for (j, score) in weights.iter_mut().enumerate() {
            *score = dots(simd, [keys.at(j, d)], [q])[0][0] * scale;
            max = max.max(*score);
        }
        let mut sum = 0.0;
        for weight in weights.iter_mut() {
            *weight = (*weight - max).exp();
            sum += *weight;
        }
        for weight in weights.iter_mut() {
            *weight /= sum;
        }
        if let Some(values) = values {
            out.fill(0.0);
            for (j, weight) in weights.iter().enumerate() {
                add_scaled(*weight, values.at(j, d), out);
            }
        }
    }
}

/// The gradients of [`attention`] for one query, added to `dq`, `dk` and `dv`.
///
/// `weights` are those that [`attention_weights`] gives and `g` `(d,)` is the gradient of `out`.
/// `dq` is `(d,)`; `dk` and `dv` are `(positions, d)`. `slopes` is scratch of the length of
/// `weights`. With scale `c = 1 / sqrt(d)`:
///
/// ```text
/// dv_j += w_j g      dw_j = g . v_j      ds_j = w_j (dw_j - sum_i w_i dw_i)
/// dq   += c ds_j k_j      dk_j += c ds_j q
/// ```
///
/// # Panics
/// When the lengths do not fit together.
pub fn attention_backward(
    q: &[f32],
    keys: Positions<'_>,
    values: Positions<'_>,
    weights: &[f32],
    g: &[f32],
    slopes: &mut [f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    assert_eq!(weights.len(), slopes.len(), "weights and slopes differ in length");
    dispatch(isa(), AttentionBackward { q, keys, values, weights, g, slopes, dq, dk, dv });
}

struct AttentionBackward<'a> {
    q: &'a [f32],
    keys: Positions<'a>,
    values: Positions<'a>,
    weights: &'a [f32],
    g: &'a [f32],
    slopes: &'a mut [f32],
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

impl Kernel for AttentionBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { q, keys, values, weights, g, slopes, dq, dk, dv } = self;
        let d = q.len();
        let scale = 1.0 / (d as f32).sqrt();
        for (j, slope) in slopes.iter_mut().enumerate() {
            *slope = dots(simd, [values.at(j, d)], [g])[0][0];
        }
        let mean = dots(simd, [weights], [&*slopes])[0][0];
        let rows = dk.chunks_exact_mut(d).zip(dv.chunks_exact_mut(d));
        for (j, ((dk, dv), (weight, slope))) in
            rows.zip(weights.iter().zip(slopes.iter())).enumerate()
        {
            let ds = weight * (slope - mean) * scale;
            add_scaled(*weight, g, dv);
            add_scaled(ds, keys.at(j, d), dq);
            add_scaled(ds, q, dk);
        }
    }
}

/// Squared ReLU gate (arXiv 2109.08668): `gate = relu(gate)^2 * up`, elementwise.
pub fn relu2_gate(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        let positive = gate.max(0.0);
        *gate = positive * positive * up;
    }
}

/// SiLU gate (SwiGLU, arXiv 2002.05202): `gate = gate / (1 + exp(-gate)) * up`, elementwise.
pub fn silu_gate(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + (-*gate).exp()) * up;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::available;

    fn painted(n: usize, phase: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + phase * 101) % 251) as f32 / 64.0 - 2.0).collect()
    }

    /// Attention straight from its formula, in f64.
    fn formula(q: &[f32], keys: &[f32], values: &[f32], stride: usize, seen: usize) -> Vec<f64> {
        let dot = |j: usize| -> f64 {
            q.iter().zip(&keys[j * stride..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let exps: Vec<f64> = (0..seen).map(|j| (dot(j) / (q.len() as f64).sqrt()).exp()).collect();
        let sum: f64 = exps.iter().sum();
        let value = |i: usize| {
            exps.iter().enumerate().map(|(j, e)| e / sum * f64::from(values[j * stride + i])).sum()
        };
        (0..q.len()).map(value).collect()
    }

    #[test]
    fn attention_is_the_formula_and_the_same_on_every_isa() {
        for (d, stride, seen) in [(2, 2, 1), (6, 12, 5), (32, 32, 17), (34, 70, 40)] {
            let (q, keys, values) =
                (painted(d, 1), painted(stride * seen, 2), painted(stride * seen, 3));
            let positions = |data| Positions { data, stride };
            let on = |isa| {
                let (mut weights, mut out) = (vec![0.0; seen], vec![9.0; d]);
                attention_on(isa, &q, positions(&keys), positions(&values), &mut weights, &mut out);
                out
            };
            let expected = formula(&q, &keys, &values, stride, seen);
            let generic = on(Isa::Generic);
            for (y, expected) in generic.iter().zip(expected) {
                assert!((f64::from(*y) - expected).abs() < 1e-5, "{y} instead of {expected}");
            }
            for isa in available() {
                assert_eq!(on(isa), generic, "{isa}");
            }
        }
    }

    #[test]
    fn rope_with_negated_sines_undoes_rope() {
        let angles = [0.0f32, 0.3, 2.0];
        let (cos, sin) = (angles.map(f32::cos), angles.map(f32::sin));
        let head = painted(6, 1);
        let mut rotated = head.clone();
        rope(&mut rotated, &cos, &sin);
        assert_eq!((rotated[0], rotated[3]), (head[0], head[3]));
        assert!((rotated[1] - (head[1] * cos[1] - head[4] * sin[1])).abs() < 1e-6);
        rope(&mut rotated, &cos, &sin.map(|s| -s));
        assert!(rotated.iter().zip(&head).all(|(a, b)| (a - b).abs() < 1e-6));
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
        relu2_gate(&mut gate, &[5.0, 5.0, 2.0]);
        assert_eq!(gate, [0.0, 0.0, 18.0]);
        let mut gate = [0.0, 1.0];
        silu_gate(&mut gate, &[5.0, 2.0]);
        assert_eq!(gate[0], 0.0);
        assert!((gate[1] - 2.0 / (1.0 + (-1.0f32).exp())).abs() < 1e-6);
    }
}
