//! AdamW (arXiv 1711.05101), as PyTorch computes it: one pass over a parameter, in place.

use candle_core::{Result, Tensor};

use super::CHUNK;
use super::in_place::in_place_parts;
use super::moment::Moment;
use super::rounding::Rounding;

/// What one update does to one parameter.
pub(super) struct Update {
    /// What gradients are multiplied by.
    pub(super) clip: f32,
    pub(super) beta1: f32,
    pub(super) beta2: f32,
    pub(super) eps: f32,
    /// What is left of weights after their decay.
    pub(super) keep: f32,
    /// Learning rate, corrected for a first moment that began at zero.
    pub(super) step_size: f32,
    /// Corrects the root of a second moment that began at zero.
    pub(super) inverse_root_correction2: f32,
    pub(super) rounding: Option<Rounding>,
}

impl Update {
    /// Updates `weights` and the two moments of their gradient, all of one size.
    pub(super) fn apply(
        &self,
        weights: &Tensor,
        gradient: &[f32],
        m: &mut Moment,
        v: &mut Moment,
    ) -> Result<()> {
        let parts = gradient.chunks(CHUNK).zip(m.parts()).zip(v.parts());
        let mut parts: Vec<_> = parts.collect();
        in_place_parts(weights, &mut parts, |part, weights, ((gradient, m), v)| {
            m.change_both(v, |range, m, v| {
                self.elements(&mut weights[range.clone()], &gradient[range], m, v);
            });
            if let Some(rounding) = self.rounding {
                rounding.apply(part * CHUNK, weights);
            }
        })
    }

    fn elements(&self, w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        let n = w.len();
        let (g, m, v) = (&g[..n], &mut m[..n], &mut v[..n]);
        for i in 0..n {
            let g = g[i] * self.clip;
            m[i] += (g - m[i]) * (1.0 - self.beta1);
            v[i] = v[i] * self.beta2 + g * g * (1.0 - self.beta2);
            let root = v[i].sqrt() * self.inverse_root_correction2 + self.eps;
            w[i] = w[i] * self.keep - self.step_size * m[i] / root;
        }
    }
}
