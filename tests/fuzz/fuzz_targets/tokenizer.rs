//! Any text as a tokenizer.json, then texts both ways through what it describes.
//!
//! The input is the tokenizer.json, a line `%%`, a text.

#![no_main]

use libfuzzer_sys::fuzz_target;
use trine_fuzz::{catch_library_panics, use_tokenizer};
use trine_tokenizer::Tokenizer;

fuzz_target!(init: catch_library_panics(), |input: &str| {
    let (json, text) = input.split_once("\n%%\n").unwrap_or((input, "a text"));
    match Tokenizer::from_json(json) {
        Ok(tokenizer) => use_tokenizer(&tokenizer, text),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
