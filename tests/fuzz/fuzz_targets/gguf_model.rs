//! A valid GGUF file of every layout, damaged: so that what lies behind the header is reached.
//!
//! The first byte picks the model. Then come edits, each an operation, a place and its bytes: patch,
//! insert, remove, copy a piece of the file to elsewhere, truncate. A model that is still valid
//! after them is written again, in TRN2, and must read back as the same trits and scales.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use trine_format::gguf::{TernaryType, WriteOptions, write_model};
use trine_format::{Dtype, ModelFile, Projection, Quantization};
use trine_fuzz::{Scratch, model, read_all};

static SCRATCH: LazyLock<Scratch> = LazyLock::new(Scratch::new);

/// Largest edited file.
const LARGEST: usize = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let Some((&which, edits)) = input.split_first() else { return };
    let bytes = edited(model(which).to_vec(), edits);
    let path = SCRATCH.write("model.gguf", &bytes);
    if let Some(file) = read_all(&path) {
        rewrite(&file);
    }
});

/// Applies edits as long as there are any: one byte operation, three bytes place, one byte length.
fn edited(mut bytes: Vec<u8>, mut edits: &[u8]) -> Vec<u8> {
    while let Some((&[op, a, b, c, len], rest)) = edits.split_first_chunk() {
        if bytes.is_empty() || bytes.len() > LARGEST {
            break;
        }
        let at = u32::from_le_bytes([a, b, c, 0]) as usize % bytes.len();
        let len = usize::from(len);
        let reach = len.min(bytes.len() - at);
        let (data, rest_after) = rest.split_at(len.min(rest.len()));
        edits = rest;
        match op % 6 {
            0 => {
                edits = rest_after;
                let reach = data.len().min(reach);
                bytes[at..at + reach].copy_from_slice(&data[..reach]);
            }
            1 => {
                edits = rest_after;
                bytes.splice(at..at, data.iter().copied());
            }
            2 => drop(bytes.drain(at..at + reach)),
            3 => {
                // A piece of the file over, or between, what lies at the first bytes of `rest`.
                let Some((&[a, b, c], after)) = rest.split_first_chunk() else { break };
                edits = after;
                let to = u32::from_le_bytes([a, b, c, 0]) as usize % bytes.len();
                let piece = bytes[at..at + reach].to_vec();
                let over = if op < 128 { piece.len().min(bytes.len() - to) } else { 0 };
                bytes.splice(to..to + over, piece);
            }
            4 => bytes[at] = bytes[at].wrapping_add(len as u8),
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// Writes what was read and compares.
fn rewrite(file: &ModelFile) {
    let path = SCRATCH.path("again.gguf");
    let options = WriteOptions { ternary: TernaryType::Trn2, embedding: Dtype::F32 };
    let tokenizer = file.tokenizer();
    if write_model(&path, file.config(), file, tokenizer, options).is_err() {
        return;
    }
    let again = ModelFile::open(&path).unwrap();
    let mut config = file.config().clone();
    config.quantization = Quantization::Offline;
    assert_eq!(*again.config(), config);
    for (layer, p) in (0..config.num_hidden_layers).flat_map(|l| Projection::ALL.map(|p| (l, p))) {
        assert_eq!(again.projection(layer, p).unwrap(), file.projection(layer, p).unwrap());
    }
}
