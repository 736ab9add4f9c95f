//! Answers of a given form, by a model that would write anything.

use serde_json::{Value, json};

use super::{Server, chat, with};

const CHAT: &str = "/v1/chat/completions";

/// What is answered with some form and seed, and why it ended.
fn answer(server: &Server, format: &Value, seed: u64) -> (String, String) {
    let body = json!({
        "response_format": format, "max_tokens": 200, "temperature": 1.0, "seed": seed,
    });
    let answer = server.ok(CHAT, &with(chat("Say something"), body));
    let choice = &answer["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap().to_owned();
    (text, choice["finish_reason"].as_str().unwrap().to_owned())
}

#[test]
fn json_has_the_schema_that_was_asked_for() {
    let server = Server::new();
    let schema = json!({
        "type": "object",
        "properties": {
            "whole": {"type": "boolean"},
            "word": {"enum": ["one", "two", "three"]},
            "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}, "minItems": 1, "maxItems": 2},
        },
        "required": ["whole", "word", "parts"],
        "additionalProperties": false,
        "$defs": {"part": {"type": "integer", "minimum": 0, "maximum": 99}},
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    let mut texts = Vec::new();
    for seed in 0..6 {
        let (text, reason) = answer(&server, &format, seed);
        let found: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
        assert_eq!(reason, "stop", "{text}");
        assert!(found["whole"].is_boolean(), "{text}");
        assert!(["one", "two", "three"].map(Value::from).contains(&found["word"]), "{text}");
        let parts = found["parts"].as_array().unwrap();
        assert!((1..=2).contains(&parts.len()), "{text}");
        assert!(parts.iter().all(|part| part.as_u64().is_some_and(|n| n < 100)), "{text}");
        assert_eq!(found.as_object().unwrap().len(), 3, "{text}");
        texts.push(text);
    }
    // What it leaves open is still the model's.
    assert!(texts.iter().any(|text| *text != texts[0]), "{texts:?}");
    // Any object will do, but it is one.
    let (text, _) = answer(&server, &json!({"type": "json_object"}), 1);
    assert!(text.trim_start().starts_with('{'), "{text}");
}

#[test]
fn texts_match_an_expression_or_a_grammar_beside_others_that_are_free() {
    let server = Server::new();
    let free = server.ok(CHAT, &chat("Hello there"));
    let expression = json!({"type": "regex", "regex": "(yes|no), [0-9]{3}"});
    let grammar = "start: \"a\" (\"b\" | \"cd\") \"!\"";
    let grammar = json!({"type": "grammar", "grammar": grammar});
    for seed in 0..4 {
        let (text, reason) = answer(&server, &expression, seed);
        let (word, number) = text.split_once(", ").unwrap();
        assert!(["yes", "no"].contains(&word), "{text}");
        assert!(number.len() == 3 && number.bytes().all(|b| b.is_ascii_digit()), "{text}");
        assert_eq!(reason, "stop");
        let (text, _) = answer(&server, &grammar, seed);
        assert!(["ab!", "acd!"].contains(&&text[..]), "{text}");
    }
    // Several choices have a place in the grammar each; streams are the same; nobody else is bound.
    let body = json!({"response_format": expression, "max_tokens": 200, "n": 3, "seed": 5, "temperature": 1});
    let several = server.ok(CHAT, &with(chat("Hi"), body.clone()));
    for choice in several["choices"].as_array().unwrap() {
        let text = choice["message"]["content"].as_str().unwrap();
        assert!(text.starts_with("yes, ") || text.starts_with("no, "), "{text}");
    }
    let stream = with(with(chat("Hi"), body), json!({"n": 1, "stream": true}));
    let chunks = server.post(CHAT, &stream).chunks();
    let deltas = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
    assert_eq!(deltas.collect::<String>(), several["choices"][0]["message"]["content"]);
    assert_eq!(server.ok(CHAT, &chat("Hello there"))["choices"], free["choices"]);
}
