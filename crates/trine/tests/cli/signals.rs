//! Runs that are stopped halfway, gently or not, end as if they never had been.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Place, Ran};

pub(super) const TRAIN: [&str; 10] = [
    "train",
    "tiny.toml",
    "--data",
    "data",
    "--set",
    "train.steps=400",
    "--set",
    "train.checkpoint_every=20",
    "--out",
    "run",
];

pub(super) fn signal(child: &Child, name: &str) {
    let pid = child.id().to_string();
    let sent = Command::new("kill").args(["-s", name, &pid]).status().unwrap();
    assert!(sent.success());
}

/// Starts training and waits until it has made a checkpoint.
pub(super) fn start(place: &Place) -> Child {
    let mut command = place.command(&TRAIN);
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let begin = Instant::now();
    while !place.exists("run/checkpoints/step-000020") {
        assert!(child.try_wait().unwrap().is_none(), "training ended before a checkpoint");
        assert!(begin.elapsed() < Duration::from_secs(60), "no checkpoint in a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

/// The steps a run has logged, without their speed, which differs every time, and without how many
/// trits flipped since the last diagnostics or, in a run that was taken up, since then.
pub(super) fn losses(place: &Place, run: &str) -> Vec<String> {
    let text = String::from_utf8(place.read(&format!("{run}/metrics.jsonl"))).unwrap();
    let strip = |line: &str| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        without(&mut line, &["tokens_per_second", "since", "flips"]);
        line.to_string()
    };
    text.lines().map(strip).collect()
}

/// Removes keys wherever they are.
fn without(value: &mut serde_json::Value, keys: &[&str]) {
    if let Some(map) = value.as_object_mut() {
        map.retain(|key, _| !keys.contains(&key.as_str()));
        map.values_mut().for_each(|value| without(value, keys));
    }
}

/// Finishes an interrupted run and compares it with one that never stopped.
pub(super) fn check_resumed(place: &Place) {
    place.ok(&["train", "run", "--resume"]);
    let mut whole = TRAIN;
    whole[9] = "whole";
    place.ok(&whole);
    assert_eq!(losses(place, "run"), losses(place, "whole"));
    let last = |run: &str| place.read(&format!("{run}/checkpoints/step-000400/model.safetensors"));
    assert_eq!(last("run"), last("whole"));
}

#[test]
fn an_interrupted_run_saves_and_goes_on_as_if_nothing_had_been() {
    let place = Place::with_data();
    let child = start(&place);
    signal(&child, "INT");
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(130), "{}", ran.stderr);
    let at = ran.stderr.lines().last().unwrap();
    assert!(at.starts_with("interrupted at step") && at.ends_with("train run --resume"), "{at}");
    assert_eq!(place.leftovers(), [""; 0]);
    check_resumed(&place);
}

#[test]
fn a_scheduler_stops_a_run_by_sigusr1() {
    let place = Place::with_data();
    let child = start(&place);
    signal(&child, "USR1");
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(130), "{}", ran.stderr);
    let at = ran.stderr.lines().last().unwrap();
    let step = at.strip_prefix("interrupted at step ").and_then(|at| at.split_once(';')).unwrap().0;
    let step: usize = step.parse().unwrap();
    assert!(place.exists(&format!("run/checkpoints/step-{step:06}")), "{at}");
}

#[test]
fn a_killed_run_has_whole_checkpoints_only_and_goes_on() {
    let place = Place::with_data();
    let mut child = start(&place);
    signal(&child, "KILL");
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    let checkpoints = fs::read_dir(place.path("run/checkpoints")).unwrap();
    for entry in checkpoints {
        let name = entry.unwrap().file_name().into_string().unwrap();
        // What a kill leaves in the making is hidden and named as such.
        if !name.starts_with(".trine-") {
            let checkpoint = format!("run/checkpoints/{name}");
            place.ok(&["inspect", &checkpoint]);
            assert!(place.exists(&format!("{checkpoint}/optimizer.safetensors")));
            assert!(place.exists(&format!("{checkpoint}/trainer_state.json")));
        }
    }
    check_resumed(&place);
}
