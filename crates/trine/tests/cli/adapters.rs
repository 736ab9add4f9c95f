//! Adapters on the command line: `run`, `logits` and `serve` with one, and what does not fit.

use std::path::{Path, PathBuf};

use trine_format::peft::Lora;
use trine_format::{ModelFile, Projection};

use super::{FIXTURE, Place};

/// Another model of the fixtures, 192 wide.
const OTHER: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/fixtures/untied-h192/bf16");

/// Writes an adapter for a model, of numbers that depend on `seed`.
pub(crate) fn write_adapter(dir: &Path, model: &str, seed: usize) {
    let file = ModelFile::open(Path::new(model)).unwrap();
    let (config, rank, targets) = (file.config(), 3, vec![Projection::V, Projection::Gate]);
    let mut matrices = std::collections::BTreeMap::new();
    for layer in 0..config.num_hidden_layers {
        for &p in &targets {
            let (out, inp) = config.projection_shape(p);
            let numbers = |len: usize| -> Vec<f32> {
                (0..len)
                    .map(|i| (i * i * 31 + i * 7 * seed) as f32 % 1009.0 / 2500.0 - 0.2)
                    .collect()
            };
            matrices.insert((layer, p), [numbers(rank * inp), numbers(out * rank)]);
        }
    }
    let base = Some("somebody/a-model".to_owned());
    Lora { rank, alpha: 6.0, targets, base, matrices }.write(dir, config).unwrap();
}

fn place() -> (Place, PathBuf) {
    let place = Place::new();
    let dir = place.path("law");
    write_adapter(&dir, FIXTURE, 1);
    (place, dir)
}

#[test]
fn a_model_is_run_with_an_adapter() {
    let (place, _) = place();
    let run = |args: &[&str]| -> serde_json::Value {
        let all = ["run", FIXTURE, "-p", "Once", "--temperature", "0", "-n", "12", "--json"];
        serde_json::from_str(&place.ok(&[&all[..], args].concat())).unwrap()
    };
    let (without, with) = (run(&[]), run(&["--adapter", "law"]));
    assert_ne!(without["ids"], with["ids"]);
    assert_eq!(run(&["--adapter", "law"])["ids"], with["ids"]);
    let logits = |args: &[&str]| place.ok(&[&["logits", FIXTURE, "--ids", "1,2,3"], args].concat());
    assert_ne!(logits(&[]), logits(&["--adapter", "law"]));
    let stderr = place.run(&["run", FIXTURE, "-n", "1", "--adapter", "law"]).stderr;
    for said in ["rank 3", "v_proj, gate_proj", "somebody/a-model"] {
        assert!(stderr.contains(said), "{stderr}");
    }
}

#[test]
fn what_does_not_fit_is_refused_with_what_was_expected() {
    let (place, dir) = place();
    let tensor = "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight";
    place.refused(
        &["run", OTHER, "--adapter", "law"],
        &["adapter law", "adapter_model.safetensors", tensor, "3 x 192", "[3, 64]"],
    );
    place.refused(&["chat", FIXTURE, "--adapter", "nowhere"], &["nowhere", "adapter_config.json"]);
    std::fs::remove_file(dir.join("adapter_model.safetensors")).unwrap();
    place.refused(&["logits", FIXTURE, "--ids", "1", "--adapter", "law"], &["adapter_model"]);
    for (args, names) in [
        (&["--adapter", "law"][..], &["law", "adapter_model.safetensors"][..]),
        (&["--adapter", "a=nowhere"], &["nowhere", "adapter_config.json"]),
        (&["--adapter", "=law"], &["--adapter", "NAME=DIR"]),
        (&["--adapter", "a=law", "--adapter", "a=other"], &["a=other", "taken"]),
        (&["--name", "law", "--adapter", "law"], &["law", "taken"]),
    ] {
        place.refused(&[&["serve", FIXTURE, "--port", "0"], args].concat(), names);
    }
}

#[cfg(unix)]
#[test]
fn a_server_answers_as_run_does_with_each_adapter() {
    use std::io::BufReader;

    use super::serve::{address, post, start};

    let (place, _) = place();
    write_adapter(&place.path("poems"), FIXTURE, 2);
    let mut child = start(&place, &["--adapter", "law", "--adapter", "verse=poems"]);
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let address = address(&mut stderr);
    let prompt = "User: A question<|eot_id|>Assistant: ";
    let mut texts = Vec::new();
    for (name, adapter) in [("tiny", None), ("law", Some("law")), ("verse", Some("poems"))] {
        let body = format!(
            "{{\"model\": \"{name}\", \"messages\": [{{\"role\": \"user\", \"content\": \"A question\"}}], \
             \"temperature\": 0, \"max_tokens\": 8}}"
        );
        let answer = post(&address, "", &body);
        let json: serde_json::Value =
            serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        let mut args =
            vec!["run", FIXTURE, "-p", prompt, "--temperature", "0", "-n", "8", "--json"];
        args.extend(adapter.iter().flat_map(|dir| ["--adapter", *dir]));
        let alone: serde_json::Value = serde_json::from_str(&place.ok(&args)).unwrap();
        assert_eq!(json["choices"][0]["message"]["content"], alone["text"]);
        assert_eq!(json["model"], name);
        texts.push(alone["text"].clone());
    }
    assert!(texts[0] != texts[1] && texts[1] != texts[2] && texts[0] != texts[2], "{texts:?}");
    super::signals::signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn an_adapter_is_merged_and_what_that_costs_is_said() {
    let (place, _) = place();
    let convert = |args: &[&str]| -> serde_json::Value {
        serde_json::from_str(&place.ok(&[&["convert", FIXTURE], args, &["--json"]].concat()))
            .unwrap()
    };
    assert!(convert(&["plain.gguf"]).get("merged").is_none());
    let merged = &convert(&["merged.gguf", "--merge-adapter", "law"])["merged"];
    let names: Vec<_> = merged.as_object().unwrap().keys().collect();
    assert_eq!(names, ["v_proj", "gate_proj"]);
    for cost in merged.as_object().unwrap().values() {
        let number = |key: &str| cost[key].as_f64().unwrap();
        assert!(number("changed_trits") > 0.0 && number("changed_trits") < number("weights"));
        assert!(number("adapter_change") > 0.0 && number("error") > 0.0 && number("kept") < 1.0);
    }
    place.ok(&["inspect", "merged.gguf"]);
    assert_ne!(place.read("merged.gguf"), place.read("plain.gguf"));
    let told = place.run(&["convert", FIXTURE, "again.gguf", "--merge-adapter", "law"]).stderr;
    assert!(told.contains("merged v_proj: ") && told.contains("trits turned"), "{told}");
    assert_eq!(place.read("again.gguf"), place.read("merged.gguf"));
    place.refused(
        &["convert", OTHER, "no.gguf", "--merge-adapter", "law"],
        &["law", "v_proj", "3 x 192"],
    );
    assert!(!place.exists("no.gguf"));
}
