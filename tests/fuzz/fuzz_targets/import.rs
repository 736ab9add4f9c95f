//! Any bytes as the files of the formats that are only imported.
//!
//! The first byte picks the reader: bitllama2.c's models in both orders, llama2.c's tokenizers.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use trine_export::import::{bitllama2c, llama2c};
use trine_fuzz::{Scratch, catch_library_panics, check_message, read_opened, use_tokenizer};
use trine_tokenizer::Tokenizer;

static SCRATCH: LazyLock<Scratch> = LazyLock::new(Scratch::new);

fuzz_target!(init: catch_library_panics(), |input: &[u8]| {
    let Some((&which, bytes)) = input.split_first() else { return };
    let path = SCRATCH.write("model.bin", bytes);
    let order = match which % 3 {
        0 => bitllama2c::BitOrder::Msb,
        1 => bitllama2c::BitOrder::Lsb,
        _ => return tokenizer(&path),
    };
    read_opened(bitllama2c::open(&path, order), &path);
});

fn tokenizer(path: &std::path::Path) {
    match llama2c::tokenizer(path) {
        Ok(files) => {
            if let Ok(tokenizer) = Tokenizer::from_json(&files.tokenizer_json) {
                use_tokenizer(&tokenizer, "a text\n\u{1f600}");
            }
        }
        Err(error) => check_message(&error, path),
    }
}
