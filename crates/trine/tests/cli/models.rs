//! Models that are damaged, hostile, incomplete, or no models at all.

use crate::life::json;
use std::fs;

use super::{FIXTURE, Place};

/// Commands that open a model.
const READERS: [&[&str]; 4] =
    [&["inspect"], &["run", "-n", "2"], &["chat"], &["logits", "--ids", "1,2"]];

/// Checks that everything that reads models refuses this one, naming all of `names`.
#[track_caller]
fn refused(place: &Place, model: &str, names: &[&str]) {
    for reader in READERS {
        let mut args = reader.to_vec();
        args.insert(1, model);
        place.refused(&args, names);
    }
    place.refused(&["convert", model, "out.gguf"], names);
    assert!(!place.exists("out.gguf"));
    assert_eq!(place.leftovers(), [""; 0]);
}

#[test]
fn what_is_no_model_is_refused() {
    let place = Place::new();
    place.write("text.gguf", "no model");
    place.write("empty.gguf", "");
    fs::create_dir_all(place.path("dir")).unwrap();
    fs::create_dir_all(place.path("run/checkpoints")).unwrap();
    refused(&place, "text.gguf", &["text.gguf", "magic", "GGUF", "no m"]);
    refused(&place, "empty.gguf", &["empty.gguf"]);
    refused(&place, "missing.gguf", &["missing.gguf", "No such file"]);
    refused(&place, "dir", &["dir/config.json", "No such file"]);
    refused(&place, "run", &["run: ", "no checkpoint"]);
    refused(&place, "/dev/zero", &["/dev/zero", "regular file"]);
    refused(&place, env!("CARGO_BIN_EXE_trine"), &["magic"]);
}

#[test]
fn truncated_ggufs_are_refused() {
    let place = Place::with_gguf();
    let whole = place.read("model.gguf");
    for length in [3, 4, 11, 23, 24, 40, 1000, whole.len() / 2, whole.len() - 1] {
        place.write("cut.gguf", &whole[..length]);
        place.refused(&["inspect", "cut.gguf"], &["cut.gguf"]);
    }
    refused(&place, "cut.gguf", &["cut.gguf"]);
}

#[test]
fn absurd_sizes_in_a_gguf_are_refused() {
    let place = Place::with_gguf();
    let whole = place.read("model.gguf");
    // Number of tensors, number of keys, length of the first key.
    for at in [8, 16, 24] {
        for size in [u64::MAX, 1 << 62, 1 << 40] {
            let mut bytes = whole.clone();
            bytes[at..at + 8].copy_from_slice(&size.to_le_bytes());
            place.write("absurd.gguf", bytes);
            refused(&place, "absurd.gguf", &["absurd.gguf"]);
        }
    }
}

#[test]
fn flipped_bits_work_or_are_refused_and_never_panic() {
    let place = Place::with_gguf();
    let whole = place.read("model.gguf");
    // Primes apart, so that all parts of keys and tensor descriptions are met.
    let head = (0..6000).step_by(61);
    let rest = (6000..whole.len()).step_by(8009);
    for (n, at) in head.chain(rest).enumerate() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (n % 8);
        place.write("flipped.gguf", bytes);
        let ran = place.run(&["run", "flipped.gguf", "-n", "2", "--json"]);
        match ran.code {
            Some(0) => {}
            _ => {
                ran.check_refused(&["byte", &at.to_string()], &[]);
                assert_eq!(ran.stderr.lines().count(), 1, "byte {at}: {}", ran.stderr);
            }
        }
    }
}

#[test]
fn damaged_safetensors_are_refused() {
    let place = Place::with_model();
    let file = "model/model.safetensors";
    let whole = place.read(file);
    for length in [u64::MAX, 1 << 40, whole.len() as u64] {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        place.write(file, bytes);
        refused(&place, "model", &[file, "header"]);
    }
    place.write(file, &whole[..whole.len() - 1]);
    refused(&place, "model", &[file, "tensor data"]);
    place.write(file, &whole[..5]);
    refused(&place, "model", &[file]);

    // A tensor under another name of the same length is one missing.
    let name = b"model.norm.weight";
    let at = whole.windows(name.len()).position(|w| w == name).unwrap();
    let mut bytes = whole.clone();
    bytes[at..at + name.len()].copy_from_slice(b"model.norm.wright");
    place.write(file, bytes);
    refused(&place, "model", &["model", "`model.norm.weight`", "none of this name"]);

    fs::remove_file(place.path(file)).unwrap();
    refused(&place, "model", &[file, "No such file"]);
}

#[test]
fn configurations_that_do_not_fit_are_refused() {
    let place = Place::with_model();
    let file = "model/config.json";
    let whole = String::from_utf8(place.read(file)).unwrap();
    let size = "\"intermediate_size\": 160";
    place.edit(file, size, "\"intermediate_size\": 176");
    refused(&place, "model", &["model.safetensors", "shape [176, 64]", "shape [160, 64]"]);
    for (value, names) in [
        ("0", &["intermediate_size", "found 0"][..]),
        ("-1", &["intermediate_size"]),
        ("1e300", &["intermediate_size"]),
        ("18446744073709551615", &["intermediate_size"]),
        ("\"many\"", &["intermediate_size"]),
        ("[", &["JSON"]),
    ] {
        place.write(file, whole.replace(size, &format!("\"intermediate_size\": {value}")));
        refused(&place, "model", &[&[file][..], names].concat());
    }
}

#[test]
fn tokenizers_that_do_not_serve_are_refused() {
    let place = Place::with_model();
    let file = "model/tokenizer.json";
    let whole = place.read(file);
    let run = ["run", "model", "-n", "2"];
    // A control character inside of the decoder, on which the library that reads it panics.
    let text = String::from_utf8(whole.clone()).unwrap();
    let decoder = text.find("\"decoder\"").unwrap();
    let at = decoder + text[decoder..].find("ByteLevel").unwrap();
    let mut bytes = whole.clone();
    bytes[at] = 1;
    place.write(file, bytes);
    place.refused(&run, &["tokenizer", "model", "control character"]);
    place.write(file, &whole[..whole.len() / 2]);
    place.refused(&run, &["tokenizer", "model", "EOF"]);
    fs::remove_file(place.path(file)).unwrap();
    place.refused(&run, &["model has no tokenizer", "--tokenizer"]);
    place.refused(&["tokenizer", "encode", "model", "x"], &["model has no tokenizer"]);
    // One of another model does not fit.
    place.ok(&["data", "synth", "corpus.txt", "--bytes", "40000"]);
    place.ok(&["tokenizer", "train", "corpus.txt", "--out", "t.json", "--vocab-size", "600"]);
    let other = ["run", "model", "--tokenizer", "t.json"];
    place.refused(&other, &["600 ids", "512"]);
    place.refused(&["run", "model", "--tokenizer", "none.json"], &["none.json", "No such file"]);
    // Ids alone need none.
    place.ok(&["logits", "model", "--ids", "1,2"]);
}

#[test]
fn ids_outside_the_vocabulary_and_the_context_are_refused() {
    let place = Place::new();
    place.refused(&["logits", FIXTURE, "--ids", "1,512"], &["bf16", "512", "outside"]);
    let ids = vec!["1"; 513].join(",");
    place.refused(&["logits", FIXTURE, "--ids", &ids], &["bf16", "context", "513", "512"]);
    place.refused(&["tokenizer", "decode", FIXTURE, "99999"], &["bf16", "99999", "512"]);
}

#[test]
fn settings_out_of_range_are_refused() {
    let place = Place::new();
    for (option, value) in [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--min-p", "1.5"),
        ("--repetition-penalty", "0"),
    ] {
        let name = option.trim_start_matches("--").replace('-', "_");
        place.refused(&["run", FIXTURE, option, value], &[&name, "expected", "found"]);
    }
}

#[test]
fn random_models_of_every_form_are_the_same_model() {
    let place = Place::new();
    place.ok(&["synth-model", "masters", "--seed", "3"]);
    place.ok(&["synth-model", "model.gguf", "--seed", "3"]);
    place.ok(&["verify", "masters", "model.gguf", "--ids", "1,2"]);
    place.ok(&["synth-model", "other.gguf", "--seed", "4"]);
    assert_eq!(place.run(&["verify", "model.gguf", "other.gguf", "--ids", "1"]).code, Some(1));
    let logits = place.ok(&["logits", "model.gguf", "--ids", "1,2,3", "--json"]);
    let logits: serde_json::Value = serde_json::from_str(&logits).unwrap();
    for position in logits["positions"].as_array().unwrap() {
        let largest = position["top"][0][1].as_f64().unwrap();
        assert!((1.0..20.0).contains(&largest), "{largest}");
    }
    let small = ["--layers", "1", "--hidden", "128", "--ffn", "256", "--heads", "2", "--vocab"];
    place.ok(&[&["synth-model", "packed", "--type", "hf-packed"][..], &small, &["512"]].concat());
    let found = place.ok(&["inspect", "packed", "--json"]);
    let found: serde_json::Value = serde_json::from_str(&found).unwrap();
    assert_eq!(found["parameters"], 512 * 128 + 128 * (128 * 4 + 3 * 256) + 128 * 4 + 256);
    assert_eq!(found["ternary"].as_array().unwrap().len(), 7);
}

#[test]
fn random_models_that_cannot_be_are_refused() {
    let place = Place::new();
    fs::create_dir(place.path("full")).unwrap();
    place.write("full/file", "");
    for (args, names) in [
        (&["out", "--type", "i2_s"][..], &["i2_s", ".gguf"][..]),
        (&["out.gguf", "--type", "hf"], &["hf", ".gguf"]),
        (&["full"], &["full", "empty directory"]),
        (&["out", "--heads", "3"], &["--heads 3", "256"]),
        (&["out", "--heads", "0"], &["--heads 0"]),
        (&["out", "--layers", "0"], &["num_hidden_layers"]),
        (&["out", "--tokenizer", "none.json"], &["none.json"]),
        (&["out", "--vocab", "3", "--tokenizer", FIXTURE], &["tied-h64", "--vocab"]),
    ] {
        place.refused(&[&["synth-model"], args].concat(), names);
    }
    assert!(!place.exists("out") && !place.exists("out.gguf"));
    place.ok(&["synth-model", "with", "--vocab", "512", "--tokenizer", FIXTURE]);
    place.ok(&["run", "with", "-p", "a", "-n", "2"]);
}

/// A tokenizer that a model did not have brings the tokens with it that begin and end a text.
#[test]
fn another_tokenizer_brings_its_own_ends() {
    let place = Place::new();
    place.write("text.txt", "Once upon a time there was a fox. ".repeat(40).as_bytes());
    place.ok(&["tokenizer", "train", "text.txt", "--out", "tok.json", "--vocab-size", "300"]);
    place.ok(&["convert", FIXTURE, "m.gguf", "--tokenizer", "tok.json"]);
    let shown = json(&place.ok(&["inspect", "m.gguf", "--json"]));
    let special = shown["tokenizer"]["special_tokens"].as_array().unwrap();
    let id_of = |ids: &serde_json::Value| special.iter().any(|token| token[0] == *ids);
    assert!(id_of(&shown["config"]["bos_token_id"]), "{shown}");
    let ends = shown["config"]["eos_token_ids"].as_array().unwrap();
    assert!(!ends.is_empty() && ends.iter().all(id_of), "{ends:?}");
}

#[test]
fn an_order_of_i2_s_is_for_i2_s_of_others() {
    let place = Place::new();
    place.ok(&["convert", FIXTURE, "m.gguf"]);
    let order = ["--i2s-order", "arm"];
    let refused = |from: &str, names: &[&str]| {
        place.refused(&[&["convert", from, "x.gguf"][..], &order].concat(), names);
    };
    refused("m.gguf", &["--i2s-order", "m.gguf", "Trine"]);
    refused(FIXTURE, &["--i2s-order", "no I2_S"]);
    assert!(!place.exists("x.gguf"));
}
