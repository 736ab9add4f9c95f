//! Requests, and patience with servers that are busy.

use std::io::Read;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use ureq::Agent;
use ureq::http::{HeaderMap, Response, Uri};

use crate::RemoteError;

/// How often a request is made before it is given up.
const ATTEMPTS: u32 = 6;

/// Longest that is waited before another attempt, whatever the server asks for.
const LONGEST_WAIT: Duration = Duration::from_secs(120);

/// Longest that an answer may take: a long text of a slow model.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// Most bytes of an answer: the log-probabilities of 100,000 tokens fit.
const LARGEST: u64 = 64 << 20;

/// Talks to one server.
pub(crate) struct Client {
    agent: Agent,
    /// The address up to and with `/v1`.
    base: String,
    key: Option<String>,
}

impl Client {
    pub(crate) fn new(url: &str, key: Option<String>) -> Result<Self, RemoteError> {
        let base = url.trim_end_matches('/').trim_end_matches("/completions").to_owned();
        let refuse = |cause: String| RemoteError::Url { url: url.to_owned(), cause };
        let uri: Uri = base.parse().map_err(|error| refuse(format!("{error}")))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            return Err(refuse("it has no such scheme".to_owned()));
        }
        // A key goes where it was meant to go: nowhere else.
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_global(Some(TIMEOUT));
        Ok(Self { agent: config.build().into(), base, key })
    }

    /// The address of an endpoint.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.base)
    }

    /// What is at an endpoint.
    pub(crate) fn get(&self, path: &str) -> Result<Value, RemoteError> {
        self.patiently(&self.url(path), |url| {
            let mut request = self.agent.get(url);
            if let Some(key) = &self.key {
                request = request.header("Authorization", format!("Bearer {key}"));
            }
            request.call()
        })
    }

    /// What an endpoint answers to `body`.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Result<Value, RemoteError> {
        let body = body.to_string();
        self.patiently(&self.url(path), |url| {
            let mut request = self.agent.post(url).header("Content-Type", "application/json");
            if let Some(key) = &self.key {
                request = request.header("Authorization", format!("Bearer {key}"));
            }
            request.send(&body[..])
        })
    }

    fn patiently(
        &self,
        url: &str,
        send: impl Fn(&str) -> Result<Response<ureq::Body>, ureq::Error>,
    ) -> Result<Value, RemoteError> {
        let mut cause = String::new();
        for attempt in 0..ATTEMPTS {
            let mut wait = Duration::from_millis(500 << attempt);
            match send(url) {
                Err(error) => cause = error.to_string(),
                Ok(mut answer) => {
                    let status = answer.status();
                    let mut text = String::new();
                    let mut body = answer.body_mut().as_reader().take(LARGEST);
                    match body.read_to_string(&mut text) {
                        Err(error) => cause = error.to_string(),
                        Ok(_) if status.is_success() => return parsed(url, &text),
                        Ok(_) if status == 429 || status.is_server_error() => {
                            cause = format!("{}: {}", status.as_u16(), message(&text));
                            wait = asked_wait(answer.headers()).unwrap_or(wait);
                        }
                        Ok(_) => {
                            let (status, message) = (status.as_u16(), message(&text));
                            return Err(RemoteError::Refused {
                                url: url.to_owned(),
                                status,
                                message,
                            });
                        }
                    }
                }
            }
            if attempt + 1 < ATTEMPTS {
                thread::sleep(wait.min(LONGEST_WAIT));
            }
        }
        Err(RemoteError::Unreachable { url: url.to_owned(), attempts: ATTEMPTS, cause })
    }
}

/// How long a server asks to be left alone: seconds; a date is not understood.
fn asked_wait(headers: &HeaderMap) -> Option<Duration> {
    let seconds: f64 = headers.get("retry-after")?.to_str().ok()?.trim().parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

fn parsed(url: &str, text: &str) -> Result<Value, RemoteError> {
    serde_json::from_str(text).map_err(|error| RemoteError::Answer {
        url: url.to_owned(),
        cause: format!("expected JSON: {error}; found {}", shortened(text)),
    })
}

/// The message in an error of OpenAI's interface, or the beginning of whatever it is.
fn message(text: &str) -> String {
    let json: Option<Value> = serde_json::from_str(text).ok();
    let said = json.as_ref().and_then(|json| {
        json["error"]["message"].as_str().or(json["error"].as_str()).or(json["message"].as_str())
    });
    shortened(said.unwrap_or(text))
}

fn shortened(text: &str) -> String {
    let text: String = text.chars().filter(|c| !c.is_control()).take(300).collect();
    if text.is_empty() { "nothing".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_the_interface() {
        let url = |url: &str| Client::new(url, None).map(|client| client.url("completions"));
        for given in ["http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/completions"] {
            assert_eq!(url(given).unwrap(), "http://h:1/v1/completions");
        }
        for given in ["ftp://h/v1", "h:1/v1", "http://", ""] {
            assert!(url(given).is_err(), "{given}");
        }
    }

    #[test]
    fn errors_are_told_in_the_servers_words() {
        assert_eq!(message(r#"{"error":{"message":"no such model"}}"#), "no such model");
        assert_eq!(message(r#"{"error":"busy"}"#), "busy");
        assert_eq!(message("<html>\x1b[2J"), "<html>[2J");
        assert_eq!(message(""), "nothing");
    }
}
