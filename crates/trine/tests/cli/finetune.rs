//! Fine-tuning as users do it: conversations, a trained model, and what comes out of both.

use std::fmt::Write as _;

use super::life::json;
use super::{FIXTURE, Place};

const TUNED: &str = "\
[finetune]
base = 'BASE'
[finetune.lora]
rank = 4
[data]
path = 'chats.jsonl'
seq_len = 64
val_fraction = 0.2
[optimizer]
learning_rate = 1e-2
[schedule]
warmup_steps = 2
[train]
steps = 8
batch_size = 2
eval_every = 4
checkpoint_every = 4
";

/// With `chats.jsonl`, and `tuned.toml` for a fixture that has a chat template.
fn place() -> Place {
    let place = Place::new();
    let mut chats = String::new();
    for i in 0..20 {
        let answer = ["yes", "no"][i % 2];
        writeln!(chats, "{{\"prompt\":\"is {i} odd?\",\"completion\":\"{answer}\"}}").unwrap();
    }
    place.write("chats.jsonl", chats);
    place.write("tuned.toml", TUNED.replace("BASE", FIXTURE));
    place
}

#[test]
fn adapters_are_trained_resumed_and_run() {
    let place = place();
    assert_eq!(place.ok(&["finetune", "tuned.toml", "--out", "run"]), "");
    place.ok(&["finetune", "run", "--resume", "--set", "train.steps=12"]);
    let adapter = "run/checkpoints/step-000012";
    assert!(place.exists(&format!("{adapter}/adapter_config.json")));
    let config = String::from_utf8(place.read("run/config.toml")).unwrap();
    assert!(config.contains(FIXTURE) && !config.contains("[model]"), "{config}");
    let run = json(&String::from_utf8(place.read("run/run.json")).unwrap());
    assert_eq!(run["base"]["path"], FIXTURE);
    let said = |more: &[&str]| {
        let args = [&["run", FIXTURE, "-p", "is 3 odd?", "-n", "8", "--temperature", "0"], more];
        place.ok(&args.concat())
    };
    assert_ne!(said(&["--adapter", adapter]), said(&[]));
    assert_eq!(said(&["--adapter", adapter]), said(&["--adapter", "run"]));
    place.refused(&["run", "run", "-p", "x"], &["run is an adapter", "--adapter run"]);
    place.refused(&["finetune", "tuned.toml", "--base", "run"], &["run is an adapter"]);
    assert_eq!(place.leftovers(), [""; 0]);
}

#[test]
fn an_adapter_brings_the_template_that_its_model_lacks() {
    let place = Place::with_data();
    place.ok(&["train", "tiny.toml", "--data", "data", "--out", "base"]);
    place.write("chats.jsonl", "{\"prompt\":\"a\",\"completion\":\"b\"}\n".repeat(9));
    place
        .write("tuned.toml", TUNED.replace("BASE", "base").replace("seq_len = 64", "seq_len = 32"));
    let tune =
        |more: &[&str]| place.run(&[&["finetune", "tuned.toml", "--out", "run"], more].concat());
    let refused = tune(&[]);
    refused.check_refused(&["finetune"], &["chats.jsonl: line 1", "finetune.chat_template"]);
    place.write(
        "chat.jinja",
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}\
        {% if add_generation_prompt %}assistant: {% endif %}",
    );
    let tuned = tune(&["--set", "finetune.chat_template=chat.jinja"]);
    assert_eq!(tuned.code, Some(0), "{}", tuned.stderr);
    let chat = |more: &[&str]| place.run(&[&["chat", "base", "-n", "2"], more].concat()).stderr;
    assert!(chat(&[]).contains("no chat template"));
    assert!(!chat(&["--adapter", "run"]).contains("no chat template"));
}

#[test]
fn masters_are_trained_and_converted() {
    let place = place();
    let full = ["--set", "finetune.method=full", "--set", "finetune.loss=sum"];
    place.ok(&[&["finetune", "tuned.toml", "--out", "run"], &full[..]].concat());
    place.ok(&["convert", "run", "tuned.gguf", "--embed", "f32"]);
    for (model, out) in [("run", "a"), ("tuned.gguf", "b")] {
        place.ok(&["logits", model, "--ids", "1,2,3", "--out", out]);
    }
    assert_eq!(place.read("a"), place.read("b"));
    let metrics = String::from_utf8(place.read("run/metrics.jsonl")).unwrap();
    assert!(metrics.contains("val_loss"), "{metrics}");
}

#[test]
fn a_plan_is_made_before_anything_is_written() {
    let place = place();
    let plan = json(&place.ok(&["finetune", "tuned.toml", "--dry-run", "--json"]));
    assert!(plan["parameters"]["trained"].as_u64().unwrap() > 0);
    let memory = &plan["memory"];
    let parts = ["parameters", "gradients", "moments", "activations", "buffers"];
    let sum: u64 = parts.iter().map(|part| memory[part].as_u64().unwrap()).sum();
    assert_eq!(memory["total"], sum);
    assert!(place.ok(&["finetune", "tuned.toml", "--dry-run"]).contains("trained"));
    assert!(plan["device_memory"].is_null());
    let on_a_device = ["finetune", "tuned.toml", "--dry-run", "--device", "emulator"];
    let plan = json(&place.ok(&[&on_a_device[..], &["--json"]].concat()));
    assert!(plan["device_memory"].as_u64().unwrap() > 0);
    assert!(place.ok(&on_a_device).contains("of whose memory"));
    assert!(!place.exists("runs"));
}

#[test]
fn what_cannot_be_tuned_is_refused_in_a_line() {
    let place = place();
    let tune = |more: &[&'static str]| [&["finetune", "tuned.toml", "--out", "run"], more].concat();
    place.write("bad.jsonl", "{\"prompt\":\"a\",\"completion\":\"b\"}\n{\"prompt\":\"a\"}\n");
    place.refused_later(&tune(&["--data", "bad.jsonl"]), &["bad.jsonl: line 2", "`response`"]);
    place.refused(&tune(&["--data", "none.jsonl"]), &["none.jsonl"]);
    place.refused(&tune(&["--base", "nowhere"]), &["nowhere"]);
    place.refused(&tune(&["--set", "model.hidden_size=64"]), &["`model`"]);
    place.refused(&tune(&["--set", "data.seq_len=100000"]), &["`data.seq_len`", "positions"]);
    place.refused(&["train", "tuned.toml", "--out", "run"], &["[finetune]", "trine finetune"]);
    place.write("plain.toml", "[data]\npath = 'chats.jsonl'\n");
    place.refused(&["finetune", "plain.toml"], &["[finetune]", "trine train"]);
    // Nothing of all this is a run.
    assert!(!place.exists("run/config.toml"));
}
