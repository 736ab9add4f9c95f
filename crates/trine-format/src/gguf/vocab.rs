//! The tokenizer's keys, both ways.
//!
//! Written are the keys that llama.cpp reads (`tokenizer.ggml.*`, for a byte-level BPE and for
//! SentencePiece's) and beside them the whole `tokenizer.json` and `tokenizer_config.json`, which
//! lose nothing. Reading prefers the latter; a file without them, as llama.cpp's converters make it,
//! gets a `tokenizer.json` put together from the former. Nothing here turns text into ids.

mod bpe;
mod spm;

use serde_json::{Value as Json, json};

use super::{Array, Gguf, Value};
use crate::tokenizer::around;
use crate::{FormatError, ModelConfig, SentencePieceBpe, TokenizerFiles};

/// The whole `tokenizer.json`, under the key that the GGUF specification has for it.
const HUGGINGFACE_JSON: &str = "tokenizer.huggingface.json";
/// The whole `tokenizer_config.json`.
const TOKENIZER_CONFIG: &str = "trine.tokenizer_config";
/// All ids that end a text or a turn, where llama.cpp has a key for each kind.
const EOS_IDS: &str = "trine.eos_token_ids";
const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS_ID: &str = "tokenizer.ggml.bos_token_id";
const EOS_ID: &str = "tokenizer.ggml.eos_token_id";
const EOT_ID: &str = "tokenizer.ggml.eot_token_id";
const UNK_ID: &str = "tokenizer.ggml.unknown_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// The template that 2B4T was trained with, from its `tokenizer_config.json`.
const TEMPLATE_2B4T: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = message['role'] | capitalize + ': '+ message['content'] | trim + '<|eot_id|>' %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

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
    let (model, keys) = if bpe::is_byte_level(&json) {
        ("gpt2", bpe::encode(&json, config.vocab_size)?)
    } else if let Some(spm) = SentencePieceBpe::from_tokenizer_json(&json, config.vocab_size) {
        ("llama", spm::encode(&spm))
    } else {
        ("no_vocab", Vec::new())
    };
    put(MODEL, model.into());
    if !keys.is_empty() {
        keys.into_iter().for_each(|(key, value)| put(key, value));
        let (bos, eos) = around(&json["post_processor"]);
        for (key, name, found) in [(ADD_BOS, "add_bos_token", bos), (ADD_EOS, "add_eos_token", eos)]
        {
            let configured = files.tokenizer_config.as_ref().and_then(|c| c.get(name)?.as_bool());
            put(key, configured.unwrap_or(found.is_some()).into());
        }
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

/// Whether a chat template is the placeholder that the converter of bitnet.cpp wrote into 2B4T's
/// published file. Reading puts the model's own in its place, as the model knows no other.
pub fn is_placeholder_template(template: &str) -> bool {
    template.contains("BITNETAssistant")
}

/// The tokenizer of a file.
///
/// The placeholder of a chat template that 2B4T's published file has gives way to the model's own.
pub(crate) fn decode(gguf: &Gguf) -> Result<Option<TokenizerFiles>, FormatError> {
    let mut files = decode_as_stored(gguf)?;
    if let Some(files) = &mut files
        && files.chat_template().is_some_and(is_placeholder_template)
    {
        files.set_chat_template(TEMPLATE_2B4T);
    }
    Ok(files)
}

fn decode_as_stored(gguf: &Gguf) -> Result<Option<TokenizerFiles>, FormatError> {
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
    match text(gguf, MODEL)? {
        None | Some("no_vocab" | "none") => Ok(None),
        Some("gpt2") => bpe::decode(gguf).map(Some),
        Some("llama") => spm::decode(gguf).map(Some),
        Some(other) => {
            let expected = "`gpt2`, `llama` or `no_vocab`, or a tokenizer.huggingface.json";
            Err(FormatError::key(gguf.path(), MODEL, expected, other))
        }
    }
}

fn text<'a>(gguf: &'a Gguf, key: &str) -> Result<Option<&'a str>, FormatError> {
    let Some(value) = gguf.get(key) else { return Ok(None) };
    let refuse = || FormatError::key(gguf.path(), key, "a string", super::value::brief(value));
    value.as_str().map(Some).ok_or_else(refuse)
}

fn flag(gguf: &Gguf, key: &str) -> Result<Option<bool>, FormatError> {
    let Some(value) = gguf.get(key) else { return Ok(None) };
    let refuse = || FormatError::key(gguf.path(), key, "a boolean", super::value::brief(value));
    value.as_bool().map(Some).ok_or_else(refuse)
}

fn strings<'a>(gguf: &'a Gguf, key: &str) -> Result<&'a [String], FormatError> {
    match gguf.get(key) {
        Some(Value::Array(Array::String(list))) => Ok(list),
        other => {
            let found = other.map_or_else(|| "none".to_owned(), super::value::brief);
            Err(FormatError::key(gguf.path(), key, "an array of strings", found))
        }
    }
}

/// The type of every token, or nothing where the file has no types.
fn token_types(gguf: &Gguf, tokens: usize) -> Result<&[i32], FormatError> {
    match gguf.get(TOKEN_TYPE) {
        Some(Value::Array(Array::I32(types))) if types.len() == tokens => Ok(types),
        None => Ok(&[]),
        other => Err(mismatch(gguf, TOKEN_TYPE, "i32", tokens, other)),
    }
}

/// The error about a key that should have a number for every token.
fn mismatch(
    gguf: &Gguf,
    key: &str,
    kind: &str,
    tokens: usize,
    found: Option<&Value>,
) -> FormatError {
    let found = found.map_or_else(|| "none".to_owned(), super::value::brief);
    FormatError::key(gguf.path(), key, format!("an array of {tokens} {kind}, one a token"), found)
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
