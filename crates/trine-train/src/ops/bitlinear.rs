//! BitLinear: a linear layer whose weights are ternary and whose activations are int8.
//!
//! Forward: `y = x_q W_q^T`, computed as an exact integer product of codes and trits and one
//! rescaling, by the kernels that the runtime uses. Backward, by the straight-through estimator
//! (BitNet, arXiv 2310.11453): the rounding counts as the identity, nothing is masked by the clamps,
//!
//! ```text
//! dX = dY W_q        dW = dY^T X_q
//! ```
//!
//! with the dequantized values `W_q = trits * scale` and `X_q = codes / s`.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use trine_kernels::{Activations, PackedMatrix};
use trine_ternary::{TernaryMatrix, quantize_activations};

use super::{contiguous, view};

/// Applies a BitLinear layer.
///
/// `x` is `(.., in)`, `weight` the `(out, in)` masters, the result `(.., out)`, all f32.
/// `name` is the weight's name, for errors.
///
/// # Errors
/// Shapes that do not fit, or masters that are not finite.
pub fn bitlinear(x: &Tensor, weight: &Tensor, name: &str) -> Result<Tensor> {
    x.contiguous()?.apply_op2(weight, BitLinear { name: name.to_owned() })
}

struct BitLinear {
    name: String,
}

impl BitLinear {
    fn ternary(&self, weights: &[f32], out: usize, inp: usize) -> Result<TernaryMatrix> {
        TernaryMatrix::from_weights(weights, out, inp)
            .map_err(|e| candle_core::Error::Msg(format!("{}: {e}", self.name)))
    }
}

impl CustomOp2 for BitLinear {
    fn name(&self) -> &'static str {
        "bitlinear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (contiguous(x, x_layout)?, contiguous(w, w_layout)?);
        let (out, inp) = w_layout.shape().dims2()?;
        let mut dims = x_layout.dims().to_vec();
        if dims.last() != Some(&inp) {
            candle_core::bail!("{}: input is {dims:?}, weight ({out}, {inp})", self.name);
        }
        let tokens = x.len() / inp;
        let packed = PackedMatrix::from(&self.ternary(w, out, inp)?);
        let activations = Activations::quantize(x, tokens, inp);
        let mut y = vec![0f32; tokens * out];
        trine_kernels::bitlinear(&packed, &activations, &mut y);
        *dims.last_mut().expect("checked above") = out;
        Ok((CpuStorage::F32(y), Shape::from_dims(&dims)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (out, inp) = w.dims2()?;
        // (M, out), (M, in) with M tokens.
        let dy = dy.contiguous()?.reshape(((), out))?;
        let x_q = quantize_dequantize(&x.reshape(((), inp))?)?;
        let w_q = self.ternary(&view(w)?, out, inp)?.dequantize();
        let w_q = Tensor::from_vec(w_q, (out, inp), w.device())?;
        let dx = dy.matmul(&w_q)?.reshape(x.shape())?;
        let dw = dy.t()?.matmul(&x_q)?;
        Ok((Some(dx), Some(dw)))
    }
}

/// What the int8 codes of every row stand for: `(M, K)` to `(M, K)`, without a gradient.
fn quantize_dequantize(x: &Tensor) -> Result<Tensor> {
    let (rows, cols) = x.dims2()?;
    let mut values = vec![0.0; rows * cols];
    let x_view = view(x)?;
    let elements: &[f32] = &x_view;
    values.par_chunks_exact_mut(cols).zip(elements.par_chunks_exact(cols)).for_each(
        |(out, row)| {
            let mut codes = vec![0i8; cols];
            let inverse = 1.0 / quantize_activations(row, &mut codes);
            out.iter_mut().zip(codes).for_each(|(v, code)| *v = f32::from(code) * inverse);
        },
    );
    Tensor::from_vec(values, (rows, cols), x.device())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, painted};
    use super::*;
    use candle_core::Device;
    use trine_ternary::reference;

    #[test]
    fn bitlinear_forward_matches_definition() {
        for (tokens, out, inp) in [(1, 1, 1), (3, 5, 7), (9, 17, 257), (2, 64, 300)] {
            let (x, w) = (painted((tokens, inp), 1), painted((out, inp), 2));
            let y = bitlinear(&x, &w, "w").unwrap();
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let (x, w) = (flat(&x), flat(&w));
            let matrix = TernaryMatrix::from_weights(&w, out, inp).unwrap();
            for (t, y) in y.to_vec2::<f32>().unwrap().iter().enumerate() {
                let mut expected = vec![0.0; out];
                reference::bitlinear(&matrix, &x[t * inp..][..inp], &mut expected);
                assert_eq!(*y, expected, "token {t} of ({tokens}, {out}, {inp})");
            }
        }
    }

    /// The straight-through estimator by the detach trick: the gradient of `v` is that of `q`.
    fn straight_through(v: &Tensor, q: &Tensor) -> Tensor {
        (v + (q - v).unwrap().detach()).unwrap()
    }

    #[test]
    fn gradients_are_those_of_the_straight_through_estimator() {
        for (tokens, out, inp) in [(1, 1, 1), (3, 5, 19), (8, 33, 70)] {
            let oracle = |t: &[Tensor]| {
                let x = t[0].reshape(((), inp)).unwrap();
                let masters = t[1].flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let w_q = TernaryMatrix::from_weights(&masters, out, inp).unwrap().dequantize();
                let w_q = Tensor::from_vec(w_q, (out, inp), &Device::Cpu).unwrap();
                let x_q = quantize_dequantize(&x.detach()).unwrap();
                let w_q = straight_through(&t[1], &w_q);
                let y = straight_through(&x, &x_q).matmul(&w_q.t().unwrap()).unwrap();
                y.reshape((2, tokens, out)).unwrap()
            };
            check(
                &[painted((2, tokens, inp), 1), painted((out, inp), 2)],
                |t| bitlinear(&t[0], &t[1], "w").unwrap(),
                oracle,
            );
        }
    }

    #[test]
    fn masters_that_are_not_finite_name_the_tensor() {
        let x = Tensor::zeros((1, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        let w = Tensor::new(&[[1.0f32, f32::NAN]], &Device::Cpu).unwrap();
        let error = bitlinear(&x, &w, "layers.3.q").unwrap_err().to_string();
        assert!(error.contains("layers.3.q") && error.contains("NaN"), "{error}");
    }
}
