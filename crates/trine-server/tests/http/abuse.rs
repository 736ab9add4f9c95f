//! What nobody should send: it is refused with the right status, and others are served meanwhile.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::json;
use trine_runtime::EngineConfig;
use trine_server::ServerConfig;

use super::{Answer, Server, chat, with};

const CHAT: &str = "/v1/chat/completions";
const JSON: &str = "Content-Type: application/json\r\n";

/// The server still answers, and as before.
#[track_caller]
fn check_alive(server: &Server) {
    let answer = server.ok(CHAT, &chat("Hello there"));
    let prompt = server.tokenizer.encode("User: Hello there<|eot_id|>Assistant: ", true).unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"], server.alone(&prompt, 12));
}

#[test]
fn bodies_that_are_too_large_are_refused_whether_they_say_so_or_not() {
    let config = ServerConfig { max_body: 10_000, ..ServerConfig::default() };
    let server = Server::with(config, EngineConfig::default());
    let body = vec![b' '; 20_000];
    server.request("POST", CHAT, JSON, &body).check_refused(413, None);
    let mut stream = server.connect();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{JSON}Transfer-Encoding: chunked\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(b"4e20\r\n").unwrap();
    let _refused = stream.write_all(&body);
    let _refused = stream.write_all(b"\r\n0\r\n\r\n");
    Answer::read(stream).check_refused(413, None);
    check_alive(&server);
}

#[test]
fn bytes_that_are_no_text_and_json_that_is_too_deep_are_refused() {
    let server = Server::new();
    let invalid = b"{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\xfe\"}]}";
    let deep = format!("{{\"messages\": {}", "[".repeat(1_000_000));
    let deep_object = "{\"a\":".repeat(500_000);
    let surrogate = br#"{"messages": [{"role": "user", "content": "\ud800"}]}"#;
    for body in [&invalid[..], deep.as_bytes(), deep_object.as_bytes(), surrogate, b"\0", b"null"] {
        assert_eq!(server.request("POST", CHAT, JSON, body).status, 400);
    }
    check_alive(&server);
}

#[test]
fn a_million_tokens_and_ten_thousand_stop_strings_are_refused() {
    let server = Server::new();
    let text = "a b ".repeat(500_000);
    server.post("/v1/completions", &json!({"prompt": text})).check_refused(400, Some("prompt"));
    server.post(CHAT, &chat(&text)).check_refused(400, Some("messages"));
    let ids = json!({"prompt": vec![7; 1_000_000]});
    server.post("/v1/completions", &ids).check_refused(400, Some("prompt"));
    let stops: Vec<String> = (0..10_000).map(|i| format!("stop {i}")).collect();
    server.post(CHAT, &with(chat("Hi"), json!({"stop": stops}))).check_refused(400, Some("stop"));
    let many = vec![json!({"role": "user", "content": "x"}); 100_000];
    let many = server.post(CHAT, &with(chat("Hi"), json!({"messages": many})));
    assert!([400, 413].contains(&many.status), "{}", many.status);
    check_alive(&server);
}

#[test]
fn heads_that_are_too_large_or_no_http_are_refused() {
    let server = Server::new();
    let long = format!("X: {}\r\n", "x".repeat(1_000_000));
    assert_eq!(server.request("GET", "/health", &long, b"").status, 431);
    let many: String = (0..500).map(|i| format!("X-{i}: 1\r\n")).collect();
    assert_eq!(server.request("GET", "/health", &many, b"").status, 431);
    let mut stream = server.connect();
    stream.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01 what\r\n\r\n").unwrap();
    assert_eq!(Answer::read(stream).status, 400);
    check_alive(&server);
}

#[test]
fn who_is_too_slow_is_dropped_and_holds_nobody_up() {
    let config =
        ServerConfig { read_timeout: Duration::from_millis(300), ..ServerConfig::default() };
    let server = Server::with(config, EngineConfig::default());
    let mut heads: Vec<_> = (0..50).map(|_| server.connect()).collect();
    for stream in &mut heads {
        stream.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ").unwrap();
    }
    let mut body = server.connect();
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\n{JSON}Content-Length: 100\r\n\r\n{{");
    body.write_all(head.as_bytes()).unwrap();
    check_alive(&server);
    let begin = Instant::now();
    let mut answer = [0; 64];
    let read = body.read(&mut answer).unwrap();
    assert!(answer[..read].starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&answer));
    for stream in &mut heads {
        let mut rest = Vec::new();
        let _reset = stream.read_to_end(&mut rest);
    }
    assert!(begin.elapsed() < Duration::from_secs(10));
    check_alive(&server);
}

#[test]
fn who_does_not_read_is_dropped() {
    let config =
        ServerConfig { write_timeout: Duration::from_millis(300), ..ServerConfig::default() };
    let server = Server::with(config, EngineConfig::default());
    // More answers than lie between a server and a client who does not read them.
    let greedy = "GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2000);
    let _streams: Vec<_> = (0..5)
        .map(|_| {
            let mut stream = server.connect();
            stream.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
            let _full = stream.write_all(greedy.as_bytes());
            stream
        })
        .collect();
    check_alive(&server);
    let begin = Instant::now();
    // The one that asks is left.
    while server.metric("trine_connections") > 1.0 {
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn more_than_may_wait_are_told_to_come_again() {
    let engine = EngineConfig { max_running: 1, max_waiting: 2, ..EngineConfig::default() };
    let server = Server::with(ServerConfig::default(), engine);
    let long = json!({"prompt": "A", "max_tokens": 500, "n": 2, "stream": true, "seed": 1});
    // More choices than may wait, all or none.
    let three = with(long.clone(), json!({"n": 3}));
    let refused = server.post("/v1/completions", &three);
    refused.check_refused(429, None);
    assert!(refused.head.contains("retry-after: 1"), "{}", refused.head);
    drop(server.stream("/v1/completions", &long));
    server.wait_until_idle();
    check_alive(&server);
}

#[test]
fn schemas_that_are_made_to_hurt_are_refused_or_served_in_time() {
    let server = Server::new();
    let nested = (0..55).fold(
        json!({"type": "integer"}),
        |inner, _| json!({"type": "object", "properties": {"a": inner}, "required": ["a"]}),
    );
    let any_of = (0..55).fold(
        json!({"type": "integer"}),
        |inner, i| json!({"anyOf": [inner, {"type": "string", "maxLength": i}]}),
    );
    let property = |schema: serde_json::Value| json!({"type": "object", "properties": {"a": schema}, "required": ["a"]});
    let doubling: serde_json::Map<String, serde_json::Value> = (0..30)
        .map(|i| {
            let next = json!({"$ref": format!("#/$defs/d{}", i + 1)});
            (
                format!("d{i}"),
                json!({"type": "array", "prefixItems": [next.clone(), next], "minItems": 2}),
            )
        })
        .chain([("d30".to_owned(), json!({"type": "null"}))])
        .collect();
    for schema in [
        nested,
        property(any_of),
        json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/d0"}}, "required": ["a"], "$defs": doubling}),
        json!({"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}),
        property(json!({"type": "string", "pattern": "^((((a{0,500}){0,500}){0,500}){0,500})$"})),
        property(json!({"type": "string", "pattern": "(a|a?)+$(b*)*c{9999999}"})),
        property(json!({"type": "string", "minLength": 1_000_000_000})),
        property(json!({"type": "array", "minItems": 1_000_000_000})),
        property(json!({"type": "integer", "multipleOf": 7919, "minimum": -1e300})),
        property(json!({"enum": (0..20_000).collect::<Vec<u32>>()})),
        property(json!({"$ref": "file:///etc/passwd"})),
        property(json!({"$ref": "http://127.0.0.1:9/schema"})),
    ] {
        let begin = Instant::now();
        let function = json!({"name": "f", "parameters": schema});
        let tools = json!({"tools": [{"type": "function", "function": function}], "tool_choice": "required", "max_tokens": 3});
        let format = json!({"type": "json_schema", "json_schema": {"schema": schema}});
        for other in [tools, json!({"response_format": format, "max_tokens": 3})] {
            let status = server.post(CHAT, &with(chat("Hi"), other)).status;
            assert!([200, 400].contains(&status), "{status}: {schema}");
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}: {schema}", begin.elapsed());
    }
    check_alive(&server);
}
