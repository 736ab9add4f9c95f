//! Warm-up from full precision ("Fine-tuning LLMs to 1.58bit", Hugging Face, 2024).
//!
//! For the first steps weights and activations are a mixture of what they are and what quantizing
//! makes of them, `x + l (q - x)`, with `l = min(step / steps, 1)`. The recipe takes 1000 steps to
//! turn a trained full-precision model into a ternary one.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::ops::contiguous;

/// Elements that one thread takes at a time.
const CHUNK: usize = 1 << 14;

/// How much of the quantized values the step `step` (from 0) takes, in [0, 1].
pub(super) fn share(step: usize, steps: usize) -> f64 {
    if step >= steps { 1.0 } else { step as f64 / steps as f64 }
}

/// `(1 - share) * exact + share * quantized`, two tensors of one shape.
pub(super) fn mix(exact: &Tensor, quantized: Tensor, share: f64) -> Result<Tensor> {
    if share >= 1.0 {
        return Ok(quantized);
    }
    exact.contiguous()?.apply_op2(&quantized, Mix { share })
}

/// An operation of its own, because Candle drops the gradient of what is multiplied by 0, and at
/// the first step every learned scale is.
struct Mix {
    share: f64,
}

impl CustomOp2 for Mix {
    fn name(&self) -> &'static str {
        "mix"
    }

    fn cpu_fwd(
        &self,
        exact: &CpuStorage,
        exact_layout: &Layout,
        quantized: &CpuStorage,
        quantized_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let exact = contiguous(exact, exact_layout)?;
        let mut values = contiguous(quantized, quantized_layout)?.to_vec();
        if exact.len() != values.len() {
            candle_core::bail!("mix: {} exact values, {} quantized", exact.len(), values.len());
        }
        let (keep, take) = ((1.0 - self.share) as f32, self.share as f32);
        let chunks = values.par_chunks_mut(CHUNK).zip(exact.par_chunks(CHUNK));
        chunks.for_each(|(values, exact)| {
            values.iter_mut().zip(exact).for_each(|(v, e)| *v = keep * e + take * *v);
        });
        Ok((CpuStorage::F32(values), quantized_layout.shape().clone()))
    }

    fn bwd(
        &self,
        _exact: &Tensor,
        _quantized: &Tensor,
        _mixed: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(dy.affine(1.0 - self.share, 0.0)?), Some(dy.affine(self.share, 0.0)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn the_share_grows_from_nothing_to_all() {
        assert_eq!([0, 1, 2, 4, 9].map(|step| share(step, 4)), [0.0, 0.25, 0.5, 1.0, 1.0]);
        assert_eq!(share(0, 0), 1.0);
    }

    /// The recipe writes `w + l * (q - w).detach()`: the same value, and the gradient passes whole.
    #[test]
    fn a_mixture_with_a_straight_through_value_passes_the_whole_gradient() {
        let w = Var::new(&[1f32, -3.0, 0.25], &Device::Cpu).unwrap();
        let q = ((w.as_tensor() * 2.0).unwrap().detach() - w.detach()).unwrap();
        let q = (w.as_tensor() + q).unwrap();
        let mixed = mix(&w, q, 0.25).unwrap();
        assert_eq!(mixed.to_vec1::<f32>().unwrap(), [1.25, -3.75, 0.3125]);
        let gradients = mixed.sum_all().unwrap().backward().unwrap();
        let gradient = gradients.get(&w).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(gradient, [1.0; 3]);
    }

    #[test]
    fn what_is_not_taken_yet_gets_a_gradient_of_zero() {
        let exact = Var::new(&[1f32, -3.0], &Device::Cpu).unwrap();
        let quantized = Var::new(&[0f32, -1.0], &Device::Cpu).unwrap();
        let mixed = mix(&exact, quantized.as_tensor().clone(), 0.0).unwrap();
        let gradients = mixed.sum_all().unwrap().backward().unwrap();
        let gradient = |var: &Var| gradients.get(var).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!((gradient(&exact), gradient(&quantized)), (vec![1.0; 2], vec![0.0; 2]));
    }
}
