//! How the inputs of projections are rounded.
//!
//! All of them take a token at a time, pass gradients straight through, and mask nothing:
//!
//! ```text
//! int8         s = 127 * (1 / max(max abs(x), 1e-5))     codes in [-128, 127]   the definition
//! int4         s = sqrt(7) / max(mean abs(x), 1e-5)      codes in [-8, 7]
//! int4-absmax  s = 7 / max(max abs(x), 1e-5)             codes in [-8, 7]
//! ```
//!
//! `int4` is the function of BitNet a4.8 (arXiv 2411.04965, equation 7) and BitNet v2
//! (arXiv 2504.18415): magnitudes of more than three times the mean are clamped, so that ordinary
//! ones keep their bits. `int4-absmax` clamps nothing. A row with a value that is not finite becomes
//! NaN, as in the definition.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use trine_ternary::{EPSILON, quantize_activations};

use crate::ops::contiguous;

/// How the inputs of projections are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activations {
    /// 8 bits, scaled by the largest magnitude of a token.
    #[default]
    Int8,
    /// 4 bits, scaled by the mean magnitude of a token.
    Int4,
    /// 4 bits, scaled by the largest magnitude of a token.
    Int4Absmax,
    /// Not at all.
    None,
}

impl Activations {
    /// What the codes of `x`, `(.., n)`, stand for.
    ///
    /// # Errors
    /// When `x` is not an f32 tensor on the CPU.
    pub(super) fn quantize(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::None => Ok(x.clone()),
            _ => x.contiguous()?.apply_op1(Rounded(self)),
        }
    }

    /// Rounds a row in place.
    fn round(self, row: &mut [f32], codes: &mut Vec<i8>) {
        let finite = row.iter().all(|v| v.is_finite());
        let magnitudes = || row.iter().map(|v| v.abs());
        let scale = match self {
            Self::None => return,
            Self::Int8 => {
                codes.resize(row.len(), 0);
                let inverse = 1.0 / quantize_activations(row, codes);
                row.iter_mut().zip(codes).for_each(|(v, code)| *v = f32::from(*code) * inverse);
                return;
            }
            _ if !finite => f32::NAN,
            Self::Int4 => {
                let sum: f64 = magnitudes().map(f64::from).sum();
                7f32.sqrt() / ((sum / row.len() as f64) as f32).max(EPSILON)
            }
            Self::Int4Absmax => 7.0 / magnitudes().fold(EPSILON, f32::max),
        };
        for v in row {
            *v = (*v * scale).round_ties_even().clamp(-8.0, 7.0) / scale;
        }
    }
}

struct Rounded(Activations);

impl CustomOp1 for Rounded {
    fn name(&self) -> &'static str {
        "quantize activations"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = layout.dims().last().copied().unwrap_or(1).max(1);
        let mut values = contiguous(x, layout)?.to_vec();
        values.par_chunks_mut(width).for_each_init(Vec::new, |codes, row| self.0.round(row, codes));
        Ok((CpuStorage::F32(values), layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(dy.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::values;
    use super::*;
    use candle_core::{Device, Var};

    fn rounded(kind: Activations, x: &[f32]) -> Vec<f32> {
        let x = Tensor::new(x, &Device::Cpu).unwrap();
        kind.quantize(&x).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn four_bits_are_the_formula() {
        for (n, phase) in [(1, 1), (7, 2), (200, 3)] {
            let x = values(n, phase);
            let mean = x.iter().map(|v| v.abs()).sum::<f32>() / n as f32;
            let largest = x.iter().fold(0f32, |max, v| max.max(v.abs()));
            let scales = [
                (Activations::Int4, 7f32.sqrt() / mean.max(1e-5)),
                (Activations::Int4Absmax, 7.0 / largest.max(1e-5)),
            ];
            for (kind, s) in scales {
                for (v, found) in x.iter().zip(rounded(kind, &x)) {
                    let expected = (v * s).round_ties_even().clamp(-8.0, 7.0) / s;
                    assert!((found - expected).abs() < 1e-5, "{kind:?} {v}: {found}, {expected}");
                }
            }
        }
    }

    #[test]
    fn outliers_are_clamped_by_the_mean_and_kept_by_the_maximum() {
        let mut x = vec![1f32; 99];
        x.push(101.0);
        // The mean is 2, so 101 ends at 7 steps of 2 / sqrt(7).
        let ends = [rounded(Activations::Int4, &x)[99], rounded(Activations::Int4Absmax, &x)[99]];
        assert!((ends[0] - 14.0 / 7f32.sqrt()).abs() < 1e-4, "{ends:?}");
        assert!((ends[1] - 101.0).abs() < 1e-3, "{ends:?}");
        assert_eq!(rounded(Activations::Int4Absmax, &x)[0], 0.0);
    }

    #[test]
    fn eight_bits_are_the_definition() {
        let x = values(77, 4);
        let mut codes = vec![0; 77];
        let inverse = 1.0 / quantize_activations(&x, &mut codes);
        let expected: Vec<f32> = codes.iter().map(|c| f32::from(*c) * inverse).collect();
        assert_eq!(rounded(Activations::Int8, &x), expected);
        assert_eq!(rounded(Activations::None, &x), x);
    }

    #[test]
    fn a_row_with_what_is_not_finite_is_nan() {
        for kind in [Activations::Int8, Activations::Int4, Activations::Int4Absmax] {
            for bad in [f32::NAN, f32::INFINITY] {
                assert!(rounded(kind, &[1.0, bad]).iter().all(|v| v.is_nan()), "{kind:?} {bad}");
            }
            assert_eq!(rounded(kind, &[0.0, 0.0]), [0.0, 0.0]);
        }
    }

    #[test]
    fn gradients_pass_straight_through() {
        let x = Var::new(&[1f32, -30.0, 0.01], &Device::Cpu).unwrap();
        let y = Activations::Int4.quantize(&x).unwrap();
        let gradients = (y * 3.0).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(gradients.get(&x).unwrap().to_vec1::<f32>().unwrap(), [3.0; 3]);
    }
}
