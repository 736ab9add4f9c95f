//! A model small enough to be damaged in every byte, and what reads all of it.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use trine_format::{
    BoxError, DenseTensor, FormatError, HiddenAct, ModelConfig, ModelFile, Projection,
    Quantization, TensorSource, TokenizerFiles,
};

/// Goldens at the repository's root.
pub(crate) fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data").join(path)
}

/// One layer of the smallest sizes that fill I2_S blocks.
pub(crate) fn tiny_config() -> ModelConfig {
    ModelConfig {
        hidden_size: 16,
        intermediate_size: 32,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 8,
        vocab_size: 8,
        max_position_embeddings: 32,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        hidden_act: HiddenAct::Relu2,
        sub_norms: true,
        projection_norm_eps: None,
        tie_word_embeddings: false,
        bos_token_id: Some(6),
        eos_token_ids: vec![7, 5],
        quantization: Quantization::Online,
    }
}

/// A byte-level BPE with seven of the eight ids in use.
pub(crate) fn tiny_tokenizer() -> TokenizerFiles {
    let json = serde_json::json!({
        "added_tokens": [
            {"id": 6, "content": "<s>", "special": true},
            {"id": 7, "content": "</s>", "special": true},
        ],
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": true},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]},
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4},
            "merges": [["a", "b"], "ab c"],
        },
    });
    TokenizerFiles {
        tokenizer_json: json.to_string(),
        tokenizer_config: Some(serde_json::json!({
            "bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}",
        })),
    }
}

/// Master weights of every tensor of a configuration, from a fixed sequence.
pub(crate) struct Masters(BTreeMap<String, (Vec<usize>, Vec<f32>)>);

impl Masters {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        let tensor = |id: trine_format::names::TensorId| {
            let shape = config.tensor_shape(id);
            let values = (0..shape.iter().product()).map(|_| next()).collect();
            (id.canonical(), (shape, values))
        };
        Self(config.tensor_ids().into_iter().map(tensor).collect())
    }
}

impl TensorSource for Masters {
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        let (shape, values) = self.0.get(name).ok_or("no such tensor")?;
        Ok(DenseTensor::from_f32(name, shape, values))
    }
}

/// Opens a model and reads every tensor and summary of it.
pub(crate) fn read_all(path: &Path) -> Result<(), FormatError> {
    let file = ModelFile::open(path)?;
    let config = file.config();
    for name in ["model.embed_tokens.weight", "model.norm.weight"] {
        assert!(file.dense(name)?.to_f32().len() >= config.hidden_size);
    }
    for layer in 0..config.num_hidden_layers {
        for p in Projection::ALL {
            file.projection(layer, p)?;
        }
    }
    assert!(file.tensors().len() >= config.tensor_ids().len());
    Ok(())
}
