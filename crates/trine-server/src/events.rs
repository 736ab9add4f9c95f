//! Server-sent events: how answers are streamed.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use serde_json::Value;

use crate::error::ApiError;
use crate::generation::{Generation, Piece};

/// After so long without an event a comment is sent, lest something between takes the connection for
/// dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What makes the chunks of a stream out of pieces.
pub(crate) trait Chunks: Send + 'static {
    /// The chunks of the next piece.
    fn piece(&mut self, piece: Piece) -> Vec<Value>;
    /// The chunks after the last.
    fn end(&mut self) -> Vec<Value>;
}

/// Streams a generation, chunk by chunk, and the `[DONE]` that clients wait for.
pub(crate) fn stream(generation: Generation, chunks: impl Chunks) -> Response {
    let state = Some((generation, chunks));
    let stream = unfold((state, VecDeque::new()), |(mut state, mut ready)| async move {
        loop {
            if let Some(bytes) = ready.pop_front() {
                return Some((Ok::<_, Infallible>(bytes), (state, ready)));
            }
            let (generation, chunks) = state.as_mut()?;
            match tokio::time::timeout(KEEP_ALIVE, generation.next()).await {
                Err(_) => ready.push_back(Bytes::from_static(b": still at it\n\n")),
                Ok(Some(Ok(piece))) => ready.extend(chunks.piece(piece).iter().map(event)),
                Ok(Some(Err(error))) => {
                    ready.push_back(event(&error.body()));
                    state = None;
                }
                Ok(None) => {
                    ready.extend(chunks.end().iter().map(event));
                    ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
                    state = None;
                }
            }
        }
    });
    let mut response = Body::from_stream(stream).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect the events otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// All pieces of a generation, for an answer at once.
pub(crate) async fn collect(mut generation: Generation) -> Result<Vec<Piece>, ApiError> {
    let mut pieces = Vec::new();
    while let Some(piece) = generation.next().await {
        pieces.push(piece?);
    }
    Ok(pieces)
}

fn event(chunk: &Value) -> Bytes {
    Bytes::from(format!("data: {chunk}\n\n"))
}
