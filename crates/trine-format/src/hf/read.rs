//! Opening a Hugging Face directory.
//!
//! Headers are checked once, on opening: afterwards every tensor of the configuration is known to
//! exist with the right shape and type, and no other tensor is there that would change the
//! computation.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype as StDtype;
use serde_json::Value;
use trine_ternary::TernaryMatrix;

use super::config::{self, HfConfig};
use super::header::header;
use super::packed;
use crate::mapped::part;
use crate::names::{Part, TensorId};
use crate::{
    DenseTensor, Dtype, FormatError, Mapped, ModelConfig, Projection, Quantization, TensorSummary,
    TokenizerFiles, Weight, map_file,
};

const CONFIG: &str = "config.json";

/// Longest name of a shard in bytes.
const MAX_FILE_NAME: usize = 255;

/// The tensors of a directory, by name, over one or several mapped files.
pub(crate) struct HfDir {
    shards: Vec<(PathBuf, Mapped)>,
    tensors: BTreeMap<String, Stored>,
    /// Where tensors that are missing were expected.
    path: PathBuf,
    scale_divides: bool,
}

struct Stored {
    shard: usize,
    dtype: StDtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// Opens a directory.
pub(crate) fn open(
    dir: &Path,
) -> Result<(ModelConfig, Option<TokenizerFiles>, HfDir), FormatError> {
    open_as(dir, &read_text(&dir.join(CONFIG))?)
}

/// Opens a directory with another text in the place of its `config.json`.
pub(crate) fn open_as(
    dir: &Path,
    config_json: &str,
) -> Result<(ModelConfig, Option<TokenizerFiles>, HfDir), FormatError> {
    let HfConfig { mut config, scale_divides, first_names } =
        config::parse(config_json, &dir.join(CONFIG))?;
    // Chat models end a text with the token of config.json and a turn with the one given here.
    let generation_path = dir.join("generation_config.json");
    if let Some(text) = read_optional(&generation_path)? {
        let mut known: HashSet<u32> = config.eos_token_ids.iter().copied().collect();
        let more = config::generation_eos(&text, &generation_path)?;
        config.eos_token_ids.extend(more.into_iter().filter(|&id| known.insert(id)));
        config.validate().map_err(|e| e.in_file(&generation_path))?;
    }
    let mut files = HfDir {
        shards: Vec::new(),
        tensors: BTreeMap::new(),
        path: dir.join("model.safetensors"),
        scale_divides,
    };
    for shard in shard_paths(dir)? {
        files.add_shard(shard, first_names)?;
    }
    files.check(&config)?;
    Ok((config, read_tokenizer(dir)?, files))
}

/// `model.safetensors`, or the files that `model.safetensors.index.json` names.
fn shard_paths(dir: &Path) -> Result<Vec<PathBuf>, FormatError> {
    let index = dir.join("model.safetensors.index.json");
    let single = dir.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let Some(text) = read_optional(&index)? else { return Ok(vec![single]) };
    let json: Value = serde_json::from_str(&text)
        .map_err(|e| FormatError::malformed(&index, "content", "JSON", e))?;
    let refuse = |found| FormatError::key(&index, "weight_map", "tensor names to files", found);
    let map = json.get("weight_map").and_then(Value::as_object).ok_or_else(|| refuse("none"))?;
    let mut names = BTreeSet::new();
    for file in map.values() {
        let name = file.as_str().ok_or_else(|| refuse("a value that is no string"))?;
        // A shard lies beside its index: a path out of the directory is an attack.
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(refuse("a file name with a path"));
        }
        // The name stands in messages, and no file system has a longer one.
        if name.len() > MAX_FILE_NAME || name.contains(char::is_control) {
            return Err(refuse("a file name with control characters, or too long for one"));
        }
        names.insert(name);
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// The tokenizer's files of a directory.
pub(crate) fn read_tokenizer(dir: &Path) -> Result<Option<TokenizerFiles>, FormatError> {
    let Some(tokenizer_json) = read_optional(&dir.join("tokenizer.json"))? else {
        return Ok(None);
    };
    let path = dir.join("tokenizer_config.json");
    let mut tokenizer_config = match read_optional(&path)? {
        Some(text) => {
            let json: Value = serde_json::from_str(&text)
                .map_err(|e| FormatError::malformed(&path, "content", "JSON", e))?;
            Some(json)
        }
        None => None,
    };
    // Newer versions of transformers keep the template in a file of its own.
    if let Some(template) = read_optional(&dir.join("chat_template.jinja"))? {
        let config = tokenizer_config.get_or_insert_with(|| Value::Object(Default::default()));
        if let Value::Object(map) = config {
            map.insert("chat_template".to_owned(), template.into());
        }
    }
    Ok(Some(TokenizerFiles { tokenizer_json, tokenizer_config }))
}

fn read_text(path: &Path) -> Result<String, FormatError> {
    fs::read_to_string(path).map_err(FormatError::io(path, "read"))
}

fn read_optional(path: &Path) -> Result<Option<String>, FormatError> {
    if path.exists() { read_text(path).map(Some) } else { Ok(None) }
}

impl HfDir {
    /// Maps a safetensors file and takes its tensors in.
    fn add_shard(&mut self, path: PathBuf, first_names: bool) -> Result<(), FormatError> {
        let map = map_file(&path)?;
        let (data_start, metadata) = header(&path, &map)?;
        let shard = self.shards.len();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let stored = Stored {
                shard,
                dtype: info.dtype,
                shape: info.shape.clone(),
                range: data_start + start..data_start + end,
            };
            let name = if first_names { later_name(&name) } else { name };
            if self.tensors.insert(name.clone(), stored).is_some() {
                return Err(FormatError::tensor(&path, name, "one tensor of a name", "another"));
            }
        }
        self.shards.push((path, map));
        Ok(())
    }

    /// Checks that the model's tensors are there and no others that belong to a computation.
    fn check(&self, config: &ModelConfig) -> Result<(), FormatError> {
        let mut expected = BTreeSet::new();
        for id in config.tensor_ids() {
            let name = id.canonical();
            match id {
                TensorId::Layer(_, Part::Projection(p))
                    if config.quantization == Quantization::Offline =>
                {
                    self.packed(config, &name, p)?;
                    expected.insert(scale_name(&name));
                }
                _ => drop(self.dense(config, &name)?),
            }
            expected.insert(name);
        }
        let harmless = |name: &str| {
            // A tied head may be stored all the same, and old LLaMA files store frequencies.
            name.ends_with("rotary_emb.inv_freq") || name == TensorId::Head.canonical()
        };
        match self.tensors.iter().find(|(name, _)| !expected.contains(*name) && !harmless(name)) {
            None => Ok(()),
            Some((name, stored)) => {
                let expected = "no such tensor, for the configuration has no place for it";
                let found = format_args!("{:?} {:?}", stored.dtype, stored.shape).to_string();
                Err(FormatError::tensor(&self.shards[stored.shard].0, name, expected, found))
            }
        }
    }

    fn find(&self, name: &str) -> Result<(&Path, &Stored, &[u8]), FormatError> {
        let missing = || FormatError::tensor(&self.path, name, "a tensor", "none of this name");
        let stored = self.tensors.get(name).ok_or_else(missing)?;
        let (path, map) = &self.shards[stored.shard];
        Ok((path, stored, map.get(stored.range.clone()).ok_or_else(missing)?))
    }

    pub(crate) fn dense(
        &self,
        config: &ModelConfig,
        name: &str,
    ) -> Result<DenseTensor<'_>, FormatError> {
        let (path, stored, data) = self.find(name)?;
        if let Some(id) = TensorId::from_canonical(name) {
            let shape = config.tensor_shape(id);
            if stored.shape != shape {
                let (expected, found) = (format!("shape {shape:?}"), &stored.shape);
                return Err(FormatError::tensor(path, name, expected, format!("shape {found:?}")));
            }
        }
        let dtype = plain(stored.dtype).ok_or_else(|| {
            FormatError::tensor(path, name, "F32, F16 or BF16", format!("{:?}", stored.dtype))
        })?;
        let shape = stored.shape.clone();
        Ok(DenseTensor { name: name.to_owned(), dtype, shape, data: Cow::Borrowed(data) })
    }

    /// Packed bytes and the value of the stored scale.
    fn packed(
        &self,
        config: &ModelConfig,
        name: &str,
        p: Projection,
    ) -> Result<(&[u8], f32), FormatError> {
        let (path, stored, data) = self.find(name)?;
        let (rows, cols) = config.projection_shape(p);
        let shape = [rows.div_ceil(4), cols];
        if stored.dtype != StDtype::U8 || stored.shape != shape {
            let found = format!("{:?} {:?}", stored.dtype, stored.shape);
            return Err(FormatError::tensor(path, name, format!("U8 {shape:?}"), found));
        }
        let scale_name = scale_name(name);
        let (path, stored, bytes) = self.find(&scale_name)?;
        let one = stored.shape.iter().all(|&n| n == 1);
        let Some(dtype) = plain(stored.dtype).filter(|_| one) else {
            let found = format!("{:?} {:?}", stored.dtype, stored.shape);
            return Err(FormatError::tensor(path, scale_name, "one number", found));
        };
        let tensor = DenseTensor { name: scale_name, dtype, shape: vec![1], data: bytes.into() };
        Ok((data, tensor.to_f32().first().copied().unwrap_or(f32::NAN)))
    }

    pub(crate) fn projection(
        &self,
        config: &ModelConfig,
        layer: usize,
        p: Projection,
    ) -> Result<Weight<'_>, FormatError> {
        let name = crate::names::projection(layer, p);
        let codec = |e| FormatError::codec(&self.path, &name)(crate::gguf::CodecError::from(e));
        match config.quantization {
            Quantization::None => Ok(Weight::Dense(self.dense(config, &name)?)),
            Quantization::Online => {
                Ok(Weight::Ternary(self.dense(config, &name)?.ternarize().map_err(codec)?))
            }
            Quantization::Offline => {
                let (data, stored_scale) = self.packed(config, &name, p)?;
                let (rows, cols) = config.projection_shape(p);
                let scale = if self.scale_divides { 1.0 / stored_scale } else { stored_scale };
                let matrix: Result<TernaryMatrix, _> = packed::decode(data, rows, cols, scale);
                Ok(Weight::Ternary(matrix.map_err(codec)?))
            }
        }
    }

    /// Gives the memory of some bytes of a tensor back.
    pub(crate) fn release(&self, name: &str, bytes: Range<usize>) {
        if let Some(stored) = self.tensors.get(name) {
            self.shards[stored.shard].1.release(part(&stored.range, bytes));
        }
    }

    /// Gives the memory of all files back.
    pub(crate) fn release_all(&self) {
        self.shards.iter().for_each(|(_, file)| file.release(0..file.len()));
    }

    pub(crate) fn tensors(&self) -> Vec<TensorSummary> {
        let mut stored: Vec<_> = self.tensors.iter().collect();
        stored.sort_by_key(|(_, s)| (s.shard, s.range.start));
        let summary = |(name, stored): (&String, &Stored)| TensorSummary {
            name: name.clone(),
            shape: stored.shape.clone(),
            dtype: format!("{:?}", stored.dtype),
            bytes: stored.range.len(),
        };
        stored.into_iter().map(summary).collect()
    }
}

/// The name that a sub-norm of the first BitNet models (1bitLLM) has had since.
fn later_name(name: &str) -> String {
    name.replace("self_attn.inner_attn_ln.", "self_attn.attn_sub_norm.")
        .replace("mlp.ffn_layernorm.", "mlp.ffn_sub_norm.")
}

fn scale_name(weight: &str) -> String {
    format!("{weight}_scale")
}

pub(crate) fn plain(dtype: StDtype) -> Option<Dtype> {
    match dtype {
        StDtype::F32 => Some(Dtype::F32),
        StDtype::F16 => Some(Dtype::F16),
        StDtype::BF16 => Some(Dtype::BF16),
        _ => None,
    }
}
