//! GGUF files.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use proptest::prelude::*;
use tempfile::tempdir;
use trine_format::ModelFile;
use trine_format::gguf::{self, Array, Gguf, TensorSpec, Value, WriteOptions, Writer};

use crate::common::{Masters, read_all, tiny_config, tiny_tokenizer};
use crate::directories::valid_dir;

/// The bytes of a small valid model file.
fn valid_gguf() -> Vec<u8> {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(write_gguf).clone()
}

fn write_gguf() -> Vec<u8> {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let config = tiny_config();
    let (masters, options) = (Masters::new(&config), WriteOptions::default());
    gguf::write_model(&path, &config, &masters, Some(&tiny_tokenizer()), options).unwrap();
    fs::read(path).unwrap()
}

/// Opens and reads a file of these bytes; the error must name `expected`.
pub(crate) fn refused(bytes: &[u8], expected: &str) {
    let dir = tempdir().unwrap();
    let path = dir.path().join("hostile.gguf");
    fs::write(&path, bytes).unwrap();
    let error = read_all(&path).expect_err(expected).to_string();
    assert!(error.contains(expected) && error.contains("hostile.gguf"), "{expected}: {error}");
}

/// Changes the valid file behind the first place where `text` stands.
fn after(text: &str, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = valid_gguf();
    let at = bytes.windows(text.len()).position(|w| w == text.as_bytes()).unwrap();
    change(&mut bytes[at + text.len()..]);
    bytes
}

/// Replaces text in the valid file by text of the same length.
fn renamed(from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = valid_gguf();
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
    bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
    bytes
}

/// A container from its parts: metadata `(key, type, payload)` and tensors `(name, sizes, type,
/// offset)` before `data` zeros.
pub(crate) fn craft(
    metadata: &[(&[u8], u32, &[u8])],
    tensors: &[(&str, &[u64], u32, u64)],
    data: usize,
) -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, kind, payload) in metadata {
        out.extend((key.len() as u64).to_le_bytes());
        out.extend(*key);
        out.extend(kind.to_le_bytes());
        out.extend(*payload);
    }
    for (name, sizes, kind, offset) in tensors {
        out.extend((name.len() as u64).to_le_bytes());
        out.extend(name.as_bytes());
        out.extend((sizes.len() as u32).to_le_bytes());
        sizes.iter().for_each(|size| out.extend(size.to_le_bytes()));
        out.extend(kind.to_le_bytes());
        out.extend(offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(32) + data, 0);
    out
}

#[test]
fn the_valid_file_is_read() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::write(&path, valid_gguf()).unwrap();
    read_all(&path).unwrap();
    // And what `craft` makes is refused below for nothing but the attack.
    let u32_32: &[u8] = &32u32.to_le_bytes();
    let crafted =
        craft(&[(b"general.alignment", 4, u32_32)], &[("a", &[8], 0, 0), ("b", &[8], 0, 32)], 64);
    fs::write(&path, crafted).unwrap();
    assert_eq!(Gguf::open(&path).unwrap().tensors().len(), 2);
}

#[test]
fn wrong_magic_and_versions() {
    let patch = |at: usize, value: &[u8]| {
        let mut bytes = valid_gguf();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    refused(&patch(0, b"GGML"), "magic");
    for version in [0u32, 1, 2, 4, u32::MAX] {
        refused(&patch(4, &version.to_le_bytes()), "version");
    }
    refused(&patch(4, &3u32.to_be_bytes()), "big-endian");
}

#[test]
fn absurd_counts_allocate_nothing() {
    for count in [u64::MAX, 1 << 60, 1 << 40, 1 << 20] {
        let mut bytes = valid_gguf();
        bytes[8..16].copy_from_slice(&count.to_le_bytes());
        refused(&bytes, "tensor count");
        let mut bytes = valid_gguf();
        bytes[16..24].copy_from_slice(&count.to_le_bytes());
        refused(&bytes, "metadata count");
    }
}

#[test]
fn lengths_that_overflow() {
    for length in [u64::MAX, u64::MAX - 7, 1 << 63, 1 << 33] {
        let mut bytes = valid_gguf();
        bytes[24..32].copy_from_slice(&length.to_le_bytes());
        refused(&bytes, "metadata key");
        // A string value, then an array's length.
        let mut payload = length.to_le_bytes().to_vec();
        refused(&craft(&[(b"key", 8, &payload)], &[], 64), "key");
        for element in 0..=12u32 {
            payload = element.to_le_bytes().to_vec();
            payload.extend(length.to_le_bytes());
            refused(&craft(&[(b"key", 9, &payload)], &[], 64), "key");
        }
    }
}

#[test]
fn nested_arrays_do_not_exhaust_the_stack() {
    let mut payload = Vec::new();
    for _ in 0..100_000 {
        payload.extend(9u32.to_le_bytes());
        payload.extend(1u64.to_le_bytes());
    }
    refused(&craft(&[(b"key", 9, &payload)], &[], 64), "nested");
}

#[test]
fn keys_and_strings_that_are_not_utf8() {
    refused(&craft(&[(b"k\xff", 0, &[0])], &[], 64), "UTF-8");
    refused(&craft(&[(b"key", 8, b"\x01\0\0\0\0\0\0\0\xff")], &[], 64), "UTF-8");
}

#[test]
fn metadata_of_unknown_types_and_values() {
    refused(&craft(&[(b"key", 13, &[0; 8])], &[], 64), "value type");
    refused(&craft(&[(b"key", 9, &[13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])], &[], 64), "array type");
    refused(&craft(&[(b"key", 7, &[2])], &[], 64), "boolean");
    refused(&craft(&[(b"key", 0, &[1]), (b"key", 0, &[1])], &[], 64), "one entry");
}

#[test]
fn messages_neither_steer_a_terminal_nor_fill_it() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("hostile.gguf");
    let message = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        read_all(&path).unwrap_err().to_string()
    };
    let evil = "\x1b[2J\r\n\u{202e}".repeat(5000);
    let mut payload = (evil.len() as u64).to_le_bytes().to_vec();
    payload.extend(evil.as_bytes());
    for bytes in [
        craft(&[(b"key\n\x1b[2J", 13, &[0; 8])], &[], 64),
        craft(&[(&evil.as_bytes()[..9 * 800], 13, &[0; 8])], &[], 64),
        craft(&[(b"general.architecture", 8, &payload)], &[], 64),
        craft(&[(b"general.alignment", 8, &payload)], &[], 64),
        craft(&[], &[(&evil, &[8], 99, 0)], 64),
    ] {
        let message = message(&bytes);
        assert!(message.contains("\\u{1b}[2J"), "{message}");
        assert!(
            !message.contains(char::is_control) && !message.contains('\u{202e}'),
            "{message:?}"
        );
        assert!(message.len() < 2000, "{} bytes", message.len());
    }
}

/// The valid file with a vocabulary of these keys instead of its own.
fn with_vocabulary(path: &Path, keys: Vec<(&str, Value)>) {
    fs::write(path, valid_gguf()).unwrap();
    let valid = Gguf::open(path).unwrap();
    let vocabulary = ["tokenizer.", "trine.", "general.alignment"];
    let mut metadata = valid.metadata().to_vec();
    metadata.retain(|(key, _)| !vocabulary.iter().any(|start| key.starts_with(start)));
    metadata.extend(keys.into_iter().map(|(key, value)| (key.to_owned(), value)));
    let specs = valid.tensors().iter().map(|t| TensorSpec {
        name: t.name.clone(),
        kind: t.kind,
        shape: t.shape.clone(),
    });
    let specs: Vec<_> = specs.collect();
    let mut writer = Writer::create(path, &metadata, &specs).unwrap();
    valid.tensors().iter().for_each(|t| writer.tensor(valid.bytes(t)).unwrap());
    writer.finish().unwrap();
}

#[test]
fn long_lists_of_end_tokens_are_looked_up() {
    // To scan the list for every token would take minutes.
    let dir = tempdir().unwrap();
    let path = dir.path().join("ends.gguf");
    let count = 200_000;
    for model in ["gpt2", "llama"] {
        let tokens = (0..count).map(|i| i.to_string()).collect();
        with_vocabulary(
            &path,
            vec![
                ("tokenizer.ggml.model", model.into()),
                ("tokenizer.ggml.tokens", Value::Array(Array::String(tokens))),
                ("tokenizer.ggml.merges", Value::Array(Array::String(Vec::new()))),
                ("tokenizer.ggml.scores", Value::Array(Array::F32(vec![0.0; count]))),
                ("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![3; count]))),
                ("trine.eos_token_ids", Value::Array(Array::U32(vec![7; 2 * count]))),
            ],
        );
        assert!(ModelFile::open(&path).unwrap().tokenizer().is_some());
    }
    let model = dir.path().join("model");
    valid_dir(&model);
    let ids = "7,".repeat(200_000) + &(0..8).map(|id| id.to_string()).collect::<Vec<_>>().join(",");
    fs::write(model.join("generation_config.json"), format!("{{\"eos_token_id\":[{ids}]}}"))
        .unwrap();
    let mut ends = ModelFile::open(&model).unwrap().config().eos_token_ids.clone();
    assert_eq!(ends[..2], [7, 5]);
    ends.sort_unstable();
    assert_eq!(ends, [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn alignments_that_are_none() {
    for alignment in [0u32, 1, 4, 33, 1 << 31, u32::MAX] {
        let bytes = craft(&[(b"general.alignment", 4, &alignment.to_le_bytes())], &[], 64);
        refused(&bytes, "general.alignment");
    }
    refused(&craft(&[(b"general.alignment", 7, &[1])], &[], 64), "general.alignment");
}

#[test]
fn tensors_that_are_misaligned_or_outside_the_file() {
    let tensor = |offset| craft(&[], &[("evil", &[8], 0, offset)], 32);
    for offset in [1, 4, 31] {
        refused(&tensor(offset), "multiple of 32");
    }
    for offset in [32, 64, 1 << 40, u64::MAX - 31, 1 << 63] {
        refused(&tensor(offset), "evil");
    }
}

#[test]
fn tensors_that_overlap_or_share_a_name() {
    refused(&craft(&[], &[("a", &[16], 0, 0), ("b", &[8], 0, 32)], 64), "overlap with `a`");
    refused(&craft(&[], &[("a", &[8], 0, 0), ("b", &[8], 0, 0)], 64), "bytes of its own");
    refused(&craft(&[], &[("a", &[8], 0, 0), ("a", &[8], 0, 32)], 64), "one tensor of a name");
}

#[test]
fn shapes_that_overflow_or_make_no_sense() {
    let evil = |sizes: &[u64], kind| refused(&craft(&[], &[("evil", sizes, kind, 0)], 64), "evil");
    evil(&[0], 0);
    evil(&[u64::MAX, u64::MAX], 0);
    evil(&[1 << 32, 1 << 32], 0);
    evil(&[1 << 62], 0);
    evil(&[u64::MAX - 127], 36);
    evil(&[1, 1, 1, 1, 1], 0);
    evil(&[101], 36);
    evil(&[128], 35);
    evil(&[8], 31);
    evil(&[8], u32::MAX);
}

#[test]
fn models_of_other_kinds_are_refused_by_name() {
    refused(&renamed("bitnet-b1.58", "mistral-1234"), "mistral-1234");
    refused(&renamed("relu2", "gelu2"), "gelu2");
    refused(&renamed("embedding_length", "embedding_lengtH"), "bitnet-b1.58.embedding_length");
    refused(&renamed("blk.0.ffn_up.weight", "blk.1.ffn_up.weight"), "blk.0.ffn_up.weight");
    refused(&renamed("blk.0.attn_sub_norm.weight", "blk.0.attn_q_norm.weight.."), "attn_q_norm");
    refused(&craft(&[], &[], 64), "general.architecture");
}

#[test]
fn a_tensor_too_many_is_refused() {
    // A tied model with a scale beside its weight is another model than one without.
    let head = "\x0d\0\0\0\0\0\0\0output.weight";
    let other = |name| renamed(head, &head.replace("output.weight", name));
    refused(&other("blk.0.q.scale"), "no place for it");
    refused(&other("blk.0.q.other"), "no place");
}

#[test]
fn sizes_that_disagree_with_the_tensors() {
    let set = |key: &str, value: u32| {
        after(&format!("bitnet-b1.58.{key}"), |b| b[4..8].copy_from_slice(&value.to_le_bytes()))
    };
    refused(&set("embedding_length", 32), "head_dim");
    refused(&set("feed_forward_length", 64), "expected shape [64, 16]");
    refused(&set("block_count", 2), "blk.1.attn_norm.weight");
    refused(&set("vocab_size", 9), "token_embd.weight");
    refused(&set("attention.key_length", 4), "value_length");
    refused(&set("rope.dimension_count", 4), "rope.dimension_count");
}

#[test]
fn sizes_that_no_model_has() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("hostile.gguf");
    for key in ["embedding_length", "block_count", "attention.head_count", "vocab_size"] {
        for value in [0u32, 1 << 30, u32::MAX] {
            let bytes = after(&format!("bitnet-b1.58.{key}"), |b| {
                b[4..8].copy_from_slice(&value.to_le_bytes());
            });
            fs::write(&path, bytes).unwrap();
            assert!(ModelFile::open(&path).is_err(), "{key} = {value}");
        }
    }
}

#[test]
fn scales_and_codes_that_are_none() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("hostile.gguf");
    fs::write(&path, valid_gguf()).unwrap();
    let file = Gguf::open(&path).unwrap();
    let range = file.tensor("blk.0.ffn_up.weight").unwrap().range.clone();
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0] {
        let mut bytes = valid_gguf();
        bytes[range.end - 32..][..4].copy_from_slice(&scale.to_le_bytes());
        refused(&bytes, "blk.0.ffn_up.weight");
    }
    let mut bytes = valid_gguf();
    bytes[range.start + 5] |= 0b11;
    refused(&bytes, "packed byte 5");
}

#[test]
fn truncation_anywhere() {
    let bytes = valid_gguf();
    let dir = tempdir().unwrap();
    let path = dir.path().join("hostile.gguf");
    for len in (0..bytes.len()).step_by(7) {
        fs::write(&path, &bytes[..len]).unwrap();
        // The last tensor's padding is the only thing that a model can lose.
        assert!(read_all(&path).is_err() || bytes.len() - len < 64, "{len} of {}", bytes.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes_of_a_gguf_never_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
        in_header in any::<bool>(),
    ) {
        let mut bytes = valid_gguf();
        let end = if in_header { 1600 } else { bytes.len() };
        for (at, value) in flips {
            bytes[at.index(end)] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let dir = tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        fs::write(&path, bytes).unwrap();
        let _ = read_all(&path);
    }
}
