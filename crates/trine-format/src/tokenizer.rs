//! The tokenizer's files as they travel with a model; their meaning is another crate's business.

use std::fs;
use std::path::Path;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::FormatError;
use crate::hf::read::read_tokenizer;

/// `tokenizer.json` and `tokenizer_config.json` of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizerFiles {
    /// The text of `tokenizer.json`.
    pub tokenizer_json: String,
    /// `tokenizer_config.json`; holds the chat template and the names of the special tokens.
    pub tokenizer_config: Option<Value>,
}

impl TokenizerFiles {
    /// Reads a `tokenizer.json`, or a directory that has one and possibly a `tokenizer_config.json`
    /// and a `chat_template.jinja`. The `tokenizer.json` is not looked into.
    ///
    /// # Errors
    /// A file that is missing or no text; a `tokenizer_config.json` that is no JSON.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        if !path.is_dir() {
            let tokenizer_json = fs::read_to_string(path).map_err(FormatError::io(path, "read"))?;
            return Ok(Self { tokenizer_json, tokenizer_config: None });
        }
        let file = path.join("tokenizer.json");
        let none = || FormatError::io(&file, "read")(std::io::ErrorKind::NotFound.into());
        read_tokenizer(path)?.ok_or_else(none)
    }

    /// The chat template (Jinja); of several named ones, the one named `default`.
    pub fn chat_template(&self) -> Option<&str> {
        match self.tokenizer_config.as_ref()?.get("chat_template")? {
            Value::String(template) => Some(template),
            Value::Array(named) => named
                .iter()
                .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
                .and_then(|entry| entry.get("template")?.as_str()),
            _ => None,
        }
    }

    /// Puts a chat template in the place of any that there are.
    pub fn set_chat_template(&mut self, template: &str) {
        let key = "chat_template".to_owned();
        match &mut self.tokenizer_config {
            Some(Value::Object(config)) => drop(config.insert(key, template.into())),
            other => *other = Some(json!({ key: template })),
        }
    }

    /// Text of the token that starts a text.
    pub fn bos_token(&self) -> Option<&str> {
        self.special("bos_token")
    }

    /// Text of the token that ends a text or a turn.
    pub fn eos_token(&self) -> Option<&str> {
        self.special("eos_token")
    }

    /// A special token of the configuration, which is a text or an object with the text inside.
    fn special(&self, key: &str) -> Option<&str> {
        let token = self.tokenizer_config.as_ref()?.get(key)?;
        token.as_str().or_else(|| token.get("content")?.as_str())
    }

    /// `special_tokens_map.json`, which repeats a part of the configuration.
    pub(crate) fn special_tokens_map(&self) -> Value {
        let keys = ["bos_token", "eos_token", "unk_token", "pad_token"];
        let entry = |key: &str| Some((key.to_owned(), self.special(key)?.into()));
        Value::Object(keys.into_iter().filter_map(entry).collect::<Map<_, _>>())
    }
}

/// A `tokenizer.json` with a BPE, to be written from what is borrowed: as [`Value`] a vocabulary
/// would take many times the memory of the file that it is from.
#[derive(Serialize)]
pub(crate) struct BpeJson<'a, M> {
    pub(crate) version: &'static str,
    pub(crate) truncation: (),
    pub(crate) padding: (),
    pub(crate) added_tokens: Vec<AddedToken<'a>>,
    pub(crate) normalizer: Value,
    pub(crate) pre_tokenizer: Value,
    pub(crate) post_processor: Value,
    pub(crate) decoder: Value,
    pub(crate) model: BpeModel<'a, M>,
}

/// `model` of a `tokenizer.json`; a merge `M` is a pair, or both parts with a space between them.
#[derive(Serialize)]
pub(crate) struct BpeModel<'a, M> {
    pub(crate) r#type: &'static str,
    pub(crate) dropout: (),
    pub(crate) unk_token: Option<&'a str>,
    pub(crate) continuing_subword_prefix: (),
    pub(crate) end_of_word_suffix: (),
    pub(crate) fuse_unk: bool,
    pub(crate) byte_fallback: bool,
    pub(crate) ignore_merges: bool,
    /// Tokens and ids.
    #[serde(serialize_with = "map")]
    pub(crate) vocab: Vec<(&'a str, usize)>,
    pub(crate) merges: &'a [M],
}

/// A token of `added_tokens`, found in a text before anything else is.
#[derive(Serialize)]
pub(crate) struct AddedToken<'a> {
    id: usize,
    content: &'a str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

impl<'a> AddedToken<'a> {
    pub(crate) fn new(id: usize, content: &'a str, special: bool) -> Self {
        let (single_word, lstrip, rstrip, normalized) = (false, false, false, false);
        Self { id, content, single_word, lstrip, rstrip, normalized, special }
    }
}

fn map<S: Serializer>(vocab: &[(&str, usize)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(vocab.iter().copied())
}

impl<M: Serialize> BpeJson<'_, M> {
    /// The text of the file.
    pub(crate) fn text(&self) -> String {
        serde_json::to_string(self).expect("plain data serializes")
    }
}

/// Every step of a part of `tokenizer.json` that is one step or a sequence of them under `inner`.
pub(crate) fn steps<'a>(step: &'a Value, inner: &str) -> Vec<&'a Value> {
    match step.get(inner).and_then(Value::as_array) {
        Some(list) => list.iter().collect(),
        None => vec![step],
    }
}

/// The special tokens that a post-processor puts before and behind a text.
pub(crate) fn around(post_processor: &Value) -> (Option<&str>, Option<&str>) {
    let template = steps(post_processor, "processors")
        .into_iter()
        .find(|step| step["type"] == "TemplateProcessing");
    let parts = template.and_then(|step| step["single"].as_array());
    let Some([first, rest @ ..]) = parts.map(Vec::as_slice) else { return (None, None) };
    (special(first), rest.last().and_then(special))
}

/// The name of a special token that is a part of a template.
fn special(part: &Value) -> Option<&str> {
    part["SpecialToken"]["id"].as_str()
}

/// A post-processor that puts these tokens `(text, id)` before and behind a text.
pub(crate) fn template(bos: Option<(&str, u32)>, eos: Option<(&str, u32)>) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let special =
        |(text, _): (&str, u32), part: u8| json!({"SpecialToken": {"id": text, "type_id": part}});
    let part = |name: &str, type_id: u8| {
        let text = json!({"Sequence": {"id": name, "type_id": type_id}});
        let parts =
            [bos.map(|t| special(t, type_id)), Some(text), eos.map(|t| special(t, type_id))];
        parts.into_iter().flatten().collect::<Vec<_>>()
    };
    let tokens: Map<String, Value> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|(text, id)| (text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    let (single, second) = (part("A", 0), part("B", 1));
    let pair = [single.clone(), second].concat();
    json!({
        "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens,
    })
}
