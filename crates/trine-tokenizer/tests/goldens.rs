//! Against ids and texts that transformers produced.
//!
//! `tests/data/fixtures` at the repository's root; its README names versions and generator.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use serde_json::Value;
use trine_tokenizer::{BOS, ChatTemplate, EOS, EOT, Message, Tokenizer};

fn fixture(name: &str) -> PathBuf {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/fixtures/tied-h64");
    PathBuf::from(root).join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture(name)).unwrap()).unwrap()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_file(&fixture("bf16/tokenizer.json")).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn conversation() -> [Message; 2] {
    [
        Message::new("system", "You are a helpful assistant."),
        Message::new("user", " How are you?  "),
    ]
}

/// The chat template of BitNet b1.58 2B4T.
const TEMPLATE_2B4T: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}\
    {% set content = message['role'] | capitalize + ': '+ message['content'] | trim + \
    '<|eot_id|>' %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}\
    {% endif %}";

#[test]
fn ids_match_transformers() {
    let (tokenizer, reference) = (tokenizer(), json("ref.json"));
    let prompts = reference["prompts"].as_array().unwrap();
    assert_eq!(prompts.len(), 7);
    for prompt in prompts {
        let (text, expected) = (prompt["text"].as_str().unwrap(), ids(&prompt["ids"]));
        // The last prompt is a rendered conversation, to which nothing is added.
        let add_special_tokens = expected[0] == 508;
        assert_eq!(tokenizer.encode(text, add_special_tokens).unwrap(), expected, "{text}");
        let skipped = usize::from(add_special_tokens);
        assert_eq!(tokenizer.decode(&expected[skipped..], false).unwrap(), text);
    }
}

#[test]
fn chat_matches_transformers() {
    let (tokenizer, reference) = (tokenizer(), json("ref.json"));
    let config = json("bf16/tokenizer_config.json");
    assert_eq!(config["chat_template"], TEMPLATE_2B4T);
    let template = ChatTemplate::new(TEMPLATE_2B4T).unwrap();
    let text = template.render(&conversation(), true, BOS, EOS).unwrap();
    assert_eq!(
        text,
        "System: You are a helpful assistant.<|eot_id|>User: How are you?<|eot_id|>Assistant: "
    );
    assert_eq!(text, reference["chat"]["text"]);
    let expected = ids(&reference["chat"]["ids"]);
    assert_eq!(tokenizer.encode(&text, false).unwrap(), expected);
    assert_eq!(template.encode(&tokenizer, &conversation(), true).unwrap(), expected);
}

#[test]
fn special_tokens_have_their_ids() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.vocab_size(), 512);
    assert_eq!(
        (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.eot_id()),
        (Some(508), Some(509), Some(510))
    );
    assert_eq!(tokenizer.token(509).as_deref(), Some(EOS));
    assert_eq!(tokenizer.id(EOT), Some(510));
    assert_eq!((tokenizer.token(512), tokenizer.id("no such token")), (None, None));
    assert!(tokenizer.is_special(510) && !tokenizer.is_special(37));
    assert!(tokenizer.adds_bos());
    assert_eq!(tokenizer.decode(&[508, 37, 510], true).unwrap(), "F");
}
