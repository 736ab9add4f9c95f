//! Writing a Hugging Face directory that transformers opens.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::packed;
use crate::names::{Part, TensorId};
use crate::pipeline::in_order;
use crate::tensor::{checked_data, checked_trits};
use crate::{
    AtomicDir, AtomicFile, Dtype, FormatError, ModelConfig, Quantization, TensorSource,
    TokenizerFiles,
};

/// Writes a model with all tensors as plain numbers: a checkpoint of master weights.
///
/// The directory appears whole or not at all, and must not exist yet (or be empty).
///
/// # Errors
/// A source without one of the tensors that `config` asks for, or an error of the file system.
pub fn write_hf(
    dir: &Path,
    config: &ModelConfig,
    dtype: Dtype,
    source: &dyn TensorSource,
    tokenizer: Option<&TokenizerFiles>,
) -> Result<(), FormatError> {
    let staged = AtomicDir::create(dir)?;
    write_hf_files(staged.path(), config, dtype, source, tokenizer)
        .map_err(|e| e.moved(staged.path(), dir))?;
    staged.commit()
}

/// As [`write_hf`], into an existing directory: for a caller that stages more files of its own in
/// an [`AtomicDir`].
///
/// # Errors
/// As [`write_hf`], and a `config` whose projections are stored packed, or a type of blocks.
pub fn write_hf_files(
    dir: &Path,
    config: &ModelConfig,
    dtype: Dtype,
    source: &dyn TensorSource,
    tokenizer: Option<&TokenizerFiles>,
) -> Result<(), FormatError> {
    if config.quantization == Quantization::Offline {
        let expected = "Online or None, for a file of plain numbers";
        return Err(FormatError::config("quantization", expected, "Offline"));
    }
    if dtype.is_block() {
        return Err(FormatError::config("dtype", "F32, F16 or BF16", dtype.name()));
    }
    write_texts(dir, config, dtype, tokenizer)?;
    let entries: Vec<_> = config
        .tensor_ids()
        .into_iter()
        .map(|id| Entry::new(id.canonical(), config.tensor_shape(id), dtype))
        .collect();
    let path = dir.join("model.safetensors");
    let mut file = start(&path, entries.iter().cloned())?;
    put_dense(&mut file, source, &entries, dtype)?;
    file.commit()
}

/// Writes a model with its projections packed, four trits a byte, and the rest as bf16.
///
/// The scale is stored as bf16 because that is what transformers reads; it so loses up to 2^-8 of
/// its value, which moves logits by one to three percent. GGUF keeps it exact.
///
/// # Errors
/// As [`write_hf`], and a model that is not quantized.
pub fn write_hf_packed(
    dir: &Path,
    config: &ModelConfig,
    source: &dyn TensorSource,
    tokenizer: Option<&TokenizerFiles>,
) -> Result<(), FormatError> {
    if config.quantization == Quantization::None {
        let expected = "Online or Offline, for a file of trits";
        return Err(FormatError::config("quantization", expected, "None"));
    }
    let config = ModelConfig { quantization: Quantization::Offline, ..config.clone() };
    let staged = AtomicDir::create(dir)?;
    packed_files(staged.path(), &config, source, tokenizer)
        .map_err(|e| e.moved(staged.path(), dir))?;
    staged.commit()
}

/// The files of [`write_hf_packed`].
fn packed_files(
    dir: &Path,
    config: &ModelConfig,
    source: &dyn TensorSource,
    tokenizer: Option<&TokenizerFiles>,
) -> Result<(), FormatError> {
    write_texts(dir, config, Dtype::BF16, tokenizer)?;

    // Two-byte numbers, then packed bytes, then scales: so everything is aligned to its size, and
    // scales come last because they are only known once the trits have been asked for.
    let (projections, dense): (Vec<_>, Vec<_>) = config
        .tensor_ids()
        .into_iter()
        .partition(|id| matches!(id, TensorId::Layer(_, Part::Projection(_))));
    let bf16 = |name, shape| Entry::new(name, shape, Dtype::BF16);
    let dense: Vec<_> =
        dense.into_iter().map(|id| bf16(id.canonical(), config.tensor_shape(id))).collect();
    let bytes = projections.iter().map(|&id| {
        let shape = config.tensor_shape(id);
        let shape = vec![shape[0].div_ceil(4), shape[1]];
        Entry { name: id.canonical(), dtype: "U8", bytes: shape.iter().product(), shape }
    });
    let scales = projections.iter().map(|id| bf16(format!("{}_scale", id.canonical()), vec![1]));

    let path = dir.join("model.safetensors");
    let mut file = start(&path, dense.iter().cloned().chain(bytes).chain(scales))?;
    put_dense(&mut file, source, &dense, Dtype::BF16)?;
    let mut scales = Vec::new();
    let make = |id: &TensorId| {
        let TensorId::Layer(layer, Part::Projection(p)) = *id else { return Ok((vec![], 0.0)) };
        let matrix = checked_trits(source, &path, config, layer, p)?;
        Ok((packed::encode(&matrix), matrix.scale()))
    };
    let bytes = |id: &TensorId| config.tensor_shape(*id).iter().product::<usize>() / 4;
    in_order(&projections, bytes, make, |id, (bytes, scale)| {
        file.put(&bytes)?;
        scales.extend(half::bf16::from_f32(scale).to_le_bytes());
        source.release(&id.canonical());
        Ok(())
    })?;
    file.put(&scales)?;
    file.commit()
}

/// A tensor as the safetensors header announces it.
#[derive(Clone)]
struct Entry {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: usize,
}

impl Entry {
    /// Of a type that safetensors has, where it has the name that GGUF gives it.
    fn new(name: String, shape: Vec<usize>, dtype: Dtype) -> Self {
        let bytes = dtype.bytes(&shape).unwrap_or_default();
        Self { name, dtype: dtype.ggml_type().name(), shape, bytes }
    }
}

/// Starts a safetensors file: the header's length, the header, then data in the entries' order.
///
/// The header is written here rather than by the library because that wants all tensors in memory
/// at once.
fn start(path: &Path, entries: impl IntoIterator<Item = Entry>) -> Result<AtomicFile, FormatError> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut offset = 0;
    for Entry { name, dtype, shape, bytes } in entries {
        let offsets = [offset, offset + bytes];
        let info = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        header.insert(name, info);
        offset += bytes;
    }
    let mut text = Value::Object(header).to_string();
    // Data starts at a multiple of 8; the format allows spaces after the header for that.
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    let mut file = AtomicFile::create(path)?;
    file.put(&(text.len() as u64).to_le_bytes())?;
    file.put(text.as_bytes())?;
    Ok(file)
}

/// Writes tensors of plain numbers.
fn put_dense(
    file: &mut AtomicFile,
    source: &dyn TensorSource,
    entries: &[Entry],
    dtype: Dtype,
) -> Result<(), FormatError> {
    let path = file.path().to_owned();
    let make = |e: &Entry| checked_data(source, &path, &e.name, &e.shape, dtype);
    in_order(
        entries,
        |entry| entry.bytes,
        make,
        |entry, data| {
            file.put(&data)?;
            source.release(&entry.name);
            Ok(())
        },
    )
}

/// The small files around the tensors.
fn write_texts(
    dir: &Path,
    config: &ModelConfig,
    dtype: Dtype,
    tokenizer: Option<&TokenizerFiles>,
) -> Result<(), FormatError> {
    config.validate()?;
    put_json(dir, "config.json", &config.to_hf_json(dtype.name()))?;
    put_json(
        dir,
        "generation_config.json",
        &json!({
            "_from_model_config": true,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_json(),
            "max_length": config.max_position_embeddings,
            "do_sample": false,
        }),
    )?;
    tokenizer.map_or(Ok(()), |tokenizer| tokenizer.write_files(dir))
}

fn put(dir: &Path, name: &str, text: &str) -> Result<(), FormatError> {
    let path = dir.join(name);
    fs::write(&path, text).map_err(FormatError::io(&path, "write"))
}

fn put_json(dir: &Path, name: &str, value: &Value) -> Result<(), FormatError> {
    put(dir, name, &format!("{value:#}\n"))
}

impl TokenizerFiles {
    /// Writes the files that make transformers load the tokenizer into an existing directory.
    ///
    /// # Errors
    /// What the disk refuses.
    pub fn write_files(&self, dir: &Path) -> Result<(), FormatError> {
        put(dir, "tokenizer.json", &self.tokenizer_json)?;
        put_json(dir, "special_tokens_map.json", &self.special_tokens_map())?;
        match &self.tokenizer_config {
            Some(config) => put_json(dir, "tokenizer_config.json", config),
            None => Ok(()),
        }
    }
}
