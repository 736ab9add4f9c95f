//! Embedding and head in blocks: converted, verified, run.

use std::collections::BTreeMap;
use std::path::Path;

use trine_export::{Target, convert, embedding_dtype, verify};
use trine_format::gguf::WriteOptions;
use trine_format::{
    BoxError, DenseTensor, Dtype, HiddenAct, ModelConfig, ModelFile, Quantization, TensorSource,
    names, write_hf,
};
use trine_runtime::{Model, RuntimeError, Session};

use crate::fixtures::{self, relative_error};

const BLOCKS: [Dtype; 3] = [Dtype::Q8_0, Dtype::Q6_K, Dtype::Q4_0];

/// Random numbers for every tensor.
struct Random(BTreeMap<String, (Vec<usize>, Vec<f32>)>);

impl TensorSource for Random {
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        let (shape, values) = self.0.get(name).ok_or("no such tensor")?;
        Ok(DenseTensor::from_f32(name, shape, values))
    }
}

/// A checkpoint of f32 masters, wide enough for every block.
fn checkpoint(dir: &Path, tied: bool) -> ModelFile {
    let config = ModelConfig {
        hidden_size: 256,
        intermediate_size: 256,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 128,
        vocab_size: 96,
        tie_word_embeddings: tied,
        quantization: Quantization::Online,
        hidden_act: HiddenAct::Relu2,
        ..ModelFile::open(&fixtures::model("tied-h64").join("bf16")).unwrap().config().clone()
    };
    let config = ModelConfig { bos_token_id: None, eos_token_ids: vec![], ..config };
    let mut state = 7u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let tensors = config.tensor_ids().into_iter().map(|id| {
        let shape = config.tensor_shape(id);
        let values = (0..shape.iter().product()).map(|_| next()).collect();
        (id.canonical(), (shape, values))
    });
    let path = dir.join(format!("checkpoint-{tied}"));
    write_hf(&path, &config, Dtype::F32, &Random(tensors.collect()), None).unwrap();
    ModelFile::open(&path).unwrap()
}

fn target(embedding: Dtype) -> Target {
    Target::Gguf(WriteOptions { embedding, ..WriteOptions::default() })
}

fn logits(file: &ModelFile) -> Vec<f32> {
    let ids: Vec<u32> = (0..40).map(|i| i * 7 % 96).collect();
    Session::new(&Model::load(file).unwrap()).logits_of_all(&ids).unwrap()
}

/// Names of the tensors that are stored in blocks.
fn large(tied: bool) -> &'static [&'static str] {
    if tied { &[names::EMBED] } else { &[names::EMBED, names::HEAD] }
}

/// The runtime computes with the numbers that the blocks hold, and those are near the source's.
#[test]
fn models_with_embeddings_in_blocks_convert_verify_and_run() {
    let temp = tempfile::tempdir().unwrap();
    for tied in [true, false] {
        let source = checkpoint(temp.path(), tied);
        let expected = logits(&source);
        // Half a step or, where the code of the largest has no opposite, a whole one; and what the
        // f16 of the scale loses, whose codes were chosen before. Logits of random weights are moved
        // by 2.5e-2 even by an embedding in f16, through int8 codes that flip.
        for (dtype, change, error) in [
            (Dtype::Q8_0, 0.5 / 127.0 + 0.5f32.powi(11), 0.06),
            (Dtype::Q6_K, 0.7 / 32.0, 0.09),
            (Dtype::Q4_0, 1.0 / 8.0 + 0.5f32.powi(11), 0.3),
        ] {
            let path = temp.path().join(format!("{}-{tied}.gguf", dtype.name()));
            let report = convert(&source, &path, target(dtype)).unwrap();
            let found = report.largest_dense_change;
            assert!(found > change / 3.0 && found <= change, "{dtype:?} {found}");

            let file = ModelFile::open(&path).unwrap();
            for name in large(tied) {
                assert_eq!(file.dense(name).unwrap().dtype, dtype);
            }
            assert_eq!(file.dense(names::FINAL_NORM).unwrap().dtype, Dtype::F32);
            let in_blocks = logits(&file);
            let found = relative_error(&in_blocks, &expected);
            println!("{dtype:?}, tied {tied}: relative error of logits {found:.1e}");
            assert!(found > 0.0 && found < error, "{dtype:?} {found}");

            // Widened into a file of f32 they are the same numbers; only the product with the head is
            // another, of inputs in two parts of 8 bits.
            let path = temp.path().join("widened.gguf");
            convert(&file, &path, target(Dtype::F32)).unwrap();
            let widened = logits(&ModelFile::open(&path).unwrap());
            let found = relative_error(&in_blocks, &widened);
            println!("{dtype:?}, tied {tied}: against the widened numbers {found:.1e}");
            assert!(found < 1e-4, "{dtype:?} {found}");
        }
    }
}

#[test]
fn stored_blocks_are_carried_as_they_are() {
    let temp = tempfile::tempdir().unwrap();
    for tied in [true, false] {
        let source = checkpoint(temp.path(), tied);
        assert_eq!(embedding_dtype(&source).unwrap(), Dtype::F16);
        for dtype in BLOCKS {
            let paths = ["a.gguf", "b.gguf"].map(|name| temp.path().join(name));
            convert(&source, &paths[0], target(dtype)).unwrap();
            let first = ModelFile::open(&paths[0]).unwrap();
            assert_eq!(embedding_dtype(&first).unwrap(), dtype);
            let report = convert(&first, &paths[1], target(dtype)).unwrap();
            assert_eq!(report.largest_dense_change, 0.0);
            let again = ModelFile::open(&paths[1]).unwrap();
            for name in large(tied) {
                let [a, b] = [&first, &again].map(|file| file.dense(name).unwrap());
                assert!(a.dtype == b.dtype && a.data == b.data, "{dtype:?} {name}");
            }
            // A directory has no blocks: they are widened, then rounded to its type.
            for (i, (target, plain)) in
                [(Target::HfPacked, Dtype::BF16), (Target::Hf(Dtype::F32), Dtype::F32)]
                    .into_iter()
                    .enumerate()
            {
                let path = temp.path().join(format!("{}-{tied}-{i}", dtype.name()));
                let report = convert(&first, &path, target).unwrap();
                let written = ModelFile::open(&path).unwrap();
                assert_eq!(written.dense(names::EMBED).unwrap().dtype, plain);
                assert_eq!(report.largest_dense_change > 0.0, plain == Dtype::BF16);
                assert!(report.largest_dense_change < 0.004);
            }
        }
    }
}

#[test]
fn rows_that_are_no_whole_blocks_are_refused_by_name() {
    let temp = tempfile::tempdir().unwrap();
    let source = ModelFile::open(&fixtures::model("tied-h64").join("bf16")).unwrap();
    let path = temp.path().join("model.gguf");
    let error = convert(&source, &path, target(Dtype::Q6_K)).unwrap_err().to_string();
    for part in ["token_embd.weight", "256 values in each row", "Q6_K [512, 64]", "model.gguf"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
}

/// Every byte of a block counts, and one that makes numbers that are none is named.
#[test]
fn damaged_blocks_are_found() {
    let temp = tempfile::tempdir().unwrap();
    let source = checkpoint(temp.path(), false);
    for (dtype, scale) in [(Dtype::Q8_0, 0), (Dtype::Q6_K, 208), (Dtype::Q4_0, 0)] {
        let path = temp.path().join("model.gguf");
        convert(&source, &path, target(dtype)).unwrap();
        let good = std::fs::read(&path).unwrap();
        let file = ModelFile::open(&path).unwrap();
        let start = file.as_gguf().unwrap().tensor("output.weight").unwrap().range.start;
        let damaged = |at: usize, bytes: &[u8]| {
            let mut all = good.clone();
            all[start + at..][..bytes.len()].copy_from_slice(bytes);
            let path = temp.path().join("damaged.gguf");
            std::fs::write(&path, all).unwrap();
            ModelFile::open(&path).unwrap()
        };
        let block = dtype.ggml_type().block().1;
        for at in 0..block {
            let at = at + 5 * block;
            let error = verify(&source, &damaged(at, &[!good[start + at]])).unwrap_err();
            assert!(error.to_string().contains(names::HEAD), "{error}");
        }
        for value in [0x7C00u16, 0xFC00, 0x7E01] {
            let file = damaged(3 * block + scale, &value.to_le_bytes());
            match Model::load(&file).err() {
                Some(RuntimeError::NonFinite { tensor, index, .. }) => {
                    assert_eq!((&*tensor, index), (names::HEAD, 3 * dtype.ggml_type().block().0));
                }
                other => panic!("{dtype:?}: {other:?}"),
            }
            let to = temp.path().join("copy.gguf");
            let error = convert(&file, &to, target(dtype)).unwrap_err().to_string();
            assert!(error.contains(names::HEAD) && error.contains("finite"), "{error}");
            let error = convert(&file, &to, target(Dtype::F32)).unwrap_err().to_string();
            assert!(error.contains(names::HEAD) && error.contains("finite"), "{error}");
            assert!(!to.exists());
        }
    }
}
