//! Data, configurations and targets that are not what they should be.

use std::fs;
#[cfg(unix)]
use std::io::Write;

use super::{FIXTURE, Place, TINY};

const TRAIN: [&str; 6] = ["train", "tiny.toml", "--data", "data", "--out", "run"];

#[test]
fn corpora_that_are_no_text_are_refused() {
    let place = Place::new();
    place.write("tiny.toml", TINY);
    place.write("empty.txt", "");
    place.write("binary.txt", b"abc\xff\xfe");
    place.write("empty.jsonl", "\n");
    place.write("other.jsonl", "{\"text\": \"a\"}\n{\"words\": 1}\n");
    for (file, cause) in [
        ("empty.txt", "empty"),
        ("binary.txt", "not UTF-8 at byte 3"),
        ("missing.txt", "No such file"),
        ("empty.jsonl", "empty"),
        ("other.jsonl", "line 2: missing field `text`"),
    ] {
        place.refused(&["data", "prepare", file, "--out", "data"], &[file, cause]);
        assert!(!place.exists("data"));
        let train = ["train", "tiny.toml", "--data", file, "--out", "run"];
        place.refused_later(&train, &[file, cause]);
        assert!(!place.exists("run"), "{file}: a run that never began");
    }
    for file in ["empty.txt", "binary.txt", "missing.txt"] {
        place.refused(&["tokenizer", "train", file, "--out", "t.json"], &[file]);
        place.refused(&["data", "score", file], &[file]);
        assert!(!place.exists("t.json"));
    }
}

#[test]
fn preparation_names_what_it_cannot_do() {
    let place = Place::new();
    place.write("a.txt", "some text");
    let prepare = |option: &str, value: &str, names: &[&str]| {
        place.refused(&["data", "prepare", "a.txt", "--out", "data", option, value], names);
        assert!(!place.exists("data"));
    };
    prepare("--tokenizer", "nonsense", &["`nonsense`", "char, byte, bpe:<vocabulary size>"]);
    prepare("--tokenizer", "bpe:many", &["`bpe:many`", "char, byte, bpe:<vocabulary size>"]);
    prepare("--tokenizer", "bpe:3", &["`bpe:3`", "at least 259"]);
    prepare("--val-fraction", "1", &["validation fraction", "1"]);
    prepare("--val-fraction", "nan", &["validation fraction", "NaN"]);
}

#[test]
fn configurations_with_mistakes_are_refused_by_key() {
    let place = Place::with_data();
    for (text, names) in [
        ("[train]\nstep = 3", &["line 2, column 1", "unknown field `step`", "`steps`"][..]),
        ("[trian]\nsteps = 3", &["unknown field `trian`"]),
        ("[train]\nsteps = 'many'", &["line 2", "\"many\"", "a whole number"]),
        ("[train]\nsteps = -1", &["line 2", "-1"]),
        ("[train]\nsteps = 0", &["`train.steps`", "at least 1", "found 0"]),
        ("train = 3", &["line 1", "the section [train]"]),
        ("[train\n", &["line 1, column 7"]),
        ("[model]\nhidden_size = 100000000", &["hidden_size", "found 100000000"]),
        ("[model]\nnum_key_value_heads = 3", &["num_key_value_heads", "found 3"]),
        ("[data]\nseq_len = 1000000", &["train.bin", "too short"]),
    ] {
        place.write("wrong.toml", text);
        let args = ["train", "wrong.toml", "--data", "data", "--out", "run"];
        place.refused(&args, names);
        assert!(!place.exists("run"), "{text}: a run that never began");
    }
    place.write("wrong.toml", b"\xff");
    place.refused(&["train", "wrong.toml"], &["wrong.toml", "UTF-8"]);
    place.refused(&["train", "none.toml"], &["none.toml", "No such file"]);
    place.refused(&["train", "data"], &["data/config.toml", "No such file"]);
    place.refused(&["train", "tiny.toml", "--out", "run"], &["--data", "data.path"]);
}

#[test]
fn overrides_with_mistakes_are_refused_by_key() {
    let place = Place::with_data();
    for (setting, names) in [
        ("train.step=3", &["--set train.step=3", "unknown field `step`", "in `train`"][..]),
        ("speed=3", &["--set speed=3", "unknown field `speed`"]),
        ("train.steps=many", &["--set train.steps=many", "a whole number", "in `train.steps`"]),
        ("train.steps=0", &["`train.steps`", "at least 1"]),
        ("train.steps", &["--set train.steps", "key=value"]),
        ("=3", &["--set =3", "key=value"]),
        ("train.steps.x=3", &["--set train.steps.x=3", "section"]),
    ] {
        place.refused(&[&TRAIN[..], &["--set", setting]].concat(), names);
        assert!(!place.exists("run"));
    }
}

#[test]
fn a_run_that_exists_is_not_overwritten() {
    let place = Place::with_data();
    place.ok(&TRAIN);
    let before = place.read("run/metrics.jsonl");
    place.refused(&TRAIN, &["run holds a run already", "--resume", "--out"]);
    assert_eq!(place.read("run/metrics.jsonl"), before);

    // Another model cannot be resumed, and the key that differs is named.
    let resume = ["train", "run", "--resume"];
    let wider = [&resume[..], &["--set", "model.intermediate_size=64"]].concat();
    place.refused(&wider, &["run: ", "another model.intermediate_size"]);

    // A damaged checkpoint is not resumed from: an older one is, and where there is none, nothing.
    let optimizer = "run/checkpoints/step-000020/optimizer.safetensors";
    let whole = place.read(optimizer);
    place.write(optimizer, &whole[..whole.len() / 2]);
    let ran = place.run(&resume);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let warning = ran.stderr.lines().find(|line| line.starts_with("warning: ")).unwrap();
    for name in ["step-000020", "optimizer.safetensors", "of step 10"] {
        assert!(warning.contains(name), "{warning}");
    }
    assert_eq!(place.read(optimizer), whole);
    fs::remove_dir_all(place.path("run/checkpoints/step-000010")).unwrap();
    place.write("run/checkpoints/step-000020/trainer_state.json", "{");
    place.refused(&resume, &["step-000020", "trainer_state.json"]);
    fs::remove_dir_all(place.path("run/checkpoints")).unwrap();
    place.refused(&resume, &["run: no checkpoint"]);
    place.refused(&TRAIN, &["run", "before its first checkpoint"]);
    place.refused(&["train", "tiny.toml", "--resume", "--out", "none"], &["none: no checkpoint"]);
}

#[test]
fn damaged_data_is_refused() {
    let place = Place::with_data();
    let shard = place.read("data/train.bin");
    place.write("data/train.bin", &shard[..shard.len() - 3]);
    place.refused(&TRAIN, &["data/train.bin", "end mark"]);
    place.write("data/train.bin", "x");
    place.refused(&TRAIN, &["data/train.bin"]);
    fs::remove_file(place.path("data/train.bin")).unwrap();
    place.refused(&TRAIN, &["data/train.bin", "No such file"]);
    assert!(!place.exists("run"));
}

/// As root a read-only directory is no hindrance; a missing one and one that is a file always are.
#[test]
fn targets_that_cannot_be_written_are_refused() {
    let place = Place::with_data();
    place.write("file", "kept");
    fs::create_dir(place.path("dir.gguf")).unwrap();
    fs::create_dir(place.path("dir.gguf/full")).unwrap();
    for dir in ["missing", "file"] {
        let out = format!("{dir}/out.gguf");
        let cause = if dir == "file" { "Not a directory" } else { "No such file" };
        place.refused(&["convert", FIXTURE, &out], &[&out, cause]);
        place.refused(&["logits", FIXTURE, "--ids", "1", "--out", &out], &[&out, cause]);
        place.refused(&["data", "synth", &out, "--bytes", "100"], &[&out, cause]);
        let args = ["tokenizer", "train", "corpus.txt", "--vocab-size", "300", "--out", &out];
        place.refused(&args, &[&out, cause]);
    }
    let dir = ["dir.gguf", "a directory"];
    place.refused(&["convert", FIXTURE, "dir.gguf"], &dir);
    place.refused(&["logits", FIXTURE, "--ids", "1", "--out", "dir.gguf"], &dir);
    place.refused(&["data", "synth", "dir.gguf"], &dir);
    let packed = ["convert", FIXTURE, "dir.gguf/", "--type", "i2_s"];
    place.refused(&packed, &dir);
    place.refused(&["convert", FIXTURE, "data", "--type", "hf-packed"], &["data", "other files"]);
    place.refused(&["convert", FIXTURE, "out"], &["out", ".gguf", "--type"]);
    place.refused(&["data", "prepare", "corpus.txt", "--out", "file"], &["file"]);
    place.refused(&["train", "tiny.toml", "--data", "data", "--out", "file"], &["file"]);
    assert_eq!(place.read("file"), b"kept");
    assert_eq!(place.leftovers(), [""; 0]);
}

/// A rename would replace the device by a file.
#[cfg(unix)]
#[test]
fn devices_and_pipes_are_not_replaced() {
    use std::os::unix::fs::FileTypeExt;
    let place = Place::with_data();
    let made = std::process::Command::new("mkfifo").arg(place.path("pipe")).status();
    assert!(made.unwrap().success());
    let names = ["pipe", "a device or pipe"];
    place.refused(&["convert", FIXTURE, "pipe", "--type", "i2_s"], &names);
    place.refused(&["logits", FIXTURE, "--ids", "1", "--out", "pipe"], &names);
    place.refused(&["data", "synth", "pipe"], &names);
    let args = ["tokenizer", "train", "corpus.txt", "--vocab-size", "300", "--out", "pipe"];
    place.refused(&args, &names);
    assert!(place.path("pipe").metadata().unwrap().file_type().is_fifo());
}

#[cfg(unix)]
#[test]
fn a_read_only_directory_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    fs::create_dir(place.path("locked")).unwrap();
    fs::set_permissions(place.path("locked"), fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(place.path("locked/probe"), "").is_ok() {
        // Past the capture of the test's output, so that the skip is seen.
        writeln!(std::io::stderr(), "skipped: permissions do not bind this user").unwrap();
        return;
    }
    let args = ["convert", FIXTURE, "locked/m.gguf"];
    place.refused(&args, &["locked/m.gguf", "Permission denied"]);
}

#[test]
fn the_demo_checks_its_options() {
    let place = Place::with_data();
    place.refused(&["demo", "--steps", "0"], &["`train.steps`", "at least 1"]);
    assert!(!place.exists("runs"));
    place.ok(&TRAIN);
    place.refused_later(&["demo", "--out", "run", "--seed", "9"], &["run of seed 0", "--out"]);
}

#[cfg(not(feature = "mpi"))]
#[test]
fn several_processes_need_a_build_with_mpi() {
    let place = Place::with_data();
    for launcher in ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"] {
        let output = place.command(&TRAIN).env(launcher, "2").output().unwrap();
        super::Ran::of(output).check_refused(&TRAIN, &["2 processes", "--features mpi"]);
        assert!(!place.exists("run"));
    }
}
