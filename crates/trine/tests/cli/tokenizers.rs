//! Tokenizers and chat templates that a conversion is given, or corrects.

use std::fs;

use super::{FIXTURE, Place};

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn a_conversion_takes_what_its_source_lacks() {
    let place = Place::with_model();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::remove_file(place.path("model").join(name)).unwrap();
    }
    place.ok(&["convert", "model", "bare.gguf"]);
    place.refused(&["run", "bare.gguf"], &["bare.gguf", "no tokenizer"]);
    place.ok(&["convert", "bare.gguf", "whole.gguf", "--tokenizer", FIXTURE]);
    place.ok(&["run", "whole.gguf", "-p", "a", "-n", "2"]);
    let given = fs::read_to_string(format!("{FIXTURE}/tokenizer.json")).unwrap();
    assert!(contains(&place.read("whole.gguf"), &given));

    // The file alone has no template, so that of the source stays; another takes its place.
    place.write("t.json", &given);
    place.write("t.jinja", "{{ 'ours: ' + messages[0]['content'] }}");
    place.ok(&["convert", "whole.gguf", "same.gguf", "--tokenizer", "t.json"]);
    assert!(contains(&place.read("same.gguf"), "set loop_messages"));
    place.ok(&["convert", "same.gguf", "other.gguf", "--chat-template", "t.jinja"]);
    let other = place.read("other.gguf");
    assert!(contains(&other, "'ours: '") && !contains(&other, "set loop_messages"));
}

#[test]
fn what_does_not_fit_a_model_is_refused() {
    let place = Place::with_model();
    place.write("bad.jinja", "{% if %}");
    place.write("bad.json", "{}");
    place.write("t.bin", "x");
    let convert = |option: &str, value: &str, names: &[&str]| {
        place.refused(&["convert", "model", "out.gguf", option, value], names);
        assert!(!place.exists("out.gguf"));
    };
    convert("--chat-template", "bad.jinja", &["bad.jinja", "chat template"]);
    convert("--chat-template", "none.jinja", &["none.jinja", "No such file"]);
    convert("--tokenizer", "bad.json", &["bad.json", "tokenizer.json"]);
    convert("--tokenizer", "t.bin", &["t.bin", "tokenizer of llama2.c"]);
    convert("--tokenizer", "none", &["none", "No such file"]);
    convert("--bit-order", "msb", &["--from bitllama2c"]);
    fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    place.write("good.jinja", "{{ messages }}");
    convert("--chat-template", "good.jinja", &["no tokenizer", "--tokenizer"]);
    let args = ["convert", "model", "out.gguf", "--from", "bitllama2c", "--bit-order", "lsb"];
    place.refused(&args, &["model", "regular file"]);
    place.write("text.bin", "x".repeat(300));
    place.refused(&[&args[..1], &["text.bin"], &args[2..]].concat(), &["text.bin", "magic"]);
    assert_eq!(place.run(&args[..5]).code, Some(2));
}

#[test]
fn a_placeholder_of_a_chat_template_is_replaced_and_said() {
    let place = Place::with_model();
    place.write("p.jinja", "{{ 'Human: ' + messages[0]['content'] + 'BITNETAssistant: ' }}");
    place.ok(&["convert", "model", "theirs.gguf", "--chat-template", "p.jinja"]);
    let ran = place.run(&["convert", "theirs.gguf", "ours.gguf"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("placeholder") && ran.stderr.contains("2B4T"), "{}", ran.stderr);
    let ours = place.read("ours.gguf");
    assert!(contains(&ours, "<|eot_id|>' %}") && !contains(&ours, "BITNETAssistant"));
    // A template that was asked for is taken, whatever it is.
    let args = ["convert", "theirs.gguf", "asked.gguf", "--chat-template", "p.jinja"];
    assert!(!place.run(&args).stderr.contains("placeholder"));
    assert!(contains(&place.read("asked.gguf"), "BITNETAssistant"));
}
