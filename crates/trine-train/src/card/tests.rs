//! Gradients of several devices, here emulators in threads, against those of one.

use std::path::Path;
use std::thread;

use trine_data::IGNORED;

use super::*;
use crate::parallel::{Alone, Threads};

const RUN: &str = "
name = 'test'
seed = 3
[model]
hidden_size = 64
intermediate_size = 96
num_hidden_layers = 3
num_attention_heads = 2
num_key_value_heads = 1
[data]
seq_len = 16
[train]
precision = 'f32'
device = 'emulator'
";

/// So large that a head of its own is summed by itself.
const VOCAB: usize = 131;

/// What one process has of a step: the sum of losses and all gradients, or why it has none.
type Found = Result<(f64, BTreeMap<String, Vec<f32>>), String>;

fn config(settings: &[&str]) -> RunConfig {
    let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
    RunConfig::parse(RUN, Path::new("test.toml"), &settings).unwrap()
}

/// A sequence, of which nothing is learned where `seed` is 0.
fn part(seed: usize) -> Batch {
    let id = |i: usize| ((i * i * 31 + seed * (i % 7)) % 127) as u32;
    let mut targets: Vec<u32> = (1..=16).map(id).collect();
    let ignored = if seed == 0 { 16 } else { seed % 5 };
    targets[..ignored].fill(IGNORED);
    Batch { inputs: (0..16).map(id).collect(), targets, starts: None, batch: 1, seq_len: 16 }
}

/// One step of a process.
fn step(config: &RunConfig, group: Arc<dyn Group>, meets: bool, parts: &[Batch]) -> Found {
    let of_model = config.model_config(VOCAB, None, None).unwrap();
    let params = Params::init(&of_model, 0.2, config.seed, &Device::Cpu).unwrap();
    let model = Bitnet::new(of_model, params).unwrap();
    let optimizer = Optimizer::new(config.optimizer.clone(), config.seed, model.trained());
    let device = open(config.train.device).unwrap().unwrap();
    let mut card = Card::new(device, config, &model, &optimizer, group).unwrap();
    if meets {
        card.meet().unwrap();
        assert!(card.met);
    }
    // The second one finds what the first one has left.
    card.forward_backward(&model, &[part(9)], 1.0).map_err(|e| e.to_string())?;
    let loss = card.forward_backward(&model, parts, 0.05).map_err(|e| e.to_string())?;
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1().unwrap();
    let gradients = card.gradients(&model).unwrap();
    Ok((loss, gradients.iter().map(|(name, found)| (name.clone(), values(found))).collect()))
}

/// One step of several processes.
fn steps(config: &RunConfig, meet: bool, shares: &[&[Batch]]) -> Vec<Found> {
    thread::scope(|scope| {
        let members = Threads::group(shares.len()).into_iter().zip(shares);
        let one = |(member, parts): (Threads, &&[Batch])| {
            let parts = parts.to_vec();
            scope.spawn(move || step(config, Arc::new(member), meet, &parts))
        };
        let members: Vec<_> = members.map(one).collect();
        members.into_iter().map(|member| member.join().unwrap()).collect()
    })
}

#[test]
fn gradients_summed_beside_the_backward_pass_are_those_summed_after_it_and_of_one_process() {
    let parts: Vec<Batch> = (1..5).map(part).collect();
    let unlearned = [part(0)];
    for settings in [
        &[][..],
        &["model.tie_word_embeddings=false", "train.recompute_activations=true"],
        &["model.quantization=none", "train.precision=bf16", "train.recompute_activations=true"],
    ] {
        let config = config(settings);
        // Two parts, as with `train.accumulate`; and processes that have nothing to add.
        for shares in [&[&parts[..1], &parts[1..2]][..], &[&parts[..2], &unlearned, &parts[2..]]] {
            let what = format!("{} processes, {settings:?}", shares.len());
            let beside = steps(&config, true, shares);
            assert_eq!(beside[0].as_ref().err(), None, "{what}");
            assert!(beside.iter().all(|found| *found == beside[0]), "{what}: they differ");
            assert!(beside == steps(&config, false, shares), "{what}: not as by way of the hosts");

            let (loss, gradients) = beside[0].as_ref().unwrap();
            let one = step(&config, Arc::new(Alone), false, &shares.concat());
            let (expected_loss, expected) = one.unwrap();
            assert!((loss / expected_loss - 1.0).abs() < 1e-9, "{what}: {loss}, {expected_loss}");
            for (name, expected) in expected {
                let pairs = gradients[&name].iter().zip(&expected);
                let error: f32 = pairs.map(|(a, b)| (a - b) * (a - b)).sum();
                let size: f32 = expected.iter().map(|x| x * x).sum();
                assert!(size > 0.0 && error <= 1e-10 * size, "{what}, {name}: {error} of {size}");
            }
        }
    }
}

#[test]
fn a_process_that_fails_in_its_pass_ends_the_sums_of_the_others() {
    let mut outside = part(2);
    outside.inputs[3] = VOCAB as u32;
    let (good, bad) = ([part(1)], [outside]);
    let found = steps(&config(&[]), true, &[&good, &bad, &good]);
    let errors: Vec<_> = found.into_iter().map(|found| found.unwrap_err()).collect();
    assert!(errors[1].contains("an id: expected below 131, found 131"), "{}", errors[1]);
    for other in [&errors[0], &errors[2]] {
        assert!(other.contains("another process has ended"), "{other}");
    }
}
