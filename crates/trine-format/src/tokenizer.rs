//! The tokenizer's files as they travel with a model; their meaning is another crate's business.

use serde_json::{Map, Value};

/// `tokenizer.json` and `tokenizer_config.json` of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizerFiles {
    /// The text of `tokenizer.json`.
    pub tokenizer_json: String,
    /// `tokenizer_config.json`; holds the chat template and the names of the special tokens.
    pub tokenizer_config: Option<Value>,
}

impl TokenizerFiles {
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
