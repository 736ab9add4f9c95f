//! Collecting diagnostics around the update of a step.

use std::collections::BTreeMap;
use std::sync::Mutex;

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use trine_format::{Projection, Quantization, names};
use trine_ternary::{TernaryMatrix, quantize_activations};

use super::layer::differing;
use super::{Diagnostics, LayerDiagnostics};
use crate::ops::view;
use crate::optimizer::Gradients;
use crate::{Bitnet, Params, TrainError};

/// Trits of every projection, 2 bits each, in the order of [`Collector::layers`].
type Snapshot = Vec<Vec<u8>>;

/// Collects [`Diagnostics`] every so many steps.
///
/// Call [`Self::before_update`] and [`Self::after_update`] around every update; in all steps but
/// those of a collection both return at once.
pub struct Collector {
    every: usize,
    ternary: bool,
    layers: Vec<Layer>,
    /// A sequence whose activations are looked at, `(1, T)` ids.
    probe: Tensor,
    /// Trits after some earlier step.
    last: Option<(usize, Snapshot)>,
    /// What was seen before the update that makes the step of this number.
    before: Option<(usize, Before)>,
}

struct Layer {
    /// Name of the weight.
    weight: String,
    /// `(out, in)`.
    shape: (usize, usize),
}

struct Before {
    /// None where gradients were gone by then.
    grad_norms: Vec<Option<f64>>,
    trits: Snapshot,
}

impl Collector {
    /// A collector for a model and all that it becomes. `probe` is a sequence of ids, the same in every
    /// collection, on which activations are measured. Of quantizers other than the default only norms
    /// of gradients are collected: what trits and thresholds are is theirs.
    ///
    /// # Errors
    /// When memory for the probe cannot be had.
    pub fn new(every: usize, model: &Bitnet, probe: &[u32]) -> Result<Self, TrainError> {
        let config = model.config();
        let layers = (0..config.num_hidden_layers).flat_map(|layer| {
            Projection::ALL.map(|p| Layer {
                weight: names::projection(layer, p),
                shape: config.projection_shape(p),
            })
        });
        Ok(Self {
            every,
            ternary: config.quantization != Quantization::None && model.scheme().is_none(),
            layers: layers.collect(),
            probe: Tensor::from_slice(probe, (1, probe.len()), &Device::Cpu)?,
            last: None,
            before: None,
        })
    }

    /// Whether diagnostics are collected after that step.
    pub(crate) fn is_due(&self, step: usize) -> bool {
        self.every > 0 && step.is_multiple_of(self.every)
    }

    /// To be called before the update that makes `step`, counted from 1, with its gradients; with none
    /// where they do not exist together.
    ///
    /// # Errors
    /// Masters that are not finite, or a gradient that is missing.
    pub fn before_update(
        &mut self,
        step: usize,
        params: &Params,
        gradients: &Gradients,
    ) -> Result<(), TrainError> {
        if self.every == 0 {
            return Ok(());
        }
        // The first flips are counted from where the run began or was taken up. A run that went
        // back to an earlier step has left the steps that its trits are from.
        if self.ternary && self.last.as_ref().is_none_or(|(last, _)| *last >= step) {
            self.last = Some((step - 1, self.snapshot(params)?));
        }
        if self.is_due(step) {
            let norm = |layer: &Layer| -> Result<Option<f64>, TrainError> {
                if gradients.is_empty() {
                    return Ok(None);
                }
                let Some(gradient) = gradients.get(&layer.weight) else {
                    let message = format!("{} has no gradient", layer.weight);
                    return Err(candle_core::Error::Msg(message).into());
                };
                Ok(Some(norm(&view(gradient)?)))
            };
            let grad_norms = self.layers.par_iter().map(norm).collect::<Result<_, _>>()?;
            let trits = match &self.last {
                // Collections after every update: these trits are known.
                Some((last, trits)) if last + 1 == step => trits.clone(),
                _ if self.ternary => self.snapshot(params)?,
                _ => Snapshot::new(),
            };
            self.before = Some((step, Before { grad_norms, trits }));
        }
        Ok(())
    }

    /// To be called after the update that made `step`; none where nothing is due.
    ///
    /// # Errors
    /// Masters that are not finite.
    pub fn after_update(
        &mut self,
        step: usize,
        model: &Bitnet,
    ) -> Result<Option<Diagnostics>, TrainError> {
        let Some((_, before)) = self.before.take().filter(|(of, _)| *of == step) else {
            return Ok(None);
        };
        let last = self.last.take();
        let measured: Vec<(LayerDiagnostics, Vec<u8>)> = self
            .layers
            .par_iter()
            .enumerate()
            .map(|(i, layer)| self.measure(i, layer, model.params(), &before, last.as_ref()))
            .collect::<Result<_, _>>()?;
        let (mut measured, trits): (Vec<LayerDiagnostics>, Snapshot) = measured.into_iter().unzip();
        if self.ternary {
            for (layer, codes) in measured.iter_mut().zip(self.activations(model)?) {
                layer.saturated = Some(codes.saturated);
                layer.zero_codes = Some(codes.zero);
            }
            self.last = Some((step, trits));
        }
        let sizes = self.layers.iter().map(|layer| layer.shape.0 * layer.shape.1);
        let all = LayerDiagnostics::mean(sizes.zip(&measured));
        let names = self.layers.iter().map(|layer| layer_name(&layer.weight).to_owned());
        let layers = names.zip(measured).collect();
        Ok(Some(Diagnostics { since: last.map(|(step, _)| step), all, layers }))
    }

    /// One projection, and its trits.
    fn measure(
        &self,
        i: usize,
        layer: &Layer,
        params: &Params,
        before: &Before,
        last: Option<&(usize, Snapshot)>,
    ) -> Result<(LayerDiagnostics, Vec<u8>), TrainError> {
        let grad_norm = before.grad_norms[i];
        if !self.ternary {
            return Ok((LayerDiagnostics { grad_norm, ..Default::default() }, Vec::new()));
        }
        let masters = view(params.get(&layer.weight)?)?;
        let trits = ternary(layer, &masters)?;
        let changed = |old: &Snapshot| {
            differing(&old[i], trits.packed()) as f64 / masters.len().max(1) as f64
        };
        let found = LayerDiagnostics {
            flips: last.map(|(_, old)| changed(old)),
            flips_by_update: Some(changed(&before.trits)),
            grad_norm,
            ..LayerDiagnostics::of_weights(&masters, &trits)
        };
        Ok((found, trits.packed().to_vec()))
    }

    fn snapshot(&self, params: &Params) -> Result<Snapshot, TrainError> {
        let packed = |layer: &Layer| -> Result<Vec<u8>, TrainError> {
            Ok(ternary(layer, &view(params.get(&layer.weight)?)?)?.packed().to_vec())
        };
        self.layers.par_iter().map(packed).collect()
    }

    /// The int8 codes of the probe before every projection.
    fn activations(&self, model: &Bitnet) -> Result<Vec<Codes>, TrainError> {
        let found = Mutex::new(BTreeMap::new());
        model.projection_inputs(&self.probe, &|name, x| {
            let codes = Codes::of(&view(&x.contiguous()?)?, x.dim(candle_core::D::Minus1)?);
            found.lock().unwrap_or_else(|e| e.into_inner()).insert(name.to_owned(), codes);
            Ok(())
        })?;
        let found = found.into_inner().unwrap_or_else(|e| e.into_inner());
        let of = |layer: &Layer| found.get(&layer.weight).copied().unwrap_or_default();
        Ok(self.layers.iter().map(of).collect())
    }
}

/// Shares of activation codes.
#[derive(Clone, Copy, Debug, Default)]
struct Codes {
    saturated: f64,
    zero: f64,
}

impl Codes {
    /// Of activations `(M, cols)`.
    fn of(x: &[f32], cols: usize) -> Self {
        let mut codes = vec![0i8; cols];
        let (mut saturated, mut zero) = (0usize, 0usize);
        for row in x.chunks_exact(cols) {
            quantize_activations(row, &mut codes);
            saturated += codes.iter().filter(|code| code.unsigned_abs() >= 127).count();
            zero += codes.iter().filter(|code| **code == 0).count();
        }
        let n = x.len().max(1) as f64;
        Self { saturated: saturated as f64 / n, zero: zero as f64 / n }
    }
}

fn ternary(layer: &Layer, masters: &[f32]) -> Result<TernaryMatrix, TrainError> {
    let (out, inp) = layer.shape;
    TernaryMatrix::from_weights(masters, out, inp)
        .map_err(|e| candle_core::Error::Msg(format!("{}: {e}", layer.weight)).into())
}

/// The projection whose weight has that name.
fn layer_name(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

/// L2 norm, summed in f64.
fn norm(values: &[f32]) -> f64 {
    let squares = |chunk: &[f32]| chunk.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>();
    values.chunks(4096).map(squares).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;
    use std::path::Path;

    use crate::RunConfig;

    fn model(quantization: &str) -> Bitnet {
        let text = format!(
            "[model]\nhidden_size = 32\nintermediate_size = 48\nnum_hidden_layers = 2\n\
             num_attention_heads = 4\nnum_key_value_heads = 2\nquantization = '{quantization}'\n\
             [data]\nseq_len = 16"
        );
        let config = RunConfig::parse(&text, Path::new("test.toml"), &[]).unwrap();
        let config = config.model_config(11, None, None).unwrap();
        let params = Params::init(&config, 0.02, 1, &Device::Cpu).unwrap();
        Bitnet::new(config, params).unwrap()
    }

    fn gradients(params: &Params) -> Gradients {
        let gradient = |var: &Var| Tensor::full(0.5f32, var.shape(), &Device::Cpu).unwrap();
        params.iter().map(|(name, var)| (name.to_owned(), gradient(var))).collect()
    }

    const V: &str = "model.layers.1.self_attn.v_proj";

    /// Changes the sign of the first `n` masters of a projection.
    fn negate(model: &Bitnet, n: usize) {
        let (_, var) = model.params().iter().find(|(name, _)| layer_name(name) == V).unwrap();
        let mut values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values[..n].iter_mut().for_each(|w| *w = -*w);
        var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
    }

    fn nonzero(model: &Bitnet, n: usize) -> f64 {
        let weight = model.params().get(&format!("{V}.weight")).unwrap();
        let (out, inp) = weight.dims2().unwrap();
        let masters = weight.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let trits = TernaryMatrix::from_weights(&masters, out, inp).unwrap().trits();
        trits[..n].iter().filter(|t| **t != 0).count() as f64 / trits.len() as f64
    }

    #[test]
    fn flips_are_counted_since_the_last_collection_and_by_the_last_update() {
        let model = model("ternary");
        let gradients = gradients(model.params());
        let mut collector = Collector::new(2, &model, &[1, 2, 3]).unwrap();
        // Signs of two stretches change, one before each of the two updates.
        collector.before_update(1, model.params(), &gradients).unwrap();
        negate(&model, 100);
        assert_eq!(collector.after_update(1, &model).unwrap(), None);
        collector.before_update(2, model.params(), &gradients).unwrap();
        negate(&model, 40);
        let found = collector.after_update(2, &model).unwrap().unwrap();
        assert_eq!(found.since, Some(0));
        let layer = &found.layers[V];
        assert_eq!(layer.flips, Some(nonzero(&model, 100) - nonzero(&model, 40)));
        assert_eq!(layer.flips_by_update, Some(nonzero(&model, 40)));
        assert!(found.layers.iter().all(|(name, l)| name == V || l.flips == Some(0.0)));
        let norm = (0.25 * (16.0 * 32.0f64)).sqrt();
        assert!((layer.grad_norm.unwrap() - norm).abs() < 1e-9, "{layer:?}");
        // Nothing happened since.
        for step in [3, 4] {
            collector.before_update(step, model.params(), &gradients).unwrap();
            let found = collector.after_update(step, &model).unwrap();
            assert_eq!(found.is_some(), step == 4);
            if let Some(found) = found {
                assert_eq!((found.since, found.all.flips), (Some(2), Some(0.0)));
            }
        }
    }

    #[test]
    fn a_run_that_went_back_counts_flips_from_there() {
        let model = model("ternary");
        let gradients = gradients(model.params());
        let mut collector = Collector::new(2, &model, &[1, 2, 3]).unwrap();
        for step in [1, 2, 3, 2] {
            collector.before_update(step, model.params(), &gradients).unwrap();
            if let Some(found) = collector.after_update(step, &model).unwrap() {
                assert!(found.since.unwrap() < step, "{found:?}");
            }
        }
    }

    #[test]
    fn activations_are_measured_before_every_projection() {
        let model = model("ternary");
        let gradients = gradients(model.params());
        let mut collector = Collector::new(1, &model, &[1, 2, 3]).unwrap();
        collector.before_update(1, model.params(), &gradients).unwrap();
        let found = collector.after_update(1, &model).unwrap().unwrap();
        assert_eq!(found.layers.len(), 14);
        for (name, layer) in &found.layers {
            let inputs = if name.ends_with("down_proj") { 48.0 } else { 32.0 };
            // The largest of a token is at an end; by far not all are.
            let saturated = layer.saturated.unwrap();
            assert!(saturated >= 1.0 / inputs && saturated < 0.5, "{name}: {saturated}");
            assert!(layer.zero_codes.unwrap() < 1.0, "{name}");
        }
    }

    #[test]
    fn a_full_precision_run_has_gradients_only() {
        let model = model("none");
        let gradients = gradients(model.params());
        let mut collector = Collector::new(1, &model, &[1, 2, 3]).unwrap();
        collector.before_update(1, model.params(), &gradients).unwrap();
        let found = collector.after_update(1, &model).unwrap().unwrap();
        let json = serde_json::to_value(&found.layers[V]).unwrap();
        assert_eq!(json.as_object().unwrap().keys().collect::<Vec<_>>(), ["grad_norm"]);
    }
}
