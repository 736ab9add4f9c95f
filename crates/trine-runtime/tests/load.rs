//! Models that are damaged, or claim too much.

use std::path::{Path, PathBuf};

use serde_json::Value;
use trine_format::{FormatError, ModelFile};
use trine_runtime::{Model, RuntimeError, Session};

/// The untied reference model, whose tensors are bf16.
fn fixture() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("../../tests/data/fixtures/untied-h192/bf16")
}

/// A copy of the fixture, changed; opened.
fn changed(config: impl Fn(&mut Value), weights: impl Fn(&mut Vec<u8>)) -> ModelFile {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(fixture().join("config.json")).unwrap();
    let mut json = serde_json::from_str(&text).unwrap();
    config(&mut json);
    std::fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    let mut bytes = std::fs::read(fixture().join("model.safetensors")).unwrap();
    weights(&mut bytes);
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    // The map outlives the name.
    ModelFile::open(dir.path()).unwrap()
}

/// Overwrites an element of a bf16 tensor in a safetensors file.
fn poke(bytes: &mut [u8], tensor: &str, index: usize, value: [u8; 2]) {
    let header = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let json: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    assert_eq!(json[tensor]["dtype"], "BF16", "{tensor}");
    let start = json[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + header + start + 2 * index..][..2].copy_from_slice(&value);
}

#[test]
fn a_claim_of_many_positions_costs_nothing() {
    let logits = |file: &ModelFile| {
        let model = Model::load(file).unwrap();
        let mut session = Session::new(&model);
        (session.limit(), session.prefill(&[5, 6, 7]).unwrap(), session.decode(8).unwrap())
    };
    let positions = i32::MAX as usize;
    let claims = changed(|c| c["max_position_embeddings"] = positions.into(), |_| {});
    let (expected, found) = (logits(&ModelFile::open(&fixture()).unwrap()), logits(&claims));
    assert_eq!(found, (positions, expected.1, expected.2));
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name() {
    // As bf16: a NaN, and both infinities.
    for (index, value) in [(0, 0x7FC0u16), (100, 0x7F80), (191, 0xFF80)] {
        for tensor in [
            "model.embed_tokens.weight",
            "lm_head.weight",
            "model.norm.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.1.self_attn.attn_sub_norm.weight",
            "model.layers.1.post_attention_layernorm.weight",
            "model.layers.0.mlp.ffn_sub_norm.weight",
        ] {
            let file = changed(|_| {}, |bytes| poke(bytes, tensor, index, value.to_le_bytes()));
            match Model::load(&file).err() {
                Some(RuntimeError::NonFinite { tensor: found, index: at, .. }) => {
                    assert_eq!((found.as_str(), at), (tensor, index));
                }
                other => panic!("{tensor}: {other:?}"),
            }
        }
        let name = "model.layers.1.mlp.down_proj.weight";
        let file = changed(|_| {}, |bytes| poke(bytes, name, index, value.to_le_bytes()));
        let error = Model::load(&file).err();
        assert!(
            matches!(&error, Some(RuntimeError::Format(FormatError::Codec { name: n, .. })) if n == name),
            "{error:?}"
        );
    }
}

/// The element that is named lies beyond what one thread checks.
#[test]
fn a_late_element_that_is_not_finite_is_found() {
    let index = 600 * 192 - 1;
    let file = changed(|_| {}, |b| poke(b, "lm_head.weight", index, 0x7F80u16.to_le_bytes()));
    let error = Model::load(&file).err().unwrap().to_string();
    assert_eq!(
        error,
        format!("tensor `lm_head.weight`: element {index} is inf: a model needs finite weights")
    );
}
