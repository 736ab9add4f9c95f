//! Backward passes of norms, gates and softmax: one token or one query at a time.
//!
//! They serve training only, and their sums have no documented order.

use super::exp::{exp_down, scaled_largest};
use super::{Gate, Kernel, LANES, Simd, dispatch, dots, exp, isa, sum_lanes};

/// The gradients of [`rms_norm`](super::rms_norm): of `x`, which replace `dx`, and of the weights, which
/// are added to `dw`. All are `(n,)`; `dy` is the gradient of the output.
///
/// With `r = 1 / sqrt(mean(x^2) + eps)` and `g = dy * weight`:
///
/// ```text
/// dx = r (g - x r^2 mean(g x))      dw += dy x r
/// ```
///
/// # Panics
/// When the lengths differ.
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    dw: &mut [f32],
) {
    let n = x.len();
    let lengths = [weight.len(), dy.len(), dx.len(), dw.len()];
    assert_eq!(lengths, [n; 4], "vectors differ in length");
    dispatch(isa(), RmsNormBackward { x, weight, eps, dy, dx, dw });
}

struct RmsNormBackward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    dy: &'a [f32],
    dx: &'a mut [f32],
    dw: &'a mut [f32],
}

impl Kernel for RmsNormBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { x, weight, eps, dy, dx, dw } = self;
        let n = x.len() as f32;
        for ((g, dy), w) in dx.iter_mut().zip(dy).zip(weight) {
            *g = dy * w;
        }
        let inverse = 1.0 / (dots(simd, [x], [x])[0][0] / n + eps).sqrt();
        let mean = dots(simd, [x], [&*dx])[0][0] / n * inverse * inverse;
        for (((dx, dw), x), dy) in dx.iter_mut().zip(dw).zip(x).zip(dy) {
            *dw += dy * x * inverse;
            *dx = (*dx - x * mean) * inverse;
        }
    }
}

/// The gradients of a gate, `out = act(gate) * up`: that of the gate replaces `gate`, that of `up`
/// replaces `up`. `dy` is the gradient of the output; all are of one length.
///
/// # Panics
/// When the lengths differ.
pub fn gate_backward(act: Gate, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    assert_eq!([up.len(), dy.len()], [gate.len(); 2], "vectors differ in length");
    dispatch(isa(), GateBackward { act, gate, up, dy });
}

struct GateBackward<'a> {
    act: Gate,
    gate: &'a mut [f32],
    up: &'a mut [f32],
    dy: &'a [f32],
}

impl Kernel for GateBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { act, gate, up, dy } = self;
        let all = gate.iter_mut().zip(up).zip(dy);
        match act {
            Gate::Relu2 => {
                for ((g, u), dy) in all {
                    let positive = g.max(0.0);
                    *g = dy * *u * 2.0 * positive;
                    *u = dy * positive * positive;
                }
            }
            Gate::Silu => {
                for ((g, u), dy) in all {
                    let sigmoid = 1.0 / (1.0 + exp(-*g));
                    let value = *g * sigmoid;
                    *g = dy * *u * sigmoid * (1.0 + *g * (1.0 - sigmoid));
                    *u = dy * value;
                }
            }
        }
    }
}

/// The middle of attention's backward pass, for one query: `scores`, its products with the keys,
/// become the weights of [`attention`](super::attention), and `slopes`, the products of the output's
/// gradient with the values, become the gradients of the scores. Both are `(positions,)`; the query
/// sees `seen`, and everything else becomes 0. `scale` is that of the scores.
///
/// # Panics
/// When the lengths do not fit together.
pub fn attention_slopes(
    scores: &mut [f32],
    slopes: &mut [f32],
    seen: std::ops::Range<usize>,
    scale: f32,
) {
    assert_eq!(scores.len(), slopes.len(), "scores and slopes differ in length");
    assert!(seen.start < seen.end && seen.end <= scores.len(), "a query sees what is not there");
    dispatch(isa(), AttentionSlopes { scores, slopes, seen, scale });
}

struct AttentionSlopes<'a> {
    scores: &'a mut [f32],
    slopes: &'a mut [f32],
    seen: std::ops::Range<usize>,
    scale: f32,
}

impl Kernel for AttentionSlopes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { scores, slopes, seen, scale } = self;
        for all in [&mut *scores, &mut *slopes] {
            all[..seen.start].fill(0.0);
            all[seen.end..].fill(0.0);
        }
        let (weights, slopes) = (&mut scores[seen.clone()], &mut slopes[seen]);
        let max = scaled_largest(weights, scale);
        let (mut sums, mut products) = ([0.0; LANES], [0.0; LANES]);
        let mut take = |weights: &mut [f32], slopes: &[f32]| {
            for (l, (weight, slope)) in weights.iter_mut().zip(slopes).enumerate() {
                *weight = exp_down(*weight - max);
                sums[l] += *weight;
                products[l] += *weight * slope;
            }
        };
        let ((chunks, rest), (of_slopes, rest_of_slopes)) =
            (weights.as_chunks_mut::<LANES>(), slopes.as_chunks::<LANES>());
        for (weights, slopes) in chunks.iter_mut().zip(of_slopes) {
            take(weights, slopes);
        }
        take(rest, rest_of_slopes);
        let share = 1.0 / sum_lanes(sums);
        let mean = sum_lanes(products) * share;
        for (slope, weight) in slopes.iter_mut().zip(weights) {
            *weight *= share;
            *slope = *weight * (*slope - mean) * scale;
        }
    }
}
