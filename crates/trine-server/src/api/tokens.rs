//! `/tokenize` and `/detokenize`, as llama-server has them, and with vLLM's names.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::{App, body, prompt};

#[derive(Deserialize)]
struct Tokenize {
    #[serde(alias = "prompt")]
    content: String,
    /// Adds what begins a text.
    #[serde(default, alias = "add_special_tokens")]
    add_special: bool,
    /// Reads the names of special tokens as these tokens.
    #[serde(default = "yes")]
    parse_special: bool,
}

fn yes() -> bool {
    true
}

/// `POST /tokenize`
pub(super) async fn tokenize(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Json<Value>, ApiError> {
    let Tokenize { content, add_special, parse_special } = body::json(&app, request).await?;
    let ids = prompt::tokens(&app, "content", content, add_special, parse_special).await?;
    Ok(Json(json!({"tokens": ids, "count": ids.len(), "max_model_len": app.context()})))
}

#[derive(Deserialize)]
struct Detokenize {
    tokens: Vec<u32>,
}

/// `POST /detokenize`
pub(super) async fn detokenize(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Json<Value>, ApiError> {
    let Detokenize { tokens } = body::json(&app, request).await?;
    let text = app.tokenizer.decode(&tokens, false);
    let text = text.map_err(|error| ApiError::text("tokens", &error))?;
    Ok(Json(json!({"content": text, "prompt": text})))
}
