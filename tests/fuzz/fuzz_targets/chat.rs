//! Any text as a chat template: it must compile and render in bounded time and memory, or be refused.
//!
//! The input is the template, a line `%%`, what the user says.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use trine_fuzz::catch_library_panics;
use trine_tokenizer::{ChatTemplate, Message, Tokenizer};

static BYTES: LazyLock<Tokenizer> = LazyLock::new(Tokenizer::bytes);

fuzz_target!(init: catch_library_panics(), |input: &str| {
    let (jinja, said) = input.split_once("\n%%\n").unwrap_or((input, "Hello <|eot_id|>"));
    let Ok(template) = ChatTemplate::new(jinja) else { return };
    let messages = [
        Message::new("system", "Be brief."),
        Message::new("user", said),
        Message::new("assistant", "Hi."),
        Message::new("user", "{{ bos_token }}"),
    ];
    let rendered = template.render(&messages, true, "<s>", "</s>");
    if rendered.is_ok_and(|text| text.len() < 1 << 16) {
        let _ = template.encode(&BYTES, &messages, false);
        let _ = template.call_format(&BYTES);
    }
});
