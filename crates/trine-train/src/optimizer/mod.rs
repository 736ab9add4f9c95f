//! Optimizers with global-norm clipping: AdamW for everything, or Muon for the matrices of the
//! layers and AdamW for embedding, head and norms.
//!
//! Weight decay applies to matrices only (norm weights have one dimension and are left alone).
//! An update is computed in f32, in one pass over a parameter, in place; how moments and masters
//! are kept between updates is a choice of `[optimizer]`.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `gradients` | gradients by name, their sum and norm |
//! | `adamw`, `muon` | what one update does to one parameter |
//! | `moment`, `code` | running means in f32 or in bytes |
//! | `rounding` | masters rounded stochastically to bf16 |

mod adamw;
mod code;
mod gradients;
mod in_place;
mod moment;
mod muon;
mod rounding;

pub use gradients::{Gradients, accumulate, collect, global_norm, norm, norms};
pub use muon::{NewtonSchulz, update_scale};

use std::collections::BTreeMap;

use trine_format::names::{Part, TensorId};

use crate::config::{MasterPrecision, OptimizerConfig, OptimizerKind};
use crate::ops::view;
use crate::schedule::Rates;
use crate::{Params, TrainError};
pub(crate) use in_place::in_place;
use moment::{Meaning, Moment};
use rounding::Rounding;
pub(crate) use rounding::mix;

/// Elements that one thread takes at a time; a multiple of a block of moments.
const CHUNK: usize = 1 << 14;

/// The optimizer of a run and its state.
pub struct Optimizer {
    config: OptimizerConfig,
    /// Decides stochastic rounding.
    seed: u64,
    /// Updates made.
    updates: usize,
    rules: BTreeMap<String, Rule>,
    newton_schulz: NewtonSchulz,
}

/// What updates a parameter.
enum Rule {
    AdamW { m: Moment, v: Moment },
    Muon { mean: Moment },
}

/// A tensor of one dimension of the optimizer's state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StateValues<'a> {
    /// Plain numbers.
    F32(&'a [f32]),
    /// Codes.
    U8(&'a [u8]),
}

/// As [`StateValues`], of a file.
#[derive(Clone, Debug, PartialEq)]
pub enum LoadedValues {
    /// Plain numbers.
    F32(Vec<f32>),
    /// Codes.
    U8(Vec<u8>),
}

impl Optimizer {
    /// An optimizer with zero moments. `seed` decides how bf16 masters are rounded.
    pub fn new(config: OptimizerConfig, seed: u64, params: &Params) -> Self {
        let storage = config.moments;
        let zeros = |n, meaning| Moment::zeros(n, meaning, storage);
        let rule = |name: &str, n: usize| match config.kind {
            OptimizerKind::Muon if is_projection(name) => {
                Rule::Muon { mean: zeros(n, Meaning::Signed) }
            }
            _ => Rule::AdamW { m: zeros(n, Meaning::Signed), v: zeros(n, Meaning::Root) },
        };
        let rules =
            params.iter().map(|(name, var)| (name.to_owned(), rule(name, var.elem_count())));
        let rules = rules.collect();
        Self { config, seed, updates: 0, rules, newton_schulz: NewtonSchulz::default() }
    }

    /// Updates made.
    pub fn updates(&self) -> usize {
        self.updates
    }

    /// What masters are kept as.
    pub fn masters(&self) -> MasterPrecision {
        self.config.masters
    }

    /// Bytes of the moments.
    pub fn state_bytes(&self) -> usize {
        let bytes = |(_, values): (String, StateValues<'_>)| match values {
            StateValues::F32(values) => size_of_val(values),
            StateValues::U8(values) => values.len(),
        };
        self.state().map(bytes).sum()
    }

    /// Makes masters what this optimizer keeps them as: nothing to do for f32, and rounded to the
    /// nearest for bf16, in which matrices then lie in memory. Called once, before the first update.
    ///
    /// # Errors
    /// When a parameter is not a tensor of f32 or bf16 on the CPU.
    pub fn prepare(&self, params: &mut Params) -> Result<(), TrainError> {
        if self.config.masters == MasterPrecision::Bf16 {
            params.narrow()?;
            for (_, var) in params.iter().filter(|(_, var)| var.rank() < 2) {
                in_place(var, |w| w.iter_mut().for_each(|w| *w = rounding::to_nearest(*w)))?;
            }
        }
        Ok(())
    }

    /// One update of all parameters. `norm` is the [`global_norm`] of the gradients; it must be
    /// finite, for a NaN would reach every parameter.
    ///
    /// # Errors
    /// When a gradient is missing or of another shape.
    pub fn update(
        &mut self,
        params: &Params,
        gradients: &Gradients,
        norm: f64,
        rates: Rates,
    ) -> Result<(), TrainError> {
        self.begin();
        let clip = self.clip(norm);
        if let Some((name, _)) = params.iter().find(|(name, _)| !gradients.contains_key(*name)) {
            return Err(candle_core::Error::Msg(format!("{name} has no gradient")).into());
        }
        self.part(params, gradients, clip, rates)
    }

    /// Begins an update that a device makes, of gradients of this norm.
    pub(crate) fn next_on_card(
        &mut self,
        norm: f64,
        rates: Rates,
    ) -> (trine_cuda::AdamW, Option<trine_cuda::Muon>) {
        self.begin();
        let update = adamw(&self.config, self.updates, rates.learning_rate, 1.0, 1.0, None);
        let muon = (self.config.kind == OptimizerKind::Muon).then(|| {
            let learning_rate = rates.learning_rate * self.config.muon_ratio();
            let keep = (1.0 - learning_rate * rates.weight_decay) as f32;
            trine_cuda::Muon {
                momentum: self.config.muon_momentum as f32,
                keep,
                learning_rate,
                coefficients: muon::COEFFICIENTS,
                steps: muon::STEPS,
                scale: update_scale,
            }
        });
        let update = trine_cuda::AdamW {
            clip: self.clip(norm),
            betas: [update.beta1, update.beta2],
            eps: update.eps,
            keep: (1.0 - rates.learning_rate * rates.weight_decay) as f32,
            step_size: update.step_size,
            inverse_root_correction2: update.inverse_root_correction2,
            chance: Rounding::of_update(self.seed, self.updates),
        };
        (update, muon)
    }

    /// First and, of AdamW, second moments by parameter, where they are f32.
    pub(crate) fn f32_moments(&self) -> impl Iterator<Item = (&str, Vec<&[f32]>)> {
        self.rules.iter().map(|(name, rule)| {
            let moments = rule.moments().into_iter();
            (name.as_str(), moments.filter_map(|(_, moment)| moment.as_f32()).collect())
        })
    }

    /// As [`Self::f32_moments`], to be written.
    pub(crate) fn f32_moments_mut(&mut self) -> impl Iterator<Item = (&str, Vec<&mut [f32]>)> {
        self.rules.iter_mut().map(|(name, rule)| {
            let moments = rule.moments_mut().into_iter();
            (name.as_str(), moments.filter_map(|(_, moment)| moment.as_f32_mut()).collect())
        })
    }

    /// What gradients of this norm are multiplied by.
    fn clip(&self, norm: f64) -> f32 {
        match self.config.clip_grad_norm {
            max if max > 0.0 => (max / (norm + 1e-6)).min(1.0) as f32,
            _ => 1.0,
        }
    }

    /// Begins an update that is made of [parts](Self::part).
    pub(crate) fn begin(&mut self) {
        self.updates += 1;
    }

    /// The part of an update that changes the parameters that have a gradient here, which is multiplied by
    /// `clip`.
    ///
    /// # Errors
    /// When a gradient is of another shape.
    pub(crate) fn part(
        &mut self,
        params: &Params,
        gradients: &Gradients,
        clip: f32,
        rates: Rates,
    ) -> Result<(), TrainError> {
        let config = &self.config;
        for (index, (name, var)) in params.iter().enumerate() {
            let (Some(gradient), Some(rule)) = (gradients.get(name), self.rules.get_mut(name))
            else {
                continue;
            };
            if gradient.dims() != var.dims() {
                let message = format!(
                    "{name}: expected a gradient of {:?}, found {:?}",
                    var.dims(),
                    gradient.dims()
                );
                return Err(candle_core::Error::Msg(message).into());
            }
            let rounding = (config.masters == MasterPrecision::Bf16)
                .then(|| Rounding::new(self.seed, self.updates, index));
            let gradient = view(gradient)?;
            let decay = if var.rank() >= 2 { rates.weight_decay } else { 0.0 };
            match rule {
                Rule::Muon { mean } => {
                    let learning_rate = rates.learning_rate * config.muon_ratio();
                    muon::Update {
                        clip,
                        momentum: config.muon_momentum as f32,
                        learning_rate,
                        keep: (1.0 - learning_rate * decay) as f32,
                        rounding,
                    }
                    .apply(var, &gradient, mean, &mut self.newton_schulz)?;
                }
                Rule::AdamW { m, v } => {
                    let keep = (1.0 - rates.learning_rate * decay) as f32;
                    adamw(config, self.updates, rates.learning_rate, clip, keep, rounding)
                        .apply(var, &gradient, m, v)?;
                }
            }
        }
        Ok(())
    }

    /// The state as tensors, in a fixed order: `m.<parameter>` and `v.<parameter>` of AdamW,
    /// `momentum.<parameter>` of Muon; where they are bytes, with `.scales`.
    pub fn state(&self) -> impl Iterator<Item = (String, StateValues<'_>)> {
        self.rules.iter().flat_map(|(name, rule)| {
            rule.moments().into_iter().flat_map(move |(kind, moment)| {
                let name = format!("{kind}.{name}");
                match moment {
                    Moment::F32(values) => vec![(name, StateValues::F32(values))],
                    Moment::Int8 { codes, scales, .. } => vec![
                        (format!("{name}.scales"), StateValues::F32(scales)),
                        (name, StateValues::U8(codes)),
                    ],
                }
            })
        })
    }

    /// Takes up the state of a checkpoint: the number of updates made and the tensors of
    /// [`Self::state`], which `load` finds by name.
    ///
    /// # Errors
    /// The name of a tensor that is missing or of another type or size. The optimizer is of no use
    /// then.
    pub fn restore(
        &mut self,
        updates: usize,
        mut load: impl FnMut(&str) -> Option<LoadedValues>,
    ) -> Result<(), String> {
        for (name, rule) in &mut self.rules {
            for (kind, moment) in rule.moments_mut() {
                let name = format!("{kind}.{name}");
                match moment {
                    Moment::F32(values) => match load(&name) {
                        Some(LoadedValues::F32(new)) if new.len() == values.len() => {
                            values.copy_from_slice(&new);
                        }
                        _ => return Err(name),
                    },
                    Moment::Int8 { codes, scales, .. } => {
                        match (load(&name), load(&format!("{name}.scales"))) {
                            (Some(LoadedValues::U8(new)), Some(LoadedValues::F32(new_scales)))
                                if new.len() == codes.len() && new_scales.len() == scales.len() =>
                            {
                                (*codes, *scales) = (new, new_scales);
                            }
                            _ => return Err(name),
                        }
                    }
                }
            }
        }
        self.updates = updates;
        Ok(())
    }
}

impl Rule {
    fn moments(&self) -> Vec<(&'static str, &Moment)> {
        match self {
            Self::AdamW { m, v } => vec![("m", m), ("v", v)],
            Self::Muon { mean } => vec![("momentum", mean)],
        }
    }

    fn moments_mut(&mut self) -> Vec<(&'static str, &mut Moment)> {
        match self {
            Self::AdamW { m, v } => vec![("m", m), ("v", v)],
            Self::Muon { mean } => vec![("momentum", mean)],
        }
    }
}

/// Whether a parameter is a matrix of a layer.
fn is_projection(name: &str) -> bool {
    matches!(TensorId::from_canonical(name), Some(TensorId::Layer(_, Part::Projection(_))))
}

/// The update of AdamW that has made `updates`, this one included.
fn adamw(
    config: &OptimizerConfig,
    updates: usize,
    learning_rate: f64,
    clip: f32,
    keep: f32,
    rounding: Option<Rounding>,
) -> adamw::Update {
    let [beta1, beta2] = config.betas;
    let correction = |beta: f64| 1.0 - beta.powi(updates as i32);
    adamw::Update {
        clip,
        beta1: beta1 as f32,
        beta2: beta2 as f32,
        eps: config.eps as f32,
        keep,
        step_size: (learning_rate / correction(beta1)) as f32,
        inverse_root_correction2: (1.0 / correction(beta2).sqrt()) as f32,
        rounding,
    }
}

#[cfg(test)]
mod tests;
