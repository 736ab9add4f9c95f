//! Adapters beside a model that stays packed train as beside its masters.

use std::path::PathBuf;

use candle_core::Device;
use trine_data::Batch;
use trine_format::peft::Lora;
use trine_format::{ModelFile, Projection};
use trine_train::adapters::Adapters;
use trine_train::fused::{Engine, Options, Precision};
use trine_train::optimizer::{Gradients, Optimizer, global_norm};
use trine_train::schedule::Rates;
use trine_train::{Bitnet, Params, RunConfig};

fn fixture(form: &str) -> ModelFile {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/fixtures"));
    ModelFile::open(&root.join("tied-h64").join(form)).unwrap()
}

fn adapters(file: &ModelFile) -> Adapters {
    Adapters::init(file.config(), 4, 8.0, &Projection::ALL, 3).unwrap()
}

fn batch(vocab: usize) -> Batch {
    let id = |i: usize| (i * i * 31 % 101 % vocab) as u32;
    let (inputs, targets) = ((0..48).map(id).collect(), (1..=48).map(id).collect());
    Batch { inputs, targets, starts: None, batch: 2, seq_len: 24 }
}

fn engine(precision: Precision) -> Engine {
    Engine::new(Options { precision, recompute: true }, true)
}

fn values(gradients: &Gradients) -> Vec<Vec<f32>> {
    gradients.values().map(|g| g.flatten_all().unwrap().to_vec1().unwrap()).collect()
}

#[test]
fn a_packed_model_has_the_gradients_of_its_masters() {
    let file = fixture("bf16");
    let masters = Params::load(&file, &Device::Cpu).unwrap();
    let masters = Bitnet::new(file.config().clone(), masters).unwrap();
    let masters = masters.with_adapters(adapters(&file));
    let batch = batch(file.config().vocab_size);
    for precision in [Precision::F32, Precision::Bf16] {
        let (expected_loss, expected) = engine(precision).gradients(&masters, &batch).unwrap();
        for form in ["bf16", "packed"] {
            let file = fixture(form);
            let packed = Bitnet::frozen(&file).unwrap().with_adapters(adapters(&file));
            let (loss, gradients) = engine(precision).gradients(&packed, &batch).unwrap();
            assert_eq!(gradients.len(), 2 * 7 * file.config().num_hidden_layers);
            if form == "bf16" {
                assert_eq!(loss, expected_loss);
                assert_eq!(values(&gradients), values(&expected));
            } else {
                // Scales of packed weights are stored in 16 bits.
                assert!((loss - expected_loss).abs() < 1e-2, "{loss}, not {expected_loss}");
            }
        }
    }
}

#[test]
fn adapters_go_through_files_of_the_package_peft() {
    let file = fixture("packed");
    let (config, dir) = (file.config(), tempfile::tempdir().unwrap());
    let dir = dir.path().join("adapter");
    let written = adapters(&file).to_lora(config.num_hidden_layers).unwrap();
    written.write(&dir, config).unwrap();
    let read = Adapters::from_lora(&Lora::read(&dir, config).unwrap(), config).unwrap();
    assert_eq!(read.to_lora(config.num_hidden_layers).unwrap(), written);
    let batch = batch(config.vocab_size);
    let loss = |adapters: Adapters| {
        let model = Bitnet::frozen(&file).unwrap().with_adapters(adapters);
        engine(Precision::F32).evaluate(&model, &batch).unwrap()
    };
    assert_eq!(loss(read), loss(adapters(&file)));
}

#[test]
fn adapters_learn_what_the_model_does_not_know() {
    let file = fixture("packed");
    let model = Bitnet::frozen(&file).unwrap().with_adapters(adapters(&file));
    let batch = batch(file.config().vocab_size);
    let mut engine = engine(Precision::Auto);
    let mut optimizer = Optimizer::new(RunConfig::default().optimizer, 0, model.trained());
    let mut losses = Vec::new();
    for _ in 0..30 {
        let (loss, gradients) = engine.gradients(&model, &batch).unwrap();
        let norm = global_norm(&gradients).unwrap();
        let rates = Rates { learning_rate: 1e-2, weight_decay: 0.0 };
        optimizer.update(model.trained(), &gradients, norm, rates).unwrap();
        losses.push(loss);
    }
    assert!(losses[29] < losses[0] - 1.0, "{losses:?}");
}
