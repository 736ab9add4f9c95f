//! Whole runs: learning, resuming, stopping, refusing.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use trine_data::{Dataset, Mixture};
use trine_format::ModelFile;
use trine_tokenizer::Tokenizer;
use trine_train::{RunConfig, TrainError, Trainer, checkpoint};

use common::Watch;

const CONFIG: &str = "
name = 'test'
seed = 3
[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
[data]
seq_len = 16
[optimizer]
learning_rate = 1e-2
[schedule]
warmup_steps = 5
second_learning_rate = 5e-3
[train]
steps = 60
batch_size = 4
eval_every = 25
checkpoint_every = 20
";

fn config() -> RunConfig {
    RunConfig::parse(CONFIG, Path::new("test.toml"), &[]).unwrap()
}

fn dataset(dir: &Path) -> Dataset {
    let text = "the cat sat on the mat and the dog ate the hat. ".repeat(60);
    let tokenizer = Tokenizer::characters(&text).unwrap();
    std::fs::create_dir_all(dir).unwrap();
    Dataset::from_text(dir, &tokenizer, &text, 0.1).unwrap()
}

#[test]
fn a_run_learns_and_leaves_everything_behind() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let mut watch = Watch::default();
    let mut trainer = Trainer::create(config(), dataset(&run.join("data")), &run).unwrap();
    let outcome = trainer.run(&mut watch).unwrap();
    assert!(outcome.finished);
    assert_eq!(watch.losses.len(), 60);
    assert_eq!(watch.validations.len(), 3);
    assert!(watch.losses[59] < 0.5 * watch.losses[0], "{:?}", watch.losses);
    // What was left to the machine is written down as it was chosen.
    let mut resolved = config();
    resolved.train.precision = resolved.train.precision.resolved(true);
    assert_eq!(RunConfig::load(&run.join("config.toml"), &[]).unwrap(), resolved);
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    // 60 steps, 3 validations, diagnostics at step 50.
    assert_eq!(metrics.lines().count(), 64);
    for line in metrics.lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap();
    }
    // The checkpoint is a model that anybody opens, with the trainer's own masters.
    let file = ModelFile::open(&outcome.checkpoint).unwrap();
    assert!(file.tokenizer().is_some());
    for (name, var) in trainer.model().params().iter() {
        let values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(file.dense(name).unwrap().to_f32(), values, "{name}");
    }
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let mut expected = Watch::default();
    let mut trainer = Trainer::create(config(), dataset(&whole.join("data")), &whole).unwrap();
    trainer.run(&mut expected).unwrap();

    let mut first = Watch { stop_after: Some(33), ..Watch::default() };
    let mut trainer = Trainer::create(config(), dataset(&parts.join("data")), &parts).unwrap();
    let outcome = trainer.run(&mut first).unwrap();
    assert!(!outcome.finished);
    assert_eq!(outcome.state.step, 33);
    assert_eq!(checkpoint::latest(&parts), Some(outcome.checkpoint));

    // As a killed process leaves it: steps after the checkpoint, and half a line.
    let metrics = parts.join("metrics.jsonl");
    let mut text = std::fs::read_to_string(&metrics).unwrap();
    text.push_str("{\"step\":34,\"loss\":1.0}\n{\"st");
    std::fs::write(&metrics, text).unwrap();

    let mut second = Watch::default();
    let data = Dataset::open(&parts.join("data")).unwrap();
    let mut trainer = Trainer::resume(config(), data, &parts).unwrap();
    assert!(trainer.run(&mut second).unwrap().finished);
    let together: Vec<f32> = first.losses.iter().chain(&second.losses).copied().collect();
    assert_eq!(together, expected.losses);
    let losses = |dir: &Path| -> Vec<(u64, String)> {
        let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        let line = |line: &str| {
            let v: serde_json::Value = serde_json::from_str(line).unwrap();
            (v["step"].as_u64().unwrap(), format!("{} {}", v["loss"], v["val_loss"]))
        };
        text.lines().map(line).collect()
    };
    assert_eq!(losses(&parts), losses(&whole));
}

#[test]
fn what_is_watched_changes_nothing_and_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, config: RunConfig| {
        let (run, mut watch) = (dir.path().join(name), Watch::default());
        let data = dataset(&run.join("data"));
        Trainer::create(config, data, &run).unwrap().run(&mut watch).unwrap();
        watch
    };
    let mut quiet = config();
    quiet.diagnostics.every = 0;
    let mut watched = config();
    watched.diagnostics.every = 20;
    watched.diagnostics.tensorboard = true;
    watched.samples.every = 25;
    watched.samples.prompts = vec!["the cat".to_owned(), "a".to_owned()];
    watched.samples.temperature = 0.0;
    let (quiet, watched) = (run("quiet", quiet), run("watched", watched));
    assert_eq!(quiet.losses, watched.losses);
    assert!(quiet.collected.is_empty() && quiet.samples.is_empty());

    let steps: Vec<_> =
        watched.collected.iter().map(|(step, found)| (*step, found.since)).collect();
    assert_eq!(steps, [(20, Some(0)), (40, Some(20)), (60, Some(40))]);
    for (_, found) in &watched.collected {
        assert_eq!(found.layers.len(), 14);
        let all = &found.all;
        let shares = [all.negative, all.zero, all.positive].map(Option::unwrap);
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{shares:?}");
        assert!(all.flips.unwrap() > 0.0, "training flips trits");
    }
    // Taken at the last step too, and by then the text has been learned.
    let steps: Vec<_> = watched.samples.iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, [25, 50, 60]);
    let last = &watched.samples[2].1;
    assert_eq!((last.len(), last[0].prompt.as_str()), (2, "the cat"));
    assert_eq!(last[0].text.chars().count(), 16 - 7, "up to the positions: {last:?}");
}

#[test]
fn a_run_in_the_way_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    Trainer::create(config(), dataset(&run.join("data")), &run).unwrap();
    let data = Dataset::open(&run.join("data")).unwrap();
    let error = Trainer::create(config(), data, &run).err().unwrap();
    assert!(matches!(error, TrainError::RunDir { .. }), "{error}");
}

#[test]
fn a_checkpoint_of_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let mut trainer = Trainer::create(config(), dataset(&run.join("data")), &run).unwrap();
    trainer.save().unwrap();
    trainer.run(&mut Watch { stop_after: Some(1), ..Watch::default() }).unwrap();
    let mut other = config();
    other.model.intermediate_size = 64;
    std::fs::write(run.join("config.toml"), other.to_toml()).unwrap();
    let data = Dataset::open(&run.join("data")).unwrap();
    let error = Trainer::resume(other, data, &run).err().unwrap();
    assert!(matches!(error, TrainError::Checkpoint { .. }), "{error}");
}

#[test]
fn an_exploding_run_stops_and_keeps_a_checkpoint_to_go_on_from() {
    for quantization in ["ternary", "none"] {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let overrides = [
            "optimizer.learning_rate=1e30".to_owned(),
            "train.checkpoint_every=1".to_owned(),
            format!("model.quantization={quantization}"),
        ];
        let config = RunConfig::parse(CONFIG, Path::new("test.toml"), &overrides).unwrap();
        let data = dataset(&run.join("data"));
        let error = Trainer::create(config.clone(), data, &run).unwrap().run(&mut ()).unwrap_err();
        assert!(matches!(error, TrainError::Diverged { .. }), "{quantization}: {error}");
        let data = Dataset::open(&run.join("data")).unwrap();
        let resumed = Trainer::resume(config, data, &run).unwrap();
        for (name, var) in resumed.model().params().iter() {
            let values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(values.iter().all(|v| v.is_finite()), "{name}");
        }
    }
}

/// Two corpora of one tokenizer that differ in length, with weights.
fn mixture(dir: &Path, weights: [f64; 2]) -> Mixture {
    let texts = [
        "the cat sat on the mat and the dog ate the hat. ".repeat(20),
        "a hat, a mat, a cat: the dog sat on them. ".repeat(35),
    ];
    let tokenizer = Tokenizer::characters(&texts.concat()).unwrap();
    let sources = [0, 1].map(|i| {
        let path = dir.join(format!("data{i}"));
        Dataset::from_text(&path, &tokenizer, &texts[i], 0.1).unwrap();
        (path, weights[i])
    });
    Mixture::open(&sources).unwrap()
}

#[test]
fn a_mixture_resumes_in_the_middle_of_an_epoch_with_the_same_losses() {
    let dir = tempfile::tempdir().unwrap();
    let data = |weights| mixture(dir.path(), weights);
    let weights = [3.0, 2.0];
    let mut whole = Watch::default();
    let run = dir.path().join("whole");
    Trainer::create(config(), data(weights), &run).unwrap().run(&mut whole).unwrap();

    let run = dir.path().join("parts");
    let (mut losses, mut validations) = (Vec::new(), Vec::new());
    for stop_after in [Some(7), Some(10), Some(24), None] {
        let mut trainer = match losses.is_empty() {
            true => Trainer::create(config(), data(weights), &run).unwrap(),
            false => Trainer::resume(config(), data(weights), &run).unwrap(),
        };
        // Neither source has an epoch of so many samples.
        assert!(trainer.batches().windows() > 7 * 4);
        let mut watch = Watch { stop_after, ..Watch::default() };
        trainer.run(&mut watch).unwrap();
        losses.extend(watch.losses);
        validations.extend(watch.validations);
    }
    assert_eq!(losses, whole.losses);
    assert_eq!(validations, whole.validations);
    // Other weights are other batches.
    let run = dir.path().join("other");
    let mut other = Watch::default();
    Trainer::create(config(), data([1.0, 9.0]), &run).unwrap().run(&mut other).unwrap();
    assert_ne!(other.losses, whole.losses);
}

#[test]
fn validation_reports_each_source_and_their_mean() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let mut trainer = Trainer::create(config(), mixture(dir.path(), [1.0, 1.0]), &run).unwrap();
    let (mean, sources) = trainer.validate_sources().unwrap();
    assert_eq!(trainer.validate().unwrap(), mean);
    let rows = [0, 1].map(|i| {
        let val = Dataset::open(&dir.path().join(format!("data{i}"))).unwrap().val;
        ((val.len() - 1) / 16) as f32
    });
    let expected = (sources[0] * rows[0] + sources[1] * rows[1]) / (rows[0] + rows[1]);
    assert!((mean - expected).abs() < 1e-5 && sources[0] != sources[1], "{mean} {sources:?}");
    trainer.run(&mut ()).unwrap();
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let losses = metrics.lines().filter(|line| line.contains("val_losses")).count();
    assert_eq!(losses, 3, "{metrics}");
}

#[test]
fn documents_are_told_apart_where_the_tokenizer_can() {
    let dir = tempfile::tempdir().unwrap();
    let masked = ["data.document_mask=true".to_owned()];
    let masked = RunConfig::parse(CONFIG, Path::new("test.toml"), &masked).unwrap();
    let data = dataset(&dir.path().join("text"));
    let error = Trainer::create(masked.clone(), data, &dir.path().join("a")).err().unwrap();
    let error = error.to_string();
    assert!(error.contains("`data.document_mask`") && error.contains("tokenizer"), "{error}");

    let documents = || (0..200).map(|i| Ok("word ".repeat(i % 4 + 1)));
    let tokenizer = Tokenizer::bytes();
    let data =
        || Dataset::from_documents(&dir.path().join("d"), &tokenizer, documents(), 0.1).unwrap();
    let trainer = Trainer::create(masked, data(), &dir.path().join("b")).unwrap();
    let batch = trainer.batches().batch(0).unwrap();
    let starts = batch.starts.unwrap();
    assert!(starts.iter().any(|start| *start > 0) && starts.len() == batch.inputs.len());
    let mut held_out = trainer.validation_batches().unwrap();
    assert!(held_out.all(|batch| batch.unwrap().starts.is_some()));
    let trainer = Trainer::create(config(), data(), &dir.path().join("c")).unwrap();
    assert!(trainer.batches().batch(0).unwrap().starts.is_none());
}

#[test]
fn a_run_is_not_resumed_as_another_run() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let mut trainer = Trainer::create(config(), dataset(&run.join("data")), &run).unwrap();
    trainer.run(&mut Watch { stop_after: Some(1), ..Watch::default() }).unwrap();
    let open = || Dataset::open(&run.join("data")).unwrap();
    for setting in ["seed=4", "train.batch_size=5", "optimizer.learning_rate=5e-3"] {
        let other = RunConfig::parse(CONFIG, Path::new("t.toml"), &[setting.to_owned()]).unwrap();
        let error = Trainer::resume(other, open(), &run).err().unwrap().to_string();
        assert!(error.contains(setting.split_once('=').unwrap().0), "{error}");
    }
    let text = "other text of the same letters: the hat sat on the dog and the cat. ".repeat(40);
    let data = open();
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let text: String =
        text.chars().filter(|c| data.tokenizer.encode_plain(&c.to_string()).is_ok()).collect();
    let data = Dataset::from_text(&other, &data.tokenizer, &text, 0.1).unwrap();
    let error = Trainer::resume(config(), data, &run).err().unwrap().to_string();
    assert!(error.contains("data"), "{error}");
    let mut longer = config();
    longer.train.steps = 70;
    assert!(Trainer::resume(longer, open(), &run).is_ok());
}

#[test]
fn data_shorter_than_a_window_is_refused_before_training() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let tokenizer = Tokenizer::characters("ab").unwrap();
    std::fs::create_dir_all(run.join("data")).unwrap();
    let data = Dataset::from_text(&run.join("data"), &tokenizer, "abababab", 0.5).unwrap();
    assert!(matches!(Trainer::create(config(), data, &run), Err(TrainError::Data(_))));
}
