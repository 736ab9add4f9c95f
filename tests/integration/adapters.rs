//! Adapters: what the trainer trains beside a model is what the runtime adds to it.

use candle_core::{Device, Tensor};
use trine_data::Batch;
use trine_format::peft::Lora;
use trine_format::{ModelFile, Projection};
use trine_runtime::{Adapter, LowRankType, Model, Session, cross_entropy};
use trine_train::adapters::Adapters;
use trine_train::fused::{Engine, Options, Precision};
use trine_train::{Bitnet, Params};

use crate::fixtures::{self, relative_error};
use crate::life::trained;

/// Adapters whose `B` is not zeros any more.
fn lora(file: &ModelFile, targets: &[Projection], seed: u64) -> Lora {
    let (config, rank) = (file.config(), 4);
    let fresh = Adapters::init(config, rank, 8.0, targets, seed).unwrap();
    let mut lora = fresh.to_lora(config.num_hidden_layers).unwrap();
    for [a, b] in lora.matrices.values_mut() {
        let noise = a.iter().cycle().skip(seed as usize);
        b.iter_mut().zip(noise).for_each(|(b, a)| *b = *a);
    }
    lora
}

fn text(vocab: usize, len: usize) -> Vec<u32> {
    (0..len).map(|i| (i * i * 31 % 101 % vocab) as u32).collect()
}

/// Logits `(T, V)` of the runtime.
fn runtime_logits(file: &ModelFile, lora: Option<&Lora>, ids: &[u32]) -> Vec<f32> {
    let model = Model::load(file).unwrap();
    let adapter = lora.map(|lora| Adapter::new(&model, lora, LowRankType::F32).unwrap().into());
    Session::with_adapter(&model, adapter).logits_of_all(ids).unwrap()
}

/// Logits `(T, V)` of the trainer's graph.
fn trainer_logits(file: &ModelFile, lora: &Lora, ids: &[u32]) -> Vec<f32> {
    let params = Params::load(file, &Device::Cpu).unwrap();
    let adapters = Adapters::from_lora(lora, file.config()).unwrap();
    let model = Bitnet::new(file.config().clone(), params).unwrap().with_adapters(adapters);
    let ids = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
    model.forward(&ids).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Two implementations sum an adapter's products in different orders, so an int8 code that lies within
/// rounding of a tie may fall to the other side, which moves what follows by up to some percent. Most
/// texts have none.
#[test]
fn runtime_logits_with_an_adapter_match_trainer() {
    let temp = tempfile::tempdir().unwrap();
    let runs = [&[][..], &["model.sub_norms=false"], &["model.quantization=none"]];
    let runs = runs
        .iter()
        .enumerate()
        .map(|(i, overrides)| trained(&temp.path().join(i.to_string()), overrides).1);
    let names = ["tied-h64/bf16", "untied-h192/bf16", "llama-h64/online"];
    let models = names.map(|name| ModelFile::open(&fixtures::model(name)).unwrap());
    let (mut exact, mut all) = (0, 0);
    for file in models.into_iter().chain(runs) {
        let some = [Projection::V, Projection::Up, Projection::Down];
        for (seed, targets) in [&Projection::ALL[..], &some, &Projection::ALL].iter().enumerate() {
            let (lora, ids) =
                (lora(&file, targets, 3 + seed as u64), text(file.config().vocab_size, 12));
            let expected = trainer_logits(&file, &lora, &ids);
            let error = relative_error(&runtime_logits(&file, Some(&lora), &ids), &expected);
            let effect = relative_error(&runtime_logits(&file, None, &ids), &expected);
            println!("{}, {seed}: {error:.1e} of {effect:.1e}", file.path().display());
            assert!(
                effect > 5e-3,
                "{}: the adapter does nothing: {effect:.1e}",
                file.path().display()
            );
            assert!(error < 3e-2, "{}, {seed}: {error:.1e}", file.path().display());
            exact += usize::from(error < 2e-6);
            all += 1;
        }
    }
    assert!(exact * 3 > all * 2, "{exact} of {all} are exact");
}

/// Beside weights that stay packed too, as adapters are trained.
#[test]
fn the_runtimes_loss_with_an_adapter_is_the_trainers() {
    for name in ["tied-h64/packed", "untied-h192/packed", "tied-h64/bf16"] {
        let file = ModelFile::open(&fixtures::model(name)).unwrap();
        let (vocab, lora) = (file.config().vocab_size, lora(&file, &Projection::ALL, 5));
        let ids = text(vocab, 65);
        let adapters = Adapters::from_lora(&lora, file.config()).unwrap();
        let model = Bitnet::frozen(&file).unwrap().with_adapters(adapters);
        let mut engine = Engine::new(Options { precision: Precision::F32, recompute: false }, true);
        let (inputs, targets) = (ids[..64].to_vec(), ids[1..].to_vec());
        let batch = Batch { inputs, targets, starts: None, batch: 1, seq_len: 64 };
        let expected = f64::from(engine.evaluate(&model, &batch).unwrap());
        let loss = |lora| {
            let logits = runtime_logits(&file, lora, &ids[..64]);
            cross_entropy(&logits, vocab, &ids[1..]) / 64.0
        };
        let (found, without) = (loss(Some(&lora)), loss(None));
        println!("{name}: {found} of {expected}, {without} without");
        assert!((found - expected).abs() < 1e-3 * expected, "{name}: {found}, not {expected}");
        assert!((without - expected).abs() > 0.02, "{name}: the adapter does nothing");
    }
}
