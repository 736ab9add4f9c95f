//! Checkpoints of what the formats do not know.
//!
//! A checkpoint of the default is an ordinary Hugging Face directory. One of another scheme has the
//! same files, so masters are where they always are, but its `config.json` says
//! `quantization_config.quant_method: trine`, which every other reader refuses: it would take the
//! masters for those of absmean. Parameters of learned scales lie beside, in `quantizer.safetensors`.
//!
//! [`open`] opens either. Where trits and a scale for each matrix are all of a scheme, the model is
//! what those say, and can be run and converted like any other; where they are not, it is refused
//! with what is missing.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Var};
use safetensors::tensor::TensorView;
use safetensors::{Dtype as SafeDtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use trine_format::{
    AtomicFile, BoxError, DenseTensor, ModelConfig, ModelFile, Projection, Quantization,
    TensorSource, TensorSummary, names,
};
use trine_ternary::TernaryMatrix;

use super::{QuantizerConfig, Scheme};
use crate::{Bitnet, Params, TrainError};

/// The name of our quantization method.
const METHOD: &str = "trine";

const CONFIG: &str = "config.json";
const SCALES: &str = "quantizer.safetensors";
const SECTION: &str = "quantization_config";

/// What `config.json` says about a scheme.
#[derive(Serialize, Deserialize)]
struct Stored {
    quantizer: QuantizerConfig,
    /// Updates made, which the warm-up depends on.
    step: usize,
}

/// Turns the checkpoint of masters in `dir` into one of the model's scheme, where it has one.
pub(crate) fn write(dir: &Path, model: &Bitnet) -> Result<(), TrainError> {
    let Some(scheme) = model.scheme().filter(|scheme| !scheme.is_default(model.step())) else {
        return Ok(());
    };
    let mut config = model.config().to_hf_json("float32");
    let section = &mut config[SECTION];
    let stored = Stored { quantizer: scheme.config().clone(), step: model.step() };
    let stored = serde_json::to_value(stored).expect("plain data serializes");
    section["quant_method"] = METHOD.into();
    if let Some(section) = section.as_object_mut() {
        section.retain(|key, _| !["linear_class", "quantization_mode"].contains(&key.as_str()));
    }
    for key in ["quantizer", "step"] {
        section[key] = stored[key].clone();
    }
    let lost = scheme.inexact(model.step());
    section["not_exact_as_trits"] = if lost.is_empty() { Value::Null } else { json!(lost) };
    AtomicFile::replace(&dir.join(CONFIG), format!("{config:#}\n").as_bytes())?;
    if scheme.learns() { write_scales(dir, model, scheme) } else { Ok(()) }
}

fn write_scales(dir: &Path, model: &Bitnet, scheme: &Scheme) -> Result<(), TrainError> {
    let mut bytes = BTreeMap::new();
    for name in projections(model.config()) {
        let name = scheme.scales_name(&name);
        let values: Vec<f32> = model.params().get(&name)?.to_vec1()?;
        bytes.insert(name, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
    }
    let corrupt = |e: safetensors::SafeTensorError| corrupt(dir, format!("{SCALES}: {e}"));
    let views: Result<Vec<_>, _> = bytes
        .iter()
        .map(|(name, data)| {
            Ok((name, TensorView::new(SafeDtype::F32, vec![data.len() / 4], data)?))
        })
        .collect();
    let file = safetensors::serialize(views.map_err(corrupt)?, None).map_err(corrupt)?;
    Ok(AtomicFile::replace(&dir.join(SCALES), &file)?)
}

/// The names of all projections' weights.
fn projections(config: &ModelConfig) -> impl Iterator<Item = String> {
    let layers = 0..config.num_hidden_layers;
    layers.flat_map(|layer| Projection::ALL.map(|p| names::projection(layer, p)))
}

/// Opens a model of any format: checkpoints of every scheme, and what [`ModelFile::open`] opens.
///
/// # Errors
/// A scheme of which trits and scales are not all, with what they would lose; and as
/// [`ModelFile::open`].
pub fn open(path: &Path) -> Result<ModelFile, TrainError> {
    let Some((stored, masters)) = scheme_of(path)? else { return Ok(ModelFile::open(path)?) };
    let scheme = Scheme::new(stored.quantizer)?;
    let lost = scheme.inexact(stored.step);
    if !lost.is_empty() {
        let message = format!("trained with {}, which no format holds exactly", lost.join(", "));
        return Err(TrainError::Checkpoint { path: path.to_owned(), message });
    }
    let scales = if scheme.learns() { read_scales(path)? } else { BTreeMap::new() };
    let config = ModelConfig { quantization: Quantization::Offline, ..masters.config().clone() };
    let (bos, eos) = (config.bos_token_id, config.eos_token_ids.clone());
    let tokenizer = masters.tokenizer().cloned();
    let exact = Exact { masters, scheme, scales };
    let model = ModelFile::imported(path, config, Box::new(exact));
    Ok(match tokenizer {
        Some(tokenizer) => model.with_tokenizer(tokenizer, bos, eos)?,
        None => model,
    })
}

/// Opens the masters of a checkpoint, whatever they become.
pub(crate) fn open_masters(dir: &Path) -> Result<ModelFile, TrainError> {
    match scheme_of(dir)? {
        Some((_, masters)) => Ok(masters),
        None => Ok(ModelFile::open(dir)?),
    }
}

/// Reads the learned scales of a checkpoint into `params`.
pub(crate) fn load_scales(
    dir: &Path,
    scheme: &Scheme,
    model: &ModelConfig,
    params: &mut Params,
) -> Result<(), TrainError> {
    if !scheme.learns() {
        return Ok(());
    }
    let mut scales = read_scales(dir)?;
    for (layer, p) in (0..model.num_hidden_layers).flat_map(|l| Projection::ALL.map(|p| (l, p))) {
        let name = scheme.scales_name(&names::projection(layer, p));
        let (rows, cols) = model.projection_shape(p);
        let expected = scheme.config().granularity.count(rows, cols);
        let found = scales.remove(&name).unwrap_or_default();
        if found.len() != expected {
            let found = found.len();
            let message = format!("{SCALES}: {name}: expected {expected} scales, found {found}");
            return Err(corrupt(dir, message));
        }
        params.insert(name, Var::from_vec(found, expected, &Device::Cpu)?);
    }
    Ok(())
}

/// The scheme and the masters of a directory that was written with one.
fn scheme_of(dir: &Path) -> Result<Option<(Stored, ModelFile)>, TrainError> {
    let path = dir.join(CONFIG);
    // Whatever is wrong with the file is told by the reader of the ordinary ones.
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let Ok(mut json) = serde_json::from_str::<Value>(&text) else { return Ok(None) };
    let Some(section) = json.get_mut(SECTION) else { return Ok(None) };
    if section.get("quant_method").and_then(Value::as_str) != Some(METHOD) {
        return Ok(None);
    }
    let stored = Stored::deserialize(&*section)
        .map_err(|e| TrainError::Checkpoint { path, message: format!("`{SECTION}`: {e}") })?;
    section["quant_method"] = "bitnet".into();
    section["linear_class"] = "autobitlinear".into();
    section["quantization_mode"] = "online".into();
    let masters = ModelFile::open_as(dir, &json.to_string())?;
    Ok(Some((stored, masters)))
}

fn read_scales(dir: &Path) -> Result<BTreeMap<String, Vec<f32>>, TrainError> {
    let path = dir.join(SCALES);
    let bytes = std::fs::read(&path).map_err(|source| TrainError::Read { path, source })?;
    let tensors =
        SafeTensors::deserialize(&bytes).map_err(|e| corrupt(dir, format!("{SCALES}: {e}")))?;
    let mut scales = BTreeMap::new();
    for (name, tensor) in tensors.iter() {
        if tensor.dtype() != SafeDtype::F32 {
            let found = tensor.dtype();
            return Err(corrupt(dir, format!("{SCALES}: {name}: expected F32, found {found:?}")));
        }
        let values = tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
        scales.insert(name.to_owned(), values.collect());
    }
    Ok(scales)
}

fn corrupt(dir: &Path, message: String) -> TrainError {
    TrainError::Checkpoint { path: dir.to_owned(), message }
}

/// A checkpoint as the trits and scales of its scheme.
struct Exact {
    masters: ModelFile,
    scheme: Scheme,
    /// One for every projection, where they are learned.
    scales: BTreeMap<String, Vec<f32>>,
}

impl TensorSource for Exact {
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        Ok(self.masters.dense(name)?)
    }

    fn projection(&self, layer: usize, p: Projection) -> Result<TernaryMatrix, BoxError> {
        let name = names::projection(layer, p);
        let learned = match self.scheme.learns() {
            false => None,
            true => match self.scales.get(&self.scheme.scales_name(&name)).map(Vec::as_slice) {
                Some([scale]) => Some(*scale),
                other => {
                    let found = other.map_or(0, <[f32]>::len);
                    return Err(format!("{SCALES}: expected one scale, found {found}").into());
                }
            },
        };
        let masters = self.masters.dense(&name)?.to_f32();
        let (rows, cols) = self.masters.config().projection_shape(p);
        Ok(self.scheme.ternary(&masters, rows, cols, learned)?)
    }

    fn tensors(&self) -> Vec<TensorSummary> {
        self.masters.tensors()
    }

    fn release(&self, name: &str) {
        self.masters.release(name);
    }
}
