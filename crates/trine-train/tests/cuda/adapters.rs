//! Adapters beside a model that stays as it is.

use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use trine_cuda::{Backend, Emulator, Engine, Kind, Options};
use trine_format::{ModelConfig, Projection, Quantization, names};
use trine_ternary::TernaryMatrix;
use trine_train::adapters::Adapters;
use trine_train::plan::Plan;
use trine_train::{Bitnet, RunConfig};

use super::{OnCpu, batch, config, devices, documents, model, values};

/// Adapters whose `B` is not zero, so that every gradient is something.
fn adapters(config: &ModelConfig, rank: usize, targets: &[Projection]) -> Adapters {
    let adapters = Adapters::init(config, rank, 6.0, targets, 5).unwrap();
    for (name, var) in adapters.params().iter().filter(|(name, _)| name.contains("lora_B")) {
        let value = |i: usize| ((i * 37 + name.len()) % 19) as f32 / 90.0 - 0.1;
        let b = (0..var.elem_count()).map(value).collect::<Vec<_>>();
        var.set(&Tensor::from_vec(b, var.shape(), var.device()).unwrap()).unwrap();
    }
    adapters
}

/// Puts a model, its matrices in bf16 where `narrow`, and its adapters on a device.
fn beside(device: &Arc<dyn Backend>, model: &Bitnet, options: Options, narrow: bool) -> Engine {
    let (config, adapters) = (model.config(), model.adapters().unwrap());
    let of_card = trine_cuda::Adapters {
        rank: adapters.rank(),
        alpha: adapters.alpha(),
        targets: adapters.targets().to_vec(),
        narrow_base: narrow,
    };
    let mut engine = Engine::with_adapters(device.clone(), config, options, &of_card).unwrap();
    let ternary = config.quantization != Quantization::None;
    for layer in 0..config.num_hidden_layers {
        for p in Projection::ALL.into_iter().filter(|_| ternary) {
            let (out, inp) = config.projection_shape(p);
            let masters = values(model.params().get(&names::projection(layer, p)).unwrap());
            let trits = TernaryMatrix::from_weights(&masters, out, inp).unwrap();
            engine.freeze(layer, p, trits.packed(), trits.scale()).unwrap();
        }
    }
    let is_frozen = |name: &str| ternary && name.contains("_proj");
    for (name, var) in model.params().iter().filter(|(name, _)| !is_frozen(name)) {
        engine.set(name, &values(var)).unwrap();
    }
    for (name, var) in adapters.params().iter() {
        let (expected, mut found) = (values(var), vec![0.0; var.elem_count()]);
        engine.set(name, &expected).unwrap();
        engine.get(name, &mut found).unwrap();
        assert_eq!(found, expected, "{name}");
    }
    engine
}

/// The same model with matrices that bf16 has.
fn narrowed(model: Bitnet) -> Bitnet {
    for (_, var) in model.params().iter().filter(|(_, var)| var.rank() > 1) {
        let upper = |value: f32| f32::from_bits(value.to_bits() & 0xffff_0000);
        let values = values(var).into_iter().map(upper).collect::<Vec<_>>();
        var.set(&Tensor::from_vec(values, var.shape(), var.device()).unwrap()).unwrap();
    }
    model
}

fn check(
    device: &Arc<dyn Backend>,
    config: &ModelConfig,
    (rank, targets): (usize, &[Projection]),
    batch: &trine_data::Batch,
    (what, narrow): (&str, bool),
) {
    let model = if narrow { narrowed(model(config)) } else { model(config) };
    let model = model.with_adapters(adapters(config, rank, targets));
    let expected = OnCpu::of(&model, batch);
    for (kind, recompute) in [(Kind::F32, false), (Kind::F32, true), (Kind::Bf16, true)] {
        let what = format!("{}: {what}, {kind:?}, recompute {recompute}", device.name());
        let options = Options { kind, recompute, narrow_masters: false };
        let mut engine = beside(device, &model, options, narrow);
        let before = super::batch(3, 41, config.vocab_size);
        // As where everything is trained.
        expected.check(&mut engine, &before, batch, kind, &what);
    }
}

/// Devices whose warps multiply in groups of four, and one where they do not.
fn all_devices() -> Vec<Arc<dyn Backend>> {
    let mut devices = devices();
    if std::env::var_os("TRINE_REQUIRE_CUDA").is_none() {
        devices.push(Arc::new(Emulator::open(false).unwrap()));
    }
    devices
}

#[test]
fn adapters_on_a_card_have_the_gradients_of_those_on_a_cpu() {
    use Projection::{Down, K, O, Q, Up, V};
    let (all, some) = (&Projection::ALL[..], &[Q, V, Up][..]);
    // Codes and trits of such widths are multiplied as bytes where a card can.
    let wide = ModelConfig { intermediate_size: 112, ..config() };
    let untied = ModelConfig { tie_word_embeddings: false, vocab_size: 33, ..config() };
    let full = ModelConfig { quantization: Quantization::None, ..config() };
    // More ids than are widened at a time.
    let many = ModelConfig { vocab_size: 8209, ..config() };
    for device in all_devices() {
        check(&device, &many, (2, &[V, Down]), &batch(1, 9, 8209), ("many ids", true));
        check(&device, &wide, (8, all), &batch(3, 17, 37), ("all, rank 8", true));
        check(&device, &config(), (3, all), &documents(), ("all, rank 3", false));
        check(&device, &wide, (5, some), &batch(2, 40, 37), ("some, rank 5", false));
        check(&device, &untied, (12, &[K, O, Down]), &batch(3, 17, 33), ("others, untied", true));
        check(&device, &full, (3, some), &batch(3, 17, 37), ("full precision", false));
        check(&device, &full, (4, all), &batch(3, 17, 37), ("full precision of bf16", true));
    }
}

#[test]
fn what_adapters_cannot_be_is_said() {
    let device: Arc<dyn Backend> = Arc::new(Emulator::open(true).unwrap());
    let options = Options { kind: Kind::F32, recompute: false, narrow_masters: false };
    let of = |rank| trine_cuda::Adapters {
        rank,
        alpha: 1.0,
        targets: vec![Projection::Q],
        narrow_base: false,
    };
    let made = Engine::with_adapters(device.clone(), &config(), options, &of(0));
    assert!(made.err().unwrap().to_string().contains("at least 1, found 0"));
    let mut engine = Engine::with_adapters(device, &config(), options, &of(2)).unwrap();
    let error = engine.freeze(0, Projection::Q, &[0; 5], 1.0).unwrap_err().to_string();
    assert!(error.contains("1024 bytes") && error.contains("found 5"), "{error}");
    // What stays as it is has no gradient.
    let mut norm = vec![0.0; 64];
    assert!(engine.set(names::FINAL_NORM, &norm).is_ok());
    assert!(engine.gradient(names::FINAL_NORM, &mut norm).is_err());
    assert_eq!(engine.parameters().count(), 4);
}

/// Of microsoft/bitnet-b1.58-2B-4T.
fn of_2b4t() -> ModelConfig {
    ModelConfig {
        hidden_size: 2560,
        intermediate_size: 6912,
        num_hidden_layers: 30,
        num_attention_heads: 20,
        num_key_value_heads: 5,
        head_dim: 128,
        vocab_size: 128_256,
        max_position_embeddings: 4096,
        quantization: Quantization::Offline,
        ..config()
    }
}

#[test]
fn adapters_of_2b4t_fit_on_a_small_card() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/finetune/gpu-lora.toml");
    let needed = |settings: &[&str]| {
        let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
        let config = RunConfig::load(&path, &settings).unwrap();
        Plan::new(&config, &of_2b4t(), None).unwrap().device_memory
    };
    let gb = |settings: &[&str]| needed(settings).unwrap() as f64 / 1e9;
    let as_it_is = gb(&[]);
    assert!(as_it_is < 7.5, "{as_it_is}");
    let smaller = gb(&["train.accumulate=8", "train.batch_size=8", "data.seq_len=512"]);
    assert!(smaller < as_it_is, "{smaller}");
    let kept = gb(&["train.recompute_activations=false"]);
    assert!(kept > as_it_is + 1.0, "{kept}");
    assert_eq!(needed(&["train.device=cpu"]), None);
}
