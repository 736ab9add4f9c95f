//! Writing a model as GGUF: the native model file.

use std::borrow::Cow;
use std::path::Path;

use super::model::{LLAMA, PROJECTION_NORM_EPS, to_halves};
use super::{GgmlType, TensorSpec, TernaryType, Value, Writer, vocab};
use crate::names::{Part, TensorId};
use crate::pipeline::in_order;
use crate::tensor::{checked_data, checked_trits};
use crate::{
    Dtype, FormatError, HiddenAct, ModelConfig, Projection, Quantization, TensorSource,
    TokenizerFiles,
};

/// The choices in writing a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    /// Layout of the projections.
    pub ternary: TernaryType,
    /// Type of the embedding and of a head of its own. Norms are always F32.
    pub embedding: Dtype,
}

impl Default for WriteOptions {
    /// I2_S, which keeps scales exact, and F16, which every reader knows.
    fn default() -> Self {
        Self { ternary: TernaryType::I2S, embedding: Dtype::F16 }
    }
}

/// Writes a ternary model; the file appears whole or not at all, replacing one of its name.
///
/// Tensors are asked of `source` in the order of a forward pass, a few at a time, and released once
/// they are written. The same model makes the same bytes on any number of threads.
///
/// # Errors
/// A model that is not quantized; a source without one of the tensors that `config` asks for; a
/// matrix that does not fit the layout; an embedding out of the range of its type; an error of the
/// file system.
pub fn write_model(
    path: &Path,
    config: &ModelConfig,
    source: &dyn TensorSource,
    tokenizer: Option<&TokenizerFiles>,
    options: WriteOptions,
) -> Result<(), FormatError> {
    config.validate()?;
    if config.quantization == Quantization::None {
        let expected = "Online or Offline, for a GGUF file of ternary weights";
        return Err(FormatError::config("quantization", expected, "None"));
    }
    for p in Projection::ALL {
        let (rows, cols) = config.projection_shape(p);
        let name = TensorId::Layer(0, Part::Projection(p)).gguf();
        options.ternary.check_shape(rows, cols).map_err(FormatError::codec(path, &name))?;
    }
    let arch = architecture(config);
    let mut metadata = model_metadata(arch, config, options.ternary);
    metadata
        .extend(vocab::encode(config, tokenizer).map_err(|e| {
            FormatError::malformed(path, "tokenizer", "one that fits the model", e)
        })?);
    let ids = config.tensor_ids();
    let specs: Vec<_> = ids
        .iter()
        .map(|&id| TensorSpec {
            name: id.gguf(),
            kind: storage(id, options).unwrap_or(options.ternary.ggml_type()),
            shape: config.tensor_shape(id),
        })
        .collect();
    let mut writer = Writer::create(path, &metadata, &specs)?;
    let items: Vec<_> = ids.into_iter().zip(&specs).collect();
    let make = |&(id, spec): &(TensorId, &TensorSpec)| {
        if let TensorId::Layer(layer, Part::Projection(p)) = id {
            let mut matrix = checked_trits(source, path, config, layer, p)?;
            if arch == LLAMA && matches!(p, Projection::Q | Projection::K) {
                matrix = matrix.select_rows(|r| to_halves(r, config.head_dim));
            }
            let codec = FormatError::codec(path, &spec.name);
            options.ternary.encode(&matrix).map(Cow::Owned).map_err(codec)
        } else {
            let dtype = if spec.shape.len() == 1 { Dtype::F32 } else { options.embedding };
            checked_data(source, path, &id.canonical(), &spec.shape, dtype)
        }
    };
    let bytes = |(_, spec): &(_, &TensorSpec)| spec.kind.tensor_bytes(&spec.shape).unwrap_or(0);
    in_order(&items, bytes, make, |(id, _), data| {
        writer.tensor(&data)?;
        source.release(&id.canonical());
        Ok(())
    })?;
    writer.finish()
}

/// The type of a plain tensor, or `None` for a projection.
fn storage(id: TensorId, options: WriteOptions) -> Option<GgmlType> {
    match id {
        TensorId::Layer(_, Part::Projection(_)) => None,
        TensorId::Embed | TensorId::Head => Some(options.embedding.ggml_type()),
        TensorId::FinalNorm | TensorId::Layer(..) => Some(GgmlType::F32),
    }
}

/// The name under which other programs compute such a model, as far as there is one.
///
/// llama.cpp's `bitnet` has SiLU and sub-norms, its `llama` SiLU and none; bitnet.cpp's
/// `bitnet-b1.58` has squared ReLU. No other program knows norms of projections: it will miss the
/// sub-norms of `bitnet` or find tensors that it cannot place.
fn architecture(config: &ModelConfig) -> &'static str {
    match (config.hidden_act, config.sub_norms, config.projection_norm_eps) {
        (HiddenAct::Relu2, ..) => "bitnet-b1.58",
        (HiddenAct::Silu, false, None) => LLAMA,
        (HiddenAct::Silu, ..) => "bitnet",
    }
}

/// The keys of the specification that describe the model, in its order.
fn model_metadata(arch: &str, config: &ModelConfig, ternary: TernaryType) -> Vec<(String, Value)> {
    let size = |n: usize| Value::U32(n as u32);
    let general = [
        ("general.architecture", arch.into()),
        ("general.type", "model".into()),
        ("general.file_type", ternary.file_type().into()),
        ("general.quantization_version", 2u32.into()),
    ];
    let model = [
        ("vocab_size", size(config.vocab_size)),
        ("context_length", size(config.max_position_embeddings)),
        ("embedding_length", size(config.hidden_size)),
        ("block_count", size(config.num_hidden_layers)),
        ("feed_forward_length", size(config.intermediate_size)),
        ("hidden_activation", config.hidden_act.name().into()),
        ("rope.dimension_count", size(config.head_dim)),
        ("rope.freq_base", config.rope_theta.into()),
        ("attention.head_count", size(config.num_attention_heads)),
        ("attention.head_count_kv", size(config.num_key_value_heads)),
        ("attention.key_length", size(config.head_dim)),
        ("attention.value_length", size(config.head_dim)),
        ("attention.layer_norm_rms_epsilon", config.rms_norm_eps.into()),
    ];
    let eps = config.projection_norm_eps.map(|eps| (PROJECTION_NORM_EPS, eps.into()));
    let model = model.into_iter().chain(eps);
    let general = general.map(|(key, value)| (key.to_owned(), value));
    general.into_iter().chain(model.map(|(key, value)| (format!("{arch}.{key}"), value))).collect()
}
