//! What is served, whether it is, and how it goes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::{App, metrics as text, params};

fn description(app: &App) -> Value {
    let config = app.engine.model().config();
    json!({
        "id": app.config.model,
        "object": "model",
        "created": app.created,
        "owned_by": "trine",
        "max_model_len": app.context(),
        "meta": {
            "vocab_size": config.vocab_size,
            "parameters": config.parameter_count(),
            "chat": app.template.is_some(),
        },
    })
}

/// `GET /v1/models`
pub(super) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [description(&app)]}))
}

/// `GET /v1/models/NAME`
pub(super) async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    params::check_model(&app, Some(&name))?;
    Ok(Json(description(&app)))
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
