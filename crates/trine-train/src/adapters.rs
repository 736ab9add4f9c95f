//! Low-rank adapters (LoRA, arXiv 2106.09685) beside projections whose own weights stay as they are.
//!
//! A projection then computes `y = W x + (alpha / r) B A x`, `A` being `(r, in)` and `B` `(out, r)`. `x` is
//! the projection's input before it is rounded to int8, as the layer that PEFT wraps gets it. `A` begins
//! with noise and `B` with zeros: an adapter that was not trained changes nothing.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use trine_format::peft::Lora;
use trine_format::{ModelConfig, Projection, names};

use crate::ops::view;
use crate::optimizer::mix;
use crate::{Params, TrainError};

/// Adapters of one rank for some of the projections of every layer.
pub struct Adapters {
    rank: usize,
    alpha: f64,
    targets: Vec<Projection>,
    /// The model that they belong to, as its user named it.
    base: Option<String>,
    dropout: Dropout,
    params: Params,
}

/// Inputs of adapters that are left out of a training step, at random; the others are larger for it, so
/// that their mean stays.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Dropout {
    /// Share that is left out.
    pub share: f64,
    /// Decides which.
    pub seed: u64,
}

/// What is left out of the input of some projections in a step.
#[derive(Clone, Copy)]
pub(crate) struct Mask {
    key: u64,
    /// Numbers below it are left out.
    below: u64,
    /// What the others are multiplied by.
    scale: f32,
}

impl Dropout {
    /// The mask of the `input`-th input of projections of a network, for a batch of `ids` in some step;
    /// none where nothing is left out. It is a function of these alone, so that a layer that runs twice
    /// sees the same.
    pub(crate) fn mask(self, step: usize, ids: &[u32], input: usize) -> Option<Mask> {
        if self.share == 0.0 {
            return None;
        }
        let mut key = mix(self.seed ^ mix(step as u64) ^ mix(!(input as u64)));
        for id in ids {
            key = mix(key ^ u64::from(*id));
        }
        let below = (self.share * u64::MAX as f64) as u64;
        Some(Mask { key, below, scale: (1.0 / (1.0 - self.share)) as f32 })
    }
}

impl Mask {
    /// The same for a device.
    pub(crate) fn on_card(self) -> trine_cuda::Mask {
        trine_cuda::Mask { key: self.key, below: self.below, kept: self.scale }
    }

    /// What the element at an index is multiplied by.
    pub(crate) fn factor(self, at: usize) -> f32 {
        if mix(self.key.wrapping_add(at as u64)) < self.below { 0.0 } else { self.scale }
    }
}

/// The adapter of one projection.
#[derive(Clone, Copy)]
pub(crate) struct Adapter<'a> {
    /// `(r, in)`
    pub(crate) a: &'a Tensor,
    /// `(out, r)`
    pub(crate) b: &'a Tensor,
    /// `alpha / r`
    pub(crate) scale: f64,
    pub(crate) names: &'a [String; 2],
}

impl Adapter<'_> {
    /// Outputs, inputs and rank.
    pub(crate) fn shape(&self) -> candle_core::Result<[usize; 3]> {
        let ((rank, inp), (out, _)) = (self.a.dims2()?, self.b.dims2()?);
        Ok([out, inp, rank])
    }

    /// `B` times `alpha / r`, `(out, r)`.
    pub(crate) fn scaled_b(&self) -> candle_core::Result<Vec<f32>> {
        Ok(view(self.b)?.iter().map(|b| b * self.scale as f32).collect())
    }
}

impl Adapters {
    /// Fresh adapters of rank `rank`: `A` uniform within `1 / sqrt(in)`, as PEFT makes it, `B` zeros.
    ///
    /// # Errors
    /// A rank of 0, no target, or memory that cannot be had.
    pub fn init(
        config: &ModelConfig,
        rank: usize,
        alpha: f64,
        targets: &[Projection],
        seed: u64,
    ) -> Result<Self, TrainError> {
        if rank == 0 || targets.is_empty() {
            return Err(TrainError::ConfigValue {
                key: "lora".to_owned(),
                expected: "a rank of at least 1 and a projection to adapt".to_owned(),
                found: format!("rank {rank} and {} projections", targets.len()),
            });
        }
        let mut vars = BTreeMap::new();
        for layer in 0..config.num_hidden_layers {
            for p in targets {
                let (out, inp) = config.projection_shape(*p);
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream((layer * Projection::ALL.len() + *p as usize) as u64);
                let bound = 1.0 / (inp as f32).sqrt();
                let noise = (0..rank * inp).map(|_| (2.0 * rng.random::<f32>() - 1.0) * bound);
                let [a, b] = names::adapter(layer, *p);
                vars.insert(a, Var::from_vec(noise.collect(), (rank, inp), &Device::Cpu)?);
                vars.insert(b, Var::from_vec(vec![0.0f32; out * rank], (out, rank), &Device::Cpu)?);
            }
        }
        let params = Params::from_vars(vars);
        Ok(Self {
            rank,
            alpha,
            targets: targets.to_vec(),
            base: None,
            dropout: Dropout::default(),
            params,
        })
    }

    /// Adapters from a file.
    ///
    /// # Errors
    /// When memory for the variables cannot be had.
    pub fn from_lora(lora: &Lora, config: &ModelConfig) -> Result<Self, TrainError> {
        let mut vars = BTreeMap::new();
        for ((layer, p), [a, b]) in &lora.matrices {
            let ((out, inp), [a_name, b_name]) =
                (config.projection_shape(*p), names::adapter(*layer, *p));
            let (a_shape, b_shape) = ((lora.rank, inp), (out, lora.rank));
            vars.insert(a_name, Var::from_vec(a.clone(), a_shape, &Device::Cpu)?);
            vars.insert(b_name, Var::from_vec(b.clone(), b_shape, &Device::Cpu)?);
        }
        let (targets, base) = (lora.targets.clone(), lora.base.clone());
        let params = Params::from_vars(vars);
        let dropout = Dropout::default();
        Ok(Self { rank: lora.rank, alpha: lora.alpha, targets, base, dropout, params })
    }

    /// The same adapters with the name of the model that they belong to.
    #[must_use]
    pub fn for_base(self, base: Option<String>) -> Self {
        Self { base, ..self }
    }

    /// The same adapters with inputs that are left out in training.
    #[must_use]
    pub fn with_dropout(self, dropout: Dropout) -> Self {
        Self { dropout, ..self }
    }

    /// What is left out in training.
    pub fn dropout(&self) -> Dropout {
        self.dropout
    }

    /// What a file of them holds.
    ///
    /// # Errors
    /// Numbers that are not finite.
    pub fn to_lora(&self, layers: usize) -> Result<Lora, TrainError> {
        let mut matrices = BTreeMap::new();
        for layer in 0..layers {
            for p in &self.targets {
                let [a, b] = names::adapter(layer, *p);
                let values = |name: &str| -> candle_core::Result<Vec<f32>> {
                    let values = view(self.params.get(name)?)?;
                    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                        let found = values[at];
                        candle_core::bail!("{name}: element {at} is {found}: that is not kept");
                    }
                    Ok(values.to_vec())
                };
                matrices.insert((layer, *p), [values(&a)?, values(&b)?]);
            }
        }
        let (targets, base) = (self.targets.clone(), self.base.clone());
        Ok(Lora { rank: self.rank, alpha: self.alpha, targets, base, matrices })
    }

    /// Rows of `A`, columns of `B`.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// What products are scaled by, times the rank.
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// The projections of a layer that are adapted.
    pub fn targets(&self) -> &[Projection] {
        &self.targets
    }

    /// The matrices by PEFT's names.
    pub fn params(&self) -> &Params {
        &self.params
    }

    pub(crate) fn params_mut(&mut self) -> &mut Params {
        &mut self.params
    }

    /// What `with` makes of the adapter of a projection, if it has one.
    pub(crate) fn with<R>(
        &self,
        layer: usize,
        p: Projection,
        with: impl FnOnce(Adapter<'_>) -> candle_core::Result<R>,
    ) -> candle_core::Result<Option<R>> {
        if !self.targets.contains(&p) {
            return Ok(None);
        }
        let names = names::adapter(layer, p);
        let [a, b] = names.each_ref().map(|name| self.params.get(name));
        let scale = self.alpha / self.rank as f64;
        with(Adapter { a: a?, b: b?, scale, names: &names }).map(Some)
    }
}
