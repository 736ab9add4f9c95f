//! `/v1/embeddings`: the hidden states of texts, pooled, of length 1.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};
use trine_runtime::Pooling;

use super::prompts::Prompts;
use crate::error::ApiError;
use crate::events;
use crate::generation::Generation;
use crate::params::Served;
use crate::{App, body, layers};

#[derive(Deserialize)]
struct Embeddings {
    input: Prompts,
    model: Option<String>,
    #[serde(default)]
    encoding_format: Encoding,
    dimensions: Option<usize>,
    #[serde(default)]
    pooling: Kind,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    #[default]
    Float,
    /// Of f32 in little endian, as OpenAI's own client asks for.
    Base64,
}

/// How one vector is made of many.
#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    #[default]
    Mean,
    Last,
}

/// `POST /v1/embeddings`
pub(super) async fn handle(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Json<Value>, ApiError> {
    let client = layers::client(&request);
    let asked: Embeddings = body::json(&app, request).await?;
    let served = Served::find(&app, asked.model.as_deref())?;
    let width = app.engine.model().config().hidden_size;
    if let Some(dimensions) = asked.dimensions.filter(|dimensions| *dimensions != width) {
        let message = format!("expected {width}, the model's width, found {dimensions}");
        return Err(ApiError::param("dimensions", message));
    }
    let embedding = Some(match asked.pooling {
        Kind::Mean => Pooling::Mean,
        Kind::Last => Pooling::Last,
    });
    let deadline = Instant::now().checked_add(app.config.request_timeout);
    let prompts = asked.input.read(&app, "input", 1).await?;
    let tokens: usize = prompts.iter().map(|prompt| prompt.ids.len()).sum();
    let requests = prompts.into_iter().map(|prompt| trine_runtime::Request {
        prompt: prompt.ids,
        adapter: served.adapter.clone(),
        embedding,
        deadline,
        client,
        ..trine_runtime::Request::default()
    });
    let generation = Generation::start(&app, "input", requests.collect(), &[], &[])?;
    let mut data = Vec::new();
    for piece in events::collect(generation).await? {
        let Some(embedding) = piece.embedding else { continue };
        let embedding = unit(embedding);
        let value = match asked.encoding_format {
            Encoding::Float => json!(embedding),
            Encoding::Base64 => {
                let bytes: Vec<u8> = embedding.iter().flat_map(|x| x.to_le_bytes()).collect();
                STANDARD.encode(bytes).into()
            }
        };
        data.push((piece.index, value));
    }
    data.sort_by_key(|(index, _)| *index);
    let data = data.into_iter().map(
        |(index, embedding)| json!({"object": "embedding", "index": index, "embedding": embedding}),
    );
    Ok(Json(json!({
        "object": "list",
        "data": data.collect::<Vec<_>>(),
        "model": served.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    })))
}

/// A vector of the same direction and length 1; nothing has no direction and stays.
fn unit(mut vector: Vec<f32>) -> Vec<f32> {
    let length = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    vector
}
