//! Vocabularies of other programs in a GGUF file: the tokenizer.json that is put together from them.
//!
//! The input is lines, `key=value`, that become metadata under `tokenizer.`: `s:` a string, `u:` a
//! number, `b:` a boolean, `S:`, `I:`, `F:`, `U:` lists of strings, i32, f32 and u32, with tabs between
//! elements. After a line `%%` comes a text that goes through the tokenizer both ways.

#![no_main]

use std::collections::BTreeSet;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use trine_format::ModelFile;
use trine_format::gguf::{Array, GgmlType, Gguf, TensorSpec, Value, Writer};
use trine_fuzz::{Scratch, catch_library_panics, check_message, model, use_tokenizer};
use trine_tokenizer::Tokenizer;

static SCRATCH: LazyLock<Scratch> = LazyLock::new(Scratch::new);
/// The first of the models: its metadata without a tokenizer, and its tensors with their bytes.
static MODEL: LazyLock<Parts> = LazyLock::new(|| {
    let gguf = Gguf::open(&SCRATCH.write("first.gguf", model(0))).unwrap();
    let plain = |(key, _): &&(String, Value)| {
        !key.contains("tokenizer") && !key.contains("eos_token") && key != "general.alignment"
    };
    let metadata = gguf.metadata().iter().filter(plain).cloned().collect();
    let tensors = gguf.tensors().iter().map(|t| {
        let spec = TensorSpec { name: t.name.clone(), kind: t.kind, shape: t.shape.clone() };
        (spec, gguf.bytes(t).to_vec())
    });
    (metadata, tensors.collect())
});

type Parts = (Vec<(String, Value)>, Vec<(TensorSpec, Vec<u8>)>);

fuzz_target!(init: catch_library_panics(), |input: &str| {
    let (lines, text) = input.split_once("\n%%\n").unwrap_or((input, "a text"));
    let (mut metadata, tensors) = MODEL.clone();
    let mut seen = BTreeSet::new();
    for (key, value) in lines.lines().filter_map(entry) {
        if seen.insert(key.clone()) {
            metadata.push((key, value));
        }
    }
    let path = SCRATCH.path("model.gguf");
    let specs: Vec<_> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    assert!(specs.iter().any(|spec| spec.kind == GgmlType::I2_S));
    let mut writer = Writer::create(&path, &metadata, &specs).unwrap();
    tensors.iter().for_each(|(_, data)| writer.tensor(data).unwrap());
    writer.finish().unwrap();
    let file = match ModelFile::open(&path) {
        Ok(file) => file,
        Err(error) => return check_message(&error, &path),
    };
    let Some(files) = file.tokenizer() else { return };
    if let Ok(tokenizer) = Tokenizer::from_json(&files.tokenizer_json) {
        use_tokenizer(&tokenizer, text);
    }
});

fn entry(line: &str) -> Option<(String, Value)> {
    let (key, value) = line.split_once('=')?;
    let (kind, value) = value.split_once(':')?;
    let key = match key {
        "eos_ids" => "trine.eos_token_ids".to_owned(),
        key => format!("tokenizer.{key}"),
    };
    let list = || value.split('\t').filter(|part| !part.is_empty());
    let value = match kind {
        "s" => value.into(),
        "u" => value.parse::<u32>().ok()?.into(),
        "b" => (value == "1").into(),
        "S" => Value::Array(Array::String(list().map(str::to_owned).collect())),
        "I" => Value::Array(Array::I32(list().filter_map(|v| v.parse().ok()).collect())),
        "F" => Value::Array(Array::F32(list().filter_map(|v| v.parse().ok()).collect())),
        "U" => Value::Array(Array::U32(list().filter_map(|v| v.parse().ok()).collect())),
        _ => return None,
    };
    Some((key, value))
}
