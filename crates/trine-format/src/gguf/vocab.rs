//! The tokenizer's keys, both ways.
//!
//! Written are the keys that llama.cpp reads (`tokenizer.ggml.*`, for a byte-level BPE) and beside
//! them the whole `tokenizer.json` and `tokenizer_config.json`, which lose nothing. Reading prefers
//! the latter; a file without them, as llama.cpp's converters make it, gets a `tokenizer.json` put
//! together from the former. Nothing here turns text into ids.

use serde_json::{Map, Value as Json, json};

use super::{Array, Gguf, Value};
use crate::{FormatError, ModelConfig, TokenizerFiles};

/// The whole `tokenizer.json`, under the key that the GGUF specification has for it.
const HUGGINGFACE_JSON: &str = "tokenizer.huggingface.json";
/// The whole `tokenizer_config.json`.
const TOKENIZER_CONFIG: &str = "trine.tokenizer_config";
/// All ids that end a text or a turn, where llama.cpp has a key for each kind.
const EOS_IDS: &str = "trine.eos_token_ids";
const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS_ID: &str = "tokenizer.ggml.bos_token_id";
const EOS_ID: &str = "tokenizer.ggml.eos_token_id";
const EOT_ID: &str = "tokenizer.ggml.eot_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// How LLaMA-3 cuts a text into pieces, which llama.cpp calls `llama-bpe`.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Token types of `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// The tokenizer's metadata for a model with `config.vocab_size` tokens.
///
/// # Errors
/// A `tokenizer.json` that is no JSON, or has ids past the vocabulary.
pub(super) fn encode(
    config: &ModelConfig,
    tokenizer: Option<&TokenizerFiles>,
) -> Result<Vec<(String, Value)>, String> {
    let mut out = Vec::new();
    let mut put = |key: &str, value: Value| out.push((key.to_owned(), value));
    if let Some(id) = config.bos_token_id {
        put(BOS_ID, id.into());
    }
    for (key, &id) in [EOS_ID, EOT_ID].iter().zip(&config.eos_token_ids) {
        put(key, id.into());
    }
    put(EOS_IDS, Value::Array(Array::U32(config.eos_token_ids.clone())));

    let Some(files) = tokenizer else {
        put(MODEL, "no_vocab".into());
        return Ok(out);
    };
    let json: Json = serde_json::from_str(&files.tokenizer_json)
        .map_err(|e| format!("tokenizer.json is no JSON: {e}"))?;
    if is_byte_level_bpe(&json) {
        let (tokens, types) = vocabulary(&json, config.vocab_size)?;
        put(MODEL, "gpt2".into());
        put(PRE, pre_tokenizer(&json).into());
        put(TOKENS, Value::Array(Array::String(tokens)));
        put(TOKEN_TYPE, Value::Array(Array::I32(types)));
        put(MERGES, Value::Array(Array::String(merges(&json))));
        let configured = files.tokenizer_config.as_ref().and_then(|c| c.get("add_bos_token"));
        let add_bos = configured.and_then(Json::as_bool);
        put(
            ADD_BOS,
            add_bos.unwrap_or_else(|| starts_with_special(&json["post_processor"])).into(),
        );
    } else {
        put(MODEL, "no_vocab".into());
    }
    if let Some(template) = files.chat_template() {
        put(CHAT_TEMPLATE, template.into());
    }
    put(HUGGINGFACE_JSON, files.tokenizer_json.as_str().into());
    if let Some(config) = &files.tokenizer_config {
        put(TOKENIZER_CONFIG, config.to_string().as_str().into());
    }
    Ok(out)
}

/// Every step of a pre-tokenizer or post-processor, which is one step or a sequence of them.
fn steps<'a>(step: &'a Json, inner: &str) -> Vec<&'a Json> {
    match step.get(inner).and_then(Json::as_array) {
        Some(list) => list.iter().collect(),
        None => vec![step],
    }
}

fn is_byte_level_bpe(json: &Json) -> bool {
    let pre = steps(&json["pre_tokenizer"], "pretokenizers");
    json["model"]["type"] == "BPE" && pre.iter().any(|step| step["type"] == "ByteLevel")
}

/// llama.cpp's name of how the text is cut before merging.
fn pre_tokenizer(json: &Json) -> &'static str {
    let steps = steps(&json["pre_tokenizer"], "pretokenizers");
    let splits: Vec<_> = steps.iter().filter(|step| step["type"] == "Split").collect();
    match splits[..] {
        [split] if split["pattern"]["Regex"] == LLAMA3_SPLIT => "llama-bpe",
        [] if steps.iter().any(|s| s["type"] == "ByteLevel" && s["use_regex"] != false) => "gpt-2",
        _ => "default",
    }
}

/// Tokens and their types by id; ids without a token get a placeholder, as llama.cpp expects.
fn vocabulary(json: &Json, size: usize) -> Result<(Vec<String>, Vec<i32>), String> {
    let mut tokens: Vec<String> = (0..size).map(|id| format!("[PAD{id}]")).collect();
    let mut types = vec![UNUSED; size];
    let mut put = |token: &str, id: Option<u64>, kind: i32| {
        let id = id.filter(|&id| id < size as u64).ok_or_else(|| {
            format!("token {token:?} has the id {id:?}, but the model has {size} tokens")
        })? as usize;
        tokens[id] = token.to_owned();
        types[id] = kind;
        Ok::<(), String>(())
    };
    for (token, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        put(token, id.as_u64(), NORMAL)?;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let kind = if added["special"] == true { CONTROL } else { USER_DEFINED };
        put(added["content"].as_str().unwrap_or_default(), added["id"].as_u64(), kind)?;
    }
    Ok((tokens, types))
}

/// Merges as `left right`; files have them so or as pairs.
fn merges(json: &Json) -> Vec<String> {
    let merge = |merge: &Json| match merge {
        Json::Array(pair) => pair.iter().filter_map(Json::as_str).collect::<Vec<_>>().join(" "),
        other => other.as_str().unwrap_or_default().to_owned(),
    };
    json["model"]["merges"].as_array().into_iter().flatten().map(merge).collect()
}

fn starts_with_special(post_processor: &Json) -> bool {
    steps(post_processor, "processors").iter().any(|step| {
        step["type"] == "TemplateProcessing" && step["single"][0].get("SpecialToken").is_some()
    })
}

/// The tokenizer of a file.
pub(crate) fn decode(gguf: &Gguf) -> Result<Option<TokenizerFiles>, FormatError> {
    let config = match text(gguf, TOKENIZER_CONFIG)? {
        None => None,
        Some(text) => Some(
            serde_json::from_str(text)
                .map_err(|e| FormatError::key(gguf.path(), TOKENIZER_CONFIG, "JSON", e))?,
        ),
    };
    if let Some(json) = text(gguf, HUGGINGFACE_JSON)? {
        let template = text(gguf, CHAT_TEMPLATE)?;
        let template = template.map(|template| json!({ "chat_template": template }));
        return Ok(Some(TokenizerFiles {
            tokenizer_json: json.to_owned(),
            tokenizer_config: config.or(template),
        }));
    }
    if text(gguf, MODEL)? != Some("gpt2") {
        return Ok(None);
    }
    rebuild(gguf).map(Some)
}

/// A `tokenizer.json` from llama.cpp's keys.
fn rebuild(gguf: &Gguf) -> Result<TokenizerFiles, FormatError> {
    let refuse = |key: &str, expected: &str, found: String| {
        FormatError::key(gguf.path(), key, expected, found)
    };
    let strings = |key: &str| match gguf.get(key) {
        Some(Value::Array(Array::String(list))) => Ok(list),
        _ => Err(refuse(key, "an array of strings", "none".to_owned())),
    };
    let (tokens, merges) = (strings(TOKENS)?, strings(MERGES)?);
    let types: &[i32] = match gguf.get(TOKEN_TYPE) {
        Some(Value::Array(Array::I32(types))) if types.len() == tokens.len() => types,
        None => &[],
        _ => return Err(refuse(TOKEN_TYPE, "an i32 for every token", "another".to_owned())),
    };
    let (bos, eos) = (bos_id(gguf)?, eos_ids(gguf)?);
    let mut vocab = Map::new();
    let mut added = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let marked = bos.iter().chain(&eos).any(|&marked| marked as usize == id);
        match types.get(id).copied().unwrap_or(NORMAL) {
            UNUSED if !marked => {}
            kind if marked || kind == CONTROL || kind == USER_DEFINED => added.push(json!({
                "id": id, "content": token, "special": marked || kind == CONTROL,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })),
            _ => {
                if vocab.insert(token.clone(), id.into()).is_some() {
                    let found = format!("two, the second with the id {id}");
                    return Err(refuse(TOKENS, &format!("one token {token:?}"), found));
                }
            }
        }
    }
    // 2B4T's published file names no pre-tokenizer; its vocabulary is LLaMA-3's.
    let llama3 = match text(gguf, PRE)? {
        None | Some("llama-bpe" | "llama3" | "llama-v3") => true,
        Some("gpt-2" | "default") => false,
        Some(other) => {
            let expected = "`llama-bpe`, `gpt-2` or `default`, or a tokenizer.huggingface.json";
            return Err(refuse(PRE, expected, other.to_owned()));
        }
    };
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": !llama3,
    });
    let split = json!({
        "type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated",
        "invert": false,
    });
    let steps = if llama3 { vec![split, byte_level.clone()] } else { vec![byte_level.clone()] };
    let token = |id: Option<u32>| id.and_then(|id| tokens.get(id as usize));
    let add_bos = gguf.get(ADD_BOS).and_then(Value::as_bool).unwrap_or(llama3);
    let post_processor = match (token(bos), bos) {
        (Some(text), Some(id)) if add_bos => json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": text, "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]}},
        }),
        _ => byte_level.clone(),
    };
    let tokenizer_json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": post_processor,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": llama3, "vocab": vocab, "merges": merges,
        },
    });
    let tokenizer_config = json!({
        "bos_token": token(bos), "eos_token": token(eos.first().copied()),
        "chat_template": text(gguf, CHAT_TEMPLATE)?,
    });
    Ok(TokenizerFiles {
        tokenizer_json: tokenizer_json.to_string(),
        tokenizer_config: Some(tokenizer_config),
    })
}

fn text<'a>(gguf: &'a Gguf, key: &str) -> Result<Option<&'a str>, FormatError> {
    let Some(value) = gguf.get(key) else { return Ok(None) };
    let refuse = || FormatError::key(gguf.path(), key, "a string", super::value::brief(value));
    value.as_str().map(Some).ok_or_else(refuse)
}

fn id(gguf: &Gguf, key: &str) -> Result<Option<u32>, FormatError> {
    let Some(value) = gguf.get(key) else { return Ok(None) };
    let refuse = || FormatError::key(gguf.path(), key, "a token id", super::value::brief(value));
    value.as_u64().and_then(|id| u32::try_from(id).ok()).map(Some).ok_or_else(refuse)
}

/// The token that starts a text.
pub(super) fn bos_id(gguf: &Gguf) -> Result<Option<u32>, FormatError> {
    id(gguf, BOS_ID)
}

/// The tokens that end a text or a turn.
pub(super) fn eos_ids(gguf: &Gguf) -> Result<Vec<u32>, FormatError> {
    match gguf.get(EOS_IDS) {
        Some(Value::Array(Array::U32(ids))) => Ok(ids.clone()),
        Some(other) => {
            let found = super::value::brief(other);
            Err(FormatError::key(gguf.path(), EOS_IDS, "an array of u32", found))
        }
        None => {
            let mut ids: Vec<u32> = id(gguf, EOS_ID)?.into_iter().collect();
            ids.extend(id(gguf, EOT_ID)?.filter(|eot| !ids.contains(eot)));
            Ok(ids)
        }
    }
}
