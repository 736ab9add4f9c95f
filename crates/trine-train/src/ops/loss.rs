//! Mean cross entropy over a vocabulary.
//!
//! With `p = softmax(logits)` of a row: `loss = -ln p[target]`, `dlogits = p - onehot(target)`, both
//! averaged over rows. The probabilities are computed again in the backward pass, not kept.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use trine_kernels::nn;

use super::{contiguous, view};

/// Mean cross entropy in nats, a scalar. `logits` is `(N, V)` f32, `targets` `(N,)` u32.
///
/// # Errors
/// Shapes that do not fit, or a target outside the vocabulary.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    logits.contiguous()?.apply_op2(&targets.contiguous()?, CrossEntropy)
}

struct CrossEntropy;

fn targets_of(storage: &CpuStorage, layout: &Layout) -> Result<Vec<usize>> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::U32(data), Some((start, end))) => {
            Ok(data[start..end].iter().map(|&id| id as usize).collect())
        }
        _ => candle_core::bail!("cross_entropy: expected contiguous u32 targets"),
    }
}

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        logits_layout: &Layout,
        targets: &CpuStorage,
        targets_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, vocab) = logits_layout.shape().dims2()?;
        let logits = contiguous(logits, logits_layout)?;
        let targets = targets_of(targets, targets_layout)?;
        if targets.len() != rows {
            candle_core::bail!("cross_entropy: {rows} rows of logits, {} targets", targets.len());
        }
        if let Some(target) = targets.iter().find(|&&t| t >= vocab) {
            candle_core::bail!("cross_entropy: target {target} outside a vocabulary of {vocab}");
        }
        let losses: Vec<f32> = logits
            .par_chunks_exact(vocab)
            .zip(&targets)
            .map(|(row, &target)| {
                let (max, sum) = nn::exp_sum(row);
                sum.ln() + max - row[target]
            })
            .collect();
        let total: f64 = losses.iter().map(|&l| f64::from(l)).sum();
        Ok((CpuStorage::F32(vec![(total / rows as f64) as f32]), Shape::from_dims(&[])))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        _loss: &Tensor,
        dloss: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (rows, vocab) = logits.dims2()?;
        let factor = dloss.to_scalar::<f32>()? / rows as f32;
        let targets = targets.to_vec1::<u32>()?;
        let values = view(logits)?;
        let values: &[f32] = &values;
        let mut gradient = vec![0.0; values.len()];
        gradient
            .par_chunks_exact_mut(vocab)
            .zip(values.par_chunks_exact(vocab))
            .zip(&targets)
            .for_each(|((gradient, row), &target)| {
                gradient.copy_from_slice(row);
                let (_, sum) = nn::exp_sum_in_place(gradient);
                gradient.iter_mut().for_each(|exp| *exp *= factor / sum);
                gradient[target as usize] -= factor;
            });
        Ok((Some(Tensor::from_vec(gradient, (rows, vocab), logits.device())?), None))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, painted};
    use super::*;
    use candle_core::Device;

    #[test]
    fn cross_entropy_matches_composition() {
        for (rows, vocab) in [(1, 2), (5, 7), (9, 130)] {
            let targets: Vec<u32> = (0..rows).map(|i| (i * 5 % vocab) as u32).collect();
            let targets = Tensor::from_vec(targets, rows, &Device::Cpu).unwrap();
            check(
                &[painted((rows, vocab), 3)],
                |t| cross_entropy(&t[0], &targets).unwrap(),
                |t| candle_nn::loss::cross_entropy(&t[0], &targets).unwrap(),
            );
        }
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let logits = Tensor::new(&[[1e4f32, -1e4]], &Device::Cpu).unwrap();
        let loss = |target: u32| {
            let target = Tensor::new(&[target], &Device::Cpu).unwrap();
            cross_entropy(&logits, &target).unwrap().to_scalar::<f32>().unwrap()
        };
        assert_eq!((loss(0), loss(1)), (0.0, 2e4));
    }

    #[test]
    fn targets_outside_the_vocabulary_are_refused() {
        let logits = Tensor::new(&[[0f32, 0.0]], &Device::Cpu).unwrap();
        let targets = Tensor::new(&[2u32], &Device::Cpu).unwrap();
        let error = cross_entropy(&logits, &targets).unwrap_err().to_string();
        assert!(error.contains("target 2"), "{error}");
    }
}
