//! Checkpoints: a Hugging Face directory that transformers opens, plus the optimizer's state.
//!
//! ```text
//! <run>/checkpoints/step-000500/
//!   config.json, model.safetensors (masters, f32 or bf16), tokenizer.json, ...   as transformers has them
//!   adapter_config.json, adapter_model.safetensors       instead of the model where adapters are trained,
//!                            as PEFT has them
//!   quantizer.safetensors    learned scales, where `[quantizer]` has some
//!   optimizer.safetensors    moments, as `Optimizer::state` names them
//!   trainer_state.json       how far the run has come
//!   checksums.json           BLAKE3 of every other file
//! ```
//!
//! A checkpoint appears under its name only when it is whole and flushed to the disk, and older ones
//! are deleted only after that. What happens to it afterwards, on a bad disk or by accident, is found
//! by its checksums before a run goes on from it.

mod checksums;
mod store;

pub use checksums::verify;
pub use store::{Found, best, clean, latest, latest_whole, path_of_step, prune};

use std::borrow::Cow;
use std::collections::VecDeque;
use std::path::Path;

use candle_core::{CpuStorage, DType, Storage, Tensor};
use safetensors::{Dtype as SafeDtype, SafeTensorError, SafeTensors, View};
use serde::{Deserialize, Serialize};
use trine_format::{
    AtomicDir, AtomicFile, BoxError, DenseTensor, Dtype, TensorSource, TokenizerFiles, map_file,
};

use crate::config::MasterPrecision;
use crate::ops::view;
use crate::optimizer::{LoadedValues, Optimizer, StateValues};
use crate::quantizers::stored;
use crate::{Bitnet, Params, TrainError};

/// How far a run has come. With the masters and the optimizer's state it decides all that follows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Steps made; also the next step's number, which decides its batch and rates.
    pub step: usize,
    /// Updates made: the steps less those that were skipped.
    pub updates: usize,
    /// Tokens trained on.
    pub tokens: u64,
    /// Sequences that were left out by rewinds: how much further the data is than the steps.
    pub skipped_sequences: u64,
    /// The last validation loss in nats, with the step it was measured at.
    pub validation: Option<(usize, f32)>,
    /// The lowest validation loss in nats, with the step it was measured at.
    pub best: Option<(usize, f32)>,
    /// The last losses in nats, `train.spike_window` of them at most, that a next one is judged by.
    pub recent_losses: VecDeque<f32>,
    /// Batches skipped in a row.
    pub skips: usize,
    /// Rewinds since the last checkpoint; it is 0 in one.
    pub rewinds: usize,
}

const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "trainer_state.json";

/// Writes a checkpoint as directory `dir`, replacing one of that name.
///
/// # Errors
/// When the disk refuses; nothing is then left under the name.
pub fn save(
    dir: &Path,
    model: &Bitnet,
    tokenizer: &TokenizerFiles,
    optimizer: &Optimizer,
    state: &TrainerState,
) -> Result<(), TrainError> {
    let staged = AtomicDir::create(dir)?;
    write(staged.path(), model, tokenizer, optimizer, state).map_err(|e| match e {
        // What happens to a temporary is told with the name that it was to have.
        TrainError::Format(e) => e.moved(staged.path(), dir).into(),
        TrainError::Write { path, source } => match path.strip_prefix(staged.path()) {
            Ok(below) => TrainError::Write { path: dir.join(below), source },
            Err(_) => TrainError::Write { path, source },
        },
        other => other,
    })?;
    Ok(staged.commit_replacing()?)
}

/// Writes the files of a checkpoint into a directory.
fn write(
    dir: &Path,
    model: &Bitnet,
    tokenizer: &TokenizerFiles,
    optimizer: &Optimizer,
    state: &TrainerState,
) -> Result<(), TrainError> {
    if let Some(adapters) = model.adapters() {
        adapters.to_lora(model.config().num_hidden_layers)?.write_files(dir, model.config())?;
        tokenizer.write_files(dir)?;
    } else {
        let source = Masters(model.params());
        // Masters that are kept as bf16 lose nothing by it.
        let dtype = match optimizer.masters() {
            MasterPrecision::F32 => Dtype::F32,
            MasterPrecision::Bf16 => Dtype::BF16,
        };
        trine_format::write_hf_files(dir, model.config(), dtype, &source, Some(tokenizer))?;
        stored::write(dir, model)?;
    }

    let tensors = optimizer.state().map(|(name, values)| (name, Values::new(values)));
    let path = dir.join(OPTIMIZER);
    safetensors::serialize_to_file(tensors, None, &path).map_err(|e| match e {
        SafeTensorError::IoError(source) => TrainError::Write { path: path.clone(), source },
        other => corrupt(dir, format!("{OPTIMIZER}: {other}")),
    })?;
    let state = serde_json::to_vec_pretty(state).expect("plain data serializes");
    AtomicFile::replace(&dir.join(STATE), &state)?;
    checksums::write(dir)
}

/// Reads what [`save`] wrote beside the model: how far the run had come, and the optimizer's state.
///
/// # Errors
/// A file that is missing, damaged, or of another model or optimizer.
pub fn restore(dir: &Path, optimizer: &mut Optimizer) -> Result<TrainerState, TrainError> {
    let state = read_state(dir)?;
    let path = dir.join(OPTIMIZER);
    // Moments are the largest part of a checkpoint: what has been copied is given back.
    let bytes = map_file(&path)?;
    let tensors =
        SafeTensors::deserialize(&bytes).map_err(|e| corrupt(dir, format!("{OPTIMIZER}: {e}")))?;
    let load = |name: &str| {
        let view = tensors.tensor(name).ok()?;
        let number = |b: &[u8; 4]| f32::from_le_bytes(*b);
        let start = view.data().as_ptr().addr() - bytes.as_ptr().addr();
        let range = start..start + view.data().len();
        let values = match view.dtype() {
            SafeDtype::F32 => {
                Some(LoadedValues::F32(view.data().as_chunks().0.iter().map(number).collect()))
            }
            SafeDtype::U8 => Some(LoadedValues::U8(view.data().to_vec())),
            _ => None,
        };
        bytes.release(range);
        values
    };
    optimizer.restore(state.updates, load).map_err(|name| {
        corrupt(dir, format!("{OPTIMIZER}: no {name} of this optimizer's type and size"))
    })?;
    Ok(state)
}

/// How far the run of a checkpoint had come.
///
/// # Errors
/// A file that is missing or damaged.
pub fn read_state(dir: &Path) -> Result<TrainerState, TrainError> {
    let path = dir.join(STATE);
    let text = std::fs::read(&path).map_err(|source| TrainError::Read { path, source })?;
    serde_json::from_slice(&text).map_err(|e| corrupt(dir, format!("{STATE}: {e}")))
}

/// Numbers as safetensors takes them: borrowed, so that saving needs no memory for a copy.
struct Values<'a> {
    values: StateValues<'a>,
    shape: [usize; 1],
}

impl<'a> Values<'a> {
    fn new(values: StateValues<'a>) -> Self {
        let shape = match values {
            StateValues::F32(values) => [values.len()],
            StateValues::U8(values) => [values.len()],
        };
        Self { values, shape }
    }
}

impl View for Values<'_> {
    fn dtype(&self) -> SafeDtype {
        match self.values {
            StateValues::F32(_) => SafeDtype::F32,
            StateValues::U8(_) => SafeDtype::U8,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.values {
            StateValues::U8(values) => Cow::Borrowed(values),
            // Little-endian whatever the machine, as the format has it.
            StateValues::F32(values) => match DenseTensor::from_f32("", &self.shape, values).data {
                Cow::Borrowed(_) => Cow::Borrowed(bytemuck::cast_slice(values)),
                owned => Cow::Owned(owned.into_owned()),
            },
        }
    }

    fn data_len(&self) -> usize {
        match self.values {
            StateValues::F32(values) => size_of_val(values),
            StateValues::U8(values) => values.len(),
        }
    }
}

/// Parameters as the source of a model file.
struct Masters<'a>(&'a Params);

impl TensorSource for Masters<'_> {
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        let tensor = self.0.get(name)?;
        if tensor.dtype() == DType::BF16 {
            return narrow(name, tensor);
        }
        let values = view(tensor)?;
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(format!("element {at} is {}: such a model is not kept", values[at]).into());
        }
        // The view cannot outlive this call, so the writer gets a copy, one tensor at a time.
        let borrowed = DenseTensor::from_f32(name, tensor.dims(), &values);
        let data = Cow::Owned(borrowed.data.into_owned());
        Ok(DenseTensor { name: borrowed.name, dtype: Dtype::F32, shape: borrowed.shape, data })
    }
}

/// A tensor of bf16, half the size.
fn narrow(name: &str, tensor: &Tensor) -> Result<DenseTensor<'static>, BoxError> {
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cpu(CpuStorage::BF16(numbers)), Some((start, end))) =
        (&*storage, layout.contiguous_offsets())
    else {
        return Err("expected a contiguous tensor on the CPU".into());
    };
    let numbers = &numbers[start..end];
    if let Some(at) = numbers.iter().position(|v| !v.is_finite()) {
        return Err(format!("element {at} is {}: such a model is not kept", numbers[at]).into());
    }
    let data = numbers.iter().flat_map(|v| v.to_le_bytes()).collect();
    let (name, shape) = (name.to_owned(), tensor.dims().to_vec());
    Ok(DenseTensor { name, dtype: Dtype::BF16, shape, data: Cow::Owned(data) })
}

fn corrupt(dir: &Path, message: String) -> TrainError {
    TrainError::Checkpoint { path: dir.to_owned(), message }
}
