//! `trine serve`: it says where it listens, answers, and ends when it is told to.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};

use super::{FIXTURE, Place};

/// A server of the fixture at a free port.
pub(crate) fn start(place: &Place, args: &[&str]) -> Child {
    let mut command = place.command(&["serve", FIXTURE, "--port", "0", "--name", "tiny"]);
    command.args(args).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
}

/// Where a server says that it listens.
pub(crate) fn address(stderr: &mut impl BufRead) -> String {
    let lines = stderr.lines().map(Result::unwrap);
    let address = |line: String| Some(line.strip_prefix("listening at http://")?.to_owned());
    lines.filter_map(address).next().expect("it ended before it listened")
}

pub(crate) fn post(address: &str, headers: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let length = body.len();
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn it_answers_as_run_does_and_ends_when_told_to() {
    let place = Place::new();
    place.write("keys", "first\n\nsecond\n");
    let mut child = start(&place, &["--api-key-file", "keys"]);
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let address = address(&mut stderr);
    let secret = "a text that no log has";
    let body = format!(
        "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{secret}\"}}], \"temperature\": 0, \"max_tokens\": 8}}"
    );
    assert!(post(&address, "", &body).starts_with("HTTP/1.1 401"));
    let answer = post(&address, "Authorization: Bearer second\r\nX-Request-Id: q-7\r\n", &body);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let json = answer.split("\r\n\r\n").nth(1).unwrap();
    let json: serde_json::Value = serde_json::from_str(json).unwrap();
    let prompt = format!("User: {secret}<|eot_id|>Assistant: ");
    let args = ["run", FIXTURE, "-p", &prompt, "--temperature", "0", "-n", "8", "--json"];
    let alone: serde_json::Value = serde_json::from_str(&place.ok(&args)).unwrap();
    assert_eq!(json["choices"][0]["message"]["content"], alone["text"]);
    assert_eq!(json["model"], "tiny");

    super::signals::signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let mut log = String::new();
    stderr.read_to_string(&mut log).unwrap();
    assert!(log.contains("q-7") && log.contains("/v1/chat/completions"), "{log}");
    assert!(!log.contains(secret) && !log.contains("second") && !log.contains("panicked"), "{log}");
}

#[test]
fn what_cannot_be_served_is_refused() {
    let place = Place::new();
    place.write("empty", "\n");
    place.write("broken.jinja", "{% if %}");
    for (args, names) in [
        (&["--api-key-file", "missing"][..], &["missing"][..]),
        (&["--api-key-file", "empty"], &["empty", "none"]),
        (&["--api-key", ""], &["--api-key"]),
        (&["--max-running", "0"], &["--max-running", "at least 1"]),
        (&["--kv-memory", "0"], &["--kv-memory"]),
        (&["--chat-template", "broken.jinja"], &["broken.jinja"]),
    ] {
        place.refused(&[&["serve", FIXTURE, "--port", "0"], args].concat(), names);
    }
    place.refused(&["serve", "nowhere", "--port", "0"], &["nowhere"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    place.refused(&["serve", FIXTURE, "--port", &port], &["cannot listen", &port]);
}
