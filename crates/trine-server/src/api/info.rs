//! What is served, whether it is, and how it goes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use trine_tokenizer::ChatTemplate;

use crate::error::ApiError;
use crate::params::Served;
use crate::{App, metrics as text};

/// The model, or an adapter beside it: which is then its `parent`, as in vLLM's lists.
fn description(app: &App, name: &str) -> Value {
    let config = app.engine.model().config();
    let adapter = app.adapters.iter().find(|served| served.name == name);
    let adapter = adapter.filter(|_| name != app.config.model);
    let template = adapter.and_then(|served| served.template.as_ref()).or(app.template.as_ref());
    let calls = |template: &Arc<ChatTemplate>| match template.call_format(&app.tokenizer) {
        Some(_) => "template",
        None => "words",
    };
    json!({
        "id": name,
        "object": "model",
        "created": app.created,
        "owned_by": "trine",
        "root": adapter.map_or(name, |served| &served.root),
        "parent": adapter.map(|_| &app.config.model),
        "max_model_len": app.context(),
        "meta": {
            "vocab_size": config.vocab_size,
            "parameters": config.parameter_count(),
            "chat": template.is_some(),
            "tools": template.map(calls),
            "adapter_rank": adapter.map(|served| served.adapter.rank()),
        },
    })
}

/// `GET /v1/models`
pub(super) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let names = app.adapters.iter().map(|served| &served.name);
    let names = std::iter::once(&app.config.model).chain(names);
    let data: Vec<Value> = names.map(|name| description(&app, name)).collect();
    Json(json!({"object": "list", "data": data}))
}

/// `GET /v1/models/NAME`
pub(super) async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let served = Served::find(&app, Some(&name))?;
    Ok(Json(description(&app, &served.name)))
}

/// `GET /health`: 200 while requests are taken, 503 while the server ends or the engine is gone.
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    let draining = app.draining.load(Ordering::Relaxed);
    let (status, word) = match (app.engine.is_alive(), draining) {
        (_, true) => (StatusCode::SERVICE_UNAVAILABLE, "ending"),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "the engine is gone"),
        (true, false) => (StatusCode::OK, "ok"),
    };
    let stats = app.engine.stats();
    let body = json!({
        "status": word,
        "running": stats.running,
        "waiting": stats.waiting,
        "kv_bytes": stats.kv_bytes,
        "kv_bytes_limit": app.engine.config().kv_bytes,
        "needs_key": !app.config.api_keys.is_empty(),
    });
    (status, Json(body)).into_response()
}

/// `GET /metrics`
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text::text(&app)).into_response()
}

/// `GET /openapi.json`: the endpoints and their parameters, for programs.
pub(super) async fn openapi() -> Response {
    let kind = "application/json";
    ([(header::CONTENT_TYPE, kind)], include_str!("openapi.json")).into_response()
}
