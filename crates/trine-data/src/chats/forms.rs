//! Conversations in JSON lines, in the forms in which they are shared.
//!
//! | keys of a line | form |
//! | --- | --- |
//! | `messages`: `role`, `content` | OpenAI's; contents may be lists of parts with `text` |
//! | `conversations`: `from`, `value` | ShareGPT's; `human`, `gpt` and `system` speak |
//! | `instruction`, `input`, `output` | Alpaca's; one question, one answer |
//! | `prompt`, `completion` or `response` | one question, one answer |
//! | `text` | plain text, all of which is learned |
//!
//! A preference has two answers to one question, of which the first is the better:
//!
//! | keys of a line | form |
//! | --- | --- |
//! | `chosen`, `rejected`: conversations of `role`, `content` | they differ in their last message |
//! | `prompt`, `chosen`, `rejected`: texts, or lists of messages | the answers alone |
//!
//! A line may have further keys. Anything else is an error with the line's number.

use serde::Deserialize;
use serde_json::{Map, Value};
use trine_tokenizer::Message;

/// What a line holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chat {
    /// A conversation, of whose messages none is empty of a role.
    Messages(Vec<Message>),
    /// A text without turns.
    Text(String),
}

/// Two conversations that begin alike, of which the first ends with the better answer.
pub type Preference = [Vec<Message>; 2];

/// Reads a line with a preference.
///
/// # Errors
/// What is wrong with it, naming the key or the message.
pub(crate) fn preference(line: &[u8]) -> Result<Preference, String> {
    let object = object(line)?;
    let mut question = match object.get("prompt") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::String(text)) => vec![Message::new("user", text)],
        Some(list) => messages(list, "prompt")?,
    };
    if let Some(Value::String(system)) = object.get("system")
        && !system.is_empty()
    {
        question.insert(0, Message::new("system", system));
    }
    let answer = |key: &str| -> Result<Vec<Message>, String> {
        let mut all = question.clone();
        match object.get(key) {
            Some(Value::String(text)) => all.push(Message::new("assistant", text)),
            Some(list @ Value::Array(_)) => all.extend(messages(list, key)?),
            other => {
                let found = kind(other);
                return Err(format!("`{key}`: expected a text or messages, found {found}"));
            }
        }
        check(&all).map_err(|cause| format!("`{key}`: {cause}"))?;
        match all.last() {
            Some(last) if last.role == "assistant" && all.len() > 1 => Ok(all),
            _ => Err(format!("`{key}`: expected a question, and last an answer to it")),
        }
    };
    let both = [answer("chosen")?, answer("rejected")?];
    let [chosen, rejected] = &both;
    if chosen[..chosen.len() - 1] != rejected[..rejected.len() - 1] {
        return Err("`chosen` and `rejected` differ before their last message".to_owned());
    }
    Ok(both)
}

fn object(line: &[u8]) -> Result<Map<String, Value>, String> {
    serde_json::from_slice(line)
        .map_err(|e| e.to_string().replace(" at line 1 column ", ", column "))
}

/// What must be known of an object before it is one of the forms.
const FORMS: &str = "`messages`, `conversations`, `instruction` and `output`, `prompt` and \
                     `completion`, or `text`";

/// Reads a line.
///
/// # Errors
/// What is wrong with it, naming the key or the message.
pub(crate) fn parse(line: &[u8]) -> Result<Chat, String> {
    let object = object(line)?;
    let has = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
    if let Some(key) = ["messages", "conversations"].into_iter().find(|key| has(key)) {
        return messages(&object[key], key).map(Chat::Messages);
    }
    if has("instruction") {
        let mut question = text(&object, "instruction")?;
        if has("input") {
            let input = text(&object, "input")?;
            if !input.is_empty() {
                question = format!("{question}\n\n{input}");
            }
        }
        return exchange(&object, question, text(&object, "output")?);
    }
    if has("prompt") {
        let answer = if has("completion") { "completion" } else { "response" };
        return exchange(&object, text(&object, "prompt")?, text(&object, answer)?);
    }
    if has("text") {
        return match text(&object, "text")? {
            text if text.is_empty() => Err("`text` is empty".to_owned()),
            text => Ok(Chat::Text(text)),
        };
    }
    let found: Vec<&str> = object.keys().map(String::as_str).take(8).collect();
    Err(format!("expected {FORMS}, found the keys [{}]", found.join(", ")))
}

fn text(object: &Map<String, Value>, key: &str) -> Result<String, String> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        other => Err(format!("`{key}`: expected a text, found {}", kind(other))),
    }
}

fn exchange(object: &Map<String, Value>, question: String, answer: String) -> Result<Chat, String> {
    let mut messages = Vec::new();
    if let Some(Value::String(system)) = object.get("system")
        && !system.is_empty()
    {
        messages.push(Message::new("system", system));
    }
    messages.extend([Message::new("user", question), Message::new("assistant", answer)]);
    check(&messages)?;
    Ok(Chat::Messages(messages))
}

/// A message as OpenAI and ShareGPT write it.
#[derive(Deserialize)]
struct Said {
    #[serde(alias = "from")]
    role: String,
    #[serde(alias = "value")]
    content: Content,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    text: String,
}

fn messages(value: &Value, key: &str) -> Result<Vec<Message>, String> {
    let Value::Array(list) = value else {
        return Err(format!("`{key}`: expected a list of messages, found {}", kind(Some(value))));
    };
    let mut messages = Vec::with_capacity(list.len());
    for (i, value) in list.iter().enumerate() {
        let refuse = |cause: String| format!("`{key}`, message {}: {cause}", i + 1);
        let said = Said::deserialize(value).map_err(|_| {
            let keys = if key == "messages" { ["role", "content"] } else { ["from", "value"] };
            refuse(format!("expected an object with the texts `{}` and `{}`", keys[0], keys[1]))
        })?;
        let content = match said.content {
            Content::Text(text) => text,
            Content::Parts(parts) => match parts.iter().find(|part| part.kind != "text") {
                Some(part) => {
                    return Err(refuse(format!("expected parts of text, found {:?}", part.kind)));
                }
                None => parts.into_iter().map(|part| part.text).collect(),
            },
        };
        let role = match said.role.as_str() {
            "human" => "user",
            "gpt" | "bot" => "assistant",
            role => role,
        };
        messages.push(Message::new(role, content));
    }
    check(&messages).map_err(|cause| format!("`{key}`: {cause}"))?;
    Ok(messages)
}

/// Refuses what nothing can be learned from.
fn check(messages: &[Message]) -> Result<(), String> {
    if messages.is_empty() {
        return Err("a conversation without messages".to_owned());
    }
    let empty = |m: &Message| m.role == "assistant" && m.content.trim().is_empty();
    match messages.iter().position(empty) {
        Some(at) => Err(format!("message {} is an empty answer", at + 1)),
        None => Ok(()),
    }
}

fn kind(value: Option<&Value>) -> &'static str {
    match value {
        None => "nothing",
        Some(Value::Null) => "null",
        Some(Value::Bool(_)) => "a truth value",
        Some(Value::Number(_)) => "a number",
        Some(Value::String(_)) => "a text",
        Some(Value::Array(_)) => "a list",
        Some(Value::Object(_)) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(line: &str) -> Vec<(String, String)> {
        match parse(line.as_bytes()) {
            Ok(Chat::Messages(messages)) => {
                messages.into_iter().map(|m| (m.role, m.content)).collect()
            }
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn every_form_is_the_same_conversation() {
        let expected =
            [("user".to_owned(), "q".to_owned()), ("assistant".to_owned(), "a".to_owned())];
        for line in [
            r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}],"id":3}"#,
            r#"{"messages":[{"role":"user","content":[{"type":"text","text":"q"}]},{"role":"assistant","content":"a"}]}"#,
            r#"{"conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"a"}]}"#,
            r#"{"instruction":"q","input":"","output":"a"}"#,
            r#"{"prompt":"q","completion":"a"}"#,
            r#"{"prompt":"q","response":"a"}"#,
        ] {
            assert_eq!(said(line), expected, "{line}");
        }
        let line = r#"{"instruction":"q","input":"i","output":"a","system":"s"}"#;
        assert_eq!(said(line)[0], ("system".to_owned(), "s".to_owned()));
        assert_eq!(said(line)[1].1, "q\n\ni");
        assert_eq!(parse(br#"{"text":"t"}"#), Ok(Chat::Text("t".to_owned())));
    }

    #[test]
    fn preferences_are_two_answers_to_one_question() {
        let message = |role: &str, content: &str| Message::new(role, content);
        let (question, good) = (message("user", "q"), message("assistant", "g"));
        let expected = [vec![question.clone(), good], vec![question, message("assistant", "b")]];
        for line in [
            r#"{"prompt":"q","chosen":"g","rejected":"b"}"#,
            r#"{"prompt":[{"role":"user","content":"q"}],"chosen":[{"role":"assistant","content":"g"}],"rejected":"b"}"#,
            r#"{"chosen":[{"role":"user","content":"q"},{"role":"assistant","content":"g"}],"rejected":[{"role":"user","content":"q"},{"role":"assistant","content":"b"}]}"#,
        ] {
            assert_eq!(preference(line.as_bytes()).as_ref(), Ok(&expected), "{line}");
        }
        for (line, names) in [
            (
                r#"{"prompt":"q","chosen":"g"}"#,
                "`rejected`: expected a text or messages, found nothing",
            ),
            (r#"{"chosen":"g","rejected":"b"}"#, "`chosen`: expected a question"),
            (
                r#"{"prompt":"q","chosen":" ","rejected":"b"}"#,
                "`chosen`: message 2 is an empty answer",
            ),
            (
                r#"{"chosen":[{"role":"user","content":"q"},{"role":"assistant","content":"g"}],"rejected":[{"role":"user","content":"p"},{"role":"assistant","content":"b"}]}"#,
                "differ before their last message",
            ),
        ] {
            let error = preference(line.as_bytes()).unwrap_err();
            assert!(error.contains(names), "{line}: {error}");
        }
    }

    #[test]
    fn what_is_none_is_refused_with_its_key() {
        for (line, names) in [
            ("{", "column"),
            ("[]", "map"),
            (r#"{"a":1}"#, "found the keys [a]"),
            (r#"{"messages":{}}"#, "`messages`: expected a list of messages, found an object"),
            (r#"{"messages":[]}"#, "without messages"),
            (r#"{"messages":[{"role":"user"}]}"#, "message 1: expected an object"),
            (r#"{"conversations":[{"from":"gpt","value":3}]}"#, "`from` and `value`"),
            (
                r#"{"messages":[{"role":"assistant","content":" "}]}"#,
                "message 1 is an empty answer",
            ),
            (r#"{"messages":[{"role":"user","content":[{"type":"image"}]}]}"#, "found \"image\""),
            (r#"{"instruction":"q"}"#, "`output`: expected a text, found nothing"),
            (r#"{"prompt":"q","completion":["a"]}"#, "`completion`: expected a text, found a list"),
            (r#"{"text":""}"#, "`text` is empty"),
        ] {
            let error = parse(line.as_bytes()).unwrap_err();
            assert!(error.contains(names), "{line}: {error}");
        }
    }
}
