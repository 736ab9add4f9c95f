//! Runs that are cut in two, with every way of updating parameters, against runs that are not; and
//! what checkpoints are worth when files are damaged.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use trine_data::Dataset;
use trine_format::{Dtype, ModelFile};
use trine_train::trainer::Observer;
use trine_train::{RunConfig, TrainError, Trainer, checkpoint};

use common::{Watch, dataset};

// Projections of at least 4096 elements, so that 8-bit moments are 8-bit.
const CONFIG: &str = "
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
second_learning_rate = 5e-3
[train]
steps = 10
batch_size = 4
eval_every = 5
checkpoint_every = 5
";

fn config(settings: &[&str]) -> RunConfig {
    let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
    RunConfig::parse(CONFIG, Path::new("test.toml"), &settings).unwrap()
}

fn create(config: &RunConfig, run: &Path) -> Trainer {
    Trainer::create(config.clone(), dataset(&run.join("data")), run).unwrap()
}

fn resume(config: &RunConfig, run: &Path) -> Result<Trainer, TrainError> {
    Trainer::resume(config.clone(), Dataset::open(&run.join("data")).unwrap(), run)
}

/// Every master, bit by bit.
fn masters(trainer: &Trainer) -> BTreeMap<String, Vec<u32>> {
    let bits = |var: &candle_core::Var| -> Vec<u32> {
        let values = var.to_dtype(candle_core::DType::F32).unwrap();
        let values = values.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    trainer.model().params().iter().map(|(name, var)| (name.to_owned(), bits(var))).collect()
}

/// The metrics without what the clock says.
fn metrics(run: &Path) -> Vec<String> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        line.as_object_mut().unwrap().remove("tokens_per_second");
        line.to_string()
    };
    text.lines().map(line).collect()
}

/// Ways to update parameters that must all resume exactly.
const WAYS: [&[&str]; 9] = [
    &["train.device=emulator", "optimizer.kind=muon"],
    &["train.device=emulator", "optimizer.masters=bf16", "train.accumulate=2"],
    &[],
    &["optimizer.kind=muon"],
    &["optimizer.moments=int8"],
    &["optimizer.kind=muon", "optimizer.moments=int8"],
    &["optimizer.masters=bf16"],
    &[
        "optimizer.masters=bf16",
        "optimizer.moments=int8",
        "optimizer.clip_grad_norm=0",
        "train.update_in_backward=true",
    ],
    &["train.accumulate=3", "train.batch_warmup_steps=7", "schedule.kind=wsd"],
];

#[test]
fn ten_steps_are_four_and_six_bit_for_bit() {
    for way in WAYS {
        let dir = tempfile::tempdir().unwrap();
        let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
        let config = config(way);
        let mut expected = Watch::default();
        let mut trainer = create(&config, &whole);
        trainer.run(&mut expected).unwrap();
        let expected_masters = masters(&trainer);

        let mut first = Watch { stop_after: Some(4), ..Watch::default() };
        create(&config, &parts).run(&mut first).unwrap();
        let mut trainer = resume(&config, &parts).unwrap();
        let mut second = Watch::default();
        assert!(trainer.run(&mut second).unwrap().finished);

        let losses: Vec<f32> = first.losses.iter().chain(&second.losses).copied().collect();
        assert_eq!(losses, expected.losses, "{way:?}");
        assert_eq!(masters(&trainer), expected_masters, "{way:?}");
        assert_eq!(metrics(&parts), metrics(&whole), "{way:?}");
        let state = |run: &Path| checkpoint::read_state(&checkpoint::latest(run).unwrap()).unwrap();
        assert_eq!(state(&parts), state(&whole), "{way:?}");
    }
}

#[test]
fn a_stop_at_the_step_of_a_validation_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let config = config(&["train.checkpoint_every=4"]);
    create(&config, &whole).run(&mut ()).unwrap();
    create(&config, &parts).run(&mut Watch { stop_after: Some(5), ..Watch::default() }).unwrap();
    resume(&config, &parts).unwrap().run(&mut ()).unwrap();
    assert_eq!(metrics(&parts), metrics(&whole));
}

#[test]
fn every_way_of_updating_learns() {
    // What a card does is compared with a CPU elsewhere.
    for way in WAYS.into_iter().filter(|way| !way.contains(&"train.device=emulator")) {
        let dir = tempfile::tempdir().unwrap();
        let mut watch = Watch::default();
        let config = config(&[way, &["train.steps=60"]].concat());
        create(&config, dir.path()).run(&mut watch).unwrap();
        let (first, last) = (watch.losses[0], watch.losses[59]);
        assert!(last < 0.5 * first, "{way:?}: {first} to {last}");
    }
}

#[test]
fn bf16_masters_are_stored_as_they_are_in_half_the_space() {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = create(&config(&["optimizer.masters=bf16"]), dir.path());
    let outcome = trainer.run(&mut ()).unwrap();
    let file = ModelFile::open(&outcome.checkpoint).unwrap();
    for (name, bits) in masters(&trainer) {
        let stored = file.dense(&name).unwrap();
        assert_eq!(stored.dtype, Dtype::BF16);
        let stored: Vec<u32> = stored.to_f32().into_iter().map(f32::to_bits).collect();
        assert_eq!(stored, bits, "{name}");
    }
}

#[test]
fn parts_of_a_batch_make_the_update_of_the_whole_batch() {
    let run = |settings: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let mut watch = Watch::default();
        // In full precision: a trit that flips over float noise would be a step of its own.
        let exact = ["model.quantization=none", "train.precision=f32", "train.steps=5"];
        let settings = [settings, &exact].concat();
        create(&config(&settings), dir.path()).run(&mut watch).unwrap();
        watch.losses
    };
    let whole = run(&[]);
    for parts in ["train.accumulate=2", "train.accumulate=3", "train.accumulate=4"] {
        for (found, expected) in run(&[parts]).iter().zip(&whole) {
            assert!((found - expected).abs() < 2e-5 * expected, "{parts}: {found}, not {expected}");
        }
    }
}

#[test]
fn a_growing_batch_reads_every_sequence_once() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&["train.batch_warmup_steps=6", "train.batch_start=1"]);
    let mut trainer = create(&config, dir.path());
    trainer.run(&mut ()).unwrap();
    let lines = metrics(dir.path());
    let lines = lines.iter().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    let sizes: Vec<u64> = lines.filter_map(|l| l["batch_size"].as_u64()).collect();
    assert_eq!(sizes, [1, 1, 2, 2, 3, 3, 4, 4, 4, 4]);
    assert_eq!(trainer.state().tokens, sizes.iter().sum::<u64>() * 16);
}

/// Changes one byte in the middle of a file.
fn damage(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_an_older_one_and_the_run_ends_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, run) = (dir.path().join("whole"), dir.path().join("run"));
    let config = config(&[]);
    create(&config, &whole).run(&mut ()).unwrap();
    create(&config, &run).run(&mut ()).unwrap();
    let last = checkpoint::latest(&run).unwrap();
    damage(&last.join("optimizer.safetensors"));

    let mut trainer = resume(&config, &run).unwrap();
    assert_eq!(trainer.state().step, 5);
    let mut watch = Watch::default();
    trainer.run(&mut watch).unwrap();
    let [warning] = &watch.warnings[..] else { panic!("{:?}", watch.warnings) };
    for name in ["step-000010", "optimizer.safetensors", "damaged", "step 5"] {
        assert!(warning.contains(name), "{warning}");
    }
    assert_eq!(metrics(&run), metrics(&whole));
    checkpoint::verify(&last).unwrap();
}

#[test]
fn a_run_of_damaged_checkpoints_only_is_refused_with_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&[]);
    create(&config, dir.path()).run(&mut ()).unwrap();
    damage(&checkpoint::path_of_step(dir.path(), 5).join("model.safetensors"));
    fs::remove_file(checkpoint::path_of_step(dir.path(), 10).join("config.json")).unwrap();
    let error = resume(&config, dir.path()).err().unwrap().to_string();
    assert!(error.contains("step-000010") && error.contains("config.json"), "{error}");
}

#[test]
fn a_run_killed_before_its_first_checkpoint_begins_again() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, run) = (dir.path().join("whole"), dir.path().join("run"));
    let config = config(&[]);
    create(&config, &whole).run(&mut ()).unwrap();
    drop(create(&config, &run));
    fs::write(run.join("metrics.jsonl"), "{\"step\":1,\"loss\":3.0}\n{\"step\":").unwrap();
    resume(&config, &run).unwrap().run(&mut ()).unwrap();
    assert_eq!(metrics(&run), metrics(&whole));
    // One that had come further and lost its checkpoints does not: its metrics would be lost too.
    fs::remove_dir_all(run.join("checkpoints")).unwrap();
    let error = resume(&config, &run).err().unwrap().to_string();
    assert!(error.contains("no checkpoint"), "{error}");
}

#[test]
fn old_checkpoints_go_and_the_best_stays() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&["train.steps=30", "train.keep_last=1", "train.checkpoint_every=3"]);
    let mut trainer = create(&config, dir.path());
    trainer.run(&mut ()).unwrap();
    let (step, _) = trainer.state().best.unwrap();
    let best = checkpoint::best(dir.path()).unwrap();
    assert_eq!(best, checkpoint::path_of_step(dir.path(), step));
    let kept = fs::read_dir(dir.path().join("checkpoints")).unwrap().count();
    assert_eq!(kept, if step == 30 { 1 } else { 2 });
}

#[test]
fn two_processes_do_not_train_in_one_directory() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&[]);
    let mut trainer = create(&config, dir.path());
    struct Second<'a>(&'a RunConfig, &'a Path, Option<String>);
    impl Observer for Second<'_> {
        fn on_checkpoint(&mut self, _path: &Path) {
            let error = resume(self.0, self.1).unwrap().run(&mut ()).unwrap_err();
            self.2 = Some(error.to_string());
        }
    }
    let mut second = Second(&config, dir.path(), None);
    trainer.run(&mut second).unwrap();
    assert!(second.2.unwrap().contains("another process"));
}

#[test]
fn a_run_says_what_it_was_made_with() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&[]);
    create(&config, dir.path())
        .run(&mut Watch { stop_after: Some(4), ..Watch::default() })
        .unwrap();
    resume(&config, dir.path()).unwrap().run(&mut ()).unwrap();
    let text = fs::read(dir.path().join("run.json")).unwrap();
    let about: serde_json::Value = serde_json::from_slice(&text).unwrap();
    for key in ["data_hash", "code_version", "command", "cores", "isa"] {
        assert!(!about[key].is_null(), "{key}");
    }
    assert_eq!(about["resumed"][0]["step"], 4);
    assert_eq!(about["resumed"][0]["command"], about["command"]);
}
