//! Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"): momentum
//! whose matrix is made orthogonal before it is applied, so that every direction moves alike.
//!
//! Five Newton-Schulz steps with the published coefficients take the singular values of the
//! momentum to near 1. Of the two scalings in use ours is Moonshot's, `0.2 sqrt(max(rows, columns))`
//! (arXiv 2502.16982, section 2.2): elements then move about as far as with AdamW, so learning rate
//! and weight decay of AdamW can be kept.
//!
//! It costs matrix products of 10 to 15 `min(rows, columns) * rows * columns` multiplications a step,
//! against `3 * tokens * rows * columns` for forward and backward: little for large batches only.

use candle_core::{Result, Tensor};
use trine_kernels::bf16::{self, Left, Right, Scale, multiply};
use trine_kernels::gemm::{Matrix, Store, matmul};
use trine_kernels::{AlignedBuf, parallel};

use super::CHUNK;
use super::gradients::squares;
use super::in_place::in_place_parts;
use super::moment::Moment;
use super::rounding::Rounding;

/// Coefficients of the quintic `a x + b x^3 + c x^5`, chosen for a steep rise at 0.
pub(super) const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];

/// Applications of the quintic.
pub(super) const STEPS: usize = 5;

/// Products of Newton-Schulz steps, and the memory that they need. They are of bfloat16 where the CPU has
/// instructions for it, as in the published program.
pub struct NewtonSchulz {
    bf16: bool,
    left: Left,
    right: Right,
    /// The matrix, wide, before and after a step.
    x: [AlignedBuf<f32>; 2],
    gram: AlignedBuf<f32>,
    polynomial: AlignedBuf<f32>,
}

impl Default for NewtonSchulz {
    fn default() -> Self {
        Self::new(bf16::is_fast())
    }
}

impl NewtonSchulz {
    fn new(bf16: bool) -> Self {
        Self {
            bf16,
            left: Left::default(),
            right: Right::default(),
            x: Default::default(),
            gram: AlignedBuf::default(),
            polynomial: AlignedBuf::default(),
        }
    }

    /// Turns `matrix` `(rows, columns)` into one with its singular vectors and singular values near 1
    /// (between about 0.7 and 1.2, but for those that were below a thousandth of the whole norm).
    ///
    /// # Panics
    /// When `matrix` is not `(rows, columns)`.
    pub fn orthogonalize(&mut self, matrix: &mut [f32], rows: usize, columns: usize) {
        assert_eq!(Some(matrix.len()), rows.checked_mul(columns), "matrix is not (rows, columns)");
        let Self { bf16, left, right, x: [x, next], gram, polynomial } = self;
        let [a, b, c] = COEFFICIENTS;
        // The products are of the smaller size: (s, s) and (s, l).
        let (s, l) = (rows.min(columns), rows.max(columns));
        x.resize(s * l);
        next.resize(s * l);
        gram.resize(s * s);
        polynomial.resize(s * s);
        let inverse = (1.0 / (squares(matrix).sqrt() + 1e-7)) as f32;
        if rows > columns {
            transpose(matrix, rows, columns, x);
        } else {
            x.copy_from_slice(matrix);
        }
        scale(x, inverse);
        for _ in 0..STEPS {
            if *bf16 {
                left.fill_rows(x, s, l);
                right.fill_columns(x, s, l);
                multiply(left, right.all(), Scale::One, Store::Set, gram);
                left.fill_rows(gram, s, s);
                right.fill_rows(gram, s, s);
                multiply(left, right.all(), Scale::All(c), Store::Set, polynomial);
            } else {
                let turned = Matrix::turned(x);
                matmul([s, l, s], Matrix::plain(x), turned, Store::Set, gram);
                let gram = Matrix::plain(gram);
                matmul([s, s, s], gram, gram, Store::Set, polynomial);
                scale(polynomial, c);
            }
            add_scaled(polynomial, gram, b);
            // The quintic's first term is a part of the last product: `(a + polynomial) x`, of which
            // `a` would be rounded with the rest.
            if *bf16 {
                left.fill_rows(polynomial, s, s);
                right.fill_rows(x, s, l);
                multiply(left, right.all(), Scale::One, Store::Set, next);
            } else {
                matmul([s, s, l], Matrix::plain(polynomial), Matrix::plain(x), Store::Set, next);
            }
            add_scaled(next, x, a);
            std::mem::swap(x, next);
        }
        if rows > columns {
            transpose(x, s, l, matrix);
        } else {
            matrix.copy_from_slice(x);
        }
    }
}

fn scale(x: &mut [f32], factor: f32) {
    parallel::for_each_chunk(x, CHUNK, |_, x| x.iter_mut().for_each(|x| *x *= factor));
}

/// `to += factor * x`
fn add_scaled(to: &mut [f32], x: &[f32], factor: f32) {
    parallel::for_each_chunk(to, CHUNK, |i, to| {
        to.iter_mut().zip(&x[i * CHUNK..]).for_each(|(to, x)| *to += factor * x);
    });
}

/// Writes the transpose of `x` `(rows, columns)`, in blocks that stay in the cache.
fn transpose(x: &[f32], rows: usize, columns: usize, to: &mut [f32]) {
    const BLOCK: usize = 32;
    parallel::for_each_chunk(to, BLOCK * rows, |i, to| {
        for first in (0..rows).step_by(BLOCK) {
            for (c, to) in to.chunks_exact_mut(rows).enumerate() {
                let column = i * BLOCK + c;
                for r in first..rows.min(first + BLOCK) {
                    to[r] = x[r * columns + column];
                }
            }
        }
    });
}

/// How far an orthogonal matrix goes at a learning rate of 1.
pub fn update_scale(rows: usize, columns: usize) -> f64 {
    0.2 * (rows.max(columns) as f64).sqrt()
}

/// What one update does to one matrix.
pub(super) struct Update {
    /// What gradients are multiplied by.
    pub(super) clip: f32,
    /// Decay of the running mean.
    pub(super) momentum: f32,
    pub(super) learning_rate: f64,
    /// What is left of weights after their decay.
    pub(super) keep: f32,
    pub(super) rounding: Option<Rounding>,
}

impl Update {
    /// Updates `weights` `(rows, columns)` and the running mean of their gradient.
    pub(super) fn apply(
        &self,
        weights: &Tensor,
        gradient: &[f32],
        mean: &mut Moment,
        newton_schulz: &mut NewtonSchulz,
    ) -> Result<()> {
        let (rows, columns) = weights.dims2()?;
        let mut direction = self.direction(gradient, mean);
        newton_schulz.orthogonalize(&mut direction, rows, columns);
        let step = (self.learning_rate * update_scale(rows, columns)) as f32;
        let mut parts: Vec<_> = direction.chunks(CHUNK).collect();
        in_place_parts(weights, &mut parts, |part, weights, direction| {
            for (w, d) in weights.iter_mut().zip(direction.iter()) {
                *w = *w * self.keep - step * d;
            }
            if let Some(rounding) = self.rounding {
                rounding.apply(part * CHUNK, weights);
            }
        })
    }

    /// Moves the running mean and returns it with Nesterov's look ahead.
    fn direction(&self, gradient: &[f32], mean: &mut Moment) -> Vec<f32> {
        let mut direction = vec![0.0; gradient.len()];
        let chunks = direction.chunks_mut(CHUNK).zip(gradient.chunks(CHUNK));
        let mut chunks: Vec<_> = chunks.zip(mean.parts()).collect();
        parallel::for_each(&mut chunks, |_, ((direction, gradient), mean)| {
            mean.change(|range, mean| {
                let pieces = direction[range.clone()].iter_mut().zip(&gradient[range]);
                for (m, (direction, g)) in mean.iter_mut().zip(pieces) {
                    let g = g * self.clip;
                    *m += (g - *m) * (1.0 - self.momentum);
                    *direction = g + (*m - g) * self.momentum;
                }
            });
        });
        direction
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MomentStorage;
    use crate::optimizer::moment::Meaning;
    use candle_core::Device;

    /// Pseudo-random values with a mean of 0, so that matrices have full rank.
    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as f32 / (1u64 << 31) as f32 - 0.5
        };
        (0..n).map(|_| (0..4).map(|_| next()).sum()).collect()
    }

    /// Row-major `(n, k) x (k, m)` in f64.
    fn product(a: &[f64], b: &[f64], n: usize, k: usize, m: usize) -> Vec<f64> {
        let at = |i: usize, j: usize| (0..k).map(|l| a[i * k + l] * b[l * m + j]).sum();
        (0..n * m).map(|ij| at(ij / m, ij % m)).collect()
    }

    fn transposed(a: &[f64], n: usize, m: usize) -> Vec<f64> {
        (0..n * m).map(|ij| a[ij % n * m + ij / n]).collect()
    }

    /// The published loop in f64 on `X (rows, columns)`, whatever is larger: `X (a + b X'X + c
    /// (X'X)^2)`, which equals the other order.
    fn slow(matrix: &[f32], rows: usize, columns: usize) -> Vec<f64> {
        let mut x: Vec<f64> = matrix.iter().map(|v| f64::from(*v)).collect();
        let norm = x.iter().map(|v| v * v).sum::<f64>().sqrt() + 1e-7;
        x.iter_mut().for_each(|v| *v /= norm);
        for _ in 0..5 {
            let gram = product(&transposed(&x, rows, columns), &x, columns, rows, columns);
            let square = product(&gram, &gram, columns, columns, columns);
            let factor: Vec<f64> = (0..columns * columns)
                .map(|i| {
                    let one = f64::from(u8::from(i % (columns + 1) == 0));
                    3.4445 * one - 4.7750 * gram[i] + 2.0315 * square[i]
                })
                .collect();
            x = product(&x, &factor, rows, columns, columns);
        }
        x
    }

    /// The eigenvalues of a symmetric matrix by Jacobi's rotations.
    fn eigenvalues(mut a: Vec<f64>, n: usize) -> Vec<f64> {
        for _ in 0..60 {
            for p in 0..n {
                for q in p + 1..n {
                    let apq = a[p * n + q];
                    if apq.abs() < 1e-14 {
                        continue;
                    }
                    let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * apq);
                    let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                    let cos = 1.0 / (t * t + 1.0).sqrt();
                    let sin = t * cos;
                    for k in 0..n {
                        let (kp, kq) = (a[k * n + p], a[k * n + q]);
                        a[k * n + p] = cos * kp - sin * kq;
                        a[k * n + q] = sin * kp + cos * kq;
                    }
                    for k in 0..n {
                        let (pk, qk) = (a[p * n + k], a[q * n + k]);
                        a[p * n + k] = cos * pk - sin * qk;
                        a[q * n + k] = sin * pk + cos * qk;
                    }
                }
            }
        }
        (0..n).map(|i| a[i * n + i]).collect()
    }

    const SHAPES: [(usize, usize); 4] = [(16, 16), (12, 40), (40, 12), (1, 7)];

    #[test]
    fn newton_schulz_is_the_published_loop() {
        for (rows, columns) in SHAPES {
            let values = noise(rows * columns, 3);
            let expected = slow(&values, rows, columns);
            for (bf16, within) in [(false, 2e-3), (true, 6e-2)] {
                let mut found = values.clone();
                NewtonSchulz::new(bf16).orthogonalize(&mut found, rows, columns);
                for (found, expected) in found.iter().zip(&expected) {
                    let error = (f64::from(*found) - expected).abs();
                    assert!(error < within, "{found}, not {expected}, bf16 {bf16}");
                }
            }
        }
    }

    #[test]
    fn orthogonalized_matrices_have_singular_values_near_one() {
        for (rows, columns) in SHAPES {
            let mut x: Vec<f32> = noise(rows * columns, 5).iter().map(|v| v * 1e-3).collect();
            NewtonSchulz::default().orthogonalize(&mut x, rows, columns);
            let x: Vec<f64> = x.into_iter().map(f64::from).collect();
            let (x, small, large) = match rows <= columns {
                true => (x, rows, columns),
                false => (transposed(&x, rows, columns), columns, rows),
            };
            let gram = product(&x, &transposed(&x, small, large), small, large, small);
            for square in eigenvalues(gram, small) {
                let value = square.max(0.0).sqrt();
                assert!((0.6..1.25).contains(&value), "({rows}, {columns}): {value}");
            }
        }
    }

    #[test]
    fn updates_are_momentum_made_orthogonal_and_scaled() {
        let (rows, columns) = (6, 10);
        let first = noise(rows * columns, 7);
        let weights = Tensor::from_vec(first.clone(), (rows, columns), &Device::Cpu).unwrap();
        let mut mean = Moment::zeros(rows * columns, Meaning::Signed, MomentStorage::F32);
        let mut newton_schulz = NewtonSchulz::new(false);
        let update =
            Update { clip: 0.5, momentum: 0.9, learning_rate: 0.01, keep: 0.99, rounding: None };
        // Written down from the published `muon_update`, in f64.
        let mut expected: Vec<f64> = first.iter().map(|v| f64::from(*v)).collect();
        let mut momentum = vec![0f64; rows * columns];
        for seed in [11, 12, 13] {
            let gradient = noise(rows * columns, seed);
            update.apply(&weights, &gradient, &mut mean, &mut newton_schulz).unwrap();
            let clipped: Vec<f64> = gradient.iter().map(|g| 0.5 * f64::from(*g)).collect();
            for (m, g) in momentum.iter_mut().zip(&clipped) {
                *m = 0.9 * *m + 0.1 * g;
            }
            let ahead: Vec<f32> =
                clipped.iter().zip(&momentum).map(|(g, m)| (0.1 * g + 0.9 * m) as f32).collect();
            let direction = slow(&ahead, rows, columns);
            for (w, d) in expected.iter_mut().zip(direction) {
                *w = 0.99 * *w - 0.01 * 0.2 * 10f64.sqrt() * d;
            }
        }
        let found = weights.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (found, expected) in found.iter().zip(&expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-4, "{found}, not {expected}");
        }
    }
}
