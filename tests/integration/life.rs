//! One model's whole life: text, tokens, training, checkpoint, packed file, runtime.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use trine_data::{Dataset, synth};
use trine_export::{ExportError, Target, convert, verify};
use trine_format::gguf::{TernaryType, WriteOptions};
use trine_format::{Dtype, ModelFile, Projection, TensorSource, names};
use trine_runtime::{Model, Session};
use trine_ternary::TernaryMatrix;
use trine_tokenizer::Tokenizer;
use trine_train::{RunConfig, Trainer};

use crate::fixtures::relative_error;

const CONFIG: &str = "
[model]
hidden_size = 64
intermediate_size = 160
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
[data]
seq_len = 32
[optimizer]
learning_rate = 4e-3
[schedule]
warmup_steps = 10
[train]
steps = 40
batch_size = 8
";

/// A model after a short training, and its checkpoint.
pub(crate) fn trained(dir: &Path, overrides: &[&str]) -> (Trainer, ModelFile) {
    let (trainer, checkpoint) = trained_in(dir, overrides);
    (trainer, ModelFile::open(&checkpoint).unwrap())
}

/// A model after a short training, and where its checkpoint is.
pub(crate) fn trained_in(dir: &Path, overrides: &[&str]) -> (Trainer, PathBuf) {
    let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
    let config = RunConfig::parse(CONFIG, Path::new("test.toml"), &overrides).unwrap();
    let documents = || synth::documents(1, 40_000);
    let tokenizer = Tokenizer::train_bpe(documents(), 384).unwrap();
    let data = dir.join("data");
    std::fs::create_dir_all(&data).unwrap();
    let data = Dataset::from_documents(&data, &tokenizer, documents().map(Ok), 0.1).unwrap();
    let mut trainer = Trainer::create(config, data, dir).unwrap();
    let outcome = trainer.run(&mut ()).unwrap();
    assert!(outcome.finished);
    (trainer, outcome.checkpoint)
}

/// Logits of the trainer for one sequence.
pub(crate) fn trainer_logits(trainer: &Trainer, ids: &[u32]) -> Vec<f32> {
    let input = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
    let logits = trainer.model().forward(&input).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

fn sample_ids(trainer: &Trainer) -> Vec<u32> {
    trainer.batches().batch(3).unwrap().inputs[..32].to_vec()
}

#[test]
fn export_decodes_to_the_trainers_trits() {
    let temp = tempfile::tempdir().unwrap();
    let (trainer, checkpoint) = trained(temp.path(), &[]);
    let path = temp.path().join("model.gguf");
    let report = convert(&checkpoint, &path, Target::default()).unwrap();
    assert_eq!((report.ternary_tensors, report.largest_scale_change), (14, 0.0));
    let file = ModelFile::open(&path).unwrap();
    for layer in 0..2 {
        for p in Projection::ALL {
            let (rows, cols) = file.config().projection_shape(p);
            let masters = trainer.model().params().get(&names::projection(layer, p)).unwrap();
            let masters = masters.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let expected = TernaryMatrix::from_weights(&masters, rows, cols).unwrap();
            assert_eq!(TensorSource::projection(&file, layer, p).unwrap(), expected);
        }
    }
}

/// Up to the head, trainer and runtime compute the same bits; the head sums in another order.
#[test]
fn runtime_logits_match_trainer() {
    for overrides in [
        &[][..],
        &["model.tie_word_embeddings=false", "model.hidden_act=silu"],
        &["model.sub_norms=false", "model.num_key_value_heads=4"],
        &["model.projection_norms=true"],
        &["model.quantization=none"],
    ] {
        let temp = tempfile::tempdir().unwrap();
        let (trainer, checkpoint) = trained(temp.path(), overrides);
        let ids = sample_ids(&trainer);
        let expected = trainer_logits(&trainer, &ids);
        let logits = |file: &ModelFile| {
            let model = Model::load(file).unwrap();
            Session::new(&model).logits_of_all(&ids).unwrap()
        };
        let error = relative_error(&logits(&checkpoint), &expected);
        assert!(error < 1e-6, "{overrides:?}: {error:.1e}");
        if overrides != ["model.quantization=none"] {
            let path = temp.path().join("model.gguf");
            let options = WriteOptions { ternary: TernaryType::I2S, embedding: Dtype::F32 };
            convert(&checkpoint, &path, Target::Gguf(options)).unwrap();
            let error = relative_error(&logits(&ModelFile::open(&path).unwrap()), &expected);
            assert!(error < 1e-6, "{overrides:?} from GGUF: {error:.1e}");
        }
    }
}

/// A quantizer that makes trits and a scale of each matrix is exported exactly: the trainer, which
/// multiplies in f32, and the runtime, which multiplies codes, differ by rounding.
#[test]
fn quantizers_that_the_formats_hold_are_exported_exactly() {
    for entry in trine_train::quantizers::TABLE.iter().filter(|entry| entry.name != "absmean") {
        let name = entry.name;
        let temp = tempfile::tempdir().unwrap();
        let run = temp.path();
        let (trainer, path) = trained_in(run, &[&format!("quantizer.weights={name}")]);
        let checkpoint = trine_train::quantizers::open(&path).unwrap();
        let ids = sample_ids(&trainer);
        let expected = trainer_logits(&trainer, &ids);
        let gguf = temp.path().join("model.gguf");
        let options = WriteOptions { ternary: TernaryType::I2S, embedding: Dtype::F32 };
        let report = convert(&checkpoint, &gguf, Target::Gguf(options)).unwrap();
        assert_eq!((report.ternary_tensors, report.largest_scale_change), (14, 0.0), "{name}");
        for file in [checkpoint, ModelFile::open(&gguf).unwrap()] {
            let model = Model::load(&file).unwrap();
            let logits = Session::new(&model).logits_of_all(&ids).unwrap();
            let error = relative_error(&logits, &expected);
            // An int8 code that lies within rounding of a tie may flip.
            assert!(error < 3e-2, "{name}: {error:.1e}");
        }
    }
}

#[test]
fn full_precision_models_are_not_packed() {
    let temp = tempfile::tempdir().unwrap();
    let (_, checkpoint) = trained(temp.path(), &["model.quantization=none", "train.steps=1"]);
    let path = temp.path().join("model.gguf");
    let error = convert(&checkpoint, &path, Target::default()).unwrap_err();
    assert!(matches!(error, ExportError::NotTernary { .. }), "{error}");
    assert!(!path.exists());
}

#[test]
fn verification_finds_a_single_trit() {
    let temp = tempfile::tempdir().unwrap();
    let (_, checkpoint) = trained(temp.path(), &["train.steps=1"]);
    let path = temp.path().join("model.gguf");
    convert(&checkpoint, &path, Target::default()).unwrap();
    // One bit flip that keeps the file valid: code 1 (trit 0) of some projection to 0 or back.
    let file = ModelFile::open(&path).unwrap();
    let tensor = file.as_gguf().unwrap().tensor("blk.1.ffn_up.weight").unwrap();
    let at = tensor.range.start;
    drop(file);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[at] = match bytes[at] & 3 {
        0 => bytes[at] | 1,
        _ => bytes[at] & !3,
    };
    std::fs::write(&path, bytes).unwrap();
    let error = verify(&checkpoint, &ModelFile::open(&path).unwrap()).unwrap_err().to_string();
    assert!(error.contains("model.layers.1.mlp.up_proj") && error.contains("1 of"), "{error}");
}

#[test]
fn a_shape_that_i2_s_cannot_hold_is_refused_by_name() {
    let temp = tempfile::tempdir().unwrap();
    let overrides = ["model.intermediate_size=41", "train.steps=1"];
    let (_, checkpoint) = trained(temp.path(), &overrides);
    let path = temp.path().join("model.gguf");
    let error = convert(&checkpoint, &path, Target::default()).unwrap_err().to_string();
    assert!(error.contains("ffn_gate") && error.contains("128"), "{error}");
    let left: Vec<_> = std::fs::read_dir(temp.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(left.iter().all(|p| !p.to_string_lossy().contains(".trine-")), "{left:?}");
    assert!(!path.exists());
}
