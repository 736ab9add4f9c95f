//! Clients that go away, requests that take too long, and the end of the server.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use trine_runtime::EngineConfig;
use trine_server::ServerConfig;

use super::{Answer, Server, chat, with};

const COMPLETIONS: &str = "/v1/completions";

fn long() -> Value {
    json!({"prompt": "A", "max_tokens": 500, "temperature": 0})
}

#[test]
fn a_client_that_goes_away_ends_its_request_streamed_or_not() {
    let engine = EngineConfig { max_running: 1, ..EngineConfig::default() };
    let server = Server::with(ServerConfig::default(), engine);
    // One that would take long: 64 choices, one after another.
    let many = with(long(), json!({"n": 64, "temperature": 1, "stream": true}));
    let begin = Instant::now();
    drop(server.stream(COMPLETIONS, &many));
    server.wait_until_idle();
    let whole = with(many, json!({"stream": false}));
    let headers = "Content-Type: application/json\r\n";
    let stream = server.begin("POST", COMPLETIONS, headers, whole.to_string().as_bytes());
    while server.metric("trine_requests_running") == 0.0 {
        assert!(begin.elapsed() < Duration::from_secs(60));
    }
    drop(stream);
    server.wait_until_idle();
    assert!(server.metric("trine_requests_cancelled_total") >= 64.0);
}

/// Half of many clients disconnect midway; the others get what they get from an idle server.
#[test]
fn clients_that_stay_get_the_same_whoever_leaves() {
    const CLIENTS: usize = 8;
    const ROUNDS: usize = 12;
    let engine = EngineConfig { max_running: 6, max_waiting: 64, ..EngineConfig::default() };
    let server = Server::with(ServerConfig::default(), engine);
    let body = |seed: usize| {
        let text = format!("System prompt that all have. Number {}", seed % 5);
        with(chat(&text), json!({"max_tokens": 40, "stream": true}))
    };
    let text = |answer: Answer| -> String {
        let chunks = answer.chunks();
        let text = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str());
        text.collect()
    };
    let expected: Vec<String> =
        (0..5).map(|seed| text(server.post("/v1/chat/completions", &body(seed)))).collect();
    let compared = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (server, body, text, expected, compared) =
                (&server, &body, &text, &expected, &compared);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let seed = client + round;
                    if (client + round) % 2 == 0 {
                        drop(server.stream("/v1/chat/completions", &body(seed)));
                        continue;
                    }
                    let found = text(server.post("/v1/chat/completions", &body(seed)));
                    assert_eq!(found, expected[seed % 5]);
                    compared.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(compared.load(Ordering::Relaxed), CLIENTS * ROUNDS / 2);
    server.wait_until_idle();
}

#[test]
fn who_asks_for_much_does_not_keep_others_waiting() {
    let keys = ["many".to_owned(), "one".to_owned()].to_vec();
    let config = ServerConfig { api_keys: keys, ..ServerConfig::default() };
    let engine = EngineConfig { max_running: 1, ..EngineConfig::default() };
    let server = Server::with(config, engine);
    let ask = |key: &str, body: &Value| {
        let headers = format!("Content-Type: application/json\r\nAuthorization: Bearer {key}\r\n");
        server.begin("POST", COMPLETIONS, &headers, body.to_string().as_bytes())
    };
    let health = || -> Value { serde_json::from_str(&server.get("/health").body).unwrap() };
    let many = ask("many", &with(long(), json!({"n": 60, "temperature": 1})));
    let begin = Instant::now();
    while health()["waiting"] != 59 {
        assert!(begin.elapsed() < Duration::from_secs(60), "{}", health());
    }
    let one = Answer::read(ask("one", &with(long(), json!({"max_tokens": 4}))));
    assert_eq!(one.status, 200, "{}", one.body);
    // It was the next, or nearly so.
    assert!(health()["waiting"].as_u64().unwrap() > 40, "{}", health());
    drop(many);
    server.wait_until_idle();
}

#[test]
fn a_request_that_takes_too_long_is_told_so() {
    let config =
        ServerConfig { request_timeout: Duration::from_millis(50), ..ServerConfig::default() };
    let engine = EngineConfig { max_running: 1, ..EngineConfig::default() };
    let server = Server::with(config, engine);
    let many = with(long(), json!({"n": 64, "temperature": 1}));
    server.post(COMPLETIONS, &many).check_refused(504, None);
    let streamed = server.post(COMPLETIONS, &with(many, json!({"stream": true})));
    assert_eq!(streamed.status, 200);
    let last =
        streamed.body.lines().filter_map(|line| line.strip_prefix("data: ")).next_back().unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert!(last["error"]["message"].as_str().unwrap().contains("too long"), "{last}");
}

#[test]
fn the_end_waits_for_what_runs() {
    let mut server = Server::new();
    let streamed = with(long(), json!({"stream": true}));
    let headers = "Content-Type: application/json\r\n";
    let stream = server.begin("POST", COMPLETIONS, headers, streamed.to_string().as_bytes());
    let begin = Instant::now();
    while server.metric("trine_prompt_tokens_total") == 0.0 {
        assert!(begin.elapsed() < Duration::from_secs(60));
    }
    drop(server.shutdown.take());
    let chunks = Answer::read(stream).chunks();
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[test]
fn the_end_does_not_wait_for_ever() {
    let config =
        ServerConfig { drain_timeout: Duration::from_millis(50), ..ServerConfig::default() };
    let engine = EngineConfig { max_running: 1, ..EngineConfig::default() };
    let mut server = Server::with(config, engine);
    let many = with(long(), json!({"n": 64, "temperature": 1, "stream": true}));
    let headers = "Content-Type: application/json\r\n";
    let stream = server.begin("POST", COMPLETIONS, headers, many.to_string().as_bytes());
    let begin = Instant::now();
    while server.metric("trine_prompt_tokens_total") == 0.0 {
        assert!(begin.elapsed() < Duration::from_secs(60));
    }
    drop(server.shutdown.take());
    let answer = Answer::read(stream);
    assert!(answer.body.contains("the server is ending"), "{}", answer.body);
}
