//! Around every request: its id, its line in the log, its key, who asks, and headers of all responses.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, State};
use axum::http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::{Choice, ConstantTimeEq};
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::App;
use crate::error::ApiError;

const REQUEST_ID: &str = "x-request-id";

/// Gives a request an id, or keeps the one it has, and logs what became of it. What was asked and
/// answered is not logged.
pub(crate) async fn trace(
    State(app): State<Arc<App>>,
    request: Request<Body>,
    next: Next,
) -> Response {
    let begin = Instant::now();
    let given = request.headers().get(REQUEST_ID).filter(|id| is_plain(id)).cloned();
    let id = given.or_else(|| HeaderValue::try_from(format!("{:016x}", app.unique())).ok());
    let method = request.method().clone();
    // Paths that are no route may be anything, and are not counted one by one.
    let path = request.extensions().get::<MatchedPath>();
    let path = path.map_or("other", MatchedPath::as_str).to_owned();
    let mut response = next.run(request).await;
    let status = response.status().as_u16();
    app.metrics.response(&path, status);
    let ms = begin.elapsed().as_micros() as f64 / 1e3;
    let name = id.as_ref().and_then(|id| id.to_str().ok()).unwrap_or_default();
    // Probes and pages ask for these every few seconds.
    if matches!(&path[..], "/health" | "/metrics") {
        tracing::debug!(id = name, %method, path, status, ms, "answered");
    } else {
        tracing::info!(id = name, %method, path, status, ms, "answered");
    }
    let headers = response.headers_mut();
    if let Some(id) = id {
        headers.insert(REQUEST_ID, id);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Whether an id that a client chose may stand in a log.
fn is_plain(id: &HeaderValue) -> bool {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    (1..=64).contains(&id.len()) && id.as_bytes().iter().all(plain)
}

/// The other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// Who asks, as a number: clients take turns.
#[derive(Clone, Copy)]
struct Client(u64);

/// Who asks: a key, where there are keys, or an address. `None` where nobody can tell.
pub(crate) fn client(request: &Request<Body>) -> Option<u64> {
    request.extensions().get::<Client>().map(|client| client.0)
}

/// Lets only those pass who have a key, where there are keys, and notes who it is.
pub(crate) async fn key(
    State(app): State<Arc<App>>,
    mut request: Request<Body>,
    next: Next,
) -> Response {
    let peer = request.extensions().get::<Peer>().map(|peer| network(peer.0));
    let client = match app.config.api_keys.is_empty() {
        true => peer.map(|peer| app.number(&peer)),
        false => match has_key(request.headers(), &app.config.api_keys) {
            true => given_key(request.headers()).map(|key| app.number(&key)),
            false => return no_key(),
        },
    };
    if let Some(client) = client {
        request.extensions_mut().insert(Client(client));
    }
    next.run(request).await
}

/// What one client may choose its address from: of version 6, it has a network of 64 bits.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address @ IpAddr::V4(_) => address,
    }
}

fn no_key() -> Response {
    let message = "expected an API key: Authorization: Bearer KEY";
    let error = ApiError::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key");
    error.into_response()
}

/// Compares with every key, and takes as long whether one fits or not.
fn has_key(headers: &HeaderMap, keys: &[String]) -> bool {
    let Some(given) = given_key(headers) else { return false };
    let fits = |fits: Choice, key: &String| fits | key.as_bytes().ct_eq(given);
    keys.iter().fold(Choice::from(0), fits).into()
}

/// The key of `Authorization: Bearer KEY`.
fn given_key(headers: &HeaderMap) -> Option<&[u8]> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
}

/// Lets pages of other origins ask, if there are any.
pub(crate) fn cors(origins: &[String]) -> Option<CorsLayer> {
    let all = origins.iter().any(|origin| origin == "*");
    let origins = match origins {
        [] => return None,
        _ if all => AllowOrigin::any(),
        // What is no header no browser sends.
        some => AllowOrigin::list(some.iter().filter_map(|o| HeaderValue::from_str(o).ok())),
    };
    let headers = [header::AUTHORIZATION, header::CONTENT_TYPE];
    let methods = [Method::GET, Method::POST];
    Some(CorsLayer::new().allow_origin(origins).allow_methods(methods).allow_headers(headers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_keys_fit() {
        let keys = ["first-key".to_owned(), "second".to_owned()];
        let has = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
            has_key(&headers, &keys)
        };
        assert!(has("Bearer first-key") && has("bearer second"));
        for wrong in ["Bearer first", "Bearer first-key2", "Bearer ", "second", "Basic second", ""]
        {
            assert!(!has(wrong), "{wrong}");
        }
        assert!(!has_key(&HeaderMap::new(), &keys));
    }

    #[test]
    fn addresses_of_a_network_are_one_client() {
        let same = |a: &str, b: &str| network(a.parse().unwrap()) == network(b.parse().unwrap());
        assert!(same("2001:db8::1", "2001:db8::ffff:1") && !same("2001:db8::1", "2001:db8:0:1::1"));
        assert!(same("::ffff:192.0.2.1", "192.0.2.1") && !same("192.0.2.1", "192.0.2.2"));
    }

    #[test]
    fn ids_of_clients_are_plain() {
        let plain = |id: &str| is_plain(&HeaderValue::from_str(id).unwrap());
        assert!(plain("a-Z_0.9") && !plain("") && !plain("a b") && !plain(&"x".repeat(65)));
    }
}
