//! Runs that are killed again and again, and runs whose disk is full.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::signals::{TRAIN, check_resumed, losses, signal, start};
use super::{Place, Ran};

/// Kills before the run is left in peace, and the time that all of them may take.
const KILLS: usize = 20;
const PATIENCE: Duration = Duration::from_secs(12);

#[test]
fn a_run_killed_at_any_moment_ends_as_if_it_never_had_been() {
    let place = Place::with_data();
    let mut train = TRAIN.to_vec();
    // Checkpoints are frequent, so that many kills fall into the writing or deleting of one.
    train[7] = "train.checkpoint_every=3";
    let begin = Instant::now();
    let mut random = u64::from(std::process::id());
    let mut killed = 0;
    while killed < KILLS && begin.elapsed() < PATIENCE {
        let resume = place.exists("run/config.toml");
        let args = if resume { vec!["train", "run", "--resume"] } else { train.clone() };
        let mut command = place.command(&args);
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        std::thread::sleep(Duration::from_millis(20 + (random >> 33) % 400));
        if child.try_wait().unwrap().is_none() {
            signal(&child, "KILL");
            killed += 1;
        }
        let ran = Ran::of(child.wait_with_output().unwrap());
        // Until it was killed, or unless it came to its end, nothing was wrong.
        assert!(
            !ran.stderr.contains("error:") && !ran.stderr.contains("warning:"),
            "{}",
            ran.stderr
        );
        if ran.code == Some(0) {
            break;
        }
    }
    assert!(killed > 0);
    place.ok(&["train", "run", "--resume"]);
    let mut whole = train.clone();
    whole[9] = "whole";
    place.ok(&whole);
    assert_eq!(losses(&place, "run"), losses(&place, "whole"), "after {killed} kills");
    for file in ["model.safetensors", "optimizer.safetensors", "trainer_state.json"] {
        let last = |run: &str| place.read(&format!("{run}/checkpoints/step-000400/{file}"));
        assert!(last("run") == last("whole"), "{file} after {killed} kills");
    }
    assert_eq!(place.leftovers(), [""; 0]);
}

#[test]
fn a_full_disk_ends_a_run_that_can_go_on_when_there_is_room() {
    let place = Place::with_data();
    let mut child = start(&place);
    signal(&child, "KILL");
    child.wait().unwrap();
    // A limit on the size of files stands for the full disk: the model of a checkpoint is larger,
    // everything else that a step writes is smaller.
    let limited = "trap '' XFSZ; ulimit -f 200; exec \"$0\" train run --resume";
    let mut command = Command::new("sh");
    command.args(["-c", limited, env!("CARGO_BIN_EXE_trine")]).current_dir(place.0.path());
    let ran = Ran::of(command.stdin(Stdio::null()).output().unwrap());
    ran.check_refused(&["train"], &["checkpoints/step-", "model.safetensors", "too large"]);
    assert_eq!(place.leftovers(), [""; 0]);
    check_resumed(&place);
}
