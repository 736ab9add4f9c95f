//! A model behind our own server, and behind servers that are busy, poor or confused.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::oneshot;
use trine_eval::{
    Continuation, Data, Evaluation, Item, LanguageModel, RuntimeModel, Settings, Store, Task,
};
use trine_format::ModelFile;
use trine_remote::{Remote, RemoteConfig};
use trine_runtime::{Engine, EngineConfig, Model};
use trine_server::{App, ServerConfig, serve};
use trine_tokenizer::Tokenizer;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/fixtures/tied-h64/packed")
}

fn config(address: SocketAddr) -> RemoteConfig {
    RemoteConfig {
        url: format!("http://{address}/v1"),
        model: None,
        key: None,
        positions: None,
        concurrency: 4,
    }
}

/// Our server with the smallest fixture, which ends when it is dropped.
struct Served {
    address: SocketAddr,
    shutdown: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    model: Arc<Model>,
    tokenizer: Tokenizer,
    stop_ids: Vec<u32>,
}

impl Served {
    fn new() -> Self {
        let file = ModelFile::open(&fixture()).unwrap();
        let model = Arc::new(Model::load(&file).unwrap());
        let tokenizer = Tokenizer::from_json(&file.tokenizer().unwrap().tokenizer_json).unwrap();
        let stop_ids: Vec<u32> = tokenizer.eos_id().into_iter().collect();
        let engine = Engine::start(model.clone(), EngineConfig::default()).unwrap();
        let config = ServerConfig::default();
        let app = App::new(engine, tokenizer.clone(), None, stop_ids.clone(), config);
        let (shutdown, ended) = oneshot::channel::<()>();
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            tokio::runtime::Runtime::new().unwrap().block_on(async move {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                sender.send(listener.local_addr().unwrap()).unwrap();
                let ended = async { ended.await.unwrap_or_default() };
                serve(listener, Arc::new(app), ended).await.unwrap();
            });
        });
        let (shutdown, thread) = (Some(shutdown), Some(thread));
        let address = receiver.recv().unwrap();
        Self { address, shutdown, thread, model, tokenizer, stop_ids }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.shutdown.take());
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

const CHOICE: &str = r#"
name = "choice"
version = 1
kind = "multiple_choice"
metrics = ["acc", "acc_norm"]
files = ["items.jsonl"]
[[form]]
needs = ["query", "choices", "gold"]
prompt = "{{query}}"
choices = "choices"
gold = "gold"
"#;

const LAST: &str = r#"
name = "last"
version = 1
kind = "continuation"
metrics = ["acc", "perplexity"]
files = ["items.jsonl"]
[[form]]
needs = ["query", "choices"]
prompt = "{{query}}"
target = " {{choices[0]}}"
"#;

const WRITTEN: &str = r#"
name = "written"
version = 1
kind = "generation"
metrics = ["exact_match"]
files = ["items.jsonl"]
[generation]
max_tokens = 12
until = ["e", "1", "2", "3", "4", "zz"]
[[form]]
needs = ["query", "choices"]
prompt = "{{query}}"
target = "{{choices[0]}}"
"#;

#[test]
fn scores_are_those_of_the_model_itself() {
    let served = Served::new();
    let dir = tempfile::tempdir().unwrap();
    let line = |i: usize| {
        let query = if i == 9 { "so ".repeat(2000) } else { format!("What is {i} and {}?", i * i) };
        let choices = [1, 2, 3, 4].map(|c| format!("about {}", (i + 3) * c));
        json!({ "query": query, "choices": choices, "gold": i % 4 }).to_string() + "\n"
    };
    std::fs::write(dir.path().join("items.jsonl"), (0..40).map(line).collect::<String>()).unwrap();
    let settings = Settings::default();
    for text in [CHOICE, LAST, WRITTEN] {
        let task = Task::parse(text, "task.toml").unwrap();
        let data = Data::open(&task, dir.path(), 0).unwrap();
        let evaluate = |model: &mut dyn LanguageModel| {
            let mut store = Store::in_memory();
            let evaluation = Evaluation {
                task: &task,
                data: &data,
                tokenizer: &served.tokenizer,
                stop_ids: &served.stop_ids,
                template: None,
                sandbox: None,
                settings,
            };
            evaluation.run(model, &mut store, &mut |_| {}).unwrap();
            store
        };
        let here = evaluate(&mut RuntimeModel::new(&served.model));
        let mut remote = Remote::connect(&config(served.address)).unwrap();
        assert_eq!(remote.positions(), served.model.config().max_position_embeddings);
        let there = evaluate(&mut remote);
        let (here, there) = (here.first(99), there.first(99));
        assert_eq!((here.len(), there.len()), (40, 40));
        let mut texts = std::collections::BTreeSet::new();
        for (a, b) in here.iter().zip(&there) {
            assert_eq!(a.log_likelihoods.len(), b.log_likelihoods.len());
            for (x, y) in a.log_likelihoods.iter().zip(&b.log_likelihoods) {
                assert!((x - y).abs() < 1e-5 * x.abs().max(1.0), "item {}: {x} and {y}", a.item);
            }
            assert_eq!((&a.greedy, &a.text, &a.skipped), (&b.greedy, &b.text, &b.skipped));
            if task.name() != "last" {
                assert_eq!(a.scores, b.scores, "item {}", a.item);
            }
            texts.extend(a.text.clone());
        }
        assert!(task.name() != "written" || texts.len() > 1, "{texts:?}");
    }
}

/// A server that answers each request as `answer` says of its number and body: status, headers, body.
fn answering(
    answer: impl Fn(usize, &Value) -> (u16, &'static str, String) + Send + Sync + 'static,
) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (answer, count) = (answer.clone(), count.clone());
            thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let (mut length, mut line) = (0, String::new());
                while reader.read_line(&mut line).unwrap() > 2 {
                    let header = line.to_ascii_lowercase();
                    if let Some(value) = header.strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                    line.clear();
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
                let (status, headers, body) = answer(count.fetch_add(1, Ordering::SeqCst), &body);
                let head = format!(
                    "HTTP/1.1 {status} Status\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
                    body.len()
                );
                let _gone = stream.write_all((head + &body).as_bytes());
            });
        }
    });
    (address, asked)
}

fn item() -> Item {
    Item { options: vec![Continuation { context: vec![5, 6], ids: vec![7] }] }
}

fn likely() -> String {
    json!({ "choices": [{ "text": "", "logprobs": {
        "token_logprobs": [null, -1.0, -2.0, -3.0],
        "top_logprobs": [null, { "a": -1.0 }, { "b": -2.0 }, { "c": -3.0 }],
    } }] })
    .to_string()
}

fn named(address: SocketAddr) -> Remote {
    let named = RemoteConfig { model: Some("m".into()), positions: Some(99), ..config(address) };
    Remote::connect(&named).unwrap()
}

#[test]
fn a_busy_server_is_asked_again_when_it_says() {
    let (address, asked) = answering(|number, body| match number {
        0 => (429, "Retry-After: 1\r\n", r#"{"error":{"message":"later"}}"#.to_owned()),
        1 => (503, "", String::new()),
        _ => {
            assert_eq!(body["prompt"], json!([5, 6, 7]));
            assert_eq!((&body["echo"], &body["model"]), (&json!(true), &json!("m")));
            (200, "", likely())
        }
    });
    let begin = Instant::now();
    let found = named(address).score(&[item()]).unwrap();
    assert_eq!((found[0][0].log, found[0][0].greedy), (-2.0, true));
    assert_eq!(asked.load(Ordering::SeqCst), 3);
    assert!(begin.elapsed() >= Duration::from_millis(1900));
}

#[test]
fn a_server_that_says_nothing_of_a_prompt_is_named_as_such() {
    let (address, _) =
        answering(|_, _| (200, "", json!({ "choices": [{ "text": "x" }] }).to_string()));
    let error = named(address).score(&[item()]).unwrap_err().to_string();
    assert!(error.contains("no log-probabilities of the prompt (`logprobs` is null)"), "{error}");
    assert!(error.contains(&address.to_string()) && error.contains("`echo`"), "{error}");
}

#[test]
fn refusals_come_at_once_and_in_the_servers_words() {
    let (address, asked) =
        answering(|_, _| (400, "", r#"{"error":{"message":"echo is not supported"}}"#.to_owned()));
    let error = named(address).score(&[item()]).unwrap_err().to_string();
    assert!(error.ends_with("/v1/completions: 400: echo is not supported"), "{error}");
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    let (address, _) = answering(|_, _| (200, "", "<html>".to_owned()));
    let error = named(address).score(&[item()]).unwrap_err().to_string();
    assert!(error.contains("expected JSON") && error.contains("<html>"), "{error}");
    // A key goes nowhere else.
    let (address, _) = answering(|_, _| (302, "Location: http://127.0.0.1:9/\r\n", String::new()));
    let error = named(address).score(&[item()]).unwrap_err().to_string();
    assert!(error.contains("302"), "{error}");
}

#[test]
fn one_of_several_models_has_to_be_named() {
    let (address, _) = answering(|_, _| {
        let models = json!({ "data": [{ "id": "a" }, { "id": "b", "max_model_len": 77 }] });
        (200, "", models.to_string())
    });
    let error = Remote::connect(&config(address)).err().unwrap().to_string();
    assert!(error.contains("--model-name: a, b"), "{error}");
    let named = RemoteConfig { model: Some("b".into()), ..config(address) };
    let remote = Remote::connect(&named).unwrap();
    assert_eq!((remote.name(), remote.positions(), remote.limit()), ("b", 77, 75));
}
