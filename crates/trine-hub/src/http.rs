//! Requests to the hub: redirects, the token, what statuses mean, and patience.
//!
//! Redirects are followed here and not by the HTTP library, for two reasons: the token goes to the
//! hub's own scheme, host and port and to no other, and the hash of a large file stands in the
//! headers of the redirect.

use std::io::Read;
use std::thread;
use std::time::Duration;

use ureq::http::{HeaderMap, Response, StatusCode, Uri};
use ureq::{Agent, Body, Proxy};

use crate::{HubError, Observer, Reference, Settings};

/// Redirects that are followed for one request.
const MAX_REDIRECTS: usize = 10;

/// Longest wait between two attempts.
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// Most bytes of an answer that is not a file: a repository with 100,000 files fits.
const MAX_LISTING: u64 = 16 << 20;

/// Why an attempt failed.
pub(crate) enum Failure {
    /// Another attempt may succeed.
    Again(String),
    /// No other attempt would.
    Final(HubError),
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::Final(error)
    }
}

/// What to ask for.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Ask {
    /// The headers that describe a file: those of the redirect that leaves the hub, if there is one
    /// and it has them.
    Description,
    /// The bytes from this one on.
    From(u64),
}

/// Scheme, host and port: who gets to see a token.
#[derive(Clone, Debug, PartialEq)]
struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

impl Origin {
    fn of(uri: &Uri) -> Option<Self> {
        let scheme = uri.scheme_str()?.to_ascii_lowercase();
        let default = match scheme.as_str() {
            "https" => 443,
            "http" => 80,
            _ => return None,
        };
        let host = uri.host()?.to_ascii_lowercase();
        Some(Self { port: uri.port_u16().unwrap_or(default), scheme, host })
    }

    fn is_local(&self) -> bool {
        matches!(self.host.as_str(), "localhost" | "127.0.0.1" | "[::1]")
    }
}

/// Talks to one hub.
pub(crate) struct Client {
    agent: Agent,
    endpoint: String,
    origin: Origin,
    token: Option<String>,
    attempts: u32,
    backoff: Duration,
}

impl Client {
    pub(crate) fn new(settings: &Settings) -> Result<Self, HubError> {
        let endpoint = settings.endpoint.clone();
        let origin = endpoint.parse().ok().and_then(|uri| Origin::of(&uri)).ok_or_else(|| {
            let (name, expected) = ("HF_ENDPOINT", "a URL such as https://huggingface.co");
            HubError::Setting { name, expected, found: endpoint.clone() }
        })?;
        let timeout = Some(settings.timeout);
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_resolve(timeout)
            .timeout_connect(timeout)
            .timeout_recv_response(timeout)
            .timeout_per_read(timeout)
            .user_agent(concat!("trine/", env!("CARGO_PKG_VERSION")))
            // A compressed answer has other lengths and offsets.
            .accept_encoding("identity");
        if origin.is_local() {
            config = config.proxy(None);
        } else {
            config = config.proxy(Proxy::try_from_env());
        }
        Ok(Self {
            agent: config.build().into(),
            endpoint,
            origin,
            token: settings.token.clone(),
            attempts: settings.attempts.max(1),
            backoff: settings.backoff,
        })
    }

    /// The URL of a path on the hub.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.endpoint)
    }

    /// Patience for work on a URL.
    pub(crate) fn patience<'a>(&'a self, url: &'a str) -> Patience<'a> {
        Patience { client: self, url, attempts: self.attempts, failed: 0 }
    }

    /// One attempt at a file of the hub: status 200, 206, or 416 for a range beyond its end; for a
    /// description also a redirect. `subject` is what messages name.
    pub(crate) fn send(
        &self,
        url: &str,
        ask: Ask,
        subject: &Reference,
    ) -> Result<Response<Body>, Failure> {
        let mut url = url.to_owned();
        for _ in 0..MAX_REDIRECTS {
            let (response, origin) = self.send_once(&url, ask)?;
            let on_the_hub = origin == self.origin;
            let status = response.status();
            if let Some(next) = redirect(&response, &url)? {
                let leaves = Origin::of(&next).as_ref() != Some(&self.origin);
                if ask == Ask::Description
                    && (linked_etag(&response) || leaves && etag(response.headers()).is_some())
                {
                    return Ok(response);
                }
                if origin.scheme == "https" && next.scheme_str() != Some("https") {
                    let found = "a redirect to one that is not encrypted";
                    return Err(HubError::answer(without_query(&url), "https", found).into());
                }
                url = next.to_string();
                continue;
            }
            return match status.as_u16() {
                200 | 206 => Ok(response),
                416 if matches!(ask, Ask::From(1..)) => Ok(response),
                408 | 429 | 500.. => {
                    Err(Failure::Again(format!("{} answers {status}", origin.host)))
                }
                // A signed link that has run out; the hub makes a new one.
                400.. if !on_the_hub => {
                    Err(Failure::Again(format!("{} answers {status}", origin.host)))
                }
                _ => Err(self.refusal(status, response.headers(), subject).into()),
            };
        }
        let found = format!("more than {MAX_REDIRECTS} redirects");
        Err(HubError::answer(without_query(&url), "an answer", found).into())
    }

    fn send_once(&self, url: &str, ask: Ask) -> Result<(Response<Body>, Origin), Failure> {
        let uri = url.parse::<Uri>().ok();
        let origin = uri.as_ref().and_then(Origin::of).ok_or_else(|| {
            Failure::from(HubError::answer(without_query(url), "a URL of http or https", "another"))
        })?;
        let mut request = match ask {
            Ask::Description => self.agent.head(url),
            Ask::From(_) => self.agent.get(url),
        };
        if let Ask::From(start @ 1..) = ask {
            request = request.header("Range", format!("bytes={start}-"));
        }
        if let Some(token) = self.token.as_ref().filter(|_| origin == self.origin) {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        match request.call() {
            Ok(response) => Ok((response, origin)),
            Err(e) => Err(Failure::Again(format!("{}: {e}", origin.host))),
        }
    }

    /// The text of an answer of the hub; `patient` says whether a failure is tried again.
    pub(crate) fn text(
        &self,
        url: &str,
        subject: &Reference,
        patient: bool,
        observer: &mut dyn Observer,
    ) -> Result<String, HubError> {
        let mut patience = self.patience(url);
        if !patient {
            patience.attempts = 1;
        }
        loop {
            let attempt = self.send(url, Ask::From(0), subject).and_then(|response| {
                let mut text = String::new();
                let mut reader = response.into_body().into_reader().take(MAX_LISTING);
                match reader.read_to_string(&mut text) {
                    Ok(_) => Ok(text),
                    Err(e) => Err(Failure::Again(e.to_string())),
                }
            });
            match attempt {
                Ok(text) => return Ok(text),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Again(cause)) => patience.again(cause, observer)?,
            }
        }
    }

    /// What a status means and what to do about it.
    fn refusal(&self, status: StatusCode, headers: &HeaderMap, subject: &Reference) -> HubError {
        let code = header(headers, "x-error-code").unwrap_or_default();
        let repo = subject.repo();
        let advice = match (status.as_u16(), code) {
            (403, _) | (_, "GatedRepo") => format!(
                "access is restricted: accept the terms at {}/{repo} and set HF_TOKEN to a token \
                 of that account which may read it",
                self.endpoint
            ),
            (401, _) if self.token.is_some() => {
                "no such repository, or the token is not valid for it: check the spelling and \
                 HF_TOKEN"
                    .into()
            }
            (401, _) => "no such repository, or a private or gated one: check the spelling, and \
                         set HF_TOKEN where it needs a token"
                .into(),
            (404, "RevisionNotFound") => {
                format!("the repository has no revision `{}`", subject.revision())
            }
            (404, "EntryNotFound") => {
                format!("no such file at revision `{}`", subject.revision())
            }
            (404, _) => "no such repository, revision or file: check the spelling; a private one \
                         needs HF_TOKEN"
                .into(),
            _ => format!("not an answer of a hub: is {} one? HF_ENDPOINT names it", self.endpoint),
        };
        HubError::Refused { what: subject.to_string(), status: status.as_u16(), advice }
    }
}

/// Counts failed attempts and waits longer after each.
pub(crate) struct Patience<'a> {
    client: &'a Client,
    url: &'a str,
    attempts: u32,
    failed: u32,
}

impl Patience<'_> {
    /// There was progress: failures before it do not count.
    pub(crate) fn renew(&mut self) {
        self.failed = 0;
    }

    /// Waits for another attempt, or gives up.
    pub(crate) fn again(
        &mut self,
        cause: String,
        observer: &mut dyn Observer,
    ) -> Result<(), HubError> {
        self.failed += 1;
        if self.failed >= self.attempts {
            let (url, attempts) = (self.url.to_owned(), self.attempts);
            return Err(HubError::Network { url, cause, attempts });
        }
        let factor = 1u32.checked_shl(self.failed - 1).unwrap_or(u32::MAX);
        let wait = self.client.backoff.saturating_mul(factor).min(MAX_BACKOFF);
        observer.note(&format!("{cause}; trying again"));
        thread::sleep(wait);
        Ok(())
    }
}

/// Where an answer redirects to.
fn redirect(response: &Response<Body>, from: &str) -> Result<Option<Uri>, HubError> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let refuse =
        || HubError::answer(without_query(from), "a redirect with a URL in `Location`", "another");
    let location = header(response.headers(), "location").ok_or_else(refuse)?;
    let base: Uri = from.parse().map_err(|_| refuse())?;
    let (scheme, authority) = match (base.scheme_str(), base.authority()) {
        (Some(scheme), Some(authority)) => (scheme, authority.as_str()),
        _ => return Err(refuse()),
    };
    let absolute = match location {
        _ if location.starts_with("//") => format!("{scheme}:{location}"),
        _ if location.starts_with('/') => format!("{scheme}://{authority}{location}"),
        _ => location.to_owned(),
    };
    let next: Uri = absolute.parse().map_err(|_| refuse())?;
    if Origin::of(&next).is_none() {
        return Err(refuse());
    }
    Ok(Some(next))
}

/// A header as text.
pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

fn linked_etag(response: &Response<Body>) -> bool {
    header(response.headers(), "x-linked-etag").is_some()
}

/// The hash that the hub names for a file: that of the linked large file before that of the answer.
pub(crate) fn etag(headers: &HeaderMap) -> Option<&str> {
    let value = header(headers, "x-linked-etag").or_else(|| header(headers, "etag"))?;
    Some(value.strip_prefix("W/").unwrap_or(value).trim_matches('"'))
}

/// A URL without what signs it.
fn without_query(url: &str) -> &str {
    url.split_once('?').map_or(url, |(path, _)| path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_port_or_scheme_is_another_origin() {
        let origin = |url: &str| Origin::of(&url.parse().unwrap());
        assert_eq!(origin("https://Hub.co/a"), origin("https://hub.co:443/b?c"));
        assert_ne!(origin("https://hub.co"), origin("http://hub.co"));
        assert_ne!(origin("http://hub.co:1"), origin("http://hub.co:2"));
        assert_ne!(origin("https://hub.co"), origin("https://cdn.hub.co"));
        assert_eq!(origin("ftp://hub.co"), None);
        assert_eq!(origin("/path"), None);
    }

    #[test]
    fn etags_lose_their_quotes() {
        let mut headers = HeaderMap::new();
        headers.insert("etag", "W/\"ab\"".parse().unwrap());
        assert_eq!(etag(&headers), Some("ab"));
        headers.insert("x-linked-etag", "\"cd\"".parse().unwrap());
        assert_eq!(etag(&headers), Some("cd"));
    }
}
