//! Bodies of requests: JSON, within limits of length, time and depth.

use axum::body::{Body, Bytes, to_bytes};
use axum::http::{Request, StatusCode, header};
use serde::de::DeserializeOwned;

use crate::App;
use crate::error::ApiError;

/// Reads the body of a request as JSON.
pub(crate) async fn json<T: DeserializeOwned>(
    app: &App,
    request: Request<Body>,
) -> Result<T, ApiError> {
    parse(&read(app, request).await?)
}

/// Reads the body of a request.
///
/// It must say that it is JSON: a page of another site can send a form or plain text to a server on
/// one's own machine without asking, but not that. Depth is no danger: the parser goes 128 levels deep
/// into what is read, and skips what is not without going into it.
pub(crate) async fn read(app: &App, request: Request<Body>) -> Result<Bytes, ApiError> {
    let kind = request.headers().get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        let message = format!("expected Content-Type: application/json, found {essence:?}");
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    let limit = app.config.max_body;
    let too_large = || {
        let message = format!("a body of more than {limit} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    let length = request.headers().get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let body = tokio::time::timeout(app.config.read_timeout, to_bytes(request.into_body(), limit));
    let body = body.await.map_err(|_| {
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time")
    })?;
    body.map_err(|error| {
        let source = std::error::Error::source(&error);
        match source.is_some_and(|source| source.to_string().contains("length limit")) {
            true => too_large(),
            false => ApiError::new(StatusCode::BAD_REQUEST, "the body could not be read"),
        }
    })
}

/// Reads JSON; what is wrong in it is named by its path.
pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let error = error.into_inner();
        if !error.is_eof() && path != "." {
            return ApiError::param(path, error.to_string());
        }
        ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the body is not what was expected: {error}"),
        )
    })?;
    reader.end().map_err(|error| {
        ApiError::new(StatusCode::BAD_REQUEST, format!("the body is not JSON: {error}"))
    })?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Form {
        #[serde(default)]
        parts: Vec<Part>,
    }

    #[derive(Debug, Deserialize)]
    struct Part {
        size: f32,
    }

    fn message(body: &[u8]) -> String {
        parse::<Form>(body).unwrap_err().body()["error"]["message"].to_string()
    }

    #[test]
    fn the_parameter_is_named() {
        let form: Form = parse(br#"{"parts": [{"size": 1}], "other": null}"#).unwrap();
        assert_eq!(form.parts[0].size, 1.0);
        let found = message(br#"{"parts": [{"size": 1}, {"size": "large"}]}"#);
        assert!(found.contains("parts[1].size"), "{found}");
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for body in [&b"{"[..], b"", b"{} {}", b"{\"parts\": [{\"size\": \"\xff\"}]}", b"[1"] {
            assert!(!message(body).is_empty());
        }
        for key in ["parts", "other"] {
            let deep = format!("{{\"{key}\": {}", "[".repeat(100_000));
            assert!(!message(deep.as_bytes()).is_empty());
        }
        let value: Result<serde_json::Value, _> = parse("[".repeat(100_000).as_bytes());
        assert!(value.unwrap_err().body().to_string().contains("recursion"));
    }
}
