//! Answers of a chat: words and calls, whole or in chunks.

use std::sync::Arc;

use serde_json::{Value, json};
use trine_runtime::Logprob;
use trine_tokenizer::{CallFormat, Tokenizer};

use super::super::frame::Frame;
use super::super::number;
use crate::App;
use crate::events::Chunks;
use crate::generation::{Ending, Piece};
use crate::tools::{CallReader, Delta};

const CHUNK: &str = "chat.completion.chunk";

/// An answer in the making.
pub(super) struct Answer {
    app: Arc<App>,
    frame: Frame,
    wants_logprobs: bool,
    choices: Vec<Choice>,
}

/// What is known of a choice.
#[derive(Default)]
struct Choice {
    /// Whether its role was sent.
    begun: bool,
    /// Where it may call functions.
    reader: Option<CallReader>,
    /// Calls that were sent.
    calls: usize,
}

impl Answer {
    /// Calls are looked for if they have a format.
    pub(super) fn new(
        app: Arc<App>,
        frame: Frame,
        wants_logprobs: bool,
        format: Option<&CallFormat>,
    ) -> Self {
        let choice = |_| Choice {
            reader: format.map(|format| CallReader::new(format.clone())),
            ..Choice::default()
        };
        let choices = (0..frame.choices()).map(choice).collect();
        Self { app, frame, wants_logprobs, choices }
    }

    fn chunk(&self, index: usize, delta: Value, logprobs: Value, reason: Option<&str>) -> Value {
        let choice = json!({
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        });
        self.frame.object(CHUNK, vec![choice])
    }

    fn logprobs(&self, logprobs: &[Logprob]) -> Value {
        if !self.wants_logprobs {
            return Value::Null;
        }
        let tokens = logprobs.iter().map(|logprob| token(&self.app.tokenizer, logprob));
        json!({"content": tokens.collect::<Vec<_>>(), "refusal": null})
    }

    /// The answer at once.
    pub(super) fn whole(mut self, pieces: Vec<Piece>) -> Value {
        let choices = (0..self.choices.len()).map(|index| {
            let mine = || pieces.iter().filter(|piece| piece.index == index);
            let (mut content, mut calls) = (String::new(), Vec::<(Value, String)>::new());
            let choice = &mut self.choices[index];
            for delta in mine().flat_map(|piece| choice.read(piece)) {
                match (delta, calls.last_mut()) {
                    (Delta::Text(text), _) => content += &text,
                    (Delta::Call(name), _) => calls.push((call(&self.app, &name), String::new())),
                    (Delta::Arguments(text), Some((_, arguments))) => *arguments += &text,
                    (Delta::Arguments(_), None) => (),
                }
            }
            let logprobs: Vec<_> = mine().flat_map(|piece| piece.logprobs.clone()).collect();
            let end = mine().find_map(|piece| piece.end);
            if let Some(end) = end {
                self.frame.end(index, end.usage);
            }
            let mut message = json!({"role": "assistant", "content": content, "refusal": null});
            if !calls.is_empty() {
                if content.is_empty() {
                    message["content"] = Value::Null;
                }
                let whole = |(mut call, arguments): (Value, String)| {
                    call["function"]["arguments"] = arguments.into();
                    call
                };
                message["tool_calls"] = calls.into_iter().map(whole).collect();
            }
            json!({
                "index": index,
                "message": message,
                "logprobs": self.logprobs(&logprobs),
                "finish_reason": end.map(|end| self.choices[index].reason(&end)),
            })
        });
        let choices = choices.collect();
        self.frame.whole("chat.completion", choices)
    }
}

impl Choice {
    /// What a piece adds.
    fn read(&mut self, piece: &Piece) -> Vec<Delta> {
        let Some(reader) = &mut self.reader else {
            let text = piece.text.clone();
            return if text.is_empty() { Vec::new() } else { vec![Delta::Text(text)] };
        };
        let mut deltas = reader.push(&piece.text);
        if piece.end.is_some() {
            deltas.extend(reader.finish());
        }
        deltas
    }

    fn reason(&self, end: &Ending) -> &'static str {
        match end.reason {
            "stop" if self.reader.as_ref().is_some_and(CallReader::has_called) => "tool_calls",
            reason => reason,
        }
    }
}

impl Chunks for Answer {
    fn piece(&mut self, piece: Piece) -> Vec<Value> {
        let mut chunks = Vec::new();
        let index = piece.index;
        if !std::mem::replace(&mut self.choices[index].begun, true) {
            let role = json!({"role": "assistant", "content": ""});
            chunks.push(self.chunk(index, role, Value::Null, None));
        }
        let deltas = self.choices[index].read(&piece).into_iter();
        let mut deltas: Vec<Value> = deltas.map(|delta| self.delta(index, delta)).collect();
        if deltas.is_empty() && !piece.logprobs.is_empty() {
            deltas.push(json!({"content": ""}));
        }
        let mut logprobs = self.logprobs(&piece.logprobs);
        for delta in deltas {
            chunks.push(self.chunk(index, delta, logprobs.take(), None));
        }
        if let Some(end) = piece.end {
            self.frame.end(index, end.usage);
            let reason = self.choices[index].reason(&end);
            chunks.push(self.chunk(index, json!({}), Value::Null, Some(reason)));
        }
        chunks
    }

    fn end(&mut self) -> Vec<Value> {
        self.frame.last(CHUNK)
    }
}

impl Answer {
    /// What a chunk says of it. A call is named by its number; its id and name are sent once.
    fn delta(&mut self, index: usize, delta: Delta) -> Value {
        let calls = &mut self.choices[index].calls;
        match delta {
            Delta::Text(text) => json!({"content": text}),
            Delta::Call(name) => {
                let mut call = call(&self.app, &name);
                call["index"] = json!(*calls);
                *calls += 1;
                json!({"tool_calls": [call]})
            }
            Delta::Arguments(text) => {
                let function = json!({"arguments": text});
                json!({"tool_calls": [{"index": calls.saturating_sub(1), "function": function}]})
            }
        }
    }
}

/// A call whose arguments follow. Its id has nine letters and digits, which is what templates in the
/// manner of Mistral's want to see again.
fn call(app: &App, name: &str) -> Value {
    let mut number = app.unique();
    let mut digit = || {
        let digit = char::from_digit((number % 36) as u32, 36);
        number /= 36;
        digit
    };
    let id: String = (0..9).filter_map(|_| digit()).collect();
    json!({"id": id, "type": "function", "function": {"name": name, "arguments": ""}})
}

/// A token with its log-probability and the likeliest ones.
fn token(tokenizer: &Tokenizer, logprob: &Logprob) -> Value {
    let one = |id: u32, logprob: f32| {
        let text = tokenizer.decode(&[id], false).unwrap_or_default();
        json!({"token": text, "logprob": number(logprob), "bytes": text.as_bytes()})
    };
    let mut token = one(logprob.id, logprob.logprob);
    token["top_logprobs"] = logprob.top.iter().map(|&(id, logprob)| one(id, logprob)).collect();
    token
}
