//! RMSNorm (arXiv 1910.07467).
//!
//! With `r = 1 / sqrt(mean(x^2) + eps)` and `n = x * r`:
//!
//! ```text
//! y  = n * w
//! dw = sum over rows of dy * n
//! dx = r * (dy * w - n * mean(dy * w * n))
//! ```

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use trine_kernels::{dot, nn};

use super::{contiguous, view};

/// Rows whose weight gradients are summed together.
const ROWS: usize = 64;

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension.
///
/// `x` is `(.., D)`, `weight` `(D,)`, the result `(.., D)`.
///
/// # Errors
/// Shapes that do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    x.contiguous()?.apply_op2(weight, RmsNorm { eps })
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (contiguous(x, x_layout)?, contiguous(w, w_layout)?);
        if x_layout.dims().last() != Some(&w.len()) {
            candle_core::bail!("rms_norm: {:?} with {} weights", x_layout.dims(), w.len());
        }
        let mut y = vec![0.0; x.len()];
        x.par_chunks_exact(w.len()).zip(y.par_chunks_exact_mut(w.len())).for_each(|(x, y)| {
            nn::rms_norm(x, w, self.eps, y);
        });
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (xs, ws, dys) = (view(x)?, view(w)?, view(&dy)?);
        let (xs, ws, dys): (&[f32], &[f32], &[f32]) = (&xs, &ws, &dys);
        let n = ws.len();
        let ones = vec![1.0; n];
        let mut dx = vec![0.0; xs.len()];
        // Rows are summed in groups of a fixed size, and groups in order: the gradient of the
        // weights does not depend on the number of threads.
        let partial: Vec<Vec<f32>> = dx
            .par_chunks_mut(n * ROWS)
            .zip(xs.par_chunks(n * ROWS))
            .zip(dys.par_chunks(n * ROWS))
            .map(|((dx, x), dy)| {
                let (mut dw, mut normed) = (vec![0.0; n], vec![0.0; n]);
                let rows = x.chunks_exact(n).zip(dy.chunks_exact(n)).zip(dx.chunks_exact_mut(n));
                for ((x, dy), dx) in rows {
                    let inverse = nn::rms_norm(x, &ones, self.eps, &mut normed);
                    for i in 0..n {
                        dw[i] += dy[i] * normed[i];
                        dx[i] = dy[i] * ws[i];
                    }
                    let mean = dot(dx, &normed) / n as f32;
                    for i in 0..n {
                        dx[i] = inverse * (dx[i] - normed[i] * mean);
                    }
                }
                dw
            })
            .collect();
        let mut dw = vec![0.0; n];
        for partial in &partial {
            dw.iter_mut().zip(partial).for_each(|(sum, part)| *sum += part);
        }
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        let dw = Tensor::from_vec(dw, w.shape(), w.device())?;
        Ok((Some(dx), Some(dw)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, painted};
    use super::*;
    use candle_core::D;

    fn composition(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        let inverse = (mean_square + eps)?.sqrt()?.recip()?;
        x.broadcast_mul(&inverse)?.broadcast_mul(weight)
    }

    #[test]
    fn rms_norm_matches_composition() {
        for (rows, n) in [(1, 2), (3, 5), (7, 33), (2, 130)] {
            check(
                &[painted((2, rows, n), 1), painted(n, 2)],
                |t| rms_norm(&t[0], &t[1], 1e-5).unwrap(),
                |t| composition(&t[0], &t[1], 1e-5).unwrap(),
            );
        }
    }
}
