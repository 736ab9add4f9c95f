//! Batches that must not be learned from: skipped, gone around, or the end of the run; and all of it
//! the same again after a resumption.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use trine_data::Dataset;
use trine_tokenizer::Tokenizer;
use trine_train::trainer::{Action, Anomaly, Observer, StepReport};
use trine_train::{RunConfig, TrainError, Trainer};

const CONFIG: &str = "
name = 'test'
seed = 3
[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
[data]
seq_len = 16
[optimizer]
learning_rate = 1e-2
[schedule]
kind = 'constant'
warmup_steps = 3
[train]
steps = 60
batch_size = 2
eval_every = 1000
checkpoint_every = 10
keep_last = 0
spike_window = 8
spike_sigmas = 4.0
[diagnostics]
every = 0
";

fn config(settings: &[&str]) -> RunConfig {
    let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
    RunConfig::parse(CONFIG, Path::new("test.toml"), &settings).unwrap()
}

/// A text that is easily learned, with one place that is quite another language.
fn dataset(dir: &Path) -> Dataset {
    // Eleven letters do not divide a window, so that windows differ.
    let easy = "abcdefghijk".repeat(360);
    let text = format!("{}{}{}", &easy[..2400], "zyxwzzyyxxwwzxyw".repeat(2), &easy[2400..]);
    let tokenizer = Tokenizer::characters(&text).unwrap();
    fs::create_dir_all(dir).unwrap();
    Dataset::from_text(dir, &tokenizer, &text, 0.1).unwrap()
}

fn create(config: &RunConfig, run: &Path) -> Trainer {
    Trainer::create(config.clone(), dataset(&run.join("data")), run).unwrap()
}

fn resume(config: &RunConfig, run: &Path) -> Trainer {
    let data = Dataset::open(&run.join("data")).unwrap();
    Trainer::resume(config.clone(), data, run).unwrap()
}

#[derive(Default)]
struct Watch {
    stop_at: Option<usize>,
    steps: Vec<(usize, f32)>,
    anomalies: Vec<Anomaly>,
}

impl Observer for Watch {
    fn on_step(&mut self, report: &StepReport) {
        self.steps.push((report.step, report.loss));
    }
    fn on_anomaly(&mut self, anomaly: &Anomaly) {
        self.anomalies.push(anomaly.clone());
    }
    fn should_stop(&mut self) -> bool {
        self.stop_at.is_some_and(|step| self.steps.last().is_some_and(|last| last.0 == step))
    }
}

fn lines(run: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        line.as_object_mut().unwrap().remove("tokens_per_second");
        line
    };
    text.lines().map(line).collect()
}

#[test]
fn a_spike_is_skipped_reported_and_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let mut watch = Watch::default();
    let mut trainer = create(&config(&[]), dir.path());
    assert!(trainer.run(&mut watch).unwrap().finished);
    assert!(!watch.anomalies.is_empty(), "{:?}", watch.steps);
    for anomaly in &watch.anomalies {
        assert_eq!(anomaly.action, Action::Skipped);
        assert!(anomaly.what.contains("standard deviations"), "{}", anomaly.what);
        assert!(trainer.model().params().get(&anomaly.parameter).is_ok());
        assert!(watch.steps.iter().all(|(step, _)| *step != anomaly.step));
    }
    let skipped = watch.anomalies.len();
    assert_eq!(trainer.state().updates, 60 - skipped);
    let events: Vec<_> =
        lines(dir.path()).into_iter().filter(|line| line["event"] == "skip").collect();
    assert_eq!(events.len(), skipped);
    assert_eq!(events[0]["step"], watch.anomalies[0].step);
    assert_eq!(events[0]["parameter"], watch.anomalies[0].parameter.as_str());
}

#[test]
fn a_rewind_goes_around_the_spike() {
    let dir = tempfile::tempdir().unwrap();
    let mut watch = Watch::default();
    let mut trainer = create(&config(&["train.on_spike=rewind"]), dir.path());
    assert!(trainer.run(&mut watch).unwrap().finished);
    let first = &watch.anomalies[0];
    let to = (first.step - 1) / 10 * 10;
    assert_eq!(first.action, Action::Rewound { to });
    // The steps since the checkpoint were made again, with other data, and logged once.
    let losses = |step| watch.steps.iter().filter(move |s| s.0 == step).map(|s| s.1);
    let again: Vec<f32> = losses(to + 1).collect();
    assert!(again.len() >= 2 && again[0] != again[1], "{again:?}");
    assert!(trainer.state().skipped_sequences >= 2 * (first.step - to) as u64);
    assert_eq!(trainer.state().updates, 60);
    let logged = lines(dir.path());
    for step in 1..=60 {
        let steps = logged.iter().filter(|l| l["step"] == step && l["event"].is_null());
        assert_eq!(steps.filter(|l| l["val_loss"].is_null()).count(), 1, "{step}");
    }
    assert!(logged.iter().any(|l| l["event"] == "rewind" && l["from"] == first.step));
}

#[test]
fn what_a_spike_led_to_happens_again_after_a_resumption() {
    for policy in ["train.on_spike=skip", "train.on_spike=rewind"] {
        let dir = tempfile::tempdir().unwrap();
        let whole = dir.path().join("whole");
        let config = config(&[policy]);
        let mut expected = Watch::default();
        create(&config, &whole).run(&mut expected).unwrap();
        let spike = expected.anomalies[0].step;
        // Stopped before the spike and soon after it. A stop is a checkpoint, which a later rewind
        // goes back to, so only runs that skip are the same with and without.
        for stop in [spike - 1, spike + 1] {
            if policy.ends_with("rewind") {
                continue;
            }
            let parts = dir.path().join(format!("parts-{stop}"));
            let mut watch = Watch { stop_at: Some(stop), ..Watch::default() };
            create(&config, &parts).run(&mut watch).unwrap();
            resume(&config, &parts).run(&mut ()).unwrap();
            assert_eq!(lines(&parts), lines(&whole), "stopped at {stop}");
        }
        // Killed: no checkpoint but those that the whole run has.
        let killed = dir.path().join("killed");
        let mut watch = Watch { stop_at: Some(spike + 1), ..Watch::default() };
        create(&config, &killed).run(&mut watch).unwrap();
        let stopped = killed.join(format!("checkpoints/step-{:06}", spike + 1));
        if (spike + 1) % 10 != 0 {
            fs::remove_dir_all(stopped).unwrap();
        }
        resume(&config, &killed).run(&mut ()).unwrap();
        assert_eq!(lines(&killed), lines(&whole), "{policy}");
    }
}

#[test]
fn a_spike_stops_the_run_where_it_is_told_to_and_another_policy_gets_over_it() {
    let dir = tempfile::tempdir().unwrap();
    let stop = config(&["train.on_spike=stop"]);
    let error = create(&stop, dir.path()).run(&mut ()).unwrap_err();
    assert!(matches!(error, TrainError::Diverged { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("standard deviations") && text.contains("weight"), "{text}");
    let mut watch = Watch::default();
    assert!(resume(&config(&[]), dir.path()).run(&mut watch).unwrap().finished);
    assert!(!watch.anomalies.is_empty());
}

#[test]
fn a_run_that_only_spikes_ends_after_so_many_skips_or_rewinds() {
    for (policy, word) in [("skip", "batches skipped"), ("rewind", "rewinds")] {
        let dir = tempfile::tempdir().unwrap();
        let settings = [
            "optimizer.learning_rate=1e30",
            "model.quantization=none",
            "train.spike_limit=3",
            &format!("train.on_spike={policy}"),
        ];
        let mut watch = Watch::default();
        let error = create(&config(&settings), dir.path()).run(&mut watch).unwrap_err();
        assert!(matches!(error, TrainError::Diverged { .. }), "{error}");
        assert!(error.to_string().contains(word), "{error}");
        assert_eq!(watch.anomalies.len(), 3);
    }
}

#[test]
fn a_rewind_to_the_beginning_is_the_same_on_a_device() {
    let run = |device: &str| {
        let dir = tempfile::tempdir().unwrap();
        let settings =
            ["train.on_spike=rewind", "train.checkpoint_every=1000", "train.precision=f32"];
        let settings = [&settings[..], &["train.steps=40", device]].concat();
        let mut watch = Watch::default();
        // Where it spikes again, it may end.
        let _ = create(&config(&settings), dir.path()).run(&mut watch);
        watch
    };
    let (expected, found) = (run("train.device=cpu"), run("train.device=emulator"));
    let first = |watch: &Watch| (watch.anomalies[0].step, watch.anomalies[0].action);
    assert_eq!(first(&expected).1, Action::Rewound { to: 0 });
    assert_eq!(first(&found), first(&expected));
    // Up to the spike, and some steps from the beginning on, with moments that are zero again.
    let steps = first(&expected).0 + 5;
    for ((step, found), (at, expected)) in found.steps.iter().zip(&expected.steps).take(steps) {
        assert_eq!(step, at);
        assert!((found / expected - 1.0).abs() < 1e-2, "step {step}: {found} for {expected}");
    }
    assert!(found.steps.len() >= steps && expected.steps.len() >= steps);
}
