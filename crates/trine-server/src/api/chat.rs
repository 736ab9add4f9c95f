//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use trine_runtime::{Logprob, Usage};
use trine_tokenizer::{Message, Tokenizer};

use super::{number, usage};
use crate::app::seconds;
use crate::error::ApiError;
use crate::events::{self, Chunks};
use crate::generation::{Generation, Piece};
use crate::params::{Params, TOP_LOGPROBS};
use crate::{App, body, grammar, prompt};

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Turn>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
}

#[derive(Deserialize)]
struct Turn {
    role: String,
    content: Option<Content>,
    tool_calls: Option<Vec<Value>>,
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

/// `POST /v1/chat/completions`
pub(super) async fn handle(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let bytes = body::read(&app, request).await?;
    let (chat, params): (Chat, Params) = (body::parse(&bytes)?, body::parse(&bytes)?);
    let served = params.check(&app)?;
    let logprobs = chat.logprobs()?;
    let stops = params.stops()?;
    let max_tokens = chat.max_completion_tokens.or(chat.max_tokens).unwrap_or(usize::MAX);
    let messages = chat.messages.into_iter().enumerate();
    let messages = messages.map(|(i, turn)| turn.message(i)).collect::<Result<Vec<_>, _>>()?;
    if messages.is_empty() {
        return Err(ApiError::param("messages", "expected at least one, found none"));
    }
    let constrained = grammar::constraint(&app, params.response_format.clone()).await?;
    let ids = prompt::of_messages(&app, &served, messages).await?;
    let (prompts, seed) = (ids.len(), params.seed(&app));
    let requests = (0..params.n()).map(|i| {
        let seed = seed.wrapping_add(i as u64);
        let request = params.request(&app, ids.clone(), max_tokens, seed)?;
        let adapter = served.adapter.clone();
        Ok(constrained.bind(trine_runtime::Request { adapter, logprobs, ..request }))
    });
    let requests = requests.collect::<Result<Vec<_>, _>>()?;
    let choices = requests.len();
    let generation = Generation::start(&app, "messages", requests, &stops)?;
    let answer = Answer {
        id: format!("chatcmpl-{:016x}", app.unique()),
        created: seconds(),
        model: served.name,
        wants_logprobs: logprobs.is_some(),
        wants_usage: params.wants_usage(),
        prompts,
        begun: vec![false; choices],
        used: vec![Usage::default(); choices],
        app,
    };
    if params.streams() {
        return Ok(events::stream(generation, answer));
    }
    let pieces = events::collect(generation).await?;
    Ok(Json(answer.whole(pieces)).into_response())
}

impl Chat {
    /// How many of the likeliest tokens are wanted beside each.
    fn logprobs(&self) -> Result<Option<usize>, ApiError> {
        let top = self.top_logprobs.unwrap_or(0);
        if top > TOP_LOGPROBS {
            let message = format!("expected at most {TOP_LOGPROBS}, found {top}");
            return Err(ApiError::param("top_logprobs", message));
        }
        let wanted = self.logprobs == Some(true);
        if top > 0 && !wanted {
            return Err(ApiError::param("top_logprobs", "expected \"logprobs\": true with it"));
        }
        Ok(wanted.then_some(top))
    }
}

impl Turn {
    fn message(self, index: usize) -> Result<Message, ApiError> {
        if self.tool_calls.is_some_and(|calls| !calls.is_empty()) {
            let param = format!("messages[{index}].tool_calls");
            return Err(ApiError::param(param, "this server cannot do it"));
        }
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
        Ok(Message::new(self.role, content))
    }
}

/// What is common to all chunks of an answer.
struct Answer {
    app: Arc<App>,
    id: String,
    created: u64,
    /// What answers.
    model: String,
    wants_logprobs: bool,
    wants_usage: bool,
    /// Ids of the prompt.
    prompts: usize,
    /// Whether a choice's role was sent.
    begun: Vec<bool>,
    used: Vec<Usage>,
}

impl Answer {
    fn object(&self, kind: &str, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }

    fn chunk(&self, index: usize, delta: Value, logprobs: Value, reason: Option<&str>) -> Value {
        let choice = json!([{
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }]);
        self.object("chat.completion.chunk", choice)
    }

    fn logprobs(&self, logprobs: &[Logprob]) -> Value {
        if !self.wants_logprobs {
            return Value::Null;
        }
        let tokens = logprobs.iter().map(|logprob| token(&self.app.tokenizer, logprob));
        json!({"content": tokens.collect::<Vec<_>>(), "refusal": null})
    }

    fn whole(&self, pieces: Vec<Piece>) -> Value {
        let choice = |index| {
            let mine = || pieces.iter().filter(|piece| piece.index == index);
            let text: String = mine().map(|piece| &piece.text[..]).collect();
            let logprobs: Vec<_> = mine().flat_map(|piece| piece.logprobs.clone()).collect();
            let reason = mine().find_map(|piece| piece.end).map(|end| end.reason);
            json!({
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": null},
                "logprobs": self.logprobs(&logprobs),
                "finish_reason": reason,
            })
        };
        let choices: Vec<Value> = (0..self.used.len()).map(choice).collect();
        let used: Vec<_> = pieces.iter().filter_map(|piece| Some(piece.end?.usage)).collect();
        let mut whole = self.object("chat.completion", choices.into());
        whole["usage"] = usage(self.prompts, &used);
        whole
    }
}

impl Chunks for Answer {
    fn piece(&mut self, piece: Piece) -> Vec<Value> {
        let mut chunks = Vec::new();
        let index = piece.index;
        if !std::mem::replace(&mut self.begun[index], true) {
            let role = json!({"role": "assistant", "content": ""});
            chunks.push(self.chunk(index, role, Value::Null, None));
        }
        if !piece.text.is_empty() || !piece.logprobs.is_empty() {
            let delta = json!({"content": piece.text});
            chunks.push(self.chunk(index, delta, self.logprobs(&piece.logprobs), None));
        }
        if let Some(end) = piece.end {
            self.used[index] = end.usage;
            chunks.push(self.chunk(index, json!({}), Value::Null, Some(end.reason)));
        }
        chunks
    }

    fn end(&mut self) -> Vec<Value> {
        if !self.wants_usage {
            return Vec::new();
        }
        let mut chunk = self.object("chat.completion.chunk", json!([]));
        chunk["usage"] = usage(self.prompts, &self.used);
        vec![chunk]
    }
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
