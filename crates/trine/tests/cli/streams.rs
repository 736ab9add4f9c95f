//! Standard streams that close early or are full, and the environment.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use super::{FIXTURE, Place, Ran};

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let place = Place::new();
    let long = ["run", FIXTURE, "-n", "400", "--ignore-eos"];
    for args in [&long[..], &["inspect", FIXTURE], &["completions", "bash"]] {
        let mut child =
            place.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut reader = BufReader::new(child.stdout.take().unwrap());
        reader.read_until(b'\n', &mut Vec::new()).unwrap();
        drop(reader);
        let output = child.wait_with_output().unwrap();
        let ran = Ran::of(output);
        assert_eq!(ran.code, Some(0), "{args:?}: {}", ran.stderr);
        assert!(!ran.stderr.contains("error"), "{args:?}: {}", ran.stderr);
    }
}

#[test]
fn a_run_does_not_die_because_nobody_watches_it() {
    let place = Place::with_data();
    let args = ["train", "tiny.toml", "--data", "data", "--out", "run"];
    let mut child = place.command(&args).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(place.exists("run/checkpoints/step-000020"));
}

/// Only opened here, never named as a target: see `devices_and_pipes_are_not_replaced`.
#[cfg(target_os = "linux")]
#[test]
fn full_disks_behind_standard_streams() {
    let place = Place::new();
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    let output = place.command(&["inspect", FIXTURE]).stdout(full()).output().unwrap();
    let ran = Ran::of(output);
    ran.check_refused(&["inspect"], &["standard output", "No space left"]);
    let args = ["data", "synth", "corpus.txt", "--bytes", "100"];
    assert_eq!(place.command(&args).stderr(full()).status().unwrap().code(), Some(0));
    assert!(place.exists("corpus.txt"));
}

#[test]
fn prompts_come_from_standard_input_and_may_be_awkward() {
    let place = Place::new();
    let feed = |args: &[&str], input: &[u8]| {
        let mut command = place.command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        Ran::of(child.wait_with_output().unwrap())
    };
    let run = ["run", FIXTURE, "-n", "0", "-p", "-"];
    for prompt in ["", "a\r\nb", "🙂", "<|endoftext|>", "-n 3"] {
        let ran = feed(&run, prompt.as_bytes());
        assert_eq!((ran.code, ran.stdout), (Some(0), format!("{prompt}\n")), "{}", ran.stderr);
    }
    feed(&run, b"\xff").check_refused(&run, &["standard input", "UTF-8"]);
    let long = "word ".repeat(3000);
    feed(&run, long.as_bytes()).check_refused(&run, &["context", "512"]);
    let chat = ["chat", FIXTURE];
    feed(&chat, b"\xff\n").check_refused(&chat, &["standard input", "UTF-8"]);
    assert_eq!(feed(&chat, b"").code, Some(0));
    // An option's value may look like an option.
    assert_eq!(place.ok(&["run", FIXTURE, "-n", "0", "-p", "- item"]), "- item\n");

    place.write("bad.jinja", "{{ raise_exception('not like this') }}");
    let chat = ["chat", FIXTURE, "--chat-template", "bad.jinja"];
    feed(&chat, b"hi\n").check_refused(&chat, &["bad.jinja", "not like this"]);
    place.write("bad.jinja", "{{ oops");
    feed(&chat, b"hi\n").check_refused(&chat, &["bad.jinja", "syntax error"]);
}

#[test]
fn an_instruction_set_that_cannot_be_had_is_refused() {
    let place = Place::new();
    let args = ["run", FIXTURE, "-n", "2"];
    let output = place.command(&args).env("TRINE_ISA", "nonsense").output().unwrap();
    let ran = Ran::of(output);
    ran.check_refused(&args, &["\"nonsense\"", "generic"]);
    assert_eq!(ran.stderr.lines().count(), 1);
    let output = place.command(&args).env("TRINE_ISA", "generic").output().unwrap();
    let generic = Ran::of(output);
    assert!(generic.stderr.contains("generic"), "{}", generic.stderr);
    assert_eq!(generic.stdout, place.ok(&args));
}
