//! The bias of the dead zone (Tequila, arXiv 2509.23809).
//!
//! A master that rounds to 0 takes no part in the product, and the gradient that it gets straight
//! through says nothing about that. Tequila lets those masters be a bias, of a small strength `l`
//! (1e-3 in the paper):
//!
//! ```text
//! y = x W_q^T + b      b[r] = l * sum of the w[r, c] that are quantized to 0
//! dw += l * db[r]      where w is quantized to 0, beside what passes straight through
//! ```
//!
//! The bias does not depend on the input, so it can be computed once after training. It is
//! `ultraquantv2` of the authors' code (AngelSlim), which their training script names; that also has
//! variants with the sign of the input and with a learned strength, which are not here. The formats
//! have no biases, so a model that was trained with one is not exported.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::ops::{contiguous, view};

/// The bias `(out,)` of masters `(out, in)` that are quantized to `quantized`, of the same shape.
///
/// # Errors
/// Shapes that do not fit.
pub(super) fn bias(masters: &Tensor, quantized: &Tensor, strength: f64) -> Result<Tensor> {
    masters.apply_op2(&quantized.detach(), DeadZone { strength: strength as f32 })
}

struct DeadZone {
    strength: f32,
}

impl CustomOp2 for DeadZone {
    fn name(&self) -> &'static str {
        "dead-zone bias"
    }

    fn cpu_fwd(
        &self,
        w: &CpuStorage,
        w_layout: &Layout,
        q: &CpuStorage,
        q_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, cols) = w_layout.shape().dims2()?;
        let (w, q) = (contiguous(w, w_layout)?, contiguous(q, q_layout)?);
        if w.len() != q.len() {
            candle_core::bail!("dead-zone bias: {} masters, {} quantized", w.len(), q.len());
        }
        let sums = w.par_chunks(cols).zip(q.par_chunks(cols)).map(|(w, q)| {
            let dead = w.iter().zip(q).filter(|(_, q)| **q == 0.0);
            self.strength * dead.map(|(w, _)| f64::from(*w)).sum::<f64>() as f32
        });
        Ok((CpuStorage::F32(sums.collect()), Shape::from(rows)))
    }

    fn bwd(
        &self,
        w: &Tensor,
        q: &Tensor,
        _bias: &Tensor,
        db: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (rows, cols) = w.dims2()?;
        let db = db.contiguous()?;
        let (db, q) = (view(&db)?, view(q)?);
        let (db, q): (&[f32], &[f32]) = (&db, &q);
        let mut dw = vec![0.0; rows * cols];
        let chunks = dw.par_chunks_mut(cols).zip(q.par_chunks(cols)).zip(db);
        chunks.for_each(|((dw, q), db)| {
            let of = |q: &f32| if *q == 0.0 { self.strength * db } else { 0.0 };
            dw.iter_mut().zip(q).for_each(|(dw, q)| *dw = of(q));
        });
        Ok((Some(Tensor::from_vec(dw, (rows, cols), w.device())?), None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, painted};
    use candle_core::DType;

    #[test]
    fn the_bias_is_the_sum_of_what_is_quantized_to_zero() {
        for (rows, cols) in [(1, 1), (3, 7), (16, 65)] {
            let w = painted((rows, cols), 3);
            let q =
                (w.abs().unwrap().ge(0.7f64).unwrap().to_dtype(DType::F32).unwrap() * 2.0).unwrap();
            check(
                &[w],
                |t| bias(&t[0], &q, 0.25).unwrap(),
                |t| {
                    let dead = q.eq(0f64).unwrap().to_dtype(DType::F32).unwrap();
                    ((&t[0] * dead).unwrap().sum(1).unwrap() * 0.25).unwrap()
                },
            );
        }
    }
}
