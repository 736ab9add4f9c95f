//! A Hugging Face directory: the texts and the safetensors files come from the input.
//!
//! The input is parts between the line `%%`: config.json, the header of the first safetensors file
//! (its length is put before it), its data, model.safetensors.index.json, tokenizer.json,
//! tokenizer_config.json, generation_config.json, a whole second safetensors file as it is. A part
//! that is empty is a file that is missing. Data that is a number is so many bytes of 1.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use trine_fuzz::{Scratch, read_all};

static SCRATCH: LazyLock<Scratch> = LazyLock::new(Scratch::new);

/// Largest data that a number asks for.
const LARGEST: usize = 1 << 18;

fuzz_target!(|input: &[u8]| {
    let mut parts = split(input, b"\n%%\n").into_iter();
    let mut next = || parts.next().unwrap_or_default();
    let file = |name: &str, bytes: &[u8]| {
        let name = format!("model/{name}");
        if bytes.is_empty() { SCRATCH.remove(&name) } else { drop(SCRATCH.write(&name, bytes)) }
    };
    let config = next();
    SCRATCH.write("model/config.json", config);
    let (header, data, index) = (next(), next(), next());
    let mut shard = Vec::new();
    if !header.is_empty() {
        shard.extend((header.len() as u64).to_le_bytes());
        shard.extend(header);
        match str::from_utf8(data).ok().and_then(|text| text.parse::<usize>().ok()) {
            Some(size) => shard.resize(shard.len() + size.min(LARGEST), 1),
            None => shard.extend(data),
        }
    }
    // With an index the file has a name that only the index can tell.
    let (single, named) =
        if index.is_empty() { (&shard[..], &[][..]) } else { (&[][..], &shard[..]) };
    file("model.safetensors", single);
    file("a.safetensors", named);
    file("model.safetensors.index.json", index);
    for name in
        ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "b.safetensors"]
    {
        file(name, next());
    }
    read_all(&SCRATCH.path("model"));
});

fn split<'a>(mut bytes: &'a [u8], mark: &[u8]) -> Vec<&'a [u8]> {
    let mut parts = Vec::new();
    while let Some(at) = bytes.windows(mark.len()).position(|w| w == mark) {
        parts.push(&bytes[..at]);
        bytes = &bytes[at + mark.len()..];
    }
    parts.push(bytes);
    parts
}
