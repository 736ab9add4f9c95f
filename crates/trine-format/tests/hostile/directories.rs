//! Directories of safetensors.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use proptest::prelude::*;
use serde_json::json;
use tempfile::tempdir;
use trine_format::{ModelFile, write_hf_packed};

use crate::common::{Masters, read_all, tiny_config, tiny_tokenizer};

/// Makes a small valid packed directory.
pub(crate) fn valid_dir(dir: &Path) {
    static FILES: OnceLock<Vec<(OsString, Vec<u8>)>> = OnceLock::new();
    let files = FILES.get_or_init(|| {
        let dir = tempdir().unwrap();
        let model = dir.path().join("model");
        let config = tiny_config();
        write_hf_packed(&model, &config, &Masters::new(&config), Some(&tiny_tokenizer())).unwrap();
        let read = |e: fs::DirEntry| (e.file_name(), fs::read(e.path()).unwrap());
        fs::read_dir(&model).unwrap().map(|e| read(e.unwrap())).collect()
    });
    fs::create_dir(dir).unwrap();
    for (name, bytes) in files {
        fs::write(dir.join(name), bytes).unwrap();
    }
}

/// Replaces the header of a valid directory's safetensors file; the error must name `expected`.
fn refused_header(change: impl FnOnce(String) -> String, expected: &str) {
    let dir = tempdir().unwrap();
    let model = dir.path().join("hostile");
    valid_dir(&model);
    let path = model.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = change(String::from_utf8(bytes[8..8 + length].to_vec()).unwrap());
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(&bytes[8 + length..]);
    fs::write(&path, out).unwrap();
    let error = read_all(&model).expect_err(expected).to_string();
    assert!(error.contains(expected), "{expected}: {error}");
}

#[test]
fn safetensors_headers_that_lie() {
    refused_header(|_| "no json".to_owned(), "safetensors header");
    refused_header(|h| h.replacen('{', r#"{"a":{},"a":{},"#, 1), "two tensors of the name `a`");
    refused_header(|_| format!("{{\"a\":{}", "[".repeat(100_000)), "safetensors header");
    refused_header(|h| h.replace("\"shape\":[8,16]", "\"shape\":[8,17]"), "safetensors header");
    refused_header(|h| h.replace("[8,16]", "[4611686018427387904,16]"), "safetensors header");
    refused_header(|h| h.replace("[0,256]", "[2,258]"), "safetensors header");
    refused_header(|h| h.replace("q_proj.weight\"", "k_proj.weight\""), "safetensors header");
    refused_header(|h| h.replace("q_proj.weight_scale", "q_proj.weight_other"), "weight_scale");
    refused_header(|h| h.replace("q_proj.weight_scale", "q_proj.weight_bias."), "weight_scale");
    refused_header(|h| h.replacen("\"U8\"", "\"I8\"", 1), "expected U8");
    refused_header(|h| h.replace("[8,16]", "[16,8]"), "shape [8, 16]");
    refused_header(|h| h.replace("model.norm", "model.wrong"), "model.norm.weight");
    // Ends that add up to more than any address, in empty data.
    let end = u64::MAX / 8 / 8 * 8;
    let huge = (0..10u64).map(|i| {
        let (start, stop) = (i.wrapping_mul(end), (i + 1).wrapping_mul(end));
        format!("\"t{i}\":{{\"dtype\":\"U8\",\"shape\":[{end}],\"data_offsets\":[{start},{stop}]}}")
    });
    let huge = huge.collect::<Vec<_>>().join(",");
    refused_header(|_| format!("{{{huge}}}"), "safetensors header");
}

#[test]
fn safetensors_header_lengths_that_lie() {
    let dir = tempdir().unwrap();
    let model = dir.path().join("hostile");
    valid_dir(&model);
    let path = model.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    for length in [u64::MAX, u64::MAX - 8, 1 << 40, bytes.len() as u64, 0, 1] {
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        fs::write(&path, &bytes).unwrap();
        let error = read_all(&model).unwrap_err().to_string();
        assert!(error.contains("safetensors header"), "{error}");
    }
}

#[test]
fn indices_that_name_no_file_beside_them() {
    let dir = tempdir().unwrap();
    let model = dir.path().join("model");
    valid_dir(&model);
    fs::remove_file(model.join("model.safetensors")).unwrap();
    let index = model.join("model.safetensors.index.json");
    let long = "x".repeat(256);
    for name in ["", ".", "..", "/etc/passwd", "../a", "a/b", "a\u{1b}[2J", "a\n", "a\0", &long] {
        fs::write(&index, json!({"weight_map": {"any": name}}).to_string()).unwrap();
        let error = ModelFile::open(&model).err().unwrap().to_string();
        assert!(error.contains("weight_map") && error.len() < 1000, "{name:?}: {error}");
    }
}

#[test]
fn directories_with_missing_files() {
    let dir = tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        let model = dir.path().join(name.replace('.', "-"));
        valid_dir(&model);
        fs::remove_file(model.join(name)).unwrap();
        let error = ModelFile::open(&model).err().unwrap().to_string();
        assert!(error.contains(name), "{error}");
    }
    assert!(ModelFile::open(&dir.path().join("nothing")).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes_of_a_directory_never_panic(
        name in prop::sample::select(vec![
            "model.safetensors", "model.safetensors", "model.safetensors", "config.json",
            "generation_config.json", "tokenizer_config.json", "tokenizer.json",
        ]),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let dir = tempdir().unwrap();
        let model = dir.path().join("model");
        valid_dir(&model);
        let path = model.join(name);
        let mut bytes = fs::read(&path).unwrap();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        fs::write(&path, bytes).unwrap();
        let _ = read_all(&model);
    }
}
