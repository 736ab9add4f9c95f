//! AdamW (arXiv 1711.05101) with global-norm clipping, as PyTorch computes it.
//!
//! Weight decay applies to matrices only (norm weights have one dimension and are left alone).
//! Masters and moments are f32; the update is one pass over a parameter, in place.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};
use rayon::prelude::*;

use crate::ops::{contiguous, view};
use crate::schedule::Rates;
use crate::{Params, TrainError};

/// Elements that one thread takes at a time.
const CHUNK: usize = 1 << 14;

/// Settings that stay the same over a run.
#[derive(Clone, Copy, Debug)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Gradients are scaled down to this global norm; `None` leaves them.
    pub clip_grad_norm: Option<f64>,
}

/// First and second moment of one parameter, each of its size.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    /// Running mean of the gradient.
    pub m: Vec<f32>,
    /// Running mean of the squared gradient.
    pub v: Vec<f32>,
}

/// The optimizer's state.
pub struct AdamW {
    config: AdamWConfig,
    step: usize,
    moments: BTreeMap<String, Mutex<Moments>>,
}

/// Gradients by parameter name.
pub type Gradients = BTreeMap<String, Tensor>;

/// Takes the gradients of all parameters out of a backward pass.
///
/// # Errors
/// When a parameter received no gradient: an operation without backward cut the graph.
pub fn collect(params: &Params, store: &mut GradStore) -> Result<Gradients, TrainError> {
    let mut gradients = Gradients::new();
    for (name, var) in params.iter() {
        let Some(gradient) = store.remove(var) else {
            return Err(candle_core::Error::Msg(format!("{name} received no gradient")).into());
        };
        gradients.insert(name.to_owned(), gradient.contiguous()?);
    }
    Ok(gradients)
}

/// The global L2 norm of all gradients, summed in f64 in name order.
///
/// # Errors
/// When a gradient is not a contiguous f32 tensor on the CPU.
pub fn global_norm(gradients: &Gradients) -> Result<f64, TrainError> {
    let mut sum = 0.0;
    for gradient in gradients.values() {
        let squares = |chunk: &[f32]| chunk.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>();
        sum += view(gradient)?.chunks(4096).map(squares).sum::<f64>();
    }
    Ok(sum.sqrt())
}

/// A poisoned lock is of no interest: an update that panicked ended the run.
fn lock(moments: &Mutex<Moments>) -> MutexGuard<'_, Moments> {
    moments.lock().unwrap_or_else(|e| e.into_inner())
}

impl AdamW {
    /// An optimizer with zero moments.
    pub fn new(config: AdamWConfig, params: &Params) -> Self {
        let zero = |n| Mutex::new(Moments { m: vec![0.0; n], v: vec![0.0; n] });
        let moments =
            params.iter().map(|(name, var)| (name.to_owned(), zero(var.elem_count()))).collect();
        Self { config, step: 0, moments }
    }

    /// All moments by parameter name, in name order, for a checkpoint.
    pub fn moments(&self) -> impl Iterator<Item = (&str, MutexGuard<'_, Moments>)> {
        self.moments.iter().map(|(name, moments)| (name.as_str(), lock(moments)))
    }

    /// Takes up the state of a checkpoint: the number of updates made and the moments.
    ///
    /// # Errors
    /// The name of a parameter whose moments are missing or of another size.
    pub fn restore(
        &mut self,
        step: usize,
        mut load: impl FnMut(&str) -> Option<Moments>,
    ) -> Result<(), String> {
        for (name, slot) in &mut self.moments {
            let slot = slot.get_mut().unwrap_or_else(|e| e.into_inner());
            match load(name) {
                Some(new) if new.m.len() == slot.m.len() && new.v.len() == slot.v.len() => {
                    *slot = new;
                }
                _ => return Err(name.clone()),
            }
        }
        self.step = step;
        Ok(())
    }

    /// One update of all parameters. `norm` is the [`global_norm`] of the gradients; it must be
    /// finite, for a NaN would reach every parameter.
    ///
    /// # Errors
    /// When a gradient is missing or of another shape.
    pub fn update(
        &mut self,
        params: &Params,
        gradients: &Gradients,
        norm: f64,
        Rates { learning_rate, weight_decay }: Rates,
    ) -> Result<(), TrainError> {
        self.step += 1;
        let clip = match self.config.clip_grad_norm {
            Some(max) => (max / (norm + 1e-6)).min(1.0),
            None => 1.0,
        };
        let AdamWConfig { beta1, beta2, eps, .. } = self.config;
        let correction1 = 1.0 - beta1.powi(self.step as i32);
        let correction2 = 1.0 - beta2.powi(self.step as i32);
        for (name, var) in params.iter() {
            let (Some(gradient), Some(moments)) = (gradients.get(name), self.moments.get(name))
            else {
                return Err(candle_core::Error::Msg(format!("{name} has no gradient")).into());
            };
            let decay = if var.rank() >= 2 { weight_decay } else { 0.0 };
            let op = Update {
                moments,
                clip: clip as f32,
                beta1: beta1 as f32,
                beta2: beta2 as f32,
                eps: eps as f32,
                keep: (1.0 - learning_rate * decay) as f32,
                step_size: (learning_rate / correction1) as f32,
                inverse_root_correction2: (1.0 / correction2.sqrt()) as f32,
            };
            var.as_tensor().inplace_op2(gradient, &op)?;
        }
        Ok(())
    }
}

/// The update of one parameter; the moments live inside the operation because Candle's in-place
/// operations may change only their destination.
struct Update<'a> {
    moments: &'a Mutex<Moments>,
    clip: f32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    keep: f32,
    step_size: f32,
    inverse_root_correction2: f32,
}

impl InplaceOp2 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        weights: &mut CpuStorage,
        weights_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> candle_core::Result<()> {
        let gradient = contiguous(gradient, gradient_layout)?;
        let Some((start, end)) = weights_layout.contiguous_offsets() else {
            candle_core::bail!("adamw: expected a contiguous variable");
        };
        let CpuStorage::F32(weights) = weights else {
            candle_core::bail!("adamw: expected an f32 variable");
        };
        let weights = &mut weights[start..end];
        let mut moments = lock(self.moments);
        let Moments { m, v } = &mut *moments;
        if gradient.len() != weights.len() || m.len() != weights.len() {
            candle_core::bail!("adamw: {} gradients for {} weights", gradient.len(), weights.len());
        }
        let chunks = weights.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        chunks.zip(m.par_chunks_mut(CHUNK)).zip(v.par_chunks_mut(CHUNK)).for_each(
            |(((w, g), m), v)| {
                for i in 0..w.len() {
                    let g = g[i] * self.clip;
                    m[i] += (g - m[i]) * (1.0 - self.beta1);
                    v[i] = v[i] * self.beta2 + g * g * (1.0 - self.beta2);
                    let root = v[i].sqrt() * self.inverse_root_correction2 + self.eps;
                    w[i] = w[i] * self.keep - self.step_size * m[i] / root;
                }
            },
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// Three steps of AdamW written down in f64, straight from PyTorch's documentation.
    fn formula(mut w: f64, gradients: [f64; 3], rate: f64, decay: f64) -> f64 {
        let (mut m, mut v) = (0.0, 0.0);
        for (t, g) in (1..).zip(gradients) {
            w *= 1.0 - rate * decay;
            m = 0.9 * m + 0.1 * g;
            v = 0.95 * v + 0.05 * g * g;
            let (m_hat, v_hat): (f64, f64) =
                (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.95f64.powi(t)));
            w -= rate * m_hat / (v_hat.sqrt() + 1e-8);
        }
        w
    }

    #[test]
    fn updates_are_the_formula_and_norms_do_not_decay() {
        let gradients = [0.5f64, -2.0, 0.25];
        for (shape, decays) in [(vec![1, 1], true), (vec![1], false)] {
            let var = Var::from_vec(vec![1.5f32], shape, &Device::Cpu).unwrap();
            let params = Params::from_vars([("p".to_owned(), var.clone())]);
            let config = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, clip_grad_norm: None };
            let mut adamw = AdamW::new(config, &params);
            for g in gradients {
                let gradient = Tensor::full(g as f32, var.shape(), &Device::Cpu).unwrap();
                let gradients = Gradients::from([("p".to_owned(), gradient)]);
                let rates = Rates { learning_rate: 0.1, weight_decay: 0.7 };
                adamw.update(&params, &gradients, g.abs(), rates).unwrap();
            }
            let found = var.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
            let expected = formula(1.5, gradients, 0.1, if decays { 0.7 } else { 0.0 });
            assert!((f64::from(found) - expected).abs() < 1e-6, "{found}, not {expected}");
        }
    }

    #[test]
    fn clipping_scales_the_gradient_to_the_norm() {
        let var = Var::from_vec(vec![0f32; 2], 2, &Device::Cpu).unwrap();
        let params = Params::from_vars([("p".to_owned(), var.clone())]);
        let config = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, clip_grad_norm: Some(1.0) };
        let mut adamw = AdamW::new(config, &params);
        let gradient = Tensor::new(&[30f32, 40.0], &Device::Cpu).unwrap();
        let gradients = Gradients::from([("p".to_owned(), gradient)]);
        let norm = global_norm(&gradients).unwrap();
        assert_eq!(norm, 50.0);
        let rates = Rates { learning_rate: 1e-3, weight_decay: 0.0 };
        adamw.update(&params, &gradients, norm, rates).unwrap();
        let (_, moments) = adamw.moments().next().unwrap();
        let expected = [0.1 * 0.6, 0.1 * 0.8];
        assert!(moments.m.iter().zip(expected).all(|(m, e)| (m - e).abs() < 1e-6), "{moments:?}");
    }
}
