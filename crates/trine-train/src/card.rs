//! A run's steps on a device other than the CPU: `train.device`.
//!
//! The device has parameters, moments and gradients; the model and the optimizer of the run are what they
//! were when they were last fetched, which the trainer does whenever something is to be made
//! of them: a checkpoint, diagnostics, samples.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use trine_cuda::{Backend, Driver, Emulator, Engine, Kind, Options};
use trine_data::Batch;
use trine_format::ModelFile;

use crate::config::{DeviceConfig, MasterPrecision, MomentStorage};
use crate::fused::Precision;
use crate::optimizer::{Gradients, Optimizer, in_place};
use crate::parallel::Group;
use crate::schedule::Rates;
use crate::{Bitnet, Params, RunConfig, TrainError};

/// A run on a device.
pub(crate) struct Card {
    engine: Engine,
    names: Vec<(String, usize)>,
    group: Arc<dyn Group>,
    /// Whether devices add up gradients among themselves, beside the backward pass.
    met: bool,
}

/// The device that a configuration names, unless that is the CPU.
///
/// # Errors
/// No such device, or a library of it that is missing.
pub fn open(device: DeviceConfig) -> Result<Option<Arc<dyn Backend>>, TrainError> {
    Ok(match device {
        DeviceConfig::Cpu => None,
        DeviceConfig::Cuda(0) => Some(Arc::new(Driver::open(of_this_process())?)),
        DeviceConfig::Cuda(index) => Some(Arc::new(Driver::open(index)?)),
        DeviceConfig::Emulator => Some(Arc::new(Emulator::open(true)?)),
    })
}

/// Which GPU is this process's, where its launcher has started several on this machine: one for each.
fn of_this_process() -> usize {
    let told = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"];
    let told = told.iter().find_map(|name| std::env::var(name).ok()?.parse().ok());
    told.unwrap_or(0)
}

/// The model in a file that has masters, to be evaluated on a device.
///
/// # Errors
/// A model without masters, or one that the device cannot compute or has no memory for.
pub fn load(device: Arc<dyn Backend>, file: &ModelFile) -> Result<Engine, TrainError> {
    let params = Params::load(file, &Device::Cpu)?;
    let options = Options { kind: Kind::F32, recompute: true, narrow_masters: false };
    let mut engine = Engine::new(device, file.config(), options)?;
    for (name, var) in params.iter() {
        engine.set(name, &var.flatten_all()?.to_vec1::<f32>()?)?;
    }
    Ok(engine)
}

/// Checks that a run is one that can be made on a device.
pub(crate) fn check(config: &RunConfig, model: &Bitnet) -> Result<(), TrainError> {
    let finetune = config.finetune.as_ref();
    let refused = [
        ("optimizer.moments", "f32", "int8", config.optimizer.moments == MomentStorage::Int8),
        ("train.update_in_backward", "false", "true", config.train.update_in_backward),
        ("finetune.method", "full", "lora", model.adapters().is_some()),
        ("finetune", "sft", "a teacher or preferences", finetune.is_some_and(|f| f.is_taught())),
        ("quantizer", "the default one", "another", model.scheme().is_some()),
    ];
    for (key, expected, found, is_refused) in refused {
        if is_refused {
            let device = config.train.device;
            let (key, expected) =
                (key.to_owned(), format!("{expected} with train.device {device}"));
            return Err(TrainError::ConfigValue { key, expected, found: found.to_owned() });
        }
    }
    Ok(())
}

impl Card {
    /// Puts a model and its optimizer on a device.
    ///
    /// # Errors
    /// A model that the device cannot compute or has no memory for.
    pub(crate) fn new(
        device: Arc<dyn Backend>,
        config: &RunConfig,
        model: &Bitnet,
        optimizer: &Optimizer,
        group: Arc<dyn Group>,
    ) -> Result<Self, TrainError> {
        check(config, model)?;
        let options = Options {
            kind: match config.train.precision {
                Precision::F32 => Kind::F32,
                Precision::Auto | Precision::Bf16 | Precision::Int8 => Kind::Bf16,
            },
            recompute: config.train.recompute_activations,
            narrow_masters: config.optimizer.masters == MasterPrecision::Bf16,
        };
        let engine = Engine::new(device, model.config(), options)?;
        let names = engine.parameters().map(|(name, count)| (name.to_owned(), count)).collect();
        let mut card = Self { engine, names, group, met: false };
        card.put(model, optimizer)?;
        Ok(card)
    }

    /// Lets the devices of all processes meet, if they can; otherwise gradients go by way of the hosts.
    ///
    /// # Errors
    /// A process that is gone, or devices that do not find each other.
    pub(crate) fn meet(&mut self) -> Result<(), TrainError> {
        let (device, group) = (self.engine.device(), &*self.group);
        if self.met || group.size() == 1 {
            return Ok(());
        }
        let own = device.meeting()?;
        let mut without = [f64::from(u8::from(own.is_none()))];
        group.sum_f64(&mut without)?;
        if let (0.0, Some(mut meeting)) = (without[0], own) {
            group.broadcast(&mut meeting)?;
            device.meet(&meeting, group.rank(), group.size())?;
            self.met = true;
        }
        Ok(())
    }

    /// What the device calls itself.
    pub(crate) fn name(&self) -> String {
        self.engine.device().name()
    }

    /// Puts other parameters and moments in the place of those that are there.
    pub(crate) fn put(&mut self, model: &Bitnet, optimizer: &Optimizer) -> Result<(), TrainError> {
        for (name, var) in model.params().iter() {
            let values = var.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            self.engine.set(name, &values)?;
        }
        if optimizer.updates() == 0 {
            return Ok(self.engine.clear_moments()?);
        }
        for (name, moments) in optimizer.f32_moments() {
            self.engine.set_moments(name, &moments)?;
        }
        Ok(())
    }

    /// Makes the model's parameters those of the device.
    pub(crate) fn fetch(&self, model: &mut Bitnet) -> Result<(), TrainError> {
        for (name, count) in &self.names {
            let mut values = vec![0f32; *count];
            self.engine.get(name, &mut values)?;
            model.trained_mut().fill(name, values)?;
        }
        Ok(())
    }

    /// Makes the optimizer's moments those of the device.
    pub(crate) fn fetch_moments(&self, optimizer: &mut Optimizer) -> Result<(), TrainError> {
        for (name, mut moments) in optimizer.f32_moments_mut() {
            self.engine.moments(name, &mut moments)?;
        }
        Ok(())
    }

    /// Of the tokens of a step's batch that are to be predicted, over all processes: the sum of their losses in
    /// nats. The gradients of that sum times `weight` stay on the device. `parts` are this process's.
    pub(crate) fn forward_backward(
        &mut self,
        parts: &[Batch],
        weight: f64,
    ) -> Result<f64, TrainError> {
        self.engine.begin()?;
        let parts: Vec<&Batch> = parts.iter().filter(|part| part.learned() > 0).collect();
        match parts.split_last() {
            // Gradients add up over parts, so they are finished in the last one's pass.
            Some((last, before)) if self.met => {
                for part in before {
                    self.engine.add(part, weight as f32)?;
                }
                self.engine.add_last(last, weight as f32)?;
            }
            None if self.met => {
                self.engine.add_nothing()?;
                self.engine.sum_gradients()?;
            }
            _ => self.add_up(&parts, weight as f32)?,
        }
        let mut loss = [self.engine.loss()?];
        self.group.sum_f64(&mut loss)?;
        Ok(loss[0])
    }

    /// The gradients of parts; of those of all processes the sum, by way of the hosts.
    fn add_up(&mut self, parts: &[&Batch], weight: f32) -> Result<(), TrainError> {
        if parts.is_empty() {
            self.engine.add_nothing()?;
        }
        for part in parts {
            self.engine.add(part, weight)?;
        }
        let group = &*self.group;
        match group.size() {
            1 => Ok(()),
            _ => self.engine.change_gradients(|part| Ok(group.sum(part)?)),
        }
    }

    /// The norm of each parameter's gradient.
    pub(crate) fn norms(&mut self) -> Result<BTreeMap<String, f64>, TrainError> {
        let squares = self.engine.squares()?;
        let names = self.names.iter().map(|(name, _)| name.clone());
        Ok(names.zip(squares.into_iter().map(f64::sqrt)).collect())
    }

    /// The gradients.
    pub(crate) fn gradients(&self, model: &Bitnet) -> Result<Gradients, TrainError> {
        let mut gradients = Gradients::new();
        for (name, var) in model.params().iter() {
            let gradient = Tensor::zeros(var.shape(), DType::F32, var.device())?;
            let mut found = Ok(());
            in_place(&gradient, |values| found = self.engine.gradient(name, values))?;
            found?;
            gradients.insert(name.to_owned(), gradient);
        }
        Ok(gradients)
    }

    /// One update with the gradients that are there, whose norm is `norm`.
    pub(crate) fn update(
        &mut self,
        optimizer: &mut Optimizer,
        norm: f64,
        rates: Rates,
    ) -> Result<(), TrainError> {
        let (adamw, muon) = optimizer.next_on_card(norm, rates);
        Ok(self.engine.update(&adamw, muon.as_ref())?)
    }

    /// The mean loss in nats of the targets of a batch, everything in f32.
    pub(crate) fn evaluate(&mut self, batch: &Batch) -> Result<f32, TrainError> {
        Ok((self.engine.evaluate(batch)? / batch.learned() as f64) as f32)
    }
}

#[cfg(test)]
mod tests;
