//! `/v1/completions`: texts continued, with `echo` and `logprobs` as evaluations need them.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use trine_runtime::Logprob;

use super::frame::Frame;
use super::number;
use super::prompts::{Prompt, Prompts};
use crate::error::ApiError;
use crate::events::{self, Chunks};
use crate::generation::{Generation, Piece};
use crate::params::{Params, TOP_LOGPROBS};
use crate::{App, body, grammar, layers};

/// Ids generated where a request does not say how many, as OpenAI has it.
const MAX_TOKENS: usize = 16;

const KIND: &str = "text_completion";

#[derive(Deserialize)]
struct Completion {
    prompt: Prompts,
    max_tokens: Option<usize>,
    logprobs: Option<usize>,
    echo: Option<bool>,
    /// Not for texts: refused, and not ignored.
    tools: Option<Vec<Value>>,
}

/// `POST /v1/completions`
pub(super) async fn handle(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let client = layers::client(&request);
    let bytes = body::read(&app, request).await?;
    let Completion { prompt, max_tokens, logprobs, echo, tools } = body::parse(&bytes)?;
    let params = Params::read(&bytes, client)?;
    let served = params.check(&app)?;
    if tools.is_some_and(|tools| !tools.is_empty()) {
        let message = "a text has no tools: use /v1/chat/completions";
        return Err(ApiError::param("tools", message));
    }
    if let Some(logprobs) = logprobs.filter(|logprobs| *logprobs > TOP_LOGPROBS) {
        let message = format!("expected at most {TOP_LOGPROBS}, found {logprobs}");
        return Err(ApiError::param("logprobs", message));
    }
    let stops = params.stops()?;
    let echo = echo == Some(true);
    let constrained = grammar::constraint(&app, params.response_format.clone()).await?;
    let prompts = prompt.read(&app, "prompt", params.n()).await?;
    let seed = params.seed(&app);
    let mut requests = Vec::new();
    for (prompt, i) in prompts.iter().flat_map(|prompt| (0..params.n()).map(move |i| (prompt, i))) {
        let seed = seed.wrapping_add(i as u64);
        let max_tokens = max_tokens.unwrap_or(MAX_TOKENS);
        let request = params.request(&app, prompt.ids.clone(), max_tokens, seed)?;
        let prompt_logprobs = echo && logprobs.is_some();
        let adapter = served.adapter.clone();
        let request = trine_runtime::Request { adapter, logprobs, prompt_logprobs, ..request };
        requests.push(constrained.bind(request));
    }
    let choices = requests.len();
    let generation = Generation::start(&app, "prompt", requests, &stops, &[])?;
    let tokens = prompts.iter().map(|prompt| prompt.ids.len()).sum();
    let answer = Answer {
        frame: Frame::new(&app, "cmpl", served.name, &params, tokens, choices),
        n: params.n(),
        echo,
        wants_logprobs: logprobs.is_some(),
        prompts,
        offsets: vec![0; choices],
        begun: vec![false; choices],
        app,
    };
    if params.streams() {
        return Ok(events::stream(generation, answer));
    }
    let pieces = events::collect(generation).await?;
    Ok(Json(answer.whole(pieces)).into_response())
}

/// An answer in the making.
struct Answer {
    app: Arc<App>,
    frame: Frame,
    /// Choices of each prompt.
    n: usize,
    echo: bool,
    wants_logprobs: bool,
    prompts: Vec<Prompt>,
    /// Characters of a choice whose tokens were listed.
    offsets: Vec<usize>,
    /// Whether a choice's prompt was sent, where it is to be.
    begun: Vec<bool>,
}

impl Answer {
    fn choice(&self, index: usize, text: &str, logprobs: Value, reason: Option<&str>) -> Value {
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
    }

    /// Text of a choice's prompt.
    fn prompt(&self, index: usize) -> String {
        let Prompt { ids, text } = &self.prompts[index / self.n];
        let decode = || self.app.tokenizer.decode(ids, false).unwrap_or_default();
        text.clone().unwrap_or_else(decode)
    }

    /// The tokens of a piece, in OpenAI's lists; the first of a prompt has no log-probability.
    fn logprobs(&mut self, piece: &Piece) -> Value {
        if !self.wants_logprobs {
            return Value::Null;
        }
        let (mut tokens, mut chosen, mut likeliest, mut offsets) = (vec![], vec![], vec![], vec![]);
        let offset = &mut self.offsets[piece.index];
        let text = |id: u32| self.app.tokenizer.decode(&[id], false).unwrap_or_default();
        let mut add = |id: u32, logprob: Option<&Logprob>| {
            let token = text(id);
            offsets.push(*offset);
            *offset += token.chars().count();
            likeliest.push(logprob.map_or(Value::Null, |logprob| {
                let mut top = Map::new();
                let all = logprob.top.iter().copied().chain([(logprob.id, logprob.logprob)]);
                for (id, logprob) in all {
                    // Two tokens may have the same text: the likelier is named.
                    top.entry(text(id)).or_insert_with(|| number(logprob).into());
                }
                top.into()
            }));
            chosen.push(logprob.map(|logprob| number(logprob.logprob)));
            tokens.push(token);
        };
        if let Some(prompt) = &piece.prompt {
            add(self.prompts[piece.index / self.n].ids[0], None);
            prompt.iter().for_each(|logprob| add(logprob.id, Some(logprob)));
        }
        piece.logprobs.iter().for_each(|logprob| add(logprob.id, Some(logprob)));
        json!({
            "tokens": tokens,
            "token_logprobs": chosen,
            "top_logprobs": likeliest,
            "text_offset": offsets,
        })
    }

    fn whole(mut self, pieces: Vec<Piece>) -> Value {
        let mut choices: Vec<Piece> = Vec::new();
        for index in 0..self.frame.choices() {
            choices.push(Piece { index, ..Piece::default() });
        }
        for piece in pieces {
            let choice = &mut choices[piece.index];
            choice.text += &piece.text;
            choice.logprobs.extend(piece.logprobs);
            choice.prompt = choice.prompt.take().or(piece.prompt);
            choice.end = choice.end.or(piece.end);
        }
        let mut whole = Vec::new();
        for piece in &choices {
            let logprobs = self.logprobs(piece);
            let text = match self.echo {
                true => self.prompt(piece.index) + &piece.text,
                false => piece.text.clone(),
            };
            if let Some(end) = piece.end {
                self.frame.end(piece.index, end.usage);
            }
            let reason = piece.end.map(|end| end.reason);
            whole.push(self.choice(piece.index, &text, logprobs, reason));
        }
        self.frame.whole(KIND, whole)
    }
}

impl Chunks for Answer {
    fn piece(&mut self, piece: Piece) -> Vec<Value> {
        let index = piece.index;
        let logprobs = self.logprobs(&piece);
        let mut text = piece.text;
        if self.echo && !std::mem::replace(&mut self.begun[index], true) {
            text.insert_str(0, &self.prompt(index));
        }
        if let Some(end) = piece.end {
            self.frame.end(index, end.usage);
        }
        let reason = piece.end.map(|end| end.reason);
        let choice = self.choice(index, &text, logprobs, reason);
        vec![self.frame.object(KIND, vec![choice])]
    }

    fn end(&mut self) -> Vec<Value> {
        self.frame.last(KIND)
    }
}
