//! A run's steps on a device other than the CPU: `train.device`.
//!
//! The device has parameters, moments and gradients; the model and the optimizer of the run are what they
//! were when they were last fetched, which the trainer does whenever something is to be made
//! of them: a checkpoint, diagnostics, samples.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use trine_cuda::{Backend, Counter, Driver, Emulator, Engine, Kind, Mask, Options};
use trine_data::Batch;
use trine_format::{ModelConfig, ModelFile, Projection, names};
use trine_kernels::{PackedMatrix, parallel};
use trine_ternary::pack::{pack_2bit, row_bytes_2bit};

use crate::config::{DeviceConfig, MasterPrecision, Method, MomentStorage};
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

fn options(config: &RunConfig) -> Options {
    Options {
        kind: config.train.precision.kind(),
        recompute: config.train.recompute_activations,
        narrow_masters: config.optimizer.masters == MasterPrecision::Bf16,
    }
}

/// Bytes that a run needs of a device's memory, besides what CUDA has there itself: with `sequences` that go
/// through at a time, and matrices that stay as they are in 16 bits.
///
/// # Errors
/// A model that no device computes.
pub(crate) fn memory(
    config: &RunConfig,
    model: &ModelConfig,
    sequences: usize,
) -> Result<u64, TrainError> {
    let lora = config.finetune.as_ref().filter(|f| f.method == Method::Lora).map(|f| &f.lora);
    let of = |batch: usize| {
        let seq_len = config.data.seq_len;
        let ids = vec![0; batch * seq_len];
        Batch { inputs: ids.clone(), targets: ids, starts: None, batch, seq_len }
    };
    let mut most = 0;
    for wgmma in [false, true] {
        let counter = Arc::new(Counter::new(wgmma));
        let (device, options) = (counter.clone(), options(config));
        let mut engine = match lora {
            None => Engine::new(device, model, options)?,
            Some(lora) => {
                let (rank, alpha, targets) = (lora.rank, lora.alpha, lora.projections()?);
                let adapters = trine_cuda::Adapters { rank, alpha, targets, narrow_base: true };
                Engine::with_adapters(device, model, options, &adapters)?
            }
        };
        engine.begin()?;
        engine.add(&of(sequences), 1.0)?;
        let mut optimizer =
            Optimizer::new(config.optimizer.clone(), config.seed, &Params::from_vars([]));
        let rates = Rates { learning_rate: 0.0, weight_decay: 0.0 };
        let (adamw, muon) = optimizer.next_on_card(1.0, rates);
        engine.update(&adamw, muon.as_ref())?;
        engine.evaluate(&of(config.train.batch_size))?;
        most = most.max(counter.most());
    }
    Ok(most as u64)
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
        let options = options(config);
        let engine = match model.adapters() {
            None => Engine::new(device, model.config(), options)?,
            Some(_) => beside(device, options, model)?,
        };
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
        for (name, var) in model.trained().iter() {
            self.engine.set(name, &values(var)?)?;
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
    /// nats. The gradients of that sum times `weight` stay on the device. `parts` are this process's; of `model` the
    /// step counts, which decides what adapters leave out.
    pub(crate) fn forward_backward(
        &mut self,
        model: &Bitnet,
        parts: &[Batch],
        weight: f64,
    ) -> Result<f64, TrainError> {
        self.engine.begin()?;
        let parts: Vec<&Batch> = parts.iter().filter(|part| part.learned() > 0).collect();
        match parts.split_last() {
            // Gradients add up over parts, so they are finished in the last one's pass.
            Some((last, before)) if self.met => {
                for part in before {
                    self.engine.add_masked(part, weight as f32, masks(model, part))?;
                }
                self.engine.add_last(last, weight as f32, masks(model, last))?;
            }
            None if self.met => {
                self.engine.add_nothing()?;
                self.engine.sum_gradients()?;
            }
            _ => self.add_up(model, &parts, weight as f32)?,
        }
        let mut loss = [self.engine.loss()?];
        self.group.sum_f64(&mut loss)?;
        Ok(loss[0])
    }

    /// The gradients of parts; of those of all processes the sum, by way of the hosts.
    fn add_up(&mut self, model: &Bitnet, parts: &[&Batch], weight: f32) -> Result<(), TrainError> {
        if parts.is_empty() {
            self.engine.add_nothing()?;
        }
        for part in parts {
            self.engine.add_masked(part, weight, masks(model, part))?;
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
        for (name, var) in model.trained().iter() {
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

/// An engine for the adapters of a model, with everything of the model that stays as it is.
fn beside(
    device: Arc<dyn Backend>,
    options: Options,
    model: &Bitnet,
) -> Result<Engine, TrainError> {
    let adapters = model.adapters().expect("asked about by the caller");
    let adapters = trine_cuda::Adapters {
        rank: adapters.rank(),
        alpha: adapters.alpha(),
        targets: adapters.targets().to_vec(),
        narrow_base: bf16_has(model.params())?,
    };
    let config = model.config();
    let mut engine = Engine::with_adapters(device, config, options, &adapters)?;
    for (name, var) in model.params().iter() {
        engine.set(name, &values(var)?)?;
    }
    for layer in 0..config.num_hidden_layers {
        for p in Projection::ALL {
            let Some(weights) = model.frozen_weights(&names::projection(layer, p)) else {
                continue;
            };
            let (trits, scale) = packed(weights);
            engine.freeze(layer, p, &trits, scale)?;
        }
    }
    Ok(engine)
}

/// Trits four in a byte, row after row, and their scale.
fn packed(weights: &PackedMatrix) -> (Vec<u8>, f32) {
    let (cols, scale) = (weights.cols(), weights.scale());
    let row_bytes = row_bytes_2bit(cols);
    let mut bytes = vec![0; weights.rows() * row_bytes];
    parallel::for_each_chunk(&mut bytes, row_bytes, |r, bytes| {
        let mut trits = vec![0; cols];
        // Trits of a scale of 0 count for nothing; adapters are divided by the scale.
        if scale > 0.0 {
            weights.unpack_row(r, &mut trits);
        }
        pack_2bit(&trits, bytes).expect("trits, and bytes for them");
    });
    (bytes, if scale > 0.0 { scale } else { 1.0 })
}

fn values(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()
}

/// Whether bf16 has the values of all matrices.
fn bf16_has(params: &Params) -> candle_core::Result<bool> {
    for (_, var) in params.iter().filter(|(_, var)| var.rank() > 1) {
        let has = |value: &f32| value.to_bits() & 0xffff == 0;
        if var.dtype() != DType::BF16 && !values(var)?.iter().all(has) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What adapters leave out of their inputs in a step with a batch.
fn masks(model: &Bitnet, batch: &Batch) -> Vec<Mask> {
    let Some(adapters) = model.adapters() else { return Vec::new() };
    let inputs = 0..4 * model.config().num_hidden_layers;
    let mask = |input| adapters.dropout().mask(model.step(), &batch.inputs, input);
    inputs.filter_map(mask).map(|mask| mask.on_card()).collect()
}

#[cfg(test)]
mod tests;
