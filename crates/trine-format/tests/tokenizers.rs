//! The tokenizer's keys in GGUF: what is written for which tokenizer, what is made of which keys,
//! and what is refused.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::{Masters, tiny_config};
use serde_json::{Value as Json, json};
use tempfile::tempdir;
use trine_format::gguf::{self, Array, Gguf, Value, WriteOptions};
use trine_format::{
    FormatError, ModelConfig, ModelFile, Piece, PieceKind, SentencePieceBpe, TokenizerFiles,
};

/// Unknown, begin, end, all bytes, and a few pieces of text.
fn spm() -> SentencePieceBpe {
    let piece = |text: &str, score: f32, kind| Piece { text: text.to_owned(), score, kind };
    let mut pieces = vec![
        piece("<unk>", 0.0, PieceKind::Unknown),
        piece("<s>", 0.0, PieceKind::Control),
        piece("</s>", 0.0, PieceKind::Control),
    ];
    pieces.extend((0..256).map(|b| piece(&format!("<0x{b:02X}>"), 0.0, PieceKind::Byte)));
    for (n, text) in ["ab", "abab", "\u{2581}ab", "aba", "a", "b", "\u{2581}"].iter().enumerate() {
        pieces.push(piece(text, -(n as f32), PieceKind::Normal));
    }
    pieces.push(piece("<mark>", 0.0, PieceKind::UserDefined));
    SentencePieceBpe { pieces, bos: Some(1), eos: None, add_space_prefix: true }
}

/// The `tokenizer.json` of these pieces.
fn tokenizer_json(spm: &SentencePieceBpe) -> Json {
    serde_json::from_str(&spm.tokenizer_json().unwrap()).unwrap()
}

fn config(vocab_size: usize) -> ModelConfig {
    ModelConfig { vocab_size, bos_token_id: Some(1), eos_token_ids: vec![2], ..tiny_config() }
}

fn files(json: &Json) -> TokenizerFiles {
    TokenizerFiles { tokenizer_json: json.to_string(), tokenizer_config: None }
}

/// Writes a model with that tokenizer; then hides the whole tokenizer.json, so that only the keys of
/// llama.cpp are left.
fn write(path: &Path, tokenizer: &TokenizerFiles, vocab_size: usize) {
    let config = config(vocab_size);
    let masters = Masters::new(&config);
    gguf::write_model(path, &config, &masters, Some(tokenizer), WriteOptions::default()).unwrap();
    edit(path, b"tokenizer.huggingface.json", |bytes| bytes[0] = b'x');
}

/// Changes the file from the first place on where `text` stands.
fn edit(path: &Path, text: &[u8], change: impl FnOnce(&mut [u8])) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(text.len()).position(|w| w == text).unwrap();
    change(&mut bytes[at..]);
    std::fs::write(path, bytes).unwrap();
}

fn rebuilt(path: &Path) -> Json {
    let file = ModelFile::open(path).unwrap();
    serde_json::from_str(&file.tokenizer().unwrap().tokenizer_json).unwrap()
}

#[test]
fn sentencepiece_is_written_with_pieces_scores_and_types() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let json = tokenizer_json(&spm());
    write(&path, &files(&json), 272);
    let file = Gguf::open(&path).unwrap();
    let get = |key: &str| file.get(&format!("tokenizer.ggml.{key}"));
    for (key, value) in [
        ("model", "llama".into()),
        ("pre", "default".into()),
        ("unknown_token_id", Value::U32(0)),
        ("bos_token_id", Value::U32(1)),
        ("eos_token_id", Value::U32(2)),
        ("add_bos_token", true.into()),
        ("add_eos_token", false.into()),
        ("add_space_prefix", true.into()),
    ] {
        assert_eq!(get(key), Some(&value), "{key}");
    }
    let (Some(Value::Array(Array::String(tokens))), Some(Value::Array(Array::I32(types)))) =
        (get("tokens"), get("token_type"))
    else {
        panic!("tokens and types are arrays")
    };
    assert_eq!(tokens[3..5], ["<0x00>", "<0x01>"]);
    assert_eq!(
        tokens[259..],
        [
            "ab",
            "abab",
            "\u{2581}ab",
            "aba",
            "a",
            "b",
            "\u{2581}",
            "<mark>",
            "[PAD267]",
            "[PAD268]",
            "[PAD269]",
            "[PAD270]",
            "[PAD271]"
        ]
    );
    assert_eq!(types[..4], [2, 3, 3, 6]);
    assert_eq!(types[258..], [6, 1, 1, 1, 1, 1, 1, 1, 4, 5, 5, 5, 5, 5]);
    let Some(Value::Array(Array::F32(scores))) = get("scores") else { panic!("scores") };
    // Merges by rank, then what nothing makes.
    assert_eq!(scores[259..266], [0.0, -1.0, -2.0, -3.0, -7.0, -7.0, -7.0]);
    assert_eq!(rebuilt(&path), json);
}

#[test]
fn pairs_are_ordered_by_the_score_of_what_they_make() {
    let json = tokenizer_json(&spm());
    let merges = &json["model"]["merges"];
    // "abab" is also "aba" + "b"; the longer left part comes first.
    let expected =
        json!([["a", "b"], ["aba", "b"], ["ab", "ab"], ["\u{2581}", "ab"], ["ab", "a"],]);
    assert_eq!(merges, &expected);
    // No merge for pieces that are found in no text, nor through them.
    let mut other = spm();
    other.pieces[259].kind = PieceKind::Control;
    assert_eq!(tokenizer_json(&other)["model"]["merges"], json!([["aba", "b"]]));
}

#[test]
fn ids_around_a_text_and_missing_types_are_understood() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut spm = spm();
    (spm.bos, spm.eos, spm.add_space_prefix) = (None, Some(2), false);
    spm.pieces.pop();
    let json = tokenizer_json(&spm);
    write(&path, &files(&json), spm.pieces.len());
    assert_eq!(rebuilt(&path), json);
    // Files of old converters have no types: bytes and marked ids are known by themselves.
    edit(&path, b"tokenizer.ggml.token_type", |bytes| bytes[0] = b'x');
    assert_eq!(rebuilt(&path), json);
}

/// The error of a file in which something was changed behind `text`.
#[track_caller]
fn refused(key: &str, names: &[&str], change: impl FnOnce(&Path)) {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    write(&path, &files(&tokenizer_json(&spm())), 267);
    change(&path);
    let error = ModelFile::open(&path).err().unwrap();
    assert!(matches!(error, FormatError::Key { .. }), "{error}");
    let error = error.to_string();
    assert!(error.contains(&format!("`tokenizer.ggml.{key}`")), "{error}");
    names.iter().for_each(|name| assert!(error.contains(name), "{error}"));
    assert!(error.len() < 600, "{error}");
}

#[test]
fn keys_that_make_no_tokenizer_are_refused_by_name() {
    let hide = |key: &'static str| move |path: &Path| edit(path, key.as_bytes(), |b| b[0] = b'x');
    refused("scores", &["267 f32", "none"], hide("tokenizer.ggml.scores"));
    refused("tokens", &["strings", "none"], hide("tokenizer.ggml.tokens"));
    // Behind a key stand its type, and of an array also the type and number of the elements.
    let element = |key: &'static str, value: [u8; 4]| {
        move |path: &Path| {
            edit(path, key.as_bytes(), |b| b[key.len() + 16..][..4].copy_from_slice(&value));
        }
    };
    refused("scores", &["NaN"], element("tokenizer.ggml.scores", f32::NAN.to_le_bytes()));
    refused("token_type", &["1 to 6", "7"], element("tokenizer.ggml.token_type", [7, 0, 0, 0]));
    refused("tokens", &["one token \"a\"", "264"], |path| {
        edit(path, b"\x01\0\0\0\0\0\0\0b", |b| b[8] = b'a');
    });
    refused("model", &["`gpt2`, `llama`", "lxama"], |path| {
        edit(path, b"llama", |b| b[1] = b'x');
    });
    refused("add_space_prefix", &["boolean"], |path| {
        let key = b"tokenizer.ggml.add_space_prefix";
        edit(path, key, |b| b[key.len()] = 0);
    });
}

#[test]
fn pieces_that_would_cost_too_much_are_refused() {
    let piece = |text: String| Piece { text, score: 0.0, kind: PieceKind::Normal };
    let make = |pieces: Vec<Piece>| {
        let spm = SentencePieceBpe { pieces, bos: None, eos: None, add_space_prefix: true };
        spm.tokenizer_json().unwrap_err()
    };
    let long = make(vec![piece("x".repeat(1 << 20))]);
    assert_eq!(long.part, "tokens");
    assert!(long.found.contains("1048576 bytes") && long.found.len() < 100, "{long}");
    // Every run is made of every two shorter ones: as many pairs as the square of their number.
    let pairs = make((1..=512).map(|n| piece("x".repeat(n))).collect());
    assert!(pairs.found.contains("too many pairs"), "{pairs}");
    // Shorter runs of more letters: 48 pairs a piece, each much larger in memory than in its text.
    let runs = |letter: char| (1..=96).map(move |n| piece(letter.to_string().repeat(n)));
    let pairs = make(('a'..='t').flat_map(runs).collect());
    assert!(pairs.found.contains("too many pairs"), "{pairs}");
    assert!(make(vec![piece(String::new())]).found.contains("0 bytes"));
    assert!(make(vec![piece("a".into()), piece("a".into())]).expected.contains("one token"));
    // What LLaMA's relatives have, runs of up to 31 spaces, is no attack.
    let spaces = (1..=31).map(|n| piece("\u{2581}".repeat(n))).collect();
    let spm = SentencePieceBpe { pieces: spaces, bos: None, eos: None, add_space_prefix: true };
    assert_eq!(tokenizer_json(&spm)["model"]["merges"].as_array().unwrap().len(), 465);
}

/// A byte-level BPE cut in this way.
fn byte_level(steps: &[Json], ignore_merges: bool) -> Json {
    json!({
        "added_tokens": [{"id": 2, "content": "<e>", "special": true}, {"id": 1, "content": "<b>", "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": null,
        "model": {
            "type": "BPE", "vocab": {"a": 0, "b": 3, "ab": 4}, "merges": [["a", "b"]],
            "ignore_merges": ignore_merges,
        },
    })
}

#[test]
fn the_way_of_cutting_has_llama_cpps_name_and_comes_back() {
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let digits = json!({"type": "Digits", "individual_digits": true});
    let words = |digits: &str| {
        split(&format!(
            "{}{digits}{}",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ))
    };
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    for (name, steps, ignore_merges, known) in [
        ("llama-bpe", vec![words("{1,3}"), bytes(false)], true, true),
        ("smaug-bpe", vec![words("{1,3}"), bytes(false)], false, true),
        ("qwen2", vec![words(""), bytes(false)], false, true),
        ("smollm", vec![digits.clone(), bytes(true)], false, true),
        ("gpt-2", vec![bytes(true)], false, true),
        ("default", vec![words("{1,3}"), digits, bytes(false)], true, false),
        ("default", vec![split("x"), bytes(false)], false, false),
    ] {
        write(&path, &files(&byte_level(&steps, ignore_merges)), 5);
        let pre = Gguf::open(&path).unwrap().get("tokenizer.ggml.pre").cloned();
        assert_eq!(pre, Some(name.into()));
        let json = rebuilt(&path);
        if known {
            assert_eq!(json["pre_tokenizer"]["pretokenizers"], json!(steps), "{name}");
            assert_eq!(json["model"]["ignore_merges"], ignore_merges, "{name}");
        }
        let composes = if name == "qwen2" { json!({"type": "NFC"}) } else { Json::Null };
        assert_eq!(json["normalizer"], composes, "{name}");
        assert_eq!(json["model"]["vocab"], json!({"a": 0, "<b>": 1, "<e>": 2, "b": 3, "ab": 4}));
    }
    // A name that is not known may cut in any way.
    edit(&path, b"default", |b| b[0] = b'x');
    let error = ModelFile::open(&path).err().unwrap().to_string();
    for part in ["`tokenizer.ggml.pre`", "xefault", "falcon3", "smollm"] {
        assert!(error.contains(part), "{error}");
    }
    // Falcon3 is cut as LLaMA-3 is.
    write(&path, &files(&byte_level(&[split("y"), bytes(false)], false)), 5);
    edit(&path, b"default", |b| b[..7].copy_from_slice(b"falcon3"));
    assert_eq!(rebuilt(&path)["pre_tokenizer"]["pretokenizers"][0], words("{1,3}"));
}

/// The text is that of 2B4T's published GGUF file; the model was trained with another.
#[test]
fn a_placeholder_of_a_chat_template_gives_way() {
    let placeholder = "{{ 'Human: ' + message + '\\n\\nBITNETAssistant: ' + eos_token }}";
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let config = Some(json!({"chat_template": placeholder, "bos_token": "<b>"}));
    let json = byte_level(&[json!({"type": "ByteLevel"})], true);
    for hidden in [false, true] {
        let files = TokenizerFiles { tokenizer_config: config.clone(), ..files(&json) };
        write(&path, &files, 5);
        if hidden {
            edit(&path, b"trine.tokenizer_config", |bytes| bytes[0] = b'x');
        }
        let file = ModelFile::open(&path).unwrap();
        let template = file.tokenizer().unwrap().chat_template().unwrap();
        assert!(template.contains("<|eot_id|>") && template.contains("'Assistant: '"));
        assert!(!template.contains("BITNETAssistant"));
        assert_eq!(file.tokenizer().unwrap().bos_token(), Some("<b>"));
    }
}
