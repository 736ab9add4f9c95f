//! The operation from masters to what the product sees, and back.
//!
//! Forward, every part of a matrix that shares a scale goes through the [`WeightQuantizer`]; what
//! comes out is `trit * scale` in f32. Backward, its gradient goes through the quantizer's own,
//! which by default is the identity.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{Granularity, WeightQuantizer};
use crate::ops::{contiguous, view};

/// Parts that one thread takes at a time: groups are small.
const PARTS: usize = 16;

/// A learned scale of its parameter. The exponential has the same bits on every machine, so that
/// trits have.
pub(super) fn scale_of(parameter: f32, log: bool) -> f32 {
    if log { libm::expf(parameter) } else { parameter }
}

/// The parameter of a scale.
pub(super) fn parameter_of(scale: f32, log: bool) -> f32 {
    if log { libm::logf(scale) } else { scale }
}

/// Fake quantization of a matrix.
pub(super) struct FakeQuantize {
    pub(super) quantizer: Arc<dyn WeightQuantizer>,
    pub(super) granularity: Granularity,
    /// Whether learned scales are given as their logarithms.
    pub(super) log_scales: bool,
    /// Of the weight, for errors.
    pub(super) name: String,
}

impl FakeQuantize {
    /// What the product sees of `masters` `(out, in)`, with `scales` `(n,)` where they are learned.
    ///
    /// # Errors
    /// Masters or scales that are not finite, with the name of the weight.
    pub(super) fn apply(self, masters: &Tensor, scales: Option<&Tensor>) -> Result<Tensor> {
        match scales {
            Some(scales) => masters.apply_op2(scales, self),
            None => masters.apply_op1(self),
        }
    }

    fn forward(
        &self,
        masters: &CpuStorage,
        layout: &Layout,
        scales: Option<&[f32]>,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, cols) = layout.shape().dims2()?;
        let masters = contiguous(masters, layout)?;
        self.check_scales(scales, rows, cols)?;
        let mut values = vec![0.0; masters.len()];
        let parts = self.granularity.parts(masters, cols);
        let out = self.granularity.parts_mut(&mut values, cols);
        let parts = parts.into_par_iter().zip(out).enumerate().with_min_len(PARTS);
        parts.try_for_each_init(Vec::new, |trits, (i, (part, out))| {
            trits.clear();
            trits.resize(part.len(), 0);
            let learned = scales.map(|scales| scale_of(scales[i], self.log_scales));
            let quantized = self.quantizer.quantize(part, learned, trits);
            let scale = quantized.map_err(|e| self.error(i, &e))?;
            out.iter_mut().zip(&*trits).for_each(|(v, trit)| *v = f32::from(*trit) * scale);
            Ok::<(), candle_core::Error>(())
        })?;
        Ok((CpuStorage::F32(values), layout.shape().clone()))
    }

    /// The gradients of masters and scales.
    fn backward(
        &self,
        masters: &Tensor,
        scales: Option<&Tensor>,
        dy: &Tensor,
    ) -> Result<(Tensor, Vec<f32>)> {
        let (rows, cols) = masters.dims2()?;
        let dy = dy.contiguous()?;
        let mut gradient = view(&dy)?.to_vec();
        let masters_view = view(masters)?;
        let scales_view = scales.map(view).transpose()?;
        let scales: Option<&[f32]> = scales_view.as_deref();
        let parts = self.granularity.parts(&masters_view, cols);
        let out = self.granularity.parts_mut(&mut gradient, cols);
        let parts = parts.into_par_iter().zip(out).enumerate().with_min_len(PARTS);
        let of_scales = parts.map(|(i, (part, gradient))| {
            let learned = scales.map(|scales| scale_of(scales[i], self.log_scales));
            let ds = self.quantizer.backward(part, learned, gradient);
            // d s / d ln s = s.
            learned.filter(|_| self.log_scales).map_or(ds, |scale| scale * ds)
        });
        let of_scales = of_scales.collect();
        Ok((Tensor::from_vec(gradient, (rows, cols), masters.device())?, of_scales))
    }

    fn check_scales(&self, scales: Option<&[f32]>, rows: usize, cols: usize) -> Result<()> {
        let expected = self.granularity.count(rows, cols);
        match scales {
            Some(scales) if scales.len() != expected => {
                candle_core::bail!("{}: {expected} scales, not {}", self.name, scales.len())
            }
            _ => Ok(()),
        }
    }

    fn error(&self, part: usize, e: &trine_ternary::TernaryError) -> candle_core::Error {
        let place = match self.granularity {
            Granularity::Tensor => String::new(),
            Granularity::Row => format!(", row {part}"),
            Granularity::Group(_) => format!(", group {part}"),
        };
        candle_core::Error::Msg(format!("{}{place}: {e}", self.name))
    }
}

impl CustomOp1 for FakeQuantize {
    fn name(&self) -> &'static str {
        "fake quantize"
    }

    fn cpu_fwd(&self, masters: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(masters, layout, None)
    }

    fn bwd(&self, masters: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.backward(masters, None, dy)?.0))
    }
}

impl CustomOp2 for FakeQuantize {
    fn name(&self) -> &'static str {
        "fake quantize with learned scales"
    }

    fn cpu_fwd(
        &self,
        masters: &CpuStorage,
        layout: &Layout,
        scales: &CpuStorage,
        scales_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(masters, layout, Some(contiguous(scales, scales_layout)?))
    }

    fn bwd(
        &self,
        masters: &Tensor,
        scales: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dw, ds) = self.backward(masters, Some(scales), dy)?;
        Ok((Some(dw), Some(Tensor::from_vec(ds, scales.shape(), scales.device())?)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{TABLE, find};
    use super::*;
    use crate::ops::testing::painted;
    use candle_core::{Device, Var};

    const GRANULARITIES: [&str; 4] = ["tensor", "row", "group:8", "group:3"];

    fn op(name: &str, granularity: &str) -> FakeQuantize {
        FakeQuantize {
            quantizer: find(name).unwrap(),
            granularity: granularity.parse().unwrap(),
            log_scales: false,
            name: "w".to_owned(),
        }
    }

    /// Initial scales of a matrix, where the quantizer learns some.
    fn scales(op: &FakeQuantize, masters: &[f32], cols: usize) -> Option<Var> {
        let parts = op.granularity.parts(masters, cols);
        let scales = parts.iter().map(|part| op.quantizer.initial_scale(part).unwrap());
        let scales: Option<Vec<f32>> = scales.collect();
        scales.map(|s| Var::from_vec(s.clone(), s.len(), &Device::Cpu).unwrap())
    }

    fn flat(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// One part after the other, alone: the granularity changes nothing else.
    #[test]
    fn parts_are_quantized_and_differentiated_each_on_its_own() {
        for entry in &TABLE {
            for (granularity, (rows, cols)) in
                GRANULARITIES.iter().flat_map(|g| [(1, 1), (5, 19), (33, 24)].map(|s| (*g, s)))
            {
                let what = format!("{} {granularity} ({rows}, {cols})", entry.name);
                let op = op(entry.name, granularity);
                let (parts, quantizer) = (op.granularity, op.quantizer.clone());
                let w = painted((rows, cols), 3);
                let masters = flat(&w);
                let scales = scales(&op, &masters, cols);
                let y = op.apply(&w, scales.as_ref().map(|v| v.as_tensor())).unwrap();
                let dy = painted((rows, cols), 7);
                let gradients =
                    (&y * dy.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();

                let learned = scales.as_ref().map(|v| flat(v));
                let (mut values, mut dw, mut ds) = (Vec::new(), Vec::new(), Vec::new());
                let both = parts.parts(&masters, cols);
                let upstream = flat(&dy);
                for (i, (part, dy)) in
                    both.into_iter().zip(parts.parts(&upstream, cols)).enumerate()
                {
                    let learned = learned.as_ref().map(|s| s[i]);
                    let mut trits = vec![0; part.len()];
                    let scale = quantizer.quantize(part, learned, &mut trits).unwrap();
                    values.extend(trits.iter().map(|t| f32::from(*t) * scale));
                    let mut gradient = dy.to_vec();
                    ds.push(quantizer.backward(part, learned, &mut gradient));
                    dw.extend(gradient);
                }
                assert_eq!(flat(&y), values, "{what}");
                assert_eq!(flat(gradients.get(&w).unwrap()), dw, "{what}");
                if let Some(scales) = scales {
                    assert_eq!(flat(gradients.get(&scales).unwrap()), ds, "{what}");
                } else if entry.name == "absmean" {
                    assert_eq!(dw, upstream, "{what}: straight through");
                }
            }
        }
    }

    /// The same function of another parameter: values are equal, gradients by the chain rule.
    #[test]
    fn logarithms_of_scales_are_another_parameter_of_the_same_function() {
        for name in ["lsq", "seq"] {
            let w = painted((5, 19), 3);
            let dy = painted((5, 19), 7);
            let scales = [0.3f32, 0.5, 0.75, 1.0, 2.0];
            let run = |log_scales: bool| {
                let given = scales.map(|s| parameter_of(s, log_scales));
                let given = Var::new(&given, &Device::Cpu).unwrap();
                let op = FakeQuantize { log_scales, ..op(name, "row") };
                let y = op.apply(&w, Some(&given)).unwrap();
                let loss = (&y * dy.as_tensor()).unwrap().sum_all().unwrap();
                let gradients = loss.backward().unwrap();
                let of = |var: &Var| flat(gradients.get(var).unwrap());
                (flat(&y), of(&w), of(&given))
            };
            let (plain, log) = (run(false), run(true));
            let close = |a: &[f32], b: &[f32]| {
                a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * (1.0 + b.abs()))
            };
            assert!(close(&log.0, &plain.0) && close(&log.1, &plain.1), "{name}");
            let expected: Vec<f32> = plain.2.iter().zip(scales).map(|(d, s)| d * s).collect();
            assert!(close(&log.2, &expected), "{name}: {:?}, not {expected:?}", log.2);
        }
    }

    #[test]
    fn masters_that_are_not_finite_name_tensor_and_row() {
        let w = Tensor::new(&[[1f32, 2.0], [f32::NAN, 1.0]], &Device::Cpu).unwrap();
        let error = op("absmean", "row").apply(&w, None).unwrap_err().to_string();
        assert!(error.contains("w, row 1") && error.contains("NaN"), "{error}");
    }

    #[test]
    fn scales_that_do_not_fit_are_refused() {
        let w = painted((4, 8), 1);
        let scales = Tensor::new(&[1f32, 1.0], &Device::Cpu).unwrap();
        let error = op("lsq", "row").apply(&w, Some(&scales)).unwrap_err().to_string();
        assert!(error.contains("4 scales, not 2"), "{error}");
    }
}
