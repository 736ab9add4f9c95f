//! GGUF files with numbers in blocks.

use std::fs;
use std::sync::OnceLock;

use proptest::prelude::*;
use tempfile::tempdir;
use trine_format::gguf::{self, Gguf, TensorSpec, WriteOptions, Writer};
use trine_format::{DenseTensor, Dtype, ModelConfig, ModelFile};

use crate::common::{Masters, read_all, tiny_config};
use crate::gguf::{craft, refused};

/// The types of numbers in blocks.
const BLOCKS: [Dtype; 4] = [Dtype::Q8_0, Dtype::Q6_K, Dtype::Q4_0, Dtype::Q3_K];

/// A model wide enough for blocks, all of whose plain tensors are stored in them.
fn valid_blocks(dtype: Dtype) -> Vec<u8> {
    let dir = tempdir().unwrap();
    let paths = ["plain.gguf", "blocks.gguf"].map(|name| dir.path().join(name));
    let config = ModelConfig { hidden_size: 256, head_dim: 128, ..tiny_config() };
    let config = ModelConfig { intermediate_size: 256, ..config };
    let options = WriteOptions { embedding: dtype, ..WriteOptions::default() };
    gguf::write_model(&paths[0], &config, &Masters::new(&config), None, options).unwrap();
    let file = Gguf::open(&paths[0]).unwrap();
    let metadata: Vec<_> =
        file.metadata().iter().filter(|(key, _)| key != "general.alignment").cloned().collect();
    // Norms too, although we write them as F32.
    let tensors: Vec<_> = file
        .tensors()
        .iter()
        .map(|info| {
            let (name, shape, data) = (info.name.clone(), info.shape.clone(), file.bytes(info));
            let Some(stored) = Dtype::from_ggml(info.kind) else {
                return (TensorSpec { name, kind: info.kind, shape }, data.to_vec());
            };
            let tensor = DenseTensor { name, dtype: stored, shape, data: data.into() };
            let data = tensor.convert(dtype).unwrap().into_owned();
            let DenseTensor { name, shape, .. } = tensor;
            (TensorSpec { name, kind: dtype.ggml_type(), shape }, data)
        })
        .collect();
    let specs: Vec<_> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = Writer::create(&paths[1], &metadata, &specs).unwrap();
    tensors.iter().for_each(|(_, data)| writer.tensor(data).unwrap());
    writer.finish().unwrap();
    fs::read(&paths[1]).unwrap()
}

#[test]
fn plain_tensors_may_be_blocks_wherever_they_stand() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    for dtype in BLOCKS {
        fs::write(&path, valid_blocks(dtype)).unwrap();
        read_all(&path).unwrap();
        let file = ModelFile::open(&path).unwrap();
        for name in ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"] {
            let tensor = file.dense(name).unwrap();
            assert_eq!(tensor.dtype, dtype);
            assert!(tensor.to_f32().iter().any(|v| *v != 0.0));
        }
    }
}

#[test]
fn rows_that_are_no_whole_blocks() {
    for (id, columns, needs) in [
        (8, 48, "32 values"),
        (14, 128, "256 values"),
        (2, 16, "32 values"),
        (8, 1, "32 values"),
        (11, 128, "256 values"),
    ] {
        refused(&craft(&[], &[("evil", &[columns, 32], id, 0)], 1 << 16), needs);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes_of_blocks_never_panic(
        which in 0..BLOCKS.len(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..64),
        in_header in any::<bool>(),
    ) {
        static BYTES: OnceLock<[Vec<u8>; BLOCKS.len()]> = OnceLock::new();
        let mut bytes = BYTES.get_or_init(|| BLOCKS.map(valid_blocks))[which].clone();
        let end = if in_header { 1600 } else { bytes.len() };
        for (at, value) in flips {
            bytes[at.index(end)] = value;
        }
        let dir = tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        fs::write(&path, bytes).unwrap();
        if read_all(&path).is_ok() {
            // What can be read can be widened and written, or is refused as not finite.
            let file = ModelFile::open(&path).unwrap();
            for other in Dtype::ALL {
                let _ = file.dense("model.embed_tokens.weight").unwrap().convert(other);
            }
        }
    }
}
