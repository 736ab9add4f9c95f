//! The Hadamard transform before the output and down projections (BitNet v2, arXiv 2504.18415).
//!
//! Their inputs have outliers, which a 4-bit scale cannot hold beside ordinary values; the transform
//! spreads an outlier over all features. It is orthogonal and its own inverse, so the gradient goes
//! through the same transform. The matrices are trained for transformed inputs and stay as they are.
//!
//! The paper transforms a width that is a power of two; here a row is transformed in blocks of the
//! largest power of two that divides the width, so that any even width can be.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::ops::contiguous;

/// Features that are transformed together.
pub(super) fn block(width: usize) -> usize {
    1 << width.trailing_zeros()
}

/// Transforms the rows of `x`, `(.., n)`.
///
/// # Errors
/// When `x` is not an f32 tensor on the CPU.
pub(super) fn hadamard(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Hadamard)
}

struct Hadamard;

impl CustomOp1 for Hadamard {
    fn name(&self) -> &'static str {
        "hadamard"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = layout.dims().last().copied().unwrap_or(1);
        let mut values = contiguous(x, layout)?.to_vec();
        values.par_chunks_mut(block(width)).for_each(transform);
        Ok((CpuStorage::F32(values), layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        dy.contiguous()?.apply_op1_no_bwd(self).map(Some)
    }
}

/// The fast Walsh-Hadamard transform of a power of two of values, divided by the root of their
/// number.
fn transform(values: &mut [f32]) {
    let mut half = 1;
    while half < values.len() {
        for pair in values.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let norm = 1.0 / (values.len() as f32).sqrt();
    values.iter_mut().for_each(|v| *v *= norm);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, painted};
    use candle_core::Device;

    /// The matrix, block after block on the diagonal: the sign is the parity of common bits.
    fn matrix(width: usize) -> Tensor {
        let n = block(width);
        let entry = |i: usize, j: usize| match i / n == j / n {
            true if ((i % n) & (j % n)).count_ones() % 2 == 1 => -1.0 / (n as f32).sqrt(),
            true => 1.0 / (n as f32).sqrt(),
            false => 0.0,
        };
        let values = (0..width * width).map(|at| entry(at / width, at % width)).collect();
        Tensor::from_vec(values, (width, width), &Device::Cpu).unwrap()
    }

    #[test]
    fn the_fast_transform_is_the_product_with_the_matrix() {
        for width in [1, 2, 6, 24, 64, 40] {
            check(
                &[painted((2, 3, width), 1)],
                |t| hadamard(&t[0]).unwrap(),
                |t| {
                    let x = t[0].reshape((6, width)).unwrap();
                    x.matmul(&matrix(width)).unwrap().reshape((2, 3, width)).unwrap()
                },
            );
        }
    }

    #[test]
    fn an_outlier_is_spread_over_its_block() {
        let mut x = vec![0f32; 64];
        x[17] = 8.0;
        transform(&mut x);
        assert!(x.iter().all(|v| v.abs() == 1.0));
    }
}
