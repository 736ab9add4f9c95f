//! The program as its users meet it: whole lives of a model, and everything that can be wrong.
//!
//! What holds everywhere is checked by the helpers below: results go to stdout, the rest to stderr;
//! an error is one line that begins with `error:` and names its cause; nothing panics; nothing half
//! written has a final name.

#![allow(clippy::unwrap_used)]

mod adapters;
mod bench;
mod data;
mod device;
mod eval;
mod finetune;
mod hub;
mod input;
#[cfg(unix)]
mod killed;
mod life;
mod models;
mod report;
#[cfg(unix)]
mod serve;
#[cfg(unix)]
mod signals;
mod streams;
mod tokenizers;
mod verify;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// A model of the fixtures: tied head, 64 wide, with a chat template.
const FIXTURE: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/fixtures/tied-h64/bf16");

/// A run of a second or less.
const TINY: &str = "\
[model]
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
[data]
seq_len = 32
[schedule]
warmup_steps = 2
[train]
steps = 20
batch_size = 2
eval_every = 10
eval_tokens = 1000
checkpoint_every = 10
";

/// A directory in which the program is run, and which is gone afterwards.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// With `data/`, a small prepared corpus, and `tiny.toml`, a run on it.
    fn with_data() -> Self {
        let place = Self::new();
        place.write("tiny.toml", TINY);
        place.ok(&["data", "synth", "corpus.txt", "--bytes", "40000"]);
        place.ok(&["data", "prepare", "corpus.txt", "--out", "data", "--tokenizer", "bpe:300"]);
        place
    }

    /// With `model.gguf`, the fixture with its embedding exact.
    fn with_gguf() -> Self {
        let place = Self::new();
        place.ok(&["convert", FIXTURE, "model.gguf", "--embed", "f32"]);
        place
    }

    /// With `model/`, a copy of the fixture.
    fn with_model() -> Self {
        let place = Self::new();
        fs::create_dir(place.path("model")).unwrap();
        for entry in fs::read_dir(FIXTURE).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), place.path("model").join(entry.file_name())).unwrap();
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn exists(&self, name: &str) -> bool {
        fs::symlink_metadata(self.path(name)).is_ok()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Rewrites a text file.
    fn edit(&self, name: &str, from: &str, to: &str) {
        let text = String::from_utf8(self.read(name)).unwrap();
        assert!(text.contains(from), "{name} has no {from:?}");
        self.write(name, text.replace(from, to));
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trine"));
        command.args(args).current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        Ran::of(self.command(args).output().unwrap())
    }

    /// Runs what must succeed; returns stdout.
    fn ok(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert_eq!(ran.code, Some(0), "{args:?}: {}", ran.stderr);
        ran.stdout
    }

    /// Runs what must be refused, in one line that holds all of `names`.
    #[track_caller]
    fn refused(&self, args: &[&str], names: &[&str]) {
        let ran = self.run(args);
        ran.check_refused(args, names);
        assert_eq!(ran.stderr.lines().count(), 1, "{args:?}: {}", ran.stderr);
    }

    /// As [`Self::refused`], of work that had begun and said so.
    #[track_caller]
    fn refused_later(&self, args: &[&str], names: &[&str]) {
        self.run(args).check_refused(args, names);
    }

    /// Names of all files that writing left half done.
    fn leftovers(&self) -> Vec<String> {
        fn visit(dir: &Path, found: &mut Vec<String>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                if name.starts_with(".trine-") {
                    found.push(name);
                } else if path.is_dir() {
                    visit(&path, found);
                }
            }
        }
        let mut found = Vec::new();
        visit(self.0.path(), &mut found);
        found
    }
}

/// What a run of the program left.
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn of(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self {
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    #[track_caller]
    fn check_refused(&self, args: &[&str], names: &[&str]) {
        let Self { code, stdout, stderr } = self;
        assert_eq!(*code, Some(1), "{args:?}: {stdout} {stderr}");
        assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
        let last = stderr.lines().last().unwrap_or_default();
        let errors = stderr.lines().filter(|line| line.starts_with("error: ")).count();
        assert!(last.starts_with("error: ") && errors == 1, "{args:?}: {stderr}");
        assert!(last.len() < 1000, "{args:?}: {last}");
        for name in names {
            assert!(last.contains(name), "{args:?}: no {name:?} in {last}");
        }
    }
}
