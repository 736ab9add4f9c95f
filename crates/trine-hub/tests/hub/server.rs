//! A hub and its CDN on two local ports, with every fault that a test wants.
//!
//! As the real one does, it answers for small files by a relative redirect and git's SHA-1, for
//! large ones by a redirect to the CDN with a signed link, naming SHA-256 and size in the headers.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};

/// Files of this many bytes and more lie on the CDN.
pub(crate) const LARGE: usize = 1000;

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) at_cdn: bool,
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
}

/// What is on the hub, and what goes wrong there.
#[derive(Default)]
pub(crate) struct State {
    /// Files by commit.
    pub(crate) commits: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Commits by branch or tag.
    pub(crate) refs: BTreeMap<String, String>,
    /// Token without which nothing is answered.
    pub(crate) token: Option<String>,
    /// Status and `X-Error-Code` of the next answers of the hub.
    pub(crate) refusals: Vec<(u16, &'static str)>,
    /// The next files end after so many bytes.
    pub(crate) drops: Vec<usize>,
    /// The next file stops after so many bytes, with its connection open.
    pub(crate) stall: Option<usize>,
    /// Contents are served with a flipped bit.
    pub(crate) corrupt: bool,
    /// Contents have a byte more than their description.
    pub(crate) too_long: bool,
    /// Ranges are answered by the whole file.
    pub(crate) no_ranges: bool,
    /// Hash to name instead of the right one.
    pub(crate) etag: Option<String>,
    /// Everything that was asked.
    pub(crate) requests: Vec<Request>,
}

/// The two servers; they end with the process.
#[derive(Clone)]
pub(crate) struct FakeHub {
    pub(crate) url: String,
    cdn: String,
    state: Arc<Mutex<State>>,
}

/// The repository that the hub has.
pub(crate) const REPO: &str = "our/tiny";

impl FakeHub {
    /// A hub with a repository at one commit, which is its `main`.
    pub(crate) fn new(commit: &str, files: &[(&str, &[u8])]) -> Self {
        let (hub, cdn) = (listener(), listener());
        let url = |l: &TcpListener| format!("http://{}", l.local_addr().unwrap());
        let this = Self { url: url(&hub), cdn: url(&cdn), state: Arc::default() };
        this.commit(commit, files);
        this.state().refs.insert("main".into(), commit.into());
        for (listener, at_cdn) in [(hub, false), (cdn, true)] {
            let this = this.clone();
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let this = this.clone();
                    // A client that leaves early is no failure of the server.
                    thread::spawn(move || this.serve(stream, at_cdn).ok());
                }
            });
        }
        this
    }

    /// Adds a commit.
    pub(crate) fn commit(&self, commit: &str, files: &[(&str, &[u8])]) {
        let files = files.iter().map(|(name, bytes)| ((*name).into(), bytes.to_vec())).collect();
        self.state().commits.insert(commit.into(), files);
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Requests since the last call.
    pub(crate) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state().requests)
    }

    fn serve(&self, mut stream: TcpStream, at_cdn: bool) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let mut words = line.split_whitespace().map(str::to_owned);
        let (Some(method), Some(path)) = (words.next(), words.next()) else { return Ok(()) };
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            match line.trim_end().split_once(':') {
                Some((name, value)) => {
                    headers.insert(name.to_ascii_lowercase(), value.trim().to_owned())
                }
                None => break,
            };
        }
        let request = Request { at_cdn, method, path, headers };
        self.state().requests.push(request.clone());
        let answer = if at_cdn { self.answer_cdn(&request) } else { self.answer_hub(&request) };
        let Answer { status, headers, mut body, of_file } = answer;
        let mut head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\n");
        for (name, value) in &headers {
            write!(head, "{name}: {value}\r\n").unwrap();
        }
        write!(head, "Content-Length: {}\r\n\r\n", body.len()).unwrap();
        stream.write_all(head.as_bytes())?;
        if request.method == "HEAD" {
            return Ok(());
        }
        let mut stalls = false;
        if of_file {
            let mut state = self.state();
            if !state.drops.is_empty() {
                body.truncate(state.drops.remove(0));
            } else if let Some(length) = state.stall.take() {
                body.truncate(length);
                stalls = true;
            }
        }
        stream.write_all(&body)?;
        if stalls {
            // Keeps the connection open until the client has had enough.
            reader.read_line(&mut String::new())?;
        }
        Ok(())
    }

    fn answer_hub(&self, request: &Request) -> Answer {
        let mut state = self.state();
        if !state.refusals.is_empty() {
            let (status, code) = state.refusals.remove(0);
            return Answer::of(status).with("X-Error-Code", code);
        }
        if let Some(token) = &state.token
            && request.headers.get("authorization") != Some(&format!("Bearer {token}"))
        {
            return Answer::of(401);
        }
        // A repository of each kind, with the same files.
        let kind = if request.path.contains("datasets/") { "datasets" } else { "models" };
        let cached = format!("/api/resolve-cache/{kind}/");
        if let Some(path) = request.path.strip_prefix(&cached) {
            let (commit, file) = path.strip_prefix("our/tiny/").unwrap().split_once('/').unwrap();
            let bytes = &state.commits[commit][file];
            let git = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
            let own = hex(digest(&SHA1_FOR_LEGACY_USE_ONLY, &git).as_ref());
            let etag = state.etag.as_ref().unwrap_or(&own);
            return state.file(bytes, request).with("ETag", &format!("\"{etag}\""));
        }
        let main = format!("/api/{kind}/{REPO}/revision/");
        if let Some(revision) = request.path.strip_prefix(&main) {
            let revision = revision.replace("%2F", "/");
            let commit = state.refs.get(&revision).unwrap_or(&revision);
            let Some(files) = state.commits.get(commit) else {
                return Answer::of(404).with("X-Error-Code", "RevisionNotFound");
            };
            let names: Vec<_> = files.keys().map(|n| format!(r#"{{"rfilename":"{n}"}}"#)).collect();
            let json = format!(r#"{{"sha":"{commit}","siblings":[{}]}}"#, names.join(","));
            return Answer { body: json.into_bytes(), ..Answer::of(200) };
        }
        let before = if kind == "datasets" { "/datasets" } else { "" };
        let Some(path) = request.path.strip_prefix(&format!("{before}/{REPO}/resolve/")) else {
            return Answer::of(404).with("X-Error-Code", "RepoNotFound");
        };
        let (commit, file) = path.split_once('/').unwrap();
        let Some(bytes) = state.commits.get(commit).and_then(|files| files.get(file)) else {
            return Answer::of(404).with("X-Error-Code", "EntryNotFound");
        };
        if bytes.len() < LARGE {
            return Answer::of(307).with("Location", &format!("{cached}{REPO}/{path}"));
        }
        let own = hex(digest(&SHA256, bytes).as_ref());
        let etag = state.etag.as_ref().unwrap_or(&own);
        Answer::of(302)
            .with("Location", &format!("{}/{path}?signature=secret", self.cdn))
            .with("X-Linked-Etag", &format!("\"{etag}\""))
            .with("X-Linked-Size", &bytes.len().to_string())
    }

    fn answer_cdn(&self, request: &Request) -> Answer {
        let state = self.state();
        let path = request.path.trim_start_matches('/').split('?').next().unwrap();
        let (commit, file) = path.split_once('/').unwrap();
        state.file(&state.commits[commit][file], request)
    }
}

impl State {
    /// A file or the range of it that is asked for.
    fn file(&self, bytes: &[u8], request: &Request) -> Answer {
        let mut bytes = bytes.to_vec();
        if self.corrupt {
            bytes[0] ^= 1;
        }
        if self.too_long && request.method == "GET" {
            bytes.push(0);
        }
        let total = bytes.len();
        let range = request.headers.get("range").filter(|_| !self.no_ranges);
        let Some(range) = range else {
            return Answer { body: bytes, of_file: true, ..Answer::of(200) };
        };
        let start = range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap();
        let start: usize = start.parse().unwrap();
        if start >= total {
            return Answer::of(416);
        }
        let body = bytes.split_off(start);
        let range = format!("bytes {start}-{}/{total}", total - 1);
        Answer { body, of_file: true, ..Answer::of(206) }.with("Content-Range", &range)
    }
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Whether the body is that of a file, which drops and stalls are about.
    of_file: bool,
}

impl Answer {
    fn of(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), of_file: false }
    }

    fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }
}

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
