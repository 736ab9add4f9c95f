//! What users do, in the order in which they do it.

use std::io::Write;
use std::process::Stdio;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::{FIXTURE, Place, Ran};

pub(crate) fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// The tensor `logits` of a file: its shape and bytes.
fn logits(place: &Place, name: &str) -> (Vec<usize>, Vec<u8>) {
    let bytes = place.read(name);
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let logits = tensors.tensor("logits").unwrap();
    assert_eq!(logits.dtype(), Dtype::F32);
    (logits.shape().to_vec(), logits.data().to_vec())
}

#[test]
fn help_and_version_are_results() {
    let place = Place::new();
    assert!(place.ok(&["--version"]).starts_with("trine "));
    let help = place.ok(&["--help"]);
    for command in
        ["demo", "data", "tokenizer", "train", "report", "convert", "inspect", "run", "chat"]
    {
        assert!(help.contains(&format!("\n  {command} ")), "{help}");
        assert!(place.ok(&[command, "--help"]).contains("Usage: trine"));
    }
    assert!(place.ok(&["completions", "bash"]).contains("complete -F _trine"));
}

#[test]
fn a_wrong_command_line_has_status_2() {
    let place = Place::new();
    for args in [&["nonsense"][..], &["run"], &["logits", "m.gguf"], &["inspect", "m", "--what"]] {
        let ran = place.run(args);
        assert_eq!(ran.code, Some(2), "{args:?}: {}", ran.stderr);
        assert!(ran.stdout.is_empty() && ran.stderr.starts_with("error: "), "{}", ran.stderr);
    }
}

#[test]
fn a_model_is_trained_resumed_converted_and_run() {
    let place = Place::with_data();
    assert_eq!(place.ok(&["train", "tiny.toml", "--data", "data", "--out", "run"]), "");
    for name in ["config.toml", "run.json", "metrics.jsonl", "checkpoints/step-000010"] {
        assert!(place.exists(&format!("run/{name}")), "{name}");
    }

    // More steps, remembered for the next time.
    place.ok(&["train", "run", "--resume", "--set", "train.steps=24"]);
    assert!(place.exists("run/checkpoints/step-000024"));
    let config = String::from_utf8(place.read("run/config.toml")).unwrap();
    assert!(config.contains("steps = 24"), "{config}");

    let report = place.ok(&["convert", "run", "m.gguf", "--embed", "f32", "--json"]);
    let report = json(&report);
    assert_eq!(report["largest_scale_change"], 0.0);
    assert!(report["from"].as_str().unwrap().ends_with("step-000024"));

    let shown = json(&place.ok(&["inspect", "m.gguf", "--json"]));
    assert_eq!(shown["config"]["num_hidden_layers"], 2);
    assert_eq!(shown["config"]["vocab_size"], 300);
    assert_eq!(shown["ternary"].as_array().unwrap().len(), 14);
    assert_eq!(shown["tokenizer"]["ids"], 300);
    let trits: u64 =
        shown["trits"]["counts"].as_array().unwrap().iter().flat_map(|n| n.as_u64()).sum();
    assert_eq!(shown["bytes_of"]["projections"], trits / 4 + 14 * 32);
    let masters = json(&place.ok(&["inspect", "run", "--json"]));
    assert_eq!(masters["trits"], shown["trits"]);
    assert_eq!(masters["bits_per_weight"], 32.0);
    assert!(masters["ternary"][0]["ambiguous_ties"].is_u64());

    let say = |seed: &str| {
        place.ok(&["run", "m.gguf", "--prompt", "Once", "-n", "16", "--seed", seed, "-t", "1"])
    };
    assert!(say("3").starts_with("Once"));
    assert_eq!(say("3"), say("3"));
    assert_ne!(say("3"), say("4"));
    let said = json(&place.ok(&["run", "m.gguf", "-p", "Once", "-n", "4", "--json"]));
    assert_eq!(said["ids"].as_array().unwrap().len(), 4);
    assert_eq!(said["finish"], "length");

    let ids = ["--ids", "1,2,3"];
    for (model, out) in [("run", "a.safetensors"), ("m.gguf", "b.safetensors")] {
        let args = [&["logits", model, "--out", out][..], &ids].concat();
        assert_eq!(place.ok(&args), "");
    }
    let (shape, of_checkpoint) = logits(&place, "a.safetensors");
    assert_eq!(shape, [3, 300]);
    assert_eq!(logits(&place, "b.safetensors").1, of_checkpoint);
    let top = json(&place.ok(&["logits", "m.gguf", "--text", "- Once", "--json", "--top", "2"]));
    assert_eq!(top["positions"][0]["top"].as_array().unwrap().len(), 2);
    assert_eq!(place.leftovers(), [""; 0]);
}

#[test]
fn every_format_is_written_and_read_back() {
    let place = Place::new();
    for kind in ["i2_s", "trn2", "hf", "hf-packed"] {
        place.ok(&["convert", FIXTURE, kind, "--type", kind]);
        place.ok(&["inspect", kind]);
        place.ok(&["run", kind, "-n", "3"]);
    }
    // Masters made of packed trits are masters of just these trits.
    place.ok(&["convert", "i2_s", "again", "--type", "hf", "--dtype", "bf16"]);
    place.ok(&["verify", "i2_s", "again"]);
    place.refused(&["convert", "i2_s", "x.gguf", "--dtype", "f32"], &["--dtype", "--type hf"]);
    // Blocks of 256 do not fit a model that is 64 wide; the error is about the name asked for.
    for kind in ["tq1_0", "tq2_0"] {
        place.refused(&["convert", FIXTURE, kind, "--type", kind], &[kind, "256", "attn_q"]);
        assert!(!place.exists(kind));
    }
    assert_eq!(place.leftovers(), [""; 0]);
}

/// 16 bits stay as they are; what is rounded is told, and by how much.
#[test]
fn rounding_the_embedding_is_said() {
    let place = Place::with_data();
    let report = json(&place.ok(&["convert", FIXTURE, "own.gguf", "--json"]));
    assert_eq!(
        (&report["embedding"], &report["largest_dense_change"]),
        (&"bfloat16".into(), &0.0.into())
    );
    let said = place.run(&["convert", FIXTURE, "own.gguf"]).stderr;
    assert!(!said.contains("changed"), "{said}");

    place.ok(&["train", "tiny.toml", "--data", "data", "--out", "run", "--set", "train.steps=1"]);
    let report = json(&place.ok(&["convert", "run", "m.gguf", "--json"]));
    assert_eq!(report["embedding"], "float16");
    let change = report["largest_dense_change"].as_f64().unwrap();
    assert!(change > 0.0 && change <= 1.0 / 2048.0, "{report}");
    let said = place.run(&["convert", "run", "m.gguf"]).stderr;
    assert!(said.contains("embedding is stored as float16") && said.lines().count() == 3, "{said}");
}

/// Blocks for embedding and head, said and kept; the fixture is wide enough for two of the three.
#[test]
fn embeddings_are_stored_in_blocks() {
    let place = Place::new();
    for (kind, largest) in [("q8_0", 0.0045), ("q4_0", 0.126)] {
        let report = json(&place.ok(&["convert", FIXTURE, "m.gguf", "--embed", kind, "--json"]));
        assert_eq!(report["embedding"], kind);
        let change = report["largest_dense_change"].as_f64().unwrap();
        assert!(change > largest / 4.0 && change <= largest, "{report}");
        let shown = json(&place.ok(&["inspect", "m.gguf", "--json"]));
        let stored = shown["tensors"].as_array().unwrap().iter();
        let embedding = stored.clone().find(|t| t["name"] == "token_embd.weight").unwrap();
        assert_eq!(embedding["type"], kind.to_uppercase());
        place.ok(&["run", "m.gguf", "-p", "Hello", "-n", "3"]);
        // From there on they are kept.
        let again = json(&place.ok(&["convert", "m.gguf", "again.gguf", "--json"]));
        assert_eq!(
            (&again["embedding"], &again["largest_dense_change"]),
            (&kind.into(), &0.0.into())
        );
    }
    let names = ["q6.gguf", "token_embd.weight", "256"];
    place.refused(&["convert", FIXTURE, "q6.gguf", "--embed", "q6_k"], &names);
    assert!(!place.exists("q6.gguf"));
}

#[test]
fn prompt_and_generation_are_timed_apart() {
    let place = Place::new();
    let run = |more: &[&str]| {
        place.run(&[&["run", FIXTURE, "--ignore-eos", "-p", "Hello"], more].concat())
    };
    let said = json(&run(&["-n", "5", "--json"]).stdout);
    assert_eq!(said["prompt_tokens"], said["prompt_ids"].as_array().unwrap().len());
    assert_eq!(said["generated_tokens"], 5);
    for key in ["prompt_tokens_per_second", "generated_tokens_per_second"] {
        assert!(said[key].as_f64().unwrap() > 0.0, "{said}");
    }
    let line = run(&["-n", "5"]).stderr;
    let tokens = said["prompt_tokens"].as_u64().unwrap();
    assert!(line.starts_with(&format!("[prompt {tokens} tokens ")), "{line}");
    assert!(
        line.contains(" tok/s, generated 5 tokens ") && line.matches("tok/s").count() == 2,
        "{line}"
    );
    // One token comes from the prompt alone: there is no speed of generation to tell.
    assert!(json(&run(&["-n", "1", "--json"]).stdout)["generated_tokens_per_second"].is_null());
    let line = run(&["-n", "1"]).stderr;
    assert!(line.contains("generated 1 tokens, "), "{line}");
}

/// Greedy and sampled, with a penalty and to the end of the context; only the passes are fewer.
#[test]
fn guesses_change_the_speed_and_not_the_text() {
    let place = Place::with_gguf();
    let prompt = "the fox and the dog and the fox and the dog and ".repeat(3);
    let mut right = 0;
    for more in [
        &["-t", "0"][..],
        &["-t", "0", "--ignore-eos", "-n", "600"],
        &["--seed", "3"],
        &["-t", "0.3", "--repetition-penalty", "1.05", "--top-k", "8", "--min-p", "0.02"],
    ] {
        let run = |draft: &[&str]| {
            let args = [&["run", "model.gguf", "--json", "-p", &prompt], more, draft].concat();
            json(&place.ok(&args))
        };
        let plain = run(&["--draft", "off"]);
        assert_eq!((&plain["drafted_tokens"], &plain["accepted_tokens"]), (&0.into(), &0.into()));
        for draft in [&[][..], &["--draft", "auto"], &["--draft", "1"], &["--draft", "9"]] {
            let found = run(draft);
            for key in ["ids", "text", "finish", "generated_tokens"] {
                assert_eq!(found[key], plain[key], "{key} with {more:?} {draft:?}");
            }
            let count = |key: &str| found[key].as_u64().unwrap();
            assert!(count("accepted_tokens") <= count("drafted_tokens"));
            assert_eq!(
                count("passes") + count("accepted_tokens"),
                plain["passes"].as_u64().unwrap()
            );
            right += count("accepted_tokens");
        }
    }
    assert!(right > 100, "{right}");
    let said = place.run(&["run", "model.gguf", "-t", "0", "--draft", "4", "-p", &prompt]).stderr;
    assert!(said.contains(" drafts right, "), "{said}");
    let ran = place.run(&["run", "model.gguf", "--draft", "some"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("expected `auto`, `off` or a number, found `some`"));
}

#[test]
fn a_sketch_of_the_head_changes_no_text() {
    let place = Place::with_gguf();
    for more in [&["-t", "0"][..], &["--top-k", "20", "--seed", "3"], &["-t", "1.2"]] {
        let run = |sketch: &str| {
            let args = ["run", "model.gguf", "--json", "-p", "the fox", "--head-sketch", sketch];
            json(&place.ok(&[&args[..], more].concat()))["ids"].clone()
        };
        let off = run("off");
        assert!(off.as_array().unwrap().len() > 5, "{off}");
        assert_eq!((run("on"), run("auto")), (off.clone(), off), "{more:?}");
    }
}

/// How trits lie in memory is nobody's business; smaller heads and caches are asked for by name.
#[test]
fn memory_is_chosen_and_trits_stay_what_they_are() {
    let place = Place::with_gguf();
    let run = |memory: &[&str]| {
        let args = ["run", "model.gguf", "--json", "-p", "the fox", "-t", "0", "-n", "40"];
        json(&place.ok(&[&args, memory].concat()))
    };
    let plain = run(&[]);
    for weights in ["2bit", "1.6bit"] {
        assert_eq!(run(&["--weights", weights])["ids"], plain["ids"]);
    }
    for memory in [&["--kv", "int8"][..], &["--kv", "f16"], &["--head", "q8_0"]] {
        // Which ids come may differ, that they come may not.
        assert!(run(memory)["generated_tokens"].as_u64().unwrap() > 0, "{memory:?}");
    }
    let refused = place.run(&["run", "model.gguf", "--head", "q6_k"]);
    assert!(refused.stderr.contains("cannot be held as q6_k: "), "{}", refused.stderr);
    let refused = place.run(&["run", "model.gguf", "--kv", "int4"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("int4"), "{}", refused.stderr);
}

/// Not the braces and quotes around them.
#[test]
fn a_tokenizer_learns_the_documents_of_json_lines() {
    let place = Place::new();
    place.ok(&["data", "synth", "c.jsonl", "--bytes", "20000"]);
    place.ok(&["tokenizer", "train", "c.jsonl", "--out", "t.json", "--vocab-size", "300"]);
    place.ok(&["data", "prepare", "c.jsonl", "--out", "data", "--tokenizer", "bpe:300"]);
    assert_eq!(place.read("t.json"), place.read("data/tokenizer.json"));
    place.write("other.jsonl", "{\"words\": 1}\n");
    let names = ["other.jsonl", "line 1", "missing field `text`"];
    place.refused(&["tokenizer", "train", "other.jsonl", "--out", "u.json"], &names);
}

#[test]
fn text_comes_back_from_a_tokenizer() {
    let place = Place::new();
    place.ok(&["data", "synth", "corpus.txt", "--bytes", "20000"]);
    place.ok(&["tokenizer", "train", "corpus.txt", "--out", "tok.json", "--vocab-size", "300"]);
    for text in ["Once upon a time", "", "naïve 🙂\r\nx", "<|endoftext|>"] {
        let ids = place.ok(&["tokenizer", "encode", "tok.json", text]);
        let decoded = place.ok(&["tokenizer", "decode", "tok.json", ids.trim()]);
        assert_eq!(decoded.strip_suffix('\n').unwrap(), text);
        let array = place.ok(&["tokenizer", "encode", "tok.json", text, "--json"]);
        assert_eq!(array.trim(), format!("[{}]", ids.trim()));
    }
    // A model serves as well, and special tokens are shown on request only.
    let ids = place.ok(&["tokenizer", "encode", FIXTURE, "hello"]);
    let shown = place.ok(&["tokenizer", "decode", FIXTURE, ids.trim(), "--special"]);
    assert!(shown.ends_with("hello\n") && shown.len() > "hello\n".len(), "{shown}");
}

#[test]
fn a_piped_conversation_has_one_answer_a_line() {
    let place = Place::with_gguf();
    let answers = |draft: &str| {
        let args = ["chat", "model.gguf", "-n", "40", "--system", "Be brief.", "--draft", draft];
        let mut child = place
            .command(&args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all("Hello 🙂\r\nAnd you?\n".as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(output.stderr.is_empty());
        output.stdout
    };
    // Random weights answer with random bytes and lines; that there are answers is what counts.
    let plain = answers("off");
    assert!(plain.iter().filter(|&&b| b == b'\n').count() >= 2);
    assert_eq!(answers("auto"), plain);
    assert_eq!(answers("3"), plain);
}

#[test]
fn the_synthetic_corpus_scores_itself() {
    let place = Place::new();
    place.ok(&["data", "synth", "corpus.jsonl", "--bytes", "20000"]);
    place.ok(&["data", "prepare", "corpus.jsonl", "-o", "data", "--tokenizer", "bpe:300"]);
    place.ok(&["data", "synth", "corpus.txt", "--bytes", "20000", "--seed", "5"]);
    let score = json(&place.ok(&["data", "score", "corpus.txt", "--json"]));
    assert_eq!(score["sentences"]["right"], score["sentences"]["total"]);
}

#[test]
fn two_documents_hold_none_out_and_that_is_said() {
    let place = Place::new();
    place.write("a.txt", "one");
    let args = ["data", "prepare", "a.txt", "a.txt", "--out", "data", "--tokenizer", "byte"];
    let Ran { code, stderr, .. } = place.run(&args);
    assert_eq!(code, Some(0));
    assert!(stderr.contains("nothing was held out"), "{stderr}");
}
