//! `/v1/chat/completions`.

mod answer;
mod messages;

use std::sync::Arc;

use answer::Answer;
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use messages::Turn;
use serde::Deserialize;

use super::frame::Frame;
use crate::error::ApiError;
use crate::events;
use crate::generation::Generation;
use crate::grammar::Constrained;
use crate::params::{Params, Served, TOP_LOGPROBS};
use crate::response_format::{Form, ResponseFormat};
use crate::tools::{self, Asked, Calling, Tools};
use crate::{App, body, grammar, layers, prompt};

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Turn>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
}

/// `POST /v1/chat/completions`
pub(super) async fn handle(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let client = layers::client(&request);
    let bytes = body::read(&app, request).await?;
    let chat: Chat = body::parse(&bytes)?;
    let params = Params::read(&bytes, client)?;
    let served = params.check(&app)?;
    let tools = body::parse::<Asked>(&bytes)?.read()?.map(Arc::new);
    let logprobs = chat.logprobs()?;
    let stops = params.stops()?;
    let max_tokens = chat.max_completion_tokens.or(chat.max_tokens).unwrap_or(usize::MAX);
    let messages = messages::read(chat.messages)?;
    let (constrained, calling) = form(&app, &served, &params, tools.as_ref()).await?;
    let definitions = tools.as_ref().map_or(&[][..], |tools| &tools.definitions);
    let ids = prompt::of_messages(&app, &served, messages, definitions).await?;
    let (prompts, seed) = (ids.len(), params.seed(&app));
    let requests = (0..params.n()).map(|i| {
        let seed = seed.wrapping_add(i as u64);
        let request = params.request(&app, ids.clone(), max_tokens, seed)?;
        let adapter = served.adapter.clone();
        Ok(constrained.bind(trine_runtime::Request { adapter, logprobs, ..request }))
    });
    let requests = requests.collect::<Result<Vec<_>, _>>()?;
    let frame = Frame::new(&app, "chatcmpl", served.name, &params, prompts, requests.len());
    let shown = calling.as_ref().map_or(&[][..], |calling| &calling.shown);
    let generation = Generation::start(&app, "messages", requests, &stops, shown)?;
    let format = calling.map(|calling| calling.format);
    let answer = Answer::new(app, frame, logprobs.is_some(), format.as_ref());
    if params.streams() {
        return Ok(events::stream(generation, answer));
    }
    let pieces = events::collect(generation).await?;
    Ok(Json(answer.whole(pieces)).into_response())
}

/// What answers must look like, and how they call the tools.
async fn form(
    app: &Arc<App>,
    served: &Served,
    params: &Params,
    tools: Option<&Arc<Tools>>,
) -> Result<(Constrained, Option<Calling>), ApiError> {
    let format = params.response_format.clone();
    let Some(tools) = tools else {
        return Ok((grammar::constraint(app, format).await?, None));
    };
    let answer = match format.map_or(Ok(None), ResponseFormat::form)? {
        None => None,
        Some((param, Form::Json(schema))) => Some((param, schema)),
        Some(_) => {
            let message = "expected \"text\", \"json_object\" or \"json_schema\" beside tools";
            return Err(ApiError::param("response_format.type", message));
        }
    };
    let (constrained, calling) = tools::constraint(app, served, tools, answer).await?;
    Ok((constrained, Some(calling)))
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
