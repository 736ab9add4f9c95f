//! A model in a GGUF file: which keys make its configuration, which tensors its weights.
//!
//! Read are the architectures `bitnet-b1.58` and `bitnet-25` (bitnet.cpp's converters), `bitnet`
//! and `llama` (llama.cpp's). Rows of Q and K lie in Hugging Face's order in all but the last,
//! which has the two halves of every head interleaved.

use std::borrow::Cow;
use std::collections::HashSet;

use trine_ternary::TernaryMatrix;

use super::i2_s::{self, Order};
use super::{CodecError, GgmlType, Gguf, TensorInfo, TernaryType, Value};
use crate::names::{Part, TensorId};
use crate::{
    DenseTensor, Dtype, FormatError, HiddenAct, ModelConfig, Projection, Quantization,
    TensorSummary, Weight, names,
};

/// The types of plain numbers, for errors.
const PLAIN: &str = "F32, F16, BF16, Q8_0, Q6_K, Q4_0 or Q3_K";

/// What the norms of projections add to the mean square, in a model that has them; our own key.
pub(super) const PROJECTION_NORM_EPS: &str = "attention.projection_norm_rms_epsilon";

/// The architecture whose rows of Q and K are interleaved.
pub(super) const LLAMA: &str = "llama";

/// The key that names the architecture.
const ARCHITECTURE: &str = "general.architecture";

/// Metadata under an architecture's prefix.
struct Keys<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn refuse(&self, name: &str, expected: &str, found: &Value) -> FormatError {
        FormatError::key(self.gguf.path(), self.key(name), expected, super::value::brief(found))
    }

    fn opt<'v, T>(
        &'v self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&'v Value) -> Option<T>,
    ) -> Result<Option<T>, FormatError> {
        let Some(value) = self.gguf.get(&self.key(name)) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.refuse(name, expected, value))
    }

    fn opt_size(&self, name: &str) -> Result<Option<usize>, FormatError> {
        self.opt(name, "a size", |v| v.as_u64().and_then(|v| v.try_into().ok()))
    }

    fn size(&self, name: &str) -> Result<usize, FormatError> {
        self.opt_size(name)?.ok_or_else(|| self.missing(name, "a size"))
    }

    fn float(&self, name: &str) -> Result<Option<f32>, FormatError> {
        self.opt(name, "a float", Value::as_f32)
    }

    fn missing(&self, name: &str, expected: &str) -> FormatError {
        FormatError::key(self.gguf.path(), self.key(name), expected, "nothing")
    }

    /// A size that must be `expected` where it is given at all.
    fn same(&self, name: &str, expected: usize) -> Result<(), FormatError> {
        match self.gguf.get(&self.key(name)) {
            Some(value) if value.as_u64() != Some(expected as u64) => {
                Err(self.refuse(name, &expected.to_string(), value))
            }
            _ => Ok(()),
        }
    }

    /// Scaled rotary embeddings are another computation; a linear factor of 1 scales nothing.
    fn check_rope_scaling(&self) -> Result<(), FormatError> {
        match self.opt("rope.scaling.type", "a string", Value::as_str)? {
            None | Some("none" | "linear") => {}
            Some(other) => return Err(self.refuse("rope.scaling.type", "`none`", &other.into())),
        }
        for name in ["rope.scaling.factor", "rope.scale_linear"] {
            if let Some(factor) = self.float(name)?
                && factor != 1.0
            {
                return Err(self.refuse(name, "1", &factor.into()));
            }
        }
        Ok(())
    }
}

/// Whether a file has I2_S tensors.
pub(crate) fn has_i2_s(gguf: &Gguf) -> bool {
    gguf.tensors().iter().any(|info| info.kind == GgmlType::I2_S)
}

/// The order of a file's I2_S tensors; see [`super::i2_s_order`]. Reads a sample of them.
pub(crate) fn i2_s_order(gguf: &Gguf, config: &ModelConfig) -> Order {
    super::i2_s_order::recognize(gguf, config)
}

/// The configuration of a model, from metadata and from which tensors there are.
pub(crate) fn config(gguf: &Gguf) -> Result<ModelConfig, FormatError> {
    let path = gguf.path();
    let refuse =
        |key: &str, expected: &str, found: &str| FormatError::key(path, key, expected, found);
    let arch = gguf.get(ARCHITECTURE).and_then(Value::as_str);
    let default_act = match arch {
        Some("bitnet-b1.58" | "bitnet-25") => HiddenAct::Relu2,
        Some("bitnet" | LLAMA) => HiddenAct::Silu,
        other => {
            let expected = "`bitnet-b1.58`, `bitnet-25`, `bitnet` or `llama`";
            return Err(refuse(ARCHITECTURE, expected, other.unwrap_or("no string")));
        }
    };
    let keys = Keys { gguf, arch: arch.unwrap_or_default() };
    let act = "hidden_activation";
    let hidden_act = match keys.opt(act, "a string", Value::as_str)? {
        None => default_act,
        Some(name) => HiddenAct::from_name(name)
            .ok_or_else(|| keys.refuse(act, "`relu2` or `silu`", &name.into()))?,
    };
    keys.check_rope_scaling()?;

    let hidden_size = keys.size("embedding_length")?;
    let heads = keys.size("attention.head_count")?;
    let head_dim = match keys.opt_size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => return Err(keys.missing("attention.key_length", "a size")),
    };
    keys.same("attention.value_length", head_dim)?;
    keys.same("rope.dimension_count", head_dim)?;
    let vocab_size = match keys.opt_size("vocab_size")? {
        Some(vocab_size) => vocab_size,
        None => {
            gguf.tensor(&TensorId::Embed.gguf()).and_then(|t| t.shape.first()).copied().unwrap_or(0)
        }
    };
    let eps = "attention.layer_norm_rms_epsilon";
    let config = ModelConfig {
        hidden_size,
        intermediate_size: keys.size("feed_forward_length")?,
        num_hidden_layers: keys.size("block_count")?,
        num_attention_heads: heads,
        num_key_value_heads: keys.opt_size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        vocab_size,
        max_position_embeddings: keys.size("context_length")?,
        rope_theta: keys.float("rope.freq_base")?.unwrap_or(10_000.0),
        rms_norm_eps: keys.float(eps)?.ok_or_else(|| keys.missing(eps, "a float"))?,
        hidden_act,
        sub_norms: gguf.tensor(&TensorId::Layer(0, Part::AttnSubNorm).gguf()).is_some(),
        projection_norm_eps: keys.float(PROJECTION_NORM_EPS)?,
        tie_word_embeddings: gguf.tensor(&TensorId::Head.gguf()).is_none(),
        bos_token_id: super::vocab::bos_id(gguf)?,
        eos_token_ids: super::vocab::eos_ids(gguf)?,
        quantization: Quantization::Offline,
    };
    config.validate().map_err(|e| e.in_file(path))?;
    check_tensors(gguf, &config)?;
    Ok(config)
}

/// Checks that the model's tensors are there, in types that can be read, and no others.
fn check_tensors(gguf: &Gguf, config: &ModelConfig) -> Result<(), FormatError> {
    let ids = config.tensor_ids();
    for &id in &ids {
        let info = find(gguf, config, id)?;
        let ternary = matches!(id, TensorId::Layer(_, Part::Projection(_)));
        if Dtype::from_ggml(info.kind).is_none()
            && !(ternary && TernaryType::from_ggml(info.kind).is_some())
        {
            let expected = if ternary { format!("a ternary type, {PLAIN}") } else { PLAIN.into() };
            return Err(FormatError::tensor(gguf.path(), &info.name, expected, info.kind));
        }
    }
    if gguf.tensors().len() == ids.len() {
        return Ok(());
    }
    let scales = ids.iter().filter_map(|&id| scale_name(id));
    let known: HashSet<String> = ids.iter().map(|id| id.gguf()).chain(scales).collect();
    let Some(info) = gguf.tensors().iter().find(|info| !known.contains(&info.name)) else {
        return Ok(());
    };
    let expected = "no such tensor, for the configuration has no place for it";
    let found = format!("{} {:?}", info.kind, info.shape);
    Err(FormatError::tensor(gguf.path(), &info.name, expected, found))
}

/// The description of a tensor, checked to have the shape that the configuration asks for.
fn find<'a>(
    gguf: &'a Gguf,
    config: &ModelConfig,
    id: TensorId,
) -> Result<&'a TensorInfo, FormatError> {
    let name = id.gguf();
    let info = gguf
        .tensor(&name)
        .ok_or_else(|| FormatError::tensor(gguf.path(), &name, "a tensor", "none of this name"))?;
    let shape = config.tensor_shape(id);
    if info.shape != shape {
        let found = format!("shape {:?}", info.shape);
        return Err(FormatError::tensor(gguf.path(), name, format!("shape {shape:?}"), found));
    }
    Ok(info)
}

/// A plain tensor by its canonical name.
pub(crate) fn dense<'a>(
    gguf: &'a Gguf,
    config: &ModelConfig,
    name: &str,
) -> Result<DenseTensor<'a>, FormatError> {
    let id = TensorId::from_canonical(name).ok_or_else(|| {
        FormatError::tensor(gguf.path(), name, "a canonical tensor name", "another name")
    })?;
    let info = find(gguf, config, id)?;
    let dtype = Dtype::from_ggml(info.kind)
        .ok_or_else(|| FormatError::tensor(gguf.path(), &info.name, PLAIN, info.kind))?;
    let data = Cow::Borrowed(gguf.bytes(info));
    Ok(DenseTensor { name: name.to_owned(), dtype, shape: info.shape.clone(), data })
}

/// The trits of a projection; `order` is asked for where it is I2_S.
///
/// Converters can also leave ternary weights as plain numbers, `trit * scale`: such a tensor has
/// its trits and scale taken as they are. Any other plain tensor is refused, as nothing in the
/// file says whether it is a master to be quantized.
pub(crate) fn projection<'a>(
    gguf: &'a Gguf,
    order: impl FnOnce() -> Order,
    config: &ModelConfig,
    layer: usize,
    p: Projection,
) -> Result<Weight<'a>, FormatError> {
    let info = find(gguf, config, TensorId::Layer(layer, Part::Projection(p)))?;
    let (rows, cols) = config.projection_shape(p);
    let codec = FormatError::codec(gguf.path(), &info.name);
    if let Some(kind) = TernaryType::from_ggml(info.kind) {
        let data = gguf.bytes(info);
        let matrix = match kind {
            TernaryType::I2S => i2_s::decode_ordered(data, rows, cols, order()),
            kind => kind.decode(data, rows, cols),
        };
        let matrix = matrix.map_err(codec)?;
        return Ok(Weight::Ternary(finish(gguf, config, layer, p, matrix)?));
    }
    let values = dense(gguf, config, &names::projection(layer, p))?.to_f32();
    let scale = values.iter().fold(0f32, |max, v| max.max(v.abs()));
    if let Some(v) = values.iter().find(|v| v.abs() != scale && **v != 0.0) {
        let found = format!("{v} beside {scale}");
        return Err(FormatError::tensor(gguf.path(), &info.name, "ternary weights", found));
    }
    let trits: Vec<i8> = values.iter().map(|&v| i8::from(v > 0.0) - i8::from(v < 0.0)).collect();
    let matrix = TernaryMatrix::from_trits(&trits, rows, cols, scale);
    let matrix = matrix.map_err(|e| codec(CodecError::from(e)))?;
    Ok(Weight::Ternary(finish(gguf, config, layer, p, matrix)?))
}

/// Name of the tensor of one number that multiplies a projection, where llama.cpp finds one.
fn scale_name(id: TensorId) -> Option<String> {
    match id {
        TensorId::Layer(_, Part::Projection(_)) => {
            Some(id.gguf().strip_suffix("weight")?.to_owned() + "scale")
        }
        _ => None,
    }
}

/// What a stored matrix still lacks: a scale that is stored beside it, and the order of its rows.
fn finish(
    gguf: &Gguf,
    config: &ModelConfig,
    layer: usize,
    p: Projection,
    mut matrix: TernaryMatrix,
) -> Result<TernaryMatrix, FormatError> {
    let name = scale_name(TensorId::Layer(layer, Part::Projection(p))).unwrap_or_default();
    if let Some(info) = gguf.tensor(&name) {
        let one = info.shape.iter().all(|&n| n == 1);
        let Some((GgmlType::F32, &[a, b, c, d])) = one.then(|| (info.kind, gguf.bytes(info)))
        else {
            let found = format!("{} {:?}", info.kind, info.shape);
            return Err(FormatError::tensor(gguf.path(), name, "one number of type F32", found));
        };
        let scale = matrix.scale() * f32::from_le_bytes([a, b, c, d]);
        matrix = matrix
            .with_scale(scale)
            .map_err(|e| FormatError::codec(gguf.path(), &name)(CodecError::from(e)))?;
    }
    let llama = gguf.get(ARCHITECTURE).and_then(Value::as_str) == Some(LLAMA);
    if llama && matches!(p, Projection::Q | Projection::K) {
        matrix = matrix.select_rows(|r| from_halves(r, config.head_dim));
    }
    Ok(matrix)
}

/// Where row `r` of Q or K lies where rotary pairs are neighbours: row `i` of the first half of a
/// head is next to row `i` of the second. So in the `llama` architecture and in llama2.c's files.
pub fn from_halves(r: usize, head_dim: usize) -> usize {
    let (head, i, half) = (r / head_dim * head_dim, r % head_dim, head_dim / 2);
    head + if i < half { 2 * i } else { 2 * (i - half) + 1 }
}

/// The inverse of [`from_halves`]: which row lies at row `r` of a file.
pub(super) fn to_halves(r: usize, head_dim: usize) -> usize {
    let (head, i, half) = (r / head_dim * head_dim, r % head_dim, head_dim / 2);
    head + if i.is_multiple_of(2) { i / 2 } else { half + i / 2 }
}

pub(crate) fn summaries(gguf: &Gguf) -> Vec<TensorSummary> {
    let summary = |info: &TensorInfo| TensorSummary {
        name: info.name.clone(),
        shape: info.shape.clone(),
        dtype: info.kind.to_string(),
        bytes: info.range.len(),
    };
    gguf.tensors().iter().map(summary).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_are_each_others_inverse() {
        let order: Vec<usize> = (0..8).map(|r| to_halves(r, 4)).collect();
        assert_eq!(order, [0, 2, 1, 3, 4, 6, 5, 7]);
        for (head_dim, r) in [2, 6, 128].into_iter().flat_map(|d| (0..3 * d).map(move |r| (d, r))) {
            assert_eq!(from_halves(to_halves(r, head_dim), head_dim), r);
            assert_eq!(to_halves(from_halves(r, head_dim), head_dim), r);
        }
    }
}
