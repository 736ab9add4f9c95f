//! Quantizers in whole networks and whole runs.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use candle_core::{Device, Tensor};
use trine_data::Dataset;
use trine_format::{ModelConfig, ModelFile, Projection, TensorSource, names};
use trine_tokenizer::Tokenizer;
use trine_train::quantizers::{self, QuantizerConfig, Scheme, TABLE};
use trine_train::{Bitnet, Params, RunConfig, TrainError, Trainer, checkpoint, optimizer};

use common::Watch;

const CONFIG: &str = "
name = 'test'
seed = 3
[model]
hidden_size = 24
intermediate_size = 40
num_hidden_layers = 2
num_attention_heads = 3
num_key_value_heads = 1
[data]
seq_len = 16
[optimizer]
learning_rate = 5e-3
[schedule]
warmup_steps = 5
second_learning_rate = 3e-3
[train]
steps = 30
batch_size = 4
eval_every = 15
checkpoint_every = 10
";

/// Every quantizer of the table, and what can be combined with them.
fn variants() -> Vec<String> {
    let mut variants: Vec<String> =
        TABLE.iter().map(|entry| format!("weights={}", entry.name)).collect();
    for name in ["absmean", "absmedian", "lsq", "seq", "binary-centred"] {
        for granularity in ["row", "group:16", "group:7"] {
            variants.push(format!("weights={name} granularity={granularity}"));
        }
    }
    for more in [
        "activations=int4 hadamard=true",
        "activations=int4-absmax",
        "activations=none",
        "dead_zone_bias=1e-3",
        "weights=lsq granularity=row dead_zone_bias=1e-2 activations=int4 hadamard=true",
        "lambda_steps=12",
        "weights=seq lambda_steps=100",
        "weights=seq log_scales=false",
    ] {
        variants.push(more.to_owned());
    }
    variants
}

fn config_with(variant: &str) -> RunConfig {
    let settings: Vec<String> =
        variant.split_whitespace().map(|setting| format!("quantizer.{setting}")).collect();
    RunConfig::parse(CONFIG, Path::new("test.toml"), &settings).unwrap()
}

fn dataset(dir: &Path) -> Dataset {
    let text = "the cat sat on the mat and the dog ate the hat. ".repeat(60);
    let tokenizer = Tokenizer::characters(&text).unwrap();
    std::fs::create_dir_all(dir).unwrap();
    Dataset::from_text(dir, &tokenizer, &text, 0.1).unwrap()
}

/// A whole run in `dir`.
fn trained(variant: &str, dir: &Path) -> (Trainer, Watch) {
    let mut watch = Watch::default();
    let mut trainer =
        Trainer::create(config_with(variant), dataset(&dir.join("data")), dir).unwrap();
    assert!(trainer.run(&mut watch).unwrap().finished, "{variant}");
    (trainer, watch)
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn small(variant: &str, sub_norms: bool) -> (ModelConfig, Bitnet) {
    let run = config_with(variant);
    let mut config = run.model_config(17, None, None).unwrap();
    config.sub_norms = sub_norms;
    let params = Params::init(&config, 0.3, 7, &Device::Cpu).unwrap();
    let model = Bitnet::new(config.clone(), params).unwrap();
    (config, model.with_scheme(Scheme::new(run.quantizer).unwrap()).unwrap())
}

fn sample_ids() -> (Tensor, Tensor) {
    let ids = |phase: usize| (0..48).map(|i| ((i * 5 + phase) % 17) as u32).collect();
    let tensor = |ids: Vec<u32>| Tensor::from_vec(ids, (4, 12), &Device::Cpu).unwrap();
    (tensor(ids(0)), tensor(ids(5)))
}

#[test]
fn every_variable_gets_a_gradient_whatever_the_quantizer() {
    for variant in variants() {
        for sub_norms in [true, false] {
            let (config, mut model) = small(&variant, sub_norms);
            // Within the warm-ups of the variants, but not at their beginning.
            model.set_step(7);
            let (inputs, targets) = sample_ids();
            let loss = model.loss(&inputs, &targets).unwrap();
            let mut store = loss.backward().unwrap();
            let gradients = optimizer::collect(model.params(), &mut store).unwrap();
            let learned = if variant.contains("lsq") || variant.contains("seq") { 14 } else { 0 };
            assert_eq!(gradients.len(), config.tensor_ids().len() + learned, "{variant}");
            for (name, gradient) in &gradients {
                let values = flat(gradient);
                assert!(values.iter().all(|g| g.is_finite()), "{name} with {variant}");
                assert!(values.iter().any(|g| *g != 0.0), "{name} with {variant}");
            }
            // Without gradients the pass computes the same.
            let evaluated = model.evaluate(&inputs, &targets, None).unwrap();
            assert_eq!(flat(&evaluated), flat(&loss), "{variant}");
        }
    }
}

fn scale_name(layer: usize, p: Projection) -> String {
    format!("{}_log_scale", names::projection(layer, p))
}

#[test]
fn a_small_model_learns_with_every_quantizer() {
    for variant in variants() {
        let dir = tempfile::tempdir().unwrap();
        let (_, watch) = trained(&variant, &dir.path().join("run"));
        let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
        let (first, last) = (mean(&watch.losses[..3]), mean(&watch.losses[27..]));
        assert!(last < 0.9 * first, "{variant}: {first} to {last}");
        assert!(watch.validations.iter().all(|loss| loss.is_finite()), "{variant}");
    }
}

#[test]
fn scales_are_learned() {
    let dir = tempfile::tempdir().unwrap();
    let (trainer, _) = trained("weights=lsq granularity=row", &dir.path().join("run"));
    let fresh = Params::init(trainer.model().config(), 0.02, 3, &Device::Cpu).unwrap();
    let fresh = Bitnet::new(trainer.model().config().clone(), fresh).unwrap();
    let config = trainer.config().quantizer.clone();
    let fresh = fresh.with_scheme(Scheme::new(config).unwrap()).unwrap();
    for p in Projection::ALL {
        let of = |model: &Bitnet| flat(model.params().get(&scale_name(1, p)).unwrap());
        let (before, after) = (of(&fresh), of(trainer.model()));
        assert_eq!(before.len(), fresh.config().projection_shape(p).0);
        assert!(before.iter().zip(&after).all(|(a, b)| a != b), "{p:?}");
    }
}

/// Masters, learned scales, their moments and the warm-up go on where they stopped.
#[test]
fn a_resumed_run_makes_the_same_losses() {
    let table = TABLE.iter().map(|entry| format!("weights={}", entry.name));
    let more = [
        "weights=lsq granularity=row lambda_steps=20",
        "weights=seq dead_zone_bias=1e-3",
        "weights=lsq log_scales=false",
        "granularity=group:7 activations=int4 hadamard=true",
        "lambda_steps=9",
    ];
    for variant in table.chain(more.map(str::to_owned)) {
        let variant = &variant;
        let dir = tempfile::tempdir().unwrap();
        let (_, expected) = trained(variant, &dir.path().join("whole"));
        let parts = dir.path().join("parts");
        let mut first = Watch { stop_after: Some(13), ..Watch::default() };
        let data = dataset(&parts.join("data"));
        let mut trainer = Trainer::create(config_with(variant), data, &parts).unwrap();
        assert!(!trainer.run(&mut first).unwrap().finished);
        let mut second = Watch::default();
        let data = Dataset::open(&parts.join("data")).unwrap();
        let mut trainer = Trainer::resume(config_with(variant), data, &parts).unwrap();
        assert!(trainer.run(&mut second).unwrap().finished);
        let together: Vec<f32> = first.losses.iter().chain(&second.losses).copied().collect();
        assert_eq!(together, expected.losses, "{variant}");
        assert_eq!(second.validations, expected.validations, "{variant}");
    }
}

#[test]
fn a_run_is_not_resumed_with_another_quantizer() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    trained("weights=twn", &run);
    let data = Dataset::open(&run.join("data")).unwrap();
    let error = Trainer::resume(config_with("weights=lsq"), data, &run).err().unwrap().to_string();
    assert!(error.contains("quantizer.weights"), "{error}");
}

/// A section that asks for the default is the default: the fast path, and an ordinary checkpoint.
#[test]
fn the_default_written_out_is_the_default() {
    let dir = tempfile::tempdir().unwrap();
    let (trainer, left_out) = trained("", &dir.path().join("a"));
    let all = "weights=absmean granularity=tensor activations=int8 hadamard=false dead_zone_bias=0 \
               lambda_steps=0";
    let (_, written) = trained(all, &dir.path().join("b"));
    assert_eq!(left_out.losses, written.losses);
    assert!(trainer.model().scheme().is_none());
    let file = ModelFile::open(&checkpoint::latest(&dir.path().join("b")).unwrap()).unwrap();
    assert_eq!(file.config(), trainer.model().config());
}

/// What the formats hold is what the trainer computed with, whichever quantizer found it.
#[test]
fn checkpoints_that_trits_and_scales_describe_open_as_those() {
    for entry in &TABLE {
        let dir = tempfile::tempdir().unwrap();
        let variant = format!("weights={}", entry.name);
        let (trainer, _) = trained(&variant, &dir.path().join("run"));
        let path = checkpoint::latest(&dir.path().join("run")).unwrap();
        let refused = ModelFile::open(&path).err().map(|e| e.to_string());
        match &refused {
            Some(error) => assert!(error.contains("quant_method"), "{error}"),
            None => assert_eq!(entry.name, "absmean"),
        }
        let file = quantizers::open(&path).unwrap();
        assert!(file.tokenizer().is_some() && !file.tensors().is_empty());
        let scheme = Scheme::new(config_with(&variant).quantizer).unwrap();
        for (layer, p) in [(0, Projection::Q), (1, Projection::Down)] {
            let (rows, cols) = file.config().projection_shape(p);
            let params = trainer.model().params();
            let masters = flat(params.get(&names::projection(layer, p)).unwrap());
            let learned = params.get(&scale_name(layer, p)).ok().map(|s| flat(s)[0]);
            let expected = scheme.ternary(&masters, rows, cols, learned).unwrap();
            let found = TensorSource::projection(&file, layer, p).unwrap();
            assert_eq!(found, expected, "{}", entry.name);
            let zeros = found.counts()[1];
            assert_eq!(zeros == 0, entry.name.starts_with("binary"), "{}: {zeros}", entry.name);
        }
    }
}

#[test]
fn what_no_format_holds_is_refused_with_what_it_is() {
    for (variant, lost) in [
        ("granularity=row", "scales per row"),
        ("weights=lsq granularity=group:8", "scales per group:8"),
        ("dead_zone_bias=1e-3", "biases"),
        ("activations=int4 hadamard=true", "Hadamard"),
        ("activations=none", "full precision"),
        ("lambda_steps=100", "30 %"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        trained(variant, &dir.path().join("run"));
        let path = checkpoint::latest(&dir.path().join("run")).unwrap();
        let error = quantizers::open(&path).err().unwrap();
        assert!(matches!(error, TrainError::Checkpoint { .. }), "{error}");
        assert!(error.to_string().contains(lost), "{variant}: {error}");
        let error = ModelFile::open(&path).err().unwrap().to_string();
        assert!(error.contains("quant_method"), "{variant}: {error}");
    }
    // After its end a warm-up leaves nothing behind.
    let dir = tempfile::tempdir().unwrap();
    trained("lambda_steps=12", &dir.path().join("run"));
    assert!(ModelFile::open(&checkpoint::latest(&dir.path().join("run")).unwrap()).is_ok());
    assert!(ModelFile::open(&checkpoint::path_of_step(&dir.path().join("run"), 10)).is_err());
}

#[test]
fn damaged_scales_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    trained("weights=lsq", &run);
    let path = checkpoint::latest(&run).unwrap();
    // Without an older checkpoint to go on from.
    for other in std::fs::read_dir(run.join("checkpoints")).unwrap() {
        let other = other.unwrap().path();
        if other != path {
            std::fs::remove_dir_all(other).unwrap();
        }
    }
    for change in [&b"no tensors"[..], &[]] {
        std::fs::write(path.join("quantizer.safetensors"), change).unwrap();
        let error = quantizers::open(&path).err().unwrap().to_string();
        assert!(error.contains("quantizer.safetensors"), "{error}");
        let data = Dataset::open(&run.join("data")).unwrap();
        let error = Trainer::resume(config_with("weights=lsq"), data, &run).err().unwrap();
        assert!(error.to_string().contains("quantizer.safetensors"), "{error}");
    }
    std::fs::remove_file(path.join("quantizer.safetensors")).unwrap();
    let error = quantizers::open(&path).err().unwrap().to_string();
    assert!(error.contains("quantizer.safetensors"), "{error}");
}

#[test]
fn senseless_sections_are_refused_by_key() {
    for (settings, key) in [
        (&["quantizer.weights=absmax"][..], "quantizer.weights"),
        (&["quantizer.granularity=column"][..], "granularity"),
        (&["quantizer.activations=int3"][..], "int3"),
        (&["quantizer.weight=lsq"][..], "weight"),
        (&["quantizer.dead_zone_bias=-1.0"][..], "quantizer.dead_zone_bias"),
        (&["quantizer.weights=binary", "quantizer.dead_zone_bias=1e-3"][..], "dead zone"),
        (&["quantizer.weights=lsq", "model.quantization=none"][..], "model.quantization"),
        (&["quantizer.hadamard=true", "model.intermediate_size=41"][..], "model.intermediate_size"),
    ] {
        let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
        let error = RunConfig::parse(CONFIG, Path::new("test.toml"), &settings).err().unwrap();
        assert!(error.to_string().contains(key), "{settings:?}: {error}");
    }
    let config = QuantizerConfig { weights: "mine".to_owned(), ..QuantizerConfig::default() };
    assert!(Scheme::new(config).is_err());
}
