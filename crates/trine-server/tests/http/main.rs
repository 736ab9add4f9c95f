//! The server over real connections: what clients of OpenAI's interface send and read, and what
//! nobody should send.

#![allow(clippy::unwrap_used)]

mod abuse;
mod adapters;
mod api;
mod grammar;
mod lifetime;
mod tools;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::oneshot;
use trine_format::ModelFile;
use trine_runtime::{Engine, EngineConfig, Model, Session};
use trine_server::{App, ServedAdapter, ServerConfig, serve};
use trine_tokenizer::{ChatTemplate, Tokenizer};

/// A server of the smallest fixture, which ends when it is dropped.
struct Server {
    address: SocketAddr,
    shutdown: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    model: Arc<Model>,
    tokenizer: Tokenizer,
    adapters: Vec<ServedAdapter>,
}

fn fixture() -> PathBuf {
    let fixture = "../../tests/data/fixtures/tied-h64/packed";
    Path::new(env!("CARGO_MANIFEST_DIR")).join(fixture)
}

impl Server {
    fn new() -> Self {
        Self::with(ServerConfig::default(), EngineConfig::default())
    }

    fn with(config: ServerConfig, engine: EngineConfig) -> Self {
        Self::with_adapters(config, engine, |_| Vec::new())
    }

    /// With room for conversations about tools, and another chat template than the fixture's.
    fn with_template(template: Option<&str>) -> Self {
        let roomy = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(fixture()).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), roomy.path().join(file.file_name())).unwrap();
        }
        let config = roomy.path().join("config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        let longer = text.replace("embeddings\": 512", "embeddings\": 4096");
        assert_ne!(longer, text);
        std::fs::write(&config, longer).unwrap();
        let (config, engine) = (ServerConfig::default(), EngineConfig::default());
        Self::start(roomy.path(), config, engine, template, |_| Vec::new())
    }

    fn with_adapters(
        config: ServerConfig,
        engine: EngineConfig,
        adapters: impl FnOnce(&Model) -> Vec<ServedAdapter>,
    ) -> Self {
        Self::start(&fixture(), config, engine, None, adapters)
    }

    fn start(
        model: &Path,
        config: ServerConfig,
        engine: EngineConfig,
        template: Option<&str>,
        adapters: impl FnOnce(&Model) -> Vec<ServedAdapter>,
    ) -> Self {
        let file = ModelFile::open(model).unwrap();
        let model = Arc::new(Model::load(&file).unwrap());
        let files = file.tokenizer().unwrap();
        let tokenizer = Tokenizer::from_json(&files.tokenizer_json).unwrap();
        let template = template.unwrap_or_else(|| files.chat_template().unwrap());
        let template = ChatTemplate::new(template).unwrap();
        let adapters = adapters(&model);
        let engine = Engine::start(model.clone(), engine).unwrap();
        // No id ends an answer, so that lengths are known.
        let app = App::new(engine, tokenizer.clone(), Some(template), Vec::new(), config);
        let app = app.with_adapters(adapters.clone());
        let (shutdown, ended) = oneshot::channel::<()>();
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                sender.send(listener.local_addr().unwrap()).unwrap();
                let ended = async { ended.await.unwrap_or_default() };
                serve(listener, Arc::new(app), ended).await.unwrap();
            });
        });
        let (shutdown, thread) = (Some(shutdown), Some(thread));
        Self { address: receiver.recv().unwrap(), shutdown, thread, model, tokenizer, adapters }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Sends a request whose connection ends with its answer.
    fn begin(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // The server may refuse before it has read everything.
        let _refused = stream.write_all(body);
        stream
    }

    fn request(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Answer {
        Answer::read(self.begin(method, path, headers, body))
    }

    fn get(&self, path: &str) -> Answer {
        self.request("GET", path, "", b"")
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        let headers = "Content-Type: application/json\r\n";
        self.request("POST", path, headers, body.to_string().as_bytes())
    }

    /// The JSON of what must be answered.
    #[track_caller]
    fn ok(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        serde_json::from_str(&answer.body).unwrap()
    }

    /// Begins a stream, and reads up to its first event.
    fn stream(&self, path: &str, body: &Value) -> TcpStream {
        let headers = "Content-Type: application/json\r\n";
        let mut stream = self.begin("POST", path, headers, body.to_string().as_bytes());
        let mut seen = Vec::new();
        let mut byte = [0];
        while !seen.ends_with(b"data: ") {
            assert_eq!(stream.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&seen));
            seen.extend(byte);
        }
        stream
    }

    /// What the model alone says, greedily.
    fn alone(&self, prompt: &[u32], tokens: usize) -> String {
        self.alone_with(None, prompt, tokens)
    }

    /// What it says with an adapter, or without.
    fn alone_with(&self, name: Option<&str>, prompt: &[u32], tokens: usize) -> String {
        let adapter = name.map(|name| self.adapters.iter().find(|served| served.name == name));
        let adapter = adapter.map(|served| served.unwrap().adapter.clone());
        let mut session = Session::with_adapter(&self.model, adapter);
        let mut logits = session.prefill(prompt).unwrap();
        let mut ids = Vec::new();
        while ids.len() < tokens {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let id = logits.iter().position(|logit| *logit == max).unwrap() as u32;
            ids.push(id);
            logits = session.decode(id).unwrap();
        }
        let mut text = self.tokenizer.detokenizer(true);
        let whole: String = ids.iter().map(|id| text.push(*id).unwrap()).collect();
        whole + &text.finish()
    }

    /// Waits until the engine has nothing to do.
    fn wait_until_idle(&self) {
        let begin = Instant::now();
        loop {
            let health: Value = serde_json::from_str(&self.get("/health").body).unwrap();
            if health["running"] == 0 && health["waiting"] == 0 {
                return;
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "still busy: {health}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn metric(&self, name: &str) -> f64 {
        let body = self.get("/metrics").body;
        let line = body.lines().find(|line| line.split(' ').next() == Some(name));
        line.unwrap_or_else(|| panic!("no {name}: {body}"))
            .split(' ')
            .nth(1)
            .unwrap()
            .parse()
            .unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.shutdown.take());
        let ended = self.thread.take().unwrap().join();
        assert!(std::thread::panicking() || ended.is_ok());
    }
}

/// What a server said.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        // A connection that is reset has said before what it had to say.
        let _reset = stream.read_to_end(&mut bytes);
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).unwrap_or("0").parse().unwrap();
        Self { status, head: head.to_lowercase(), body: body.to_owned() }
    }

    /// The chunks of a stream, which must have ended with `[DONE]`.
    #[track_caller]
    fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        assert!(self.head.contains("content-type: text/event-stream"), "{}", self.head);
        let data: Vec<&str> =
            self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let (done, chunks) = data.split_last().unwrap();
        assert_eq!(*done, "[DONE]");
        chunks.iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect()
    }

    /// Is an error in OpenAI's form that names a parameter.
    #[track_caller]
    fn check_refused(&self, status: u16, param: Option<&str>) {
        assert_eq!(self.status, status, "{}", self.body);
        let body: Value = serde_json::from_str(&self.body).unwrap();
        let error = &body["error"];
        assert_eq!(error["param"], json!(param), "{error}");
        assert!(error["message"].as_str().unwrap().len() > 5, "{error}");
        assert!(error["type"].as_str().unwrap().ends_with("error"), "{error}");
    }
}

fn chat(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12})
}

/// A value with other values for some keys.
fn with(mut value: Value, other: Value) -> Value {
    value.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
    value
}
