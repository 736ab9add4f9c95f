//! A step over plain buffers against the graph.

use std::collections::BTreeSet;

use super::*;
use crate::Params;
use crate::adapters::{Adapters, Dropout};
use crate::optimizer::{collect, in_place};
use crate::quantizers::{QuantizerConfig, Scheme};
use trine_format::{HiddenAct, ModelConfig, Projection};

mod distillation;

fn config() -> ModelConfig {
    ModelConfig {
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
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

fn model(config: ModelConfig) -> Bitnet {
    let params = Params::init(&config, 0.3, 7, &Device::Cpu).unwrap();
    Bitnet::new(config, params).unwrap()
}

fn batch(batch: usize, seq_len: usize, vocab: usize) -> Batch {
    let id = |i: usize| (i * i * 31 % 101 % vocab) as u32;
    let n = batch * seq_len;
    let (inputs, targets) = ((0..n).map(id).collect(), (1..=n).map(id).collect());
    Batch { inputs, targets, starts: None, batch, seq_len }
}

/// Loss and gradients by Candle's graph.
fn by_graph(model: &Bitnet, batch: &Batch) -> (f32, Gradients) {
    let tensor =
        |ids: &[u32]| Tensor::from_slice(ids, (batch.batch, batch.seq_len), &Device::Cpu).unwrap();
    let (inputs, targets) = (tensor(&batch.inputs), tensor(&batch.targets));
    let loss = model.loss_within(&inputs, &targets, batch.starts.as_deref()).unwrap();
    let gradients = collect(model.trained(), &mut loss.backward().unwrap()).unwrap();
    (loss.to_scalar().unwrap(), gradients)
}

/// The length of the difference relative to that of `expected`.
fn difference(found: &Tensor, expected: &Tensor) -> f64 {
    let (found, expected) = (view(found).unwrap(), view(expected).unwrap());
    let square = |x: f64| x * x;
    let pairs = found.iter().zip(expected.iter());
    let error: f64 = pairs.map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let size: f64 = expected.iter().map(|b| square(f64::from(*b))).sum();
    (error / size.max(1e-12)).sqrt()
}

fn check(model: &Bitnet, batch: &Batch, what: &str) {
    let (expected_loss, expected) = by_graph(model, batch);
    let rounded = [Precision::Bf16, Precision::Int8, Precision::Int8All, Precision::Int8F32];
    for precision in [Precision::F32].into_iter().chain(rounded) {
        for recompute in [false, true] {
            let mut engine = Engine::new(Options { precision, recompute }, is_ternary(model));
            // A larger batch before leaves no trace.
            engine.gradients(model, &self::batch(4, 130, model.config().vocab_size)).unwrap();
            let (loss, gradients) = engine.gradients(model, batch).unwrap();
            let (in_loss, in_gradients) = match precision {
                Precision::F32 => (1e-6, 2e-5),
                // Its forward pass is that of f32, and a model in full precision is in f32 throughout.
                Precision::Int8F32 if !is_ternary(model) => (1e-6, 2e-5),
                Precision::Int8F32 => (1e-6, 0.1),
                // What attention rounds is quantized again further up, sometimes to another code; how
                // far its own results are from f32 is tested where it is.
                _ if is_ternary(model) => (3e-3, 0.2),
                _ if model.adapters().is_some() => (3e-3, 0.1),
                _ => (3e-3, 5e-2),
            };
            let what = format!("{what}, {precision:?}, recompute {recompute}");
            assert!(((loss - expected_loss) / expected_loss).abs() < in_loss, "{what}: {loss}");
            assert_eq!(gradients.len(), expected.len());
            for (name, gradient) in &gradients {
                let difference = difference(gradient, &expected[name]);
                assert!(difference < in_gradients, "{what}, {name}: {difference}");
            }
            // With a forward pass as exact as the graph's, only what gradients round is left.
            let in_gradients = match precision {
                Precision::F32 => 2e-5,
                _ if model.adapters().is_some() || mixture(model).is_some() => 0.1,
                Precision::Bf16 if is_ternary(model) => 2e-2,
                _ => 5e-2,
            };
            let weight = 1.0 / batch.learned() as f64;
            let weigh = |sums: &[f64]| vec![weight; sums.len()];
            for (name, gradient) in &engine.sequence_gradients(model, batch, weigh).unwrap() {
                let difference = difference(gradient, &expected[name]);
                assert!(difference < in_gradients, "{what}, compared, {name}: {difference}");
            }
            let evaluated = engine.evaluate(model, batch).unwrap();
            // Where everything is in bfloat16, so is this forward pass, but for the head.
            assert!(((evaluated - expected_loss) / expected_loss).abs() < in_loss, "{what}");
        }
    }
}

#[test]
fn steps_without_a_graph_are_those_of_the_graph() {
    let shapes = [(1, 1), (3, 17), (2, 130)];
    for (b, t) in shapes {
        check(&model(config()), &batch(b, t, 37), &format!("{b} x {t}"));
    }
    let mut documents = batch(2, 40, 37);
    documents.starts = Some((0..80).map(|i| (i % 40 - i % 40 % 13) as u32).collect());
    check(&model(config()), &documents, "documents");
    for (i, target) in documents.targets.iter_mut().enumerate() {
        if i % 7 < 4 || (20..33).contains(&i) {
            *target = IGNORED;
        }
    }
    check(&model(config()), &documents, "answers");
    let silu = ModelConfig { hidden_act: HiddenAct::Silu, sub_norms: false, ..config() };
    check(&model(silu), &batch(3, 17, 37), "SiLU without sub-norms");
    let untied = ModelConfig { tie_word_embeddings: false, vocab_size: 33, ..config() };
    check(&model(untied), &batch(3, 17, 33), "untied");
    let full = ModelConfig { quantization: Quantization::None, ..config() };
    check(&model(full), &batch(3, 17, 37), "full precision");
    let scheme = QuantizerConfig { lambda_steps: 4, ..QuantizerConfig::default() };
    let mut warming = model(config()).with_scheme(Scheme::new(scheme).unwrap()).unwrap();
    for step in [0, 1, 3, 4] {
        warming.set_step(step);
        check(&warming, &batch(3, 17, 37), &format!("step {step} of a warm-up"));
    }
    let one_head =
        ModelConfig { num_key_value_heads: 1, hidden_size: 136, head_dim: 34, ..config() };
    check(&model(one_head), &batch(2, 99, 37), "one key head");
}

/// Loss and gradients of a batch, as bits.
fn bits(engine: &mut Engine, model: &Bitnet, batch: &Batch) -> Vec<u32> {
    let (loss, gradients) = engine.gradients(model, batch).unwrap();
    let gradients = gradients.values().flat_map(|g| view(g).unwrap().to_vec());
    [loss].into_iter().chain(gradients).map(f32::to_bits).collect()
}

#[test]
fn what_is_kept_or_made_again_has_the_bits_of_a_layer_that_runs_again() {
    let of = |config: ModelConfig| ModelConfig { num_hidden_layers: 3, ..config };
    let silu = ModelConfig { hidden_act: HiddenAct::Silu, sub_norms: false, ..config() };
    let full = ModelConfig { quantization: Quantization::None, ..config() };
    let models = [of(config()), of(silu), of(full)].map(model);
    let adapted = model(config()).with_adapters(adapters(&Projection::ALL));
    for model in models.iter().chain([&adapted]) {
        let engine = |recompute| {
            let options = Options { precision: Precision::Bf16, recompute };
            Engine::new(options, is_ternary(model))
        };
        let (small, large) = (batch(2, 40, 37), batch(4, 130, 37));
        let [expected, expected_of_large] =
            [&small, &large].map(|batch| bits(&mut engine(true), model, batch));
        for little in [0, usize::MAX] {
            // Whatever the memory was used for before, and whether it has to grow.
            let mut engine = engine(false);
            engine.little = little;
            for _ in 0..2 {
                assert!(bits(&mut engine, model, &small) == expected);
                engine.evaluate(model, &large).unwrap();
                assert!(bits(&mut engine, model, &small) == expected);
                assert!(bits(&mut engine, model, &large) == expected_of_large);
            }
        }
    }
}

/// Adapters whose `B` is not zero, so that every gradient is something.
fn adapters(targets: &[Projection]) -> Adapters {
    let adapters = Adapters::init(&config(), 3, 6.0, targets, 5).unwrap();
    for (name, var) in adapters.params().iter().filter(|(name, _)| name.contains("lora_B")) {
        let value = |i: usize| ((i * 37 + name.len()) % 19) as f32 / 90.0 - 0.1;
        in_place(var, |b| b.iter_mut().enumerate().for_each(|(i, b)| *b = value(i))).unwrap();
    }
    adapters
}

#[test]
fn adapters_have_the_gradients_of_the_graph() {
    let some = [Projection::Q, Projection::V, Projection::Up];
    for targets in [&Projection::ALL[..], &some] {
        let model = model(config()).with_adapters(adapters(targets));
        check(&model, &batch(2, 40, 37), &format!("{} adapters", targets.len()));
    }
    let full = ModelConfig { quantization: Quantization::None, ..config() };
    let model = model(full).with_adapters(adapters(&some));
    check(&model, &batch(3, 17, 37), "adapters in full precision");
}

/// Checks that along its gradients the loss changes as much as they say. `loss` returns both.
fn check_slope(model: &Bitnet, mut loss: impl FnMut() -> (f64, Gradients)) {
    let gradients = loss().1;
    let gradients: Gradients =
        gradients.iter().map(|(name, g)| (name.clone(), g.copy().unwrap())).collect();
    let square: f64 = crate::optimizer::global_norm(&gradients).unwrap().powi(2);
    let mut moved = |by: f64| {
        for (name, var) in model.trained().iter() {
            let gradient = view(&gradients[name]).unwrap();
            let step = |w: &mut [f32]| {
                w.iter_mut().zip(&gradient[..]).for_each(|(w, g)| *w += by as f32 * g);
            };
            in_place(var, step).unwrap();
        }
        loss().0
    };
    let by = 0.01 / square;
    let (above, below) = (moved(by), moved(-2.0 * by));
    moved(by);
    let slope = (above - below) / (2.0 * by);
    assert!((slope / square - 1.0).abs() < 0.01, "{slope}, not {square}");
}

#[test]
fn gradients_by_layer_are_those_of_all_layers() {
    let untied = ModelConfig { tie_word_embeddings: false, ..config() };
    let mut batch = batch(2, 40, 37);
    batch.targets[3..9].fill(IGNORED);
    for (config, recompute) in [(config(), true), (untied, false)] {
        let model = model(config);
        let options = Options { precision: Precision::Bf16, recompute };
        let mut engine = Engine::new(options, true);
        let (expected_loss, expected) = engine.weighted_gradients(&model, &batch, 0.3).unwrap();
        let expected: Gradients =
            expected.iter().map(|(name, g)| (name.clone(), g.copy().unwrap())).collect();
        for _ in 0..2 {
            let mut seen = BTreeSet::new();
            let show = |part: &Gradients| {
                for (name, gradient) in part {
                    assert!(difference(gradient, &expected[name]) < 1e-6, "{name}");
                    assert!(seen.insert(name.clone()), "{name}");
                }
                Ok::<_, candle_core::Error>(())
            };
            let go_on = |_: f32| Ok(true);
            let loss = engine.gradients_by_layer(&model, &batch, 0.3, go_on, show).unwrap();
            assert_eq!(loss, expected_loss);
            assert!(seen.iter().eq(expected.keys()));
        }
        let not = |_: f32| Ok::<_, candle_core::Error>(false);
        let never = |_: &Gradients| panic!("no backward pass was asked for");
        engine.gradients_by_layer(&model, &batch, 0.3, not, never).unwrap();
    }
}

/// The gradients of what is left out are those of a loss that leaves it out.
#[test]
fn dropout_has_the_gradients_of_its_loss() {
    let full = ModelConfig { quantization: Quantization::None, ..config() };
    let dropout = Dropout { share: 0.3, seed: 4 };
    let adapters = adapters(&Projection::ALL).with_dropout(dropout);
    let model = model(full).with_adapters(adapters);
    let batch = batch(2, 20, 37);
    let mut losses = Vec::new();
    for recompute in [false, true] {
        let mut engine = Engine::new(Options { precision: Precision::F32, recompute }, false);
        let (loss, _) = engine.gradients(&model, &batch).unwrap();
        assert_ne!(engine.evaluate(&model, &batch).unwrap(), loss);
        check_slope(&model, || {
            let (loss, gradients) = engine.gradients(&model, &batch).unwrap();
            (f64::from(loss), gradients)
        });
        losses.push(loss);
    }
    assert!((losses[0] - losses[1]).abs() < 1e-4, "{losses:?}");
}

#[test]
fn a_head_in_blocks_is_the_head_as_a_whole() {
    let model = model(ModelConfig { vocab_size: 200, ..config() });
    let batch = batch(2, 40, 200);
    let mut engine = Engine::new(Options { precision: Precision::F32, recompute: false }, true);
    let (loss, whole) = engine.gradients(&model, &batch).unwrap();
    let whole = whole[names::EMBED].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    engine.head.block = 64 * config().hidden_size;
    let (in_blocks, gradients) = engine.gradients(&model, &batch).unwrap();
    assert!((in_blocks - loss).abs() < 1e-5, "{in_blocks}, not {loss}");
    let whole = Tensor::from_vec(whole, (200, config().hidden_size), &Device::Cpu).unwrap();
    assert!(difference(&gradients[names::EMBED], &whole) < 1e-5);
    assert!((engine.evaluate(&model, &batch).unwrap() - loss).abs() < 1e-5);
}

#[test]
fn what_does_not_fit_is_refused() {
    let model = model(config());
    let mut engine = Engine::new(Options { precision: Precision::Auto, recompute: false }, true);
    let error = |batch: &Batch, engine: &mut Engine| {
        engine.gradients(&model, batch).unwrap_err().to_string()
    };
    assert!(error(&batch(1, 141, 37), &mut engine).contains("141 tokens"));
    let mut outside = batch(1, 5, 37);
    outside.targets[2] = 37;
    assert!(error(&outside, &mut engine).contains("id 37 outside"));
}
