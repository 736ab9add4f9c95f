//! Corpora of several forms, what was made of them, and mixtures.

use super::{Place, TINY};

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn what_was_prepared_is_listed() {
    let place = Place::with_data();
    place.write("docs.txt", "one\n\ntwo\n\n\n\nthree\n\nfour\n");
    let prepare = ["data", "prepare", "docs.txt", "--tokenizer", "byte", "--val-fraction", "0.25"];
    place.ok(&[&prepare[..], &["--out", "docs", "--split-on", "\\n\\n"]].concat());
    let listed = json(&place.ok(&["data", "list", "docs", "data", "--json"]));
    let docs = &listed["datasets"][0];
    // Letters, and two tokens around each document.
    let expected = [("tokens", 15 + 8), ("train_tokens", 11 + 6), ("val_tokens", 4 + 2)];
    for (key, value) in expected {
        assert_eq!(docs[key], value, "{key}: {docs}");
    }
    assert_eq!((&docs["path"], &docs["vocab_size"]), (&json("\"docs\""), &json("259")));
    assert_eq!(docs["begin_token"], "<|begin_of_text|>");
    assert_eq!(docs["end_token"], "<|end_of_text|>");
    assert_eq!(docs["tokenizer_hash"].as_str().unwrap().len(), 64);
    assert_ne!(docs["tokenizer_hash"], listed["datasets"][1]["tokenizer_hash"]);
    let text = place.ok(&["data", "list", "docs", "data"]);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2);
    assert!(lines[0].starts_with("docs: 23 tokens, 17 for training and 6 for validation"));
    assert!(lines[1].contains("vocabulary 300"), "{text}");
    place.refused(&["data", "list", "docs", "nothing", "--json"], &["nothing/tokenizer.json"]);
}

#[test]
fn texts_may_stand_under_another_key() {
    let place = Place::new();
    place.write("a.jsonl", "{\"content\": \"first\"}\n{\"content\": \"second\"}\n");
    let prepare = ["data", "prepare", "a.jsonl", "--out", "data", "--tokenizer", "byte"];
    place.refused(&prepare, &["a.jsonl: line 1", "missing field `text`"]);
    place.ok(&[&prepare[..], &["--text-key", "content"]].concat());
    let made = json(&place.ok(&["data", "list", "data", "--json"]));
    assert_eq!(made["datasets"][0]["tokens"], 11 + 4);
    let train = ["tokenizer", "train", "a.jsonl", "--out", "t.json", "--vocab-size", "260"];
    place.refused(&train, &["a.jsonl: line 1"]);
    place.ok(&[&train[..], &["--text-key", "content"]].concat());
}

#[test]
fn preparation_is_the_same_from_any_form() {
    let place = Place::new();
    place.ok(&["data", "synth", "c.jsonl", "--bytes", "30000"]);
    let lines = String::from_utf8(place.read("c.jsonl")).unwrap();
    let documents: Vec<_> = lines.lines().map(json).collect();
    let documents: Vec<&str> =
        documents.iter().map(|line| line["text"].as_str().unwrap()).collect();
    place.write("c.txt", documents.join("\n\n"));
    for (file, out, split) in [("c.jsonl", "a", ""), ("c.txt", "b", "\\n\\n")] {
        let args = ["data", "prepare", file, "--out", out, "--tokenizer", "bpe:300"];
        let split = if split.is_empty() { vec![] } else { vec!["--split-on", split] };
        place.ok(&[&args[..], &split].concat());
    }
    for name in ["tokenizer.json", "train.bin", "val.bin"] {
        let [a, b] = ["a", "b"].map(|dir| place.read(&format!("{dir}/{name}")));
        assert!(a == b, "{name} differs");
    }
}

#[test]
fn files_that_cannot_be_read_are_named_before_anything_is_written() {
    let place = Place::new();
    place.write("a.txt", "some text");
    place.write("blank.txt", " \n\n ");
    place.write("bad.txt.gz", "no archive");
    #[cfg(not(feature = "parquet"))]
    place.write("a.parquet", "PAR1");
    for (file, names) in [
        ("blank.txt", &["blank.txt", "empty"][..]),
        ("bad.txt.gz", &["bad.txt.gz", "gzip"]),
        #[cfg(not(feature = "parquet"))]
        ("a.parquet", &["a.parquet", "--features parquet"]),
    ] {
        // With a tokenizer that needs no text, and after a file that is good.
        let args = ["data", "prepare", "--out", "data", "--tokenizer", "byte", file];
        place.refused(&args, names);
        if file != "blank.txt" {
            place.refused(&[&args[..], &["a.txt"]].concat(), names);
        }
        assert!(!place.exists("data"));
    }
    let args = ["data", "prepare", "a.txt", "--out", "data", "--split-on", "\\x"];
    let refused = place.run(&args);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("after a backslash"), "{}", refused.stderr);
}

#[test]
fn a_run_on_a_mixture_is_resumed_as_it_would_have_gone_on() {
    let place = Place::with_data();
    let prepare = |out: &str, tokenizer: &str| {
        let args = ["data", "prepare", "other.txt", "--out", out, "--tokenizer", tokenizer];
        place.ok(&args);
    };
    place.ok(&["data", "synth", "other.txt", "--bytes", "20000", "--seed", "9"]);
    prepare("other", "data/tokenizer.json");
    let sources = "[[data.sources]]\npath = 'data'\nweight = 2\n[[data.sources]]\npath = 'other'\n";
    place.write("mixed.toml", TINY.replace("[schedule]", &format!("{sources}[schedule]")));
    // With a schedule that does not depend on the number of steps.
    let train = ["train", "mixed.toml", "--set", "schedule.kind=constant", "--out"];
    place.ok(&[&train[..], &["whole"]].concat());
    place.ok(&[&train[..], &["parts", "--set", "train.steps=11"]].concat());
    place.ok(&["train", "parts", "--resume", "--set", "train.steps=20"]);
    assert!(!place.exists("parts/data"), "what is prepared is not copied");
    let losses = |run: &str| -> Vec<String> {
        let lines = String::from_utf8(place.read(&format!("{run}/metrics.jsonl"))).unwrap();
        let losses = lines.lines().map(json).filter(|line| line["loss"].is_number());
        losses.map(|line| line["loss"].to_string()).collect()
    };
    assert_eq!(losses("whole").len(), 20);
    assert_eq!(losses("parts"), losses("whole"));
    let other = "data.sources=[{path='data'}, {path='other'}]";
    place.refused(&["train", "parts", "--resume", "--set", other], &["another data.sources"]);

    prepare("foreign", "byte");
    for (from, to, names) in [
        ("'other'", "'foreign'", &["foreign/train.bin", "the tokenizer of data/train.bin"][..]),
        ("'other'", "'nothing'", &["nothing/tokenizer.json"]),
        ("weight = 2", "weight = 0", &["`data.sources[0].weight`", "found 0"]),
        ("weight = 2", "wait = 0", &["mixed.toml", "unknown field `wait`"]),
    ] {
        place.write("mixed.toml", TINY.replace("[schedule]", &format!("{sources}[schedule]")));
        place.edit("mixed.toml", from, to);
        place.refused(&["train", "mixed.toml", "--out", "run"], names);
        assert!(!place.exists("run"));
    }
}
