//! What a projection computes under a [`QuantizerConfig`].

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use trine_format::{ModelConfig, Projection, names};
use trine_ternary::{TernaryError, TernaryMatrix};

use super::fake::{FakeQuantize, parameter_of, scale_of};
use super::hadamard::hadamard;
use super::{Activations, Granularity, QuantizerConfig, TABLE, WeightQuantizer, lambda, tequila};
use crate::model::linear;
use crate::ops::view;
use crate::{Params, TrainError};

/// How all projections of a model are quantized.
#[derive(Clone)]
pub struct Scheme {
    config: QuantizerConfig,
    weights: Arc<dyn WeightQuantizer>,
    /// Whether `weights` is that of the default.
    absmean: bool,
    /// Whether projections have scales that are parameters.
    learns: bool,
}

impl Scheme {
    /// The scheme of a section `[quantizer]`.
    ///
    /// # Errors
    /// Values that make no sense, with their key.
    pub fn new(config: QuantizerConfig) -> std::result::Result<Self, TrainError> {
        let weights = config.find()?;
        let absmean = config.weights == QuantizerConfig::default().weights;
        Self::with(config, weights, absmean)
    }

    /// A scheme with a quantizer of the caller's, under a name that [`TABLE`] does not have.
    ///
    /// Checkpoints say the name, and are opened by nobody who does not know it.
    ///
    /// # Errors
    /// As [`Self::new`], and a name that is taken.
    pub fn custom(
        config: QuantizerConfig,
        weights: Arc<dyn WeightQuantizer>,
    ) -> std::result::Result<Self, TrainError> {
        let taken = TABLE.iter().any(|entry| entry.name == config.weights);
        let (key, found) = ("quantizer.weights", &config.weights);
        crate::config::require(!taken, key, "a name that no other quantizer has", found)?;
        Self::with(config, weights, false)
    }

    fn with(
        config: QuantizerConfig,
        weights: Arc<dyn WeightQuantizer>,
        absmean: bool,
    ) -> std::result::Result<Self, TrainError> {
        config.check_for(&*weights)?;
        let learns = weights.initial_scale(&[1.0]).is_ok_and(|scale| scale.is_some());
        Ok(Self { config, weights, absmean, learns })
    }

    /// The section that it was made of.
    pub fn config(&self) -> &QuantizerConfig {
        &self.config
    }

    /// Share of the quantized values at step `step` (from 0), in [0, 1].
    pub fn lambda(&self, step: usize) -> f64 {
        lambda::share(step, self.config.lambda_steps)
    }

    /// Whether projections have scales that are parameters.
    pub(crate) fn learns(&self) -> bool {
        self.learns
    }

    /// Name of the parameter of the learned scales of the weight `name`.
    pub fn scales_name(&self, name: &str) -> String {
        let log = if self.config.log_scales { "log_" } else { "" };
        format!("{name}_{log}scale")
    }

    /// Whether at `step` this is what the formats and [`crate::ops::bitlinear`] compute.
    pub(crate) fn is_default(&self, step: usize) -> bool {
        self.absmean && self.inexact(step).is_empty()
    }

    /// How much is taken of what quantizing makes of projections and their inputs, if this is the default
    /// but for a warm-up from full precision, and `step` is in it.
    pub(crate) fn mixture(&self, step: usize) -> Option<f32> {
        let steps = self.config.lambda_steps;
        let warms_up = step < steps && self.is_default(steps);
        warms_up.then(|| self.lambda(step) as f32)
    }

    /// What of a model at `step` no format holds; where there is nothing, trits and a scale for
    /// each matrix are all of it.
    pub fn inexact(&self, step: usize) -> Vec<String> {
        let config = &self.config;
        let mut found = Vec::new();
        let steps = config.lambda_steps;
        if step < steps {
            let percent = step * 100 / steps;
            found.push(format!("projections quantized to {percent} % (step {step} of {steps})"));
        }
        if config.granularity != Granularity::Tensor {
            found.push(format!("scales per {}", config.granularity));
        }
        if config.dead_zone_bias > 0.0 {
            found.push("biases from the dead zone".to_owned());
        }
        if config.hadamard {
            found.push("a Hadamard transform".to_owned());
        }
        match config.activations {
            Activations::Int8 => {}
            Activations::Int4 | Activations::Int4Absmax => {
                found.push("4-bit activations".to_owned());
            }
            Activations::None => found.push("activations in full precision".to_owned()),
        }
        found
    }

    /// The trits and the scale that a projection is computed with, of masters `(rows, cols)` and
    /// the parameter of a learned scale; exact where [`Self::inexact`] finds nothing.
    ///
    /// # Errors
    /// Masters that are not finite.
    pub fn ternary(
        &self,
        masters: &[f32],
        rows: usize,
        cols: usize,
        parameter: Option<f32>,
    ) -> std::result::Result<TernaryMatrix, TernaryError> {
        let mut trits = vec![0; masters.len()];
        let learned = parameter.map(|parameter| scale_of(parameter, self.config.log_scales));
        let scale = self.weights.quantize(masters, learned, &mut trits)?;
        TernaryMatrix::from_trits(&trits, rows, cols, scale)
    }

    /// Gives the projections of a model the learned scales that they have not yet.
    pub(crate) fn add_scales(
        &self,
        model: &ModelConfig,
        params: &mut Params,
    ) -> std::result::Result<(), TrainError> {
        if !self.learns {
            return Ok(());
        }
        for layer in 0..model.num_hidden_layers {
            for p in Projection::ALL {
                let name = names::projection(layer, p);
                if params.get(&self.scales_name(&name)).is_ok() {
                    continue;
                }
                let scales = self.initial_scales(params.get(&name)?)?;
                let n = scales.len();
                params.insert(self.scales_name(&name), Var::from_vec(scales, n, &Device::Cpu)?);
            }
        }
        Ok(())
    }

    fn initial_scales(&self, masters: &Tensor) -> Result<Vec<f32>> {
        let (_, cols) = masters.dims2()?;
        let masters = view(masters)?;
        let parts = self.config.granularity.parts(&masters, cols).into_iter();
        let scales = parts.filter_map(|part| self.weights.initial_scale(part).transpose());
        let parameter = |scale| parameter_of(scale, self.config.log_scales);
        let parameters: std::result::Result<_, _> = scales.map(|s| s.map(parameter)).collect();
        parameters.map_err(candle_core::Error::wrap)
    }

    /// One projection at step `step`: `x` is `(B, T, in)`, `weight` the masters `(out, in)`,
    /// `scales` `(n,)` where they are learned, the result `(B, T, out)`, all f32.
    ///
    /// # Errors
    /// Shapes that do not fit, or masters that are not finite; `name` is for messages.
    pub(crate) fn linear(
        &self,
        x: &Tensor,
        weight: &Tensor,
        scales: Option<&Tensor>,
        p: Projection,
        name: &str,
        step: usize,
    ) -> Result<Tensor> {
        let config = &self.config;
        let lambda = self.lambda(step);
        let rotated = match p {
            Projection::O | Projection::Down if config.hadamard => Some(hadamard(x)?),
            _ => None,
        };
        let x = rotated.as_ref().unwrap_or(x);
        let x = lambda::mix(x, config.activations.quantize(x)?, lambda)?;
        let op = FakeQuantize {
            quantizer: self.weights.clone(),
            granularity: config.granularity,
            log_scales: config.log_scales,
            name: name.to_owned(),
        };
        let quantized = op.apply(weight, scales)?;
        let bias = match config.dead_zone_bias {
            0.0 => None,
            strength => Some(tequila::bias(weight, &quantized, strength * lambda)?),
        };
        let y = linear(&x, &lambda::mix(weight, quantized, lambda)?)?;
        match bias {
            Some(bias) => y.broadcast_add(&bias),
            None => Ok(y),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops;
    use crate::ops::testing::{check, difference, painted};
    use candle_core::DType;

    fn scheme(change: impl FnOnce(&mut QuantizerConfig)) -> Scheme {
        let mut config = QuantizerConfig::default();
        change(&mut config);
        Scheme::new(config).unwrap()
    }

    /// The general way and the fast one are the same function.
    #[test]
    fn the_default_computed_the_general_way_is_bitlinear() {
        for (tokens, out, inp) in [(1, 1, 1), (3, 5, 19), (8, 33, 70)] {
            let scheme = scheme(|_| {});
            check(
                &[painted((2, tokens, inp), 1), painted((out, inp), 2)],
                |t| scheme.linear(&t[0], &t[1], None, Projection::Q, "w", 0).unwrap(),
                |t| ops::bitlinear(&t[0], &t[1], "w").unwrap(),
            );
        }
    }

    /// Where nothing is quantized yet, the projection is the plain one and so are its gradients;
    /// where half is, it is half of each.
    #[test]
    fn the_warm_up_goes_from_the_plain_projection_to_the_quantized_one() {
        let (x, w) = (painted((2, 3, 12), 1), painted((5, 12), 2));
        let scheme = scheme(|c| c.lambda_steps = 8);
        let at = |step: usize| {
            let scheme = scheme.clone();
            move |t: &[Tensor]| scheme.linear(&t[0], &t[1], None, Projection::Q, "w", step).unwrap()
        };
        check(&[x.clone(), w.clone()], at(0), |t| linear(&t[0], &t[1]).unwrap());
        check(&[x.clone(), w.clone()], at(8), |t| ops::bitlinear(&t[0], &t[1], "w").unwrap());
        let quantized = |x: &Tensor| Activations::Int8.quantize(x).unwrap();
        let trits = |w: &Tensor| {
            let op = FakeQuantize {
                quantizer: super::super::find("absmean").unwrap(),
                granularity: Granularity::Tensor,
                log_scales: true,
                name: String::new(),
            };
            op.apply(w, None).unwrap()
        };
        check(&[x, w], at(4), |t| {
            let x = ((&t[0] + quantized(&t[0])).unwrap() * 0.5).unwrap();
            let w = ((&t[1] + trits(&t[1])).unwrap() * 0.5).unwrap();
            linear(&x, &w).unwrap()
        });
    }

    #[test]
    fn the_bias_is_added_to_every_token() {
        let (x, w) = (painted((1, 4, 24), 1), painted((5, 24), 2));
        let plain = scheme(|_| {});
        let with = scheme(|c| c.dead_zone_bias = 0.5);
        check(
            &[x, w],
            |t| with.linear(&t[0], &t[1], None, Projection::Q, "w", 0).unwrap(),
            |t| {
                let y = plain.linear(&t[0], &t[1], None, Projection::Q, "w", 0).unwrap();
                let mean = t[1].abs().unwrap().mean_all().unwrap().detach();
                let dead = t[1].abs().unwrap().broadcast_le(&(mean * 0.5).unwrap()).unwrap();
                let dead = (&t[1] * dead.to_dtype(DType::F32).unwrap()).unwrap();
                y.broadcast_add(&(dead.sum(1).unwrap() * 0.5).unwrap()).unwrap()
            },
        );
    }

    /// Without rounding the transform would cancel against transformed weights.
    #[test]
    fn only_the_output_and_down_projections_are_transformed() {
        let (x, w) = (painted((1, 4, 24), 1), painted((5, 24), 2));
        let plain = scheme(|c| c.activations = Activations::None);
        let with = scheme(|c| (c.activations, c.hadamard) = (Activations::None, true));
        for p in Projection::ALL {
            let transformed = matches!(p, Projection::O | Projection::Down);
            let expected = if transformed { hadamard(&x).unwrap() } else { x.as_tensor().clone() };
            let expected = plain.linear(&expected, &w, None, p, "w", 0).unwrap();
            let found = with.linear(&x, &w, None, p, "w", 0).unwrap();
            assert!(difference(&found, &expected) < 1e-6, "{p:?}");
        }
    }

    #[test]
    fn what_no_format_holds_is_named() {
        assert!(scheme(|_| {}).inexact(0).is_empty());
        for name in ["absmedian", "twn", "lsq", "seq", "binary"] {
            let scheme = scheme(|c| c.weights = name.to_owned());
            assert!(scheme.inexact(0).is_empty() && !scheme.is_default(0), "{name}");
        }
        let scheme = scheme(|c| {
            c.granularity = Granularity::Group(32);
            (c.hadamard, c.dead_zone_bias, c.lambda_steps) = (true, 1e-3, 3);
            c.activations = Activations::Int4;
        });
        let found = scheme.inexact(1).join("; ");
        for part in ["group:32", "33 %", "Hadamard", "biases", "4-bit"] {
            assert!(found.contains(part), "{part}: {found}");
        }
        assert_eq!(scheme.inexact(3).len(), 4);
    }

    #[test]
    fn a_warm_up_ends_in_the_default() {
        let scheme = scheme(|c| c.lambda_steps = 3);
        assert_eq!([0, 2, 3, 9].map(|step| scheme.is_default(step)), [false, false, true, true]);
        assert_eq!([0, 2, 3].map(|step| scheme.mixture(step)), [Some(0.0), Some(2.0 / 3.0), None]);
        let other = self::scheme(|c| (c.lambda_steps, c.hadamard) = (3, true));
        assert_eq!(other.mixture(0), None);
    }

    #[test]
    fn a_custom_quantizer_has_a_name_of_its_own() {
        let absmean = super::super::find("absmean").unwrap();
        let config = QuantizerConfig::default();
        let error = Scheme::custom(config, absmean).err().unwrap().to_string();
        assert!(error.contains("quantizer.weights"), "{error}");
    }
}
