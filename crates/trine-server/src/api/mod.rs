//! One file an endpoint.

mod chat;
mod completions;
mod embeddings;
mod frame;
mod info;
mod prompts;
mod tokens;

use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};

use crate::error::ApiError;
use crate::{App, layers, page};

/// All paths. Those that need no key: the page, which asks for one, whether the server is up, and what
/// can be asked.
pub(crate) fn router(app: Arc<App>) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/embeddings", post(embeddings::handle))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*name}", get(info::model))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/metrics", get(info::metrics))
        .route_layer(from_fn_with_state(app.clone(), layers::key));
    let router = Router::new()
        .route("/", get(page::document))
        .route("/chat.css", get(page::style))
        .route("/chat.js", get(page::script))
        .route("/markdown.js", get(page::markdown))
        .route("/health", get(info::health))
        .route("/openapi.json", get(info::openapi))
        .merge(guarded)
        .method_not_allowed_fallback(|| async {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method")
        })
        .fallback(|| async {
            ApiError::new(StatusCode::NOT_FOUND, "there is nothing at this path")
        })
        .layer(from_fn_with_state(app.clone(), layers::trace));
    let router = match layers::cors(&app.config.cors_origins) {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router.with_state(app)
}

/// A log-probability in JSON, which has no infinity; OpenAI writes -9999 for what is impossible.
fn number(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}
