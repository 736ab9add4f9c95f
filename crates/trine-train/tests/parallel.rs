//! Several processes, here threads, that train one run, against one process with the same batch.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use candle_core::DType;
use trine_data::Dataset;
use trine_tokenizer::Tokenizer;
use trine_train::parallel::{Group, Threads};
use trine_train::trainer::{Anomaly, Observer, Outcome, StepReport};
use trine_train::{Bitnet, RunConfig, TrainError, Trainer, checkpoint};

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
[train]
steps = 8
batch_size = 4
eval_every = 4
checkpoint_every = 4
[diagnostics]
every = 4
";

/// Without trits, which flip over float noise, and with gradients in f32.
const EXACT: [&str; 2] = ["model.quantization=none", "train.precision=f32"];

fn config(settings: &[&str]) -> RunConfig {
    let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
    RunConfig::parse(CONFIG, Path::new("test.toml"), &settings).unwrap()
}

/// A text with one place that is quite another language.
fn dataset(run: &Path) {
    let easy = "the cat sat on the mat and the dog ate the hat. ".repeat(60);
    let text = format!("{}{}{}", &easy[..1500], "zyxwzzyyxxwwzxyw".repeat(2), &easy[1500..]);
    let tokenizer = Tokenizer::characters(&text).unwrap();
    let dir = run.join("data");
    fs::create_dir_all(&dir).unwrap();
    Dataset::from_text(&dir, &tokenizer, &text, 0.1).unwrap();
}

/// What a process of a run has seen.
#[derive(Default)]
struct Seen {
    /// Ends the run after so many steps.
    stop_after: Option<usize>,
    /// Changes a parameter after that step.
    spoil_after: Option<usize>,
    losses: Vec<f32>,
    /// A hash of every parameter after every update.
    parameters: Vec<String>,
    validations: Vec<f32>,
    anomalies: Vec<Anomaly>,
    checkpoints: usize,
    diagnostics: usize,
    state: Option<checkpoint::TrainerState>,
}

impl Observer for Seen {
    fn after_update(&mut self, step: usize, model: &Bitnet) {
        let mut hasher = blake3::Hasher::new();
        for (_, var) in model.trained().iter() {
            if self.spoil_after == Some(step) && var.rank() == 1 {
                var.set(&(var.as_tensor() * 1.001).unwrap()).unwrap();
            }
            let values = var.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
            for value in values.to_vec1::<f32>().unwrap() {
                hasher.update(&value.to_le_bytes());
            }
        }
        self.parameters.push(hasher.finalize().to_hex().to_string());
    }
    fn on_step(&mut self, report: &StepReport) {
        self.losses.push(report.loss);
    }
    fn on_validation(&mut self, _step: usize, loss: f32) {
        self.validations.push(loss);
    }
    fn on_anomaly(&mut self, anomaly: &Anomaly) {
        self.anomalies.push(anomaly.clone());
    }
    fn on_checkpoint(&mut self, _path: &Path) {
        self.checkpoints += 1;
    }
    fn on_diagnostics(&mut self, _step: usize, _found: &trine_train::diagnostics::Diagnostics) {
        self.diagnostics += 1;
    }
    fn should_stop(&mut self) -> bool {
        self.stop_after.is_some_and(|steps| self.losses.len() >= steps)
    }
}

/// Lets `size` processes do something together; returns what they return, by rank.
fn all<T: Send>(size: usize, work: impl Fn(Arc<dyn Group>) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let work = &work;
        let members = Threads::group(size).into_iter();
        let members: Vec<_> =
            members.map(|member| scope.spawn(move || work(Arc::new(member)))).collect();
        members.into_iter().map(|member| member.join().unwrap()).collect()
    })
}

/// Trains with so many processes, each watched by what `watch` makes for its rank.
fn train_watched(
    size: usize,
    config: &RunConfig,
    run: &Path,
    resume: bool,
    watch: impl Fn(usize) -> Seen + Sync,
) -> Vec<(Result<Outcome, TrainError>, Seen)> {
    if !resume {
        dataset(run);
    }
    all(size, |group| {
        let mut seen = watch(group.rank());
        let data = Dataset::open(&run.join("data")).unwrap();
        let builder = Trainer::builder().group(group);
        let trainer = match resume {
            true => builder.resume(config.clone(), data, run),
            false => builder.create(config.clone(), data, run),
        };
        let outcome = trainer.and_then(|mut trainer| {
            let outcome = trainer.run(&mut seen)?;
            seen.state = Some(trainer.state().clone());
            Ok(outcome)
        });
        (outcome, seen)
    })
}

/// As [`train_watched`], to the end; what the first process has seen, and what all have seen alike.
fn train(size: usize, config: &RunConfig, run: &Path, resume: bool) -> Seen {
    let mut all = train_watched(size, config, run, resume, |_| Seen::default());
    let (outcome, first) = all.remove(0);
    assert!(outcome.unwrap().finished);
    for (outcome, other) in all {
        assert!(outcome.unwrap().finished);
        assert_eq!(other.parameters, first.parameters, "parameters of all, after every step");
        assert_eq!(other.losses, first.losses);
        assert_eq!(other.validations, first.validations);
        assert_eq!(other.anomalies, first.anomalies);
        assert_eq!(other.state, first.state);
        assert_eq!((other.checkpoints, other.diagnostics), (0, 0), "told by the first alone");
    }
    first
}

fn assert_near(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let apart = (found - expected).abs() / expected;
        assert!(apart < tolerance, "{what}: {found}, not {expected}: {apart:.1e}");
    }
}

fn metrics(run: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Steps, their batches, tokens and rates, validations and events, without what floats and clocks decide.
fn plot(run: &Path) -> Vec<String> {
    let keep = ["step", "batch_size", "tokens", "learning_rate", "event", "from"];
    let line = |line: serde_json::Value| {
        let kept = keep.iter().map(|key| (*key, line[*key].to_string()));
        let validates = ("validates", (!line["val_loss"].is_null()).to_string());
        format!("{:?}", kept.chain([validates]).collect::<BTreeMap<_, _>>())
    };
    metrics(run).into_iter().map(line).collect()
}

#[test]
fn several_processes_train_what_one_trains() {
    for (way, tolerance) in [
        (&EXACT[..], 1e-5),
        (&["model.quantization=none", "train.precision=f32", "train.accumulate=2"], 1e-5),
        // The first batches have fewer sequences than there are processes.
        (
            &[
                "model.quantization=none",
                "train.precision=f32",
                "train.batch_warmup_steps=6",
                "train.batch_start=1",
            ],
            1e-5,
        ),
        (&["model.quantization=none", "train.precision=f32", "optimizer.kind=muon"], 1e-3),
        (&["train.precision=bf16"], 1e-2),
        // Tokens that share a scale of their gradients are others.
        (&["train.precision=int8-all"], 4e-2),
        (&["train.precision=bf16", "optimizer.masters=bf16", "optimizer.moments=int8"], 1e-2),
        // By Candle's graph.
        (&["quantizer.weights=lsq"], 1e-2),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let config = config(way);
        let one = dir.path().join("one");
        let expected = train(1, &config, &one, false);
        for size in [2, 3, 4] {
            let run = dir.path().join(format!("of-{size}"));
            let found = train(size, &config, &run, false);
            let what = format!("{size} processes, {way:?}");
            assert_near(&found.losses, &expected.losses, tolerance, &what);
            assert_near(&found.validations, &expected.validations, tolerance, &what);
            assert_eq!(plot(&run), plot(&one), "{what}");
            assert_eq!(found.checkpoints, expected.checkpoints, "{what}");
            assert_eq!(found.diagnostics, expected.diagnostics, "{what}");
        }
    }
}

#[test]
fn a_run_is_taken_up_by_any_number_of_processes() {
    let dir = tempfile::tempdir().unwrap();
    let (one, run) = (dir.path().join("one"), dir.path().join("run"));
    let config = config(&EXACT);
    let expected = train(1, &config, &one, false);
    // Stopped by a process that is not the first.
    let stop = |rank| Seen { stop_after: (rank == 1).then_some(3), ..Seen::default() };
    for (outcome, seen) in train_watched(2, &config, &run, false, stop) {
        assert!(!outcome.unwrap().finished);
        assert_near(&seen.losses, &expected.losses[..3], 1e-5, "2 processes");
    }
    let stop = |rank| Seen { stop_after: (rank == 0).then_some(2), ..Seen::default() };
    for (outcome, seen) in train_watched(3, &config, &run, true, stop) {
        assert!(!outcome.unwrap().finished);
        assert_near(&seen.losses, &expected.losses[3..5], 1e-5, "then 3");
    }
    let found = train(1, &config, &run, true);
    assert_near(&found.losses, &expected.losses[5..], 1e-5, "then one");
    let steps = |run: &Path| plot(run).into_iter().collect::<Vec<_>>();
    assert_eq!(steps(&run), steps(&one));
    let about = fs::read(run.join("run.json")).unwrap();
    let about: serde_json::Value = serde_json::from_slice(&about).unwrap();
    let resumed: Vec<_> = about["resumed"].as_array().unwrap().iter().map(|r| &r["step"]).collect();
    assert_eq!(resumed, [3, 5], "once each");
}

#[test]
fn processes_decide_alike_about_spikes() {
    let spikes = ["train.spike_window=8", "train.spike_sigmas=4.0", "train.steps=60"];
    for policy in ["train.on_spike=skip", "train.on_spike=rewind"] {
        let dir = tempfile::tempdir().unwrap();
        let more = ["train.eval_every=1000", "train.checkpoint_every=10", policy];
        let config = config(&[&EXACT[..], &spikes, &more].concat());
        let (one, run) = (dir.path().join("one"), dir.path().join("run"));
        let expected = train(1, &config, &one, false);
        let found = train(2, &config, &run, false);
        let when = |seen: &Seen| -> Vec<_> {
            seen.anomalies.iter().map(|anomaly| (anomaly.step, anomaly.action)).collect()
        };
        assert!(!expected.anomalies.is_empty());
        assert_eq!(when(&found), when(&expected), "{policy}");
        assert_eq!(plot(&run), plot(&one), "{policy}");
    }
}

#[test]
fn processes_that_come_apart_end_before_they_save() {
    let dir = tempfile::tempdir().unwrap();
    let spoil = |rank| Seen { spoil_after: (rank == 2).then_some(2), ..Seen::default() };
    for (outcome, _) in train_watched(3, &config(&[]), dir.path(), false, spoil) {
        let error = outcome.unwrap_err();
        let apart = matches!(error, TrainError::Apart { step: 4, differing: 1, size: 3 });
        assert!(apart, "{error}");
    }
    assert!(checkpoint::latest(dir.path()).is_none());
}

#[test]
fn an_error_of_one_process_ends_all() {
    /// Fails at a step, as a process that is killed.
    struct Ends(usize);
    impl Observer for Ends {
        fn after_update(&mut self, step: usize, _model: &Bitnet) {
            if step == self.0 {
                std::panic::resume_unwind(Box::new("killed"));
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    dataset(dir.path());
    let config = config(&[]);
    let ended = all(3, |group| {
        let rank = group.rank();
        let data = Dataset::open(&dir.path().join("data")).unwrap();
        let trainer = Trainer::builder().group(group).create(config.clone(), data, dir.path());
        let mut trainer = trainer.unwrap();
        let run =
            move || trainer.run(&mut Ends(if rank == 1 { 3 } else { usize::MAX })).map(|_| ());
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(run))
    });
    for (rank, ended) in ended.into_iter().enumerate() {
        match ended {
            Ok(ended) => {
                let error = ended.unwrap_err().to_string();
                assert!(error.contains("process 1 has ended"), "{rank}: {error}");
            }
            Err(_) => assert_eq!(rank, 1),
        }
    }
}

#[test]
fn what_several_processes_do_not_do_is_refused_by_its_key() {
    for (settings, key, found) in [
        (
            &["train.update_in_backward=true", "optimizer.clip_grad_norm=0"][..],
            "`train.update_in_backward`",
            "true",
        ),
        (&["train.batch_size=1"], "`train.batch_size`", "found 1"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        for (outcome, _) in
            train_watched(2, &config(settings), dir.path(), false, |_| Seen::default())
        {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(found), "{error}");
            assert!(error.contains("2 processes"), "{error}");
        }
        assert!(!dir.path().join("config.toml").exists());
    }
}

#[test]
fn gradients_on_several_devices_are_added_up() {
    let dir = tempfile::tempdir().unwrap();
    let settings = [&EXACT[..], &["train.device=emulator"]].concat();
    let watch = |_| Seen::default();
    let alone = train_watched(1, &config(&EXACT), &dir.path().join("alone"), false, watch);
    let expected = &alone[0].1;
    for size in [2, 3] {
        let run = dir.path().join(size.to_string());
        let batch = if size == 2 { "train.batch_size=4" } else { "train.batch_size=3" };
        let one = match size {
            2 => None,
            _ => {
                let config = config(&[&EXACT[..], &[batch]].concat());
                Some(train_watched(1, &config, &dir.path().join("other"), false, watch))
            }
        };
        let expected = one.as_ref().map_or(expected, |one| &one[0].1);
        let config = config(&[&settings[..], &[batch]].concat());
        let all = train_watched(size, &config, &run, false, watch);
        let failed = all.iter().filter_map(|(outcome, _)| outcome.as_ref().err());
        assert_eq!(failed.map(ToString::to_string).collect::<Vec<_>>(), [""; 0]);
        for (rank, (_, seen)) in all.iter().enumerate() {
            let found = [&seen.losses[..], &seen.validations].concat();
            let expected = [&expected.losses[..], &expected.validations].concat();
            assert_eq!(found.len(), expected.len(), "process {rank} of {size}");
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found / expected - 1.0).abs() < 1e-4, "{size}: {found} for {expected}");
            }
            assert_eq!(seen.checkpoints > 0, rank == 0);
        }
    }
}
