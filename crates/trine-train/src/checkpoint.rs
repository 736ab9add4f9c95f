//! Checkpoints: a Hugging Face directory that transformers opens, plus the optimizer's state.
//!
//! ```text
//! <run>/checkpoints/step-000500/
//!   config.json, model.safetensors (f32 masters), tokenizer.json, ...   as transformers has them
//!   quantizer.safetensors    learned scales, where `[quantizer]` has some
//!   optimizer.safetensors    `m.<parameter>` and `v.<parameter>`, f32
//!   trainer_state.json       how far the run has come
//! ```
//!
//! A checkpoint appears under its name only when it is whole and flushed to the disk.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use safetensors::{Dtype as SafeDtype, SafeTensorError, SafeTensors, View};
use serde::{Deserialize, Serialize};
use trine_format::{
    AtomicDir, AtomicFile, BoxError, DenseTensor, Dtype, TensorSource, TokenizerFiles,
};

use crate::ops::view;
use crate::optimizer::{AdamW, Moments};
use crate::quantizers::stored;
use crate::{Bitnet, Params, TrainError};

/// How far a run has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Updates made; also the next step's number, which decides its batch and rates.
    pub step: usize,
    /// Tokens trained on.
    pub tokens: u64,
    /// The last validation loss in nats, with the step it was measured at.
    pub validation: Option<(usize, f32)>,
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
    optimizer: &AdamW,
    state: &TrainerState,
) -> Result<(), TrainError> {
    let staged = AtomicDir::create(dir)?;
    let path = staged.path();
    let source = Masters(model.params());
    trine_format::write_hf_files(path, model.config(), Dtype::F32, &source, Some(tokenizer))?;
    stored::write(path, model)?;

    let moments: Vec<_> = optimizer.moments().collect();
    let tensors = moments.iter().flat_map(|(name, moments)| {
        [("m", &moments.m), ("v", &moments.v)]
            .map(|(kind, values)| (format!("{kind}.{name}"), Values::new(values)))
    });
    safetensors::serialize_to_file(tensors, None, &path.join(OPTIMIZER)).map_err(|e| match e {
        SafeTensorError::IoError(source) => TrainError::Write { path: dir.join(OPTIMIZER), source },
        other => corrupt(dir, format!("{OPTIMIZER}: {other}")),
    })?;
    let state = serde_json::to_vec_pretty(state).expect("plain data serializes");
    AtomicFile::replace(&path.join(STATE), &state)?;
    staged.commit_replacing()?;
    Ok(())
}

/// Reads what [`save`] wrote beside the model: how far the run had come, and the optimizer's state.
///
/// # Errors
/// A file that is missing, damaged, or of another model.
pub fn restore(dir: &Path, optimizer: &mut AdamW) -> Result<TrainerState, TrainError> {
    let path = dir.join(STATE);
    let text = std::fs::read(&path).map_err(|source| TrainError::Read { path, source })?;
    let state: TrainerState =
        serde_json::from_slice(&text).map_err(|e| corrupt(dir, format!("{STATE}: {e}")))?;
    let path = dir.join(OPTIMIZER);
    let bytes = std::fs::read(&path).map_err(|source| TrainError::Read { path, source })?;
    let tensors =
        SafeTensors::deserialize(&bytes).map_err(|e| corrupt(dir, format!("{OPTIMIZER}: {e}")))?;
    let values = |name: String| {
        let view = tensors.tensor(&name).ok().filter(|t| t.dtype() == SafeDtype::F32)?;
        let number = |b: &[u8; 4]| f32::from_le_bytes(*b);
        Some(view.data().as_chunks().0.iter().map(number).collect())
    };
    let moments = |name: &str| {
        Some(Moments { m: values(format!("m.{name}"))?, v: values(format!("v.{name}"))? })
    };
    optimizer.restore(state.step, moments).map_err(|name| {
        corrupt(dir, format!("{OPTIMIZER}: no moments of the right size for {name}"))
    })?;
    Ok(state)
}

/// The checkpoint directory of a step.
pub fn path_of_step(run_dir: &Path, step: usize) -> PathBuf {
    run_dir.join("checkpoints").join(format!("step-{step:06}"))
}

/// The checkpoint of the most steps in a run directory.
pub fn latest(run_dir: &Path) -> Option<PathBuf> {
    let step = |path: &Path| -> Option<usize> {
        path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
    };
    let entries = std::fs::read_dir(run_dir.join("checkpoints")).ok()?;
    let paths = entries.filter_map(|entry| entry.ok().map(|e| e.path()));
    paths.filter_map(|path| Some((step(&path)?, path))).max().map(|(_, path)| path)
}

/// Numbers as safetensors takes them: borrowed, so that saving needs no memory for a copy.
struct Values<'a> {
    values: &'a [f32],
    shape: [usize; 1],
}

impl<'a> Values<'a> {
    fn new(values: &'a [f32]) -> Self {
        Self { values, shape: [values.len()] }
    }
}

impl View for Values<'_> {
    fn dtype(&self) -> SafeDtype {
        SafeDtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        // Little-endian whatever the machine, as the format has it.
        let shape = &self.shape;
        match DenseTensor::from_f32("", shape, self.values).data {
            Cow::Borrowed(_) => Cow::Borrowed(bytemuck::cast_slice(self.values)),
            owned => Cow::Owned(owned.into_owned()),
        }
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

/// Parameters as the source of a model file.
struct Masters<'a>(&'a Params);

impl TensorSource for Masters<'_> {
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        let tensor = self.0.get(name)?;
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

fn corrupt(dir: &Path, message: String) -> TrainError {
    TrainError::Checkpoint { path: dir.to_owned(), message }
}
