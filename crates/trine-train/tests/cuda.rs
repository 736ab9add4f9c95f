//! Steps of the engine for cards against those of the engine for CPUs, both on a CPU.

#[path = "cuda/adapters.rs"]
mod adapters;
mod common;

use std::path::Path;
use std::sync::Arc;

use candle_core::Device;

use trine_cuda::{AdamW, Backend, Driver, Emulator, Engine, Kind, Options};
use trine_data::{Batch, Dataset, IGNORED};
use trine_format::{HiddenAct, ModelConfig, Quantization};
use trine_train::config::OptimizerConfig;
use trine_train::fused::{self, Precision};
use trine_train::optimizer::{Gradients, Optimizer, global_norm};
use trine_train::schedule::Rates;
use trine_train::{Bitnet, Params, RunConfig, Trainer};

use common::{Watch, dataset};

fn config() -> ModelConfig {
    ModelConfig {
        hidden_size: 64,
        intermediate_size: 104,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        vocab_size: 37,
        max_position_embeddings: 140,
        rope_theta: 1e4,
        rms_norm_eps: 1e-5,
        hidden_act: HiddenAct::Relu2,
        sub_norms: true,
        projection_norm_eps: None,
        tie_word_embeddings: true,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        quantization: Quantization::Online,
    }
}

fn model(config: &ModelConfig) -> Bitnet {
    let params = Params::init(config, 0.2, 7, &Device::Cpu).unwrap();
    Bitnet::new(config.clone(), params).unwrap()
}

fn batch(batch: usize, seq_len: usize, vocab: usize) -> Batch {
    let id = |i: usize| (i * i * 31 % 101 % vocab) as u32;
    let n = batch * seq_len;
    let (inputs, targets) = ((0..n).map(id).collect(), (1..=n).map(id).collect());
    Batch { inputs, targets, starts: None, batch, seq_len }
}

fn documents() -> Batch {
    let mut batch = batch(2, 40, 37);
    batch.starts = Some((0..80).map(|i| (i % 40 - i % 40 % 13) as u32).collect());
    for (i, target) in batch.targets.iter_mut().enumerate() {
        if i % 7 < 4 || (20..33).contains(&i) {
            *target = IGNORED;
        }
    }
    batch
}

fn values(tensor: &candle_core::Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The emulator, and a card where there is one; with `TRINE_REQUIRE_CUDA` the card alone, which must be there.
fn devices() -> Vec<Arc<dyn Backend>> {
    if std::env::var_os("TRINE_REQUIRE_CUDA").is_some() {
        return vec![Arc::new(Driver::open(0).unwrap())];
    }
    let mut devices: Vec<Arc<dyn Backend>> = vec![Arc::new(Emulator::open(true).unwrap())];
    match Driver::open(0) {
        Ok(card) => devices.push(Arc::new(card)),
        Err(e) => eprintln!("skipped on a card: {e}"),
    }
    devices
}

fn on(device: &Arc<dyn Backend>, model: &Bitnet, kind: Kind, recompute: bool) -> Engine {
    let options = Options { kind, recompute, narrow_masters: false };
    let device = device.clone();
    let mut engine = Engine::new(device, model.config(), options).unwrap();
    for (name, var) in model.params().iter() {
        engine.set(name, &values(var)).unwrap();
    }
    engine
}

/// The length of the difference relative to that of `expected`, or to `least`, where what is expected is the
/// noise of sums that are zero.
fn difference(found: &[f32], expected: &[f32], least: f64) -> f64 {
    let square = |x: f64| x * x;
    let pairs = found.iter().zip(expected);
    let error: f64 = pairs.map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let size: f64 = expected.iter().map(|b| square(f64::from(*b))).sum();
    error.sqrt() / size.sqrt().max(least)
}

fn gradients_of(engine: &Engine) -> Vec<(String, Vec<f32>)> {
    let mut found = Vec::new();
    for (name, count) in engine.parameters() {
        let mut gradient = vec![0.0; count];
        engine.gradient(name, &mut gradient).unwrap();
        found.push((name.to_owned(), gradient));
    }
    found
}

/// What the CPU's engine makes of a batch.
struct OnCpu {
    loss: f32,
    gradients: Gradients,
    evaluated: f32,
}

impl OnCpu {
    fn of(model: &Bitnet, batch: &Batch) -> Self {
        let ternary = model.config().quantization != Quantization::None;
        let options = fused::Options { precision: Precision::F32, recompute: false };
        let mut engine = fused::Engine::new(options, ternary);
        let (loss, gradients) = engine.gradients(model, batch).unwrap();
        let evaluated = engine.evaluate(model, batch).unwrap();
        Self { loss, gradients, evaluated }
    }

    /// An engine that has seen another batch `before` makes the same of this one.
    fn check(&self, engine: &mut Engine, before: &Batch, batch: &Batch, kind: Kind, what: &str) {
        // What was there before leaves no trace.
        engine.begin().unwrap();
        engine.add(before, 1.0).unwrap();
        engine.begin().unwrap();
        engine.add(batch, 1.0 / batch.learned() as f32).unwrap();
        let loss = engine.loss().unwrap() / batch.learned() as f64;
        // Norms are summed in another order, which quantizes a number to another code once in a while. In
        // bfloat16, what a layer returns is rounded, and quantized to another code here and there.
        let (in_loss, in_gradients) = match kind {
            Kind::F32 => (1e-5, 2e-3),
            Kind::Bf16 => (2e-2, 0.2),
        };
        let expected_loss = self.loss;
        let error = (loss / f64::from(expected_loss) - 1.0).abs();
        assert!(error < in_loss, "{what}: {loss} for {expected_loss}");
        let norm = global_norm(&self.gradients).unwrap();
        let found = gradients_of(engine);
        assert_eq!(found.len(), self.gradients.len());
        for (name, found) in found {
            let difference = difference(&found, &values(&self.gradients[&name]), 1e-3 * norm);
            assert!(difference < in_gradients, "{what}, {name}: {difference}");
        }
        let squares: f64 = engine.squares().unwrap().iter().sum();
        assert!((squares.sqrt() / norm - 1.0).abs() < in_gradients, "{what}: {squares}");
        let loss = engine.evaluate(batch).unwrap() / batch.learned() as f64;
        assert!((loss / f64::from(self.evaluated) - 1.0).abs() < 1e-5, "{what}: {loss}");
    }
}

fn check(device: &Arc<dyn Backend>, config: &ModelConfig, batch: &Batch, what: &str) {
    let model = model(config);
    let expected = OnCpu::of(&model, batch);
    for kind in [Kind::F32, Kind::Bf16] {
        for recompute in [false, true] {
            let what = format!("{}: {what}, {kind:?}, recompute {recompute}", device.name());
            let mut engine = on(device, &model, kind, recompute);
            let larger = self::batch(3, 65, config.vocab_size);
            expected.check(&mut engine, &larger, batch, kind, &what);
        }
    }
}

#[test]
fn steps_of_a_card_are_those_of_a_cpu() {
    for device in devices() {
        steps_on(&device);
    }
}

fn steps_on(device: &Arc<dyn Backend>) {
    check(device, &config(), &batch(3, 17, 37), "3 x 17");
    check(device, &config(), &batch(1, 1, 37), "one token");
    check(device, &config(), &batch(2, 130, 37), "2 x 130");
    check(device, &config(), &documents(), "documents");
    let silu = ModelConfig { hidden_act: HiddenAct::Silu, sub_norms: false, ..config() };
    check(device, &silu, &batch(3, 17, 37), "SiLU without sub-norms");
    for head_dim in [40, 128] {
        let heads = ModelConfig {
            hidden_size: 2 * head_dim,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim,
            ..config()
        };
        check(device, &heads, &batch(2, 70, 37), &format!("heads of {head_dim}"));
    }
    let untied = ModelConfig { tie_word_embeddings: false, vocab_size: 33, ..config() };
    check(device, &untied, &batch(3, 17, 33), "untied");
    let full = ModelConfig { quantization: Quantization::None, ..config() };
    check(device, &full, &batch(3, 17, 37), "full precision");
}

#[test]
fn batches_add_up_and_updates_are_those_of_a_cpu() {
    for device in devices() {
        updates_on(&device);
    }
}

fn updates_on(device: &Arc<dyn Backend>) {
    let config = config();
    let mut model = model(&config);
    let options = fused::Options { precision: Precision::F32, recompute: false };
    let mut on_cpu = fused::Engine::new(options, true);
    let optimizer = OptimizerConfig { weight_decay: 0.1, ..OptimizerConfig::default() };
    let mut updates = Optimizer::new(optimizer.clone(), 1, model.trained());
    let mut engine = on(device, &model, Kind::F32, false);
    for step in 1..=3 {
        let parts = [batch(2, 19, 37), batch(1, 23 + step, 37)];
        let mut sum = Gradients::new();
        engine.begin().unwrap();
        for part in &parts {
            let (_, gradients) = on_cpu.weighted_gradients(&model, part, 0.01).unwrap();
            trine_train::optimizer::accumulate(&mut sum, gradients, 1.0).unwrap();
            engine.add(part, 0.01).unwrap();
        }
        let norm = global_norm(&sum).unwrap();
        let squares: f64 = engine.squares().unwrap().iter().sum();
        assert!((squares.sqrt() / norm - 1.0).abs() < 1e-5, "{squares}, {norm}");
        let rates = Rates { learning_rate: 0.01, weight_decay: 0.1 };
        updates.update(model.trained(), &sum, norm, rates).unwrap();
        let correction = |beta: f64| 1.0 - beta.powi(step as i32);
        let [beta1, beta2] = optimizer.betas;
        engine
            .update(
                &AdamW {
                    clip: (1.0 / (norm + 1e-6)).min(1.0) as f32,
                    betas: optimizer.betas.map(|beta| beta as f32),
                    eps: optimizer.eps as f32,
                    keep: (1.0 - 0.01 * 0.1) as f32,
                    step_size: (0.01 / correction(beta1)) as f32,
                    inverse_root_correction2: (1.0 / correction(beta2).sqrt()) as f32,
                    chance: 0,
                },
                None,
            )
            .unwrap();
        model.set_step(step);
        for (name, var) in model.params().iter() {
            let expected = values(var);
            let mut found = vec![0.0; expected.len()];
            engine.get(name, &mut found).unwrap();
            let difference = difference(&found, &expected, 0.0);
            assert!(difference < 1e-5, "step {step}, {name}: {difference}");
        }
    }
}

const RUN: &str = "
name = 'test'
seed = 3
[model]
hidden_size = 64
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
[data]
seq_len = 16
[optimizer]
learning_rate = 1e-2
[schedule]
warmup_steps = 3
[train]
precision = 'f32'
steps = 8
batch_size = 4
accumulate = 2
eval_every = 4
checkpoint_every = 4
[diagnostics]
every = 4
[samples]
every = 4
prompts = ['the ']
max_tokens = 4
";

fn run_config(settings: &[&str]) -> RunConfig {
    let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
    RunConfig::parse(RUN, Path::new("test.toml"), &settings).unwrap()
}

#[test]
fn a_run_is_the_same_wherever_it_is_made_and_may_move() {
    moves(&[], 1e-3);
    // Its Newton-Schulz steps are of bfloat16 on many a CPU.
    moves(&["optimizer.kind=muon", "train.eval_every=8"], 1e-2);
}

fn moves(settings: &[&str], within: f32) {
    let dir = tempfile::tempdir().unwrap();
    let close = |found: &[f32], expected: &[f32]| {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found / expected - 1.0).abs() < within, "{found} for {expected}");
        }
    };
    let mut of_cpu = Watch::default();
    let run = dir.path().join("cpu");
    let config = run_config(settings);
    Trainer::create(config, dataset(&run.join("data")), &run).unwrap().run(&mut of_cpu).unwrap();

    let run = dir.path().join("card");
    let config = run_config(&[settings, &["train.device=emulator"]].concat());
    let mut first = Watch { stop_after: Some(5), ..Watch::default() };
    let mut trainer = Trainer::create(config, dataset(&run.join("data")), &run).unwrap();
    assert!(trainer.device().is_some());
    assert!(!trainer.run(&mut first).unwrap().finished);
    let mut rest = Watch::default();
    let data = Dataset::open(&run.join("data")).unwrap();
    let mut trainer = Trainer::resume(run_config(settings), data, &run).unwrap();
    assert!(trainer.device().is_none());
    trainer.run(&mut rest).unwrap();
    close(&[first.losses, rest.losses].concat(), &of_cpu.losses);
    close(&[first.validations, rest.validations].concat(), &of_cpu.validations);
    let steps = |watch: &Watch| watch.collected.iter().map(|(step, _)| *step).collect::<Vec<_>>();
    assert_eq!((first.collected.len(), steps(&of_cpu)), (1, vec![4, 8]));
    // Where all products are of f32, so are gradients the same.
    let collected = first.collected.iter().zip(&of_cpu.collected).filter(|_| within < 1e-2);
    for ((_, found), (_, expected)) in collected {
        let layers = found.layers.values().zip(expected.layers.values());
        for (found, expected) in layers {
            let (found, expected) = (found.grad_norm.unwrap(), expected.grad_norm.unwrap());
            assert!((found / expected - 1.0).abs() < 1e-2, "{found} for {expected}");
        }
    }
    assert_eq!(first.samples[0].0, 4);
}

#[test]
fn what_a_card_cannot_do_is_refused_by_its_key() {
    let dir = tempfile::tempdir().unwrap();
    for (setting, key) in
        [("optimizer.moments=int8", "optimizer.moments"), ("quantizer.weights=twn", "quantizer")]
    {
        let config = run_config(&["train.device=emulator", setting]);
        let run = dir.path().join(key);
        let refused = Trainer::create(config, dataset(&run.join("data")), &run);
        let error = refused.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains("emulator"), "{error}");
    }
}

/// A device that is a group of one: it shows that NCCL is found and adds up, and that whatever has a stream of
/// its own waits for what it has to.
#[test]
fn a_device_that_meets_itself_sums_what_it_has_beside_the_backward_pass() {
    for device in devices() {
        let Some(meeting) = device.meeting().unwrap() else {
            eprintln!("skipped on {}: libnccl was not found", device.name());
            continue;
        };
        let error = device.sum_beside(0, 1).unwrap_err().to_string();
        assert!(error.contains("not met"), "{error}");
        device.meet(&meeting, 0, 1).unwrap();
        let numbers = [1.5f32, -2.0, 0.25];
        let at = device.allocate(12).unwrap();
        device.upload(at, bytemuck::cast_slice(&numbers)).unwrap();
        device.sum_beside(at, 3).unwrap();
        device.join_sums().unwrap();
        let mut found = [0f32; 3];
        device.download(at, bytemuck::cast_slice_mut(&mut found)).unwrap();
        assert_eq!(found, numbers);
        device.free(at);
        for tied in [true, false] {
            sums_itself(&device, &ModelConfig { tie_word_embeddings: tied, ..config() });
        }
        device.leave();
        let error = device.join_sums().unwrap_err().to_string();
        assert!(error.contains("not met"), "{error}");
    }
}

fn sums_itself(device: &Arc<dyn Backend>, config: &ModelConfig) {
    let model = model(config);
    let parts = [batch(3, 65, 37), batch(2, 130, 37)];
    for (kind, recompute) in [(Kind::F32, false), (Kind::Bf16, true)] {
        let mut engine = on(device, &model, kind, recompute);
        for parts in [&parts[..], &parts[1..]] {
            let (last, before) = parts.split_last().unwrap();
            let mut gradients = |beside: bool| {
                engine.begin().unwrap();
                before.iter().for_each(|part| engine.add(part, 0.01).unwrap());
                match beside {
                    true => engine.add_last(last, 0.01, Vec::new()).unwrap(),
                    false => engine.add(last, 0.01).unwrap(),
                }
                (engine.loss().unwrap(), gradients_of(&engine))
            };
            let after = gradients(false);
            assert!(gradients(true) == after, "{}: {kind:?}", device.name());
            engine.sum_gradients().unwrap();
            assert!(gradients_of(&engine) == after.1, "{}: {kind:?}", device.name());
        }
    }
}
