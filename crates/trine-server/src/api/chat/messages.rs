//! Messages as they are sent, in OpenAI's form, and as templates take them.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value};
use trine_tokenizer::{Call, Message};

use crate::error::ApiError;

/// A message of a conversation.
#[derive(Deserialize)]
pub(super) struct Turn {
    role: String,
    content: Option<Content>,
    tool_calls: Option<Vec<SentCall>>,
    tool_call_id: Option<String>,
    name: Option<String>,
}

/// What was said: a text, or parts of one.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or parts with \"type\" and \"text\"")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

/// A call that was made before.
#[derive(Deserialize)]
struct SentCall {
    id: Option<String>,
    function: SentFunction,
}

#[derive(Deserialize)]
struct SentFunction {
    name: String,
    /// The text of a JSON object, as OpenAI has it, or the object.
    arguments: Option<Value>,
}

/// All messages of a conversation.
pub(super) fn read(turns: Vec<Turn>) -> Result<Vec<Message>, ApiError> {
    if turns.is_empty() {
        return Err(ApiError::param("messages", "expected at least one, found none"));
    }
    let mut messages: Vec<Message> = Vec::with_capacity(turns.len());
    let mut names: HashMap<String, String> = HashMap::new();
    for (index, turn) in turns.into_iter().enumerate() {
        let mut message = turn.message(index)?;
        for call in &message.tool_calls {
            names.insert(call.id.clone(), call.name.clone());
        }
        // Some templates print which function a result is of; OpenAI's clients send the call's id only.
        if let (None, Some(id)) = (&message.name, &message.tool_call_id) {
            message.name = names.get(id).cloned();
        }
        messages.push(message);
    }
    Ok(messages)
}

impl Turn {
    fn message(self, index: usize) -> Result<Message, ApiError> {
        let content = match self.content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let text = |(i, part): (usize, Part)| match (&part.kind[..], part.text) {
                    ("text", Some(text)) => Ok(text),
                    (kind, _) => {
                        let param = format!("messages[{index}].content[{i}]");
                        let message =
                            format!("expected \"type\": \"text\" with \"text\", found {kind:?}");
                        Err(ApiError::param(param, message))
                    }
                };
                parts.into_iter().enumerate().map(text).collect::<Result<String, _>>()?
            }
        };
        let calls = self.tool_calls.unwrap_or_default();
        if !calls.is_empty() && self.role != "assistant" {
            let param = format!("messages[{index}].tool_calls");
            let message = format!("expected the role \"assistant\" with it, found {:?}", self.role);
            return Err(ApiError::param(param, message));
        }
        let call =
            |(i, call): (usize, SentCall)| call.read(&format!("messages[{index}].tool_calls[{i}]"));
        let tool_calls = calls.into_iter().enumerate().map(call).collect::<Result<_, _>>()?;
        let Self { role, tool_call_id, name, .. } = self;
        Ok(Message { role, content, tool_calls, tool_call_id, name })
    }
}

impl SentCall {
    fn read(self, param: &str) -> Result<Call, ApiError> {
        let SentFunction { name, arguments } = self.function;
        let parsed = match arguments {
            None | Some(Value::Null) => Some(Map::new()),
            Some(Value::Object(arguments)) => Some(arguments),
            // What a function without arguments is called with in some clients.
            Some(Value::String(text)) if text.trim().is_empty() => Some(Map::new()),
            Some(Value::String(text)) => serde_json::from_str(&text).ok(),
            Some(_) => None,
        };
        let arguments = parsed.ok_or_else(|| {
            let param = format!("{param}.function.arguments");
            ApiError::param(param, "expected the text of a JSON object")
        })?;
        Ok(Call { id: self.id.unwrap_or_default(), name, arguments })
    }
}
