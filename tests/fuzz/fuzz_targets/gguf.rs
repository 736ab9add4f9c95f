//! Any bytes as a GGUF file.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use trine_fuzz::{Scratch, read_all};

static SCRATCH: LazyLock<Scratch> = LazyLock::new(Scratch::new);

fuzz_target!(|bytes: &[u8]| {
    let path = SCRATCH.write("model.gguf", bytes);
    read_all(&path);
});
