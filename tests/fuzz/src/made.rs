//! Small valid models, from a fixed sequence, for targets that begin with one.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use trine_format::gguf::{TernaryType, WriteOptions, write_model};
use trine_format::names::TensorId;
use trine_format::{
    BoxError, DenseTensor, Dtype, HiddenAct, ModelConfig, Quantization, TensorSource,
    TokenizerFiles,
};

use crate::Scratch;

/// The models of [`model`]: every ternary layout and every kind of embedding occurs.
pub const MODELS: [(TernaryType, Dtype, bool); 6] = [
    (TernaryType::I2S, Dtype::F16, true),
    (TernaryType::I2S, Dtype::Q8_0, false),
    (TernaryType::Trn2, Dtype::Q4_0, true),
    (TernaryType::Trn2, Dtype::F32, false),
    (TernaryType::Tq1_0, Dtype::Q6_K, false),
    (TernaryType::Tq2_0, Dtype::BF16, true),
];

/// A configuration of one layer; `wide` fills blocks of 256, `bitnet` has squared ReLU and sub-norms.
pub fn config(wide: bool, bitnet: bool) -> ModelConfig {
    let hidden_size = if wide { 256 } else { 32 };
    ModelConfig {
        hidden_size,
        intermediate_size: if wide { 256 } else { 64 },
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: hidden_size / 2,
        vocab_size: 8,
        max_position_embeddings: 32,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        hidden_act: if bitnet { HiddenAct::Relu2 } else { HiddenAct::Silu },
        sub_norms: bitnet,
        projection_norm_eps: None,
        tie_word_embeddings: bitnet,
        bos_token_id: Some(6),
        eos_token_ids: vec![7, 5],
        quantization: Quantization::Online,
    }
}

/// A byte-level BPE with seven of the eight ids in use.
pub fn tokenizer() -> TokenizerFiles {
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [
            {"id": 6, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
             "rstrip": false, "normalized": false},
            {"id": 7, "content": "</s>", "special": true, "single_word": false, "lstrip": false,
             "rstrip": false, "normalized": false},
        ],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                          "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                    "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "byte_fallback": false,
            "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "Ġ": 5},
            "merges": [["a", "b"], ["ab", "c"]],
        },
    });
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}";
    TokenizerFiles {
        tokenizer_json: json.to_string(),
        tokenizer_config: Some(serde_json::json!({
            "bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template,
        })),
    }
}

/// Master weights of every tensor of a configuration, from a fixed sequence.
pub struct Masters(BTreeMap<String, (Vec<usize>, Vec<f32>)>);

impl Masters {
    /// Of all tensors that `config` asks for.
    pub fn new(config: &ModelConfig) -> Self {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        let tensor = |id: TensorId| {
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

/// The bytes of one of [`MODELS`] as GGUF, made once; the last two, which are large, for one byte in
/// sixteen.
pub fn model(which: u8) -> &'static [u8] {
    static MADE: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    let (small, large) = (usize::from(which % 4), 4 + usize::from(which % 2));
    &MADE.get_or_init(|| MODELS.map(write).to_vec())[if which < 240 { small } else { large }]
}

fn write((ternary, embedding, bitnet): (TernaryType, Dtype, bool)) -> Vec<u8> {
    let scratch = Scratch::new();
    let path = scratch.path("model.gguf");
    let wide = matches!(ternary, TernaryType::Tq1_0 | TernaryType::Tq2_0);
    let config = config(wide, bitnet);
    let (masters, options) = (Masters::new(&config), WriteOptions { ternary, embedding });
    write_model(&path, &config, &masters, Some(&tokenizer()), options).unwrap();
    std::fs::read(path).unwrap()
}
