//! What is answered when a request cannot be served, in the form that OpenAI's clients read.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use trine_runtime::{RuntimeError, SubmitError};
use trine_tokenizer::TokenizerError;

/// Why a request is refused.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    /// For people.
    message: String,
    /// The parameter that it is about, as a path: `messages[2].content`.
    param: Option<String>,
    /// For programs.
    code: Option<&'static str>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    /// A parameter that is wrong: what was expected and what was found.
    pub(crate) fn param(param: impl Into<String>, message: impl Into<String>) -> Self {
        let param = Some(param.into());
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    pub(crate) fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// What cannot be explained to a client.
    pub(crate) fn internal(message: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// A prompt with more ids than the model has positions.
    pub(crate) fn too_long(param: &str, found: usize, context: usize) -> Self {
        let message = format!("{found} tokens, expected at most {context}, the model's context");
        Self::param(param, message).with_code("context_length_exceeded")
    }

    /// What the tokenizer or the template says about a parameter.
    pub(crate) fn text(param: &str, error: &TokenizerError) -> Self {
        Self::param(param, error.to_string())
    }

    /// What the engine says about a request whose prompt is `param`.
    pub(crate) fn submit(param: &str, error: &SubmitError) -> Self {
        match error {
            SubmitError::Invalid(RuntimeError::Setting { name, .. }) => {
                Self::param(*name, error.to_string())
            }
            SubmitError::Invalid(RuntimeError::ContextFull { requested, limit }) => {
                Self::too_long(param, *requested, *limit)
            }
            SubmitError::Invalid(_) => Self::param(param, error.to_string()),
            SubmitError::TooLarge { .. } => Self::param("max_tokens", error.to_string()),
            SubmitError::Busy { .. } | SubmitError::ClientBusy { .. } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, error.to_string()).with_code("busy")
            }
            SubmitError::Closed => Self::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
        }
    }

    /// The body, which an event of a stream carries as well.
    pub(crate) fn body(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        let Self { message, param, code, .. } = self;
        // A client shows the message only.
        let message = match param {
            Some(param) => format!("{param}: {message}"),
            None => message.clone(),
        };
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => (),
        }
        response
    }
}
