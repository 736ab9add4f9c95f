//! The names of tensors, in one place.
//!
//! The canonical name of a tensor is its Hugging Face name; files of both formats are addressed by
//! it. GGUF has other names for the same tensors, and this is the only map between the two.
//!
//! | canonical | GGUF |
//! | --- | --- |
//! | `model.embed_tokens.weight` | `token_embd.weight` |
//! | `model.norm.weight` | `output_norm.weight` |
//! | `lm_head.weight` | `output.weight` |
//! | `model.layers.N.self_attn.q_proj.weight` | `blk.N.attn_q.weight` |
//! | … and so on, see [`Part`] | |

use crate::{ModelConfig, Projection};

/// Token embedding, `(vocab_size, hidden_size)`.
pub const EMBED: &str = "model.embed_tokens.weight";
/// Norm before the head, `(hidden_size,)`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// Head, `(vocab_size, hidden_size)`; absent when tied to the embedding.
pub const HEAD: &str = "lm_head.weight";

/// The tensors of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// RMSNorm before attention, `(hidden_size,)`.
    InputNorm,
    /// RMSNorm before `o_proj`, `(hidden_size,)`; only with sub-norms.
    AttnSubNorm,
    /// RMSNorm before the feed-forward part, `(hidden_size,)`.
    PostAttentionNorm,
    /// RMSNorm before `down_proj`, `(intermediate_size,)`; only with sub-norms.
    FfnSubNorm,
    /// One of the seven projections, `(out, in)`.
    Projection(Projection),
    /// RMSNorm of a projection's own input, `(in,)`; only with projection norms.
    ProjectionNorm(Projection),
}

/// Part, Hugging Face suffix, GGUF suffix; in the order in which a forward pass meets them.
const PARTS: [(Part, &str, &str); 18] = [
    (Part::InputNorm, "input_layernorm.weight", "attn_norm.weight"),
    (
        Part::ProjectionNorm(Projection::Q),
        "self_attn.q_proj.rms_norm.weight",
        "attn_q.rms_norm.weight",
    ),
    (Part::Projection(Projection::Q), "self_attn.q_proj.weight", "attn_q.weight"),
    (
        Part::ProjectionNorm(Projection::K),
        "self_attn.k_proj.rms_norm.weight",
        "attn_k.rms_norm.weight",
    ),
    (Part::Projection(Projection::K), "self_attn.k_proj.weight", "attn_k.weight"),
    (
        Part::ProjectionNorm(Projection::V),
        "self_attn.v_proj.rms_norm.weight",
        "attn_v.rms_norm.weight",
    ),
    (Part::Projection(Projection::V), "self_attn.v_proj.weight", "attn_v.weight"),
    (Part::AttnSubNorm, "self_attn.attn_sub_norm.weight", "attn_sub_norm.weight"),
    (
        Part::ProjectionNorm(Projection::O),
        "self_attn.o_proj.rms_norm.weight",
        "attn_output.rms_norm.weight",
    ),
    (Part::Projection(Projection::O), "self_attn.o_proj.weight", "attn_output.weight"),
    (Part::PostAttentionNorm, "post_attention_layernorm.weight", "ffn_norm.weight"),
    (
        Part::ProjectionNorm(Projection::Gate),
        "mlp.gate_proj.rms_norm.weight",
        "ffn_gate.rms_norm.weight",
    ),
    (Part::Projection(Projection::Gate), "mlp.gate_proj.weight", "ffn_gate.weight"),
    (Part::ProjectionNorm(Projection::Up), "mlp.up_proj.rms_norm.weight", "ffn_up.rms_norm.weight"),
    (Part::Projection(Projection::Up), "mlp.up_proj.weight", "ffn_up.weight"),
    (Part::FfnSubNorm, "mlp.ffn_sub_norm.weight", "ffn_sub_norm.weight"),
    (
        Part::ProjectionNorm(Projection::Down),
        "mlp.down_proj.rms_norm.weight",
        "ffn_down.rms_norm.weight",
    ),
    (Part::Projection(Projection::Down), "mlp.down_proj.weight", "ffn_down.weight"),
];

/// One tensor of a model, independent of how a format spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorId {
    /// [`EMBED`].
    Embed,
    /// [`FINAL_NORM`].
    FinalNorm,
    /// [`HEAD`].
    Head,
    /// A tensor of layer `.0`.
    Layer(usize, Part),
}

impl TensorId {
    /// The canonical name.
    pub fn canonical(self) -> String {
        match self {
            Self::Embed => EMBED.to_owned(),
            Self::FinalNorm => FINAL_NORM.to_owned(),
            Self::Head => HEAD.to_owned(),
            Self::Layer(layer, part) => format!("model.layers.{layer}.{}", suffixes(part).0),
        }
    }

    /// The name in a GGUF file.
    pub fn gguf(self) -> String {
        match self {
            Self::Embed => "token_embd.weight".to_owned(),
            Self::FinalNorm => "output_norm.weight".to_owned(),
            Self::Head => "output.weight".to_owned(),
            Self::Layer(layer, part) => format!("blk.{layer}.{}", suffixes(part).1),
        }
    }

    /// Finds the tensor of a canonical name.
    pub fn from_canonical(name: &str) -> Option<Self> {
        match name {
            EMBED => Some(Self::Embed),
            FINAL_NORM => Some(Self::FinalNorm),
            HEAD => Some(Self::Head),
            _ => layered(name, "model.layers.", |&(_, suffix, _)| suffix),
        }
    }

    /// Finds the tensor of a GGUF name.
    pub fn from_gguf(name: &str) -> Option<Self> {
        match name {
            "token_embd.weight" => Some(Self::Embed),
            "output_norm.weight" => Some(Self::FinalNorm),
            "output.weight" => Some(Self::Head),
            _ => layered(name, "blk.", |&(_, _, suffix)| suffix),
        }
    }

    /// The tensors of one layer of such a model, in the order in which a forward pass meets them.
    pub(crate) fn of_layer(layer: usize, config: &ModelConfig) -> impl Iterator<Item = Self> {
        let present = |part: &Part| match part {
            Part::AttnSubNorm | Part::FfnSubNorm => config.sub_norms,
            Part::ProjectionNorm(_) => config.projection_norm_eps.is_some(),
            _ => true,
        };
        PARTS
            .iter()
            .filter(move |(part, ..)| present(part))
            .map(move |&(part, ..)| Self::Layer(layer, part))
    }
}

fn suffixes(part: Part) -> (&'static str, &'static str) {
    let row = PARTS.iter().find(|(p, ..)| *p == part);
    row.map(|&(_, hf, gguf)| (hf, gguf)).expect("PARTS has a row for every part")
}

fn layered(
    name: &str,
    prefix: &str,
    suffix: impl Fn(&(Part, &'static str, &'static str)) -> &'static str,
) -> Option<TensorId> {
    let (number, rest) = name.strip_prefix(prefix)?.split_once('.')?;
    // One spelling only: `parse` alone would take `+1` and `01` for layer 1 as well.
    let layer = number.parse::<usize>().ok().filter(|l| l.to_string() == number)?;
    let row = PARTS.iter().find(|row| suffix(row) == rest)?;
    Some(TensorId::Layer(layer, row.0))
}

/// Canonical name of a projection's weight.
pub fn projection(layer: usize, p: Projection) -> String {
    TensorId::Layer(layer, Part::Projection(p)).canonical()
}

/// The module of a projection, as configurations of adapters name it: `q_proj`, ..., `down_proj`.
pub fn module(p: Projection) -> &'static str {
    match p {
        Projection::Q => "q_proj",
        Projection::K => "k_proj",
        Projection::V => "v_proj",
        Projection::O => "o_proj",
        Projection::Gate => "gate_proj",
        Projection::Up => "up_proj",
        Projection::Down => "down_proj",
    }
}

/// The names of the matrices `A` and `B` of a projection's adapter, as the package `peft` writes them.
pub fn adapter(layer: usize, p: Projection) -> [String; 2] {
    let weight = projection(layer, p);
    let module = weight.strip_suffix(".weight").unwrap_or(&weight);
    ["lora_A", "lora_B"].map(|matrix| format!("base_model.model.{module}.{matrix}.weight"))
}

/// Canonical name of the norm before attention.
pub fn input_norm(layer: usize) -> String {
    TensorId::Layer(layer, Part::InputNorm).canonical()
}

/// Canonical name of the norm before `o_proj`.
pub fn attn_sub_norm(layer: usize) -> String {
    TensorId::Layer(layer, Part::AttnSubNorm).canonical()
}

/// Canonical name of the norm before the feed-forward part.
pub fn post_attention_norm(layer: usize) -> String {
    TensorId::Layer(layer, Part::PostAttentionNorm).canonical()
}

/// Canonical name of the norm before `down_proj`.
pub fn ffn_sub_norm(layer: usize) -> String {
    TensorId::Layer(layer, Part::FfnSubNorm).canonical()
}

/// Canonical name of the norm of a projection's own input.
pub fn projection_norm(layer: usize, p: Projection) -> String {
    TensorId::Layer(layer, Part::ProjectionNorm(p)).canonical()
}

/// The GGUF name of a canonical name.
pub fn to_gguf(canonical: &str) -> Option<String> {
    TensorId::from_canonical(canonical).map(TensorId::gguf)
}

/// The canonical name of a GGUF name.
pub fn from_gguf(gguf: &str) -> Option<String> {
    TensorId::from_gguf(gguf).map(TensorId::canonical)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_way_there_and_back() {
        let ids = PARTS.iter().map(|&(part, ..)| TensorId::Layer(17, part));
        for id in ids.chain([TensorId::Embed, TensorId::Head, TensorId::FinalNorm]) {
            assert_eq!(TensorId::from_canonical(&id.canonical()), Some(id));
            assert_eq!(TensorId::from_gguf(&id.gguf()), Some(id));
        }
        assert_eq!(to_gguf(&projection(3, Projection::O)).unwrap(), "blk.3.attn_output.weight");
        assert_eq!(from_gguf("blk.3.attn_output.bias"), None);
        for layer in ["-1", "+1", "01", "", "99999999999999999999"] {
            assert_eq!(from_gguf(&format!("blk.{layer}.attn_q.weight")), None);
        }
    }
}
