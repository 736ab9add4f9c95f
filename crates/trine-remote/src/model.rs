//! The model, as an evaluation asks it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde_json::{Value, json};
use trine_eval::{Continuation, EvalError, Item, LanguageModel, Likelihood, Work, Writing};

use crate::client::Client;
use crate::{RemoteError, answer};

/// Positions of a model whose server does not say how many it has: the harness' assumption.
const POSITIONS: usize = 2048;

/// Texts at which OpenAI's interface ends an answer, at most. More are looked for here.
const STOPS: usize = 4;

/// Where a model is, and how to ask it.
#[derive(Clone, Debug)]
pub struct RemoteConfig {
    /// Address up to and with `/v1`.
    pub url: String,
    /// Which of its models; the only one where `None`.
    pub model: Option<String>,
    /// Key that is sent with every request.
    pub key: Option<String>,
    /// Positions of a text; what the server says where `None`.
    pub positions: Option<usize>,
    /// Requests that are on the way at a time.
    pub concurrency: usize,
}

/// A model behind an address.
pub struct Remote {
    client: Client,
    model: String,
    positions: usize,
    concurrency: usize,
    work: Work,
}

impl Remote {
    /// Asks a server which models it has, and how long texts may be.
    ///
    /// # Errors
    /// An address that is none, nobody there, a model that has to be named.
    pub fn connect(config: &RemoteConfig) -> Result<Self, RemoteError> {
        let client = Client::new(&config.url, config.key.clone())?;
        let (model, positions) = match (&config.model, config.positions) {
            (Some(model), Some(positions)) => (model.clone(), positions),
            (model, positions) => {
                let found = client.get("models")?;
                let all = found["data"].as_array().map(Vec::as_slice).unwrap_or_default();
                let entry = choose(all, model.as_deref());
                let names = || all.iter().filter_map(|entry| entry["id"].as_str());
                let model = model.as_deref().or(entry.and_then(|entry| entry["id"].as_str()));
                let Some(model) = model else {
                    let (url, names) = (client.url("models"), names().map(str::to_owned).collect());
                    return Err(RemoteError::ModelName { url, names });
                };
                let said = entry.and_then(|entry| entry["max_model_len"].as_u64());
                let said = said.map(|positions| positions as usize);
                (model.to_owned(), positions.or(said).unwrap_or(POSITIONS))
            }
        };
        let concurrency = config.concurrency.max(1);
        Ok(Self { client, model, positions, concurrency, work: Work::default() })
    }

    /// The name of the model.
    pub fn name(&self) -> &str {
        &self.model
    }

    /// Positions that its server says it has, or was said to have.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The answers to requests in their order, several at a time; the first error ends all.
    fn ask<T: Send>(
        &self,
        requests: &[Value],
        read: impl Fn(usize, Value) -> Result<T, RemoteError> + Sync,
    ) -> Result<Vec<T>, EvalError> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(request) = requests.get(at) else { return Ok(done) };
                let answer = self.client.post("completions", request);
                match answer.and_then(|answer| read(at, answer)) {
                    Ok(answer) => done.push((at, answer)),
                    Err(error) => {
                        next.store(requests.len(), Ordering::Relaxed);
                        return Err(error);
                    }
                }
            }
        };
        let parts: Vec<Result<Vec<(usize, T)>, RemoteError>> = thread::scope(|scope| {
            let threads = self.concurrency.min(requests.len());
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let ended = |cause: &str| RemoteError::Answer {
                url: self.client.url("completions"),
                cause: cause.to_owned(),
            };
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|_| Err(ended("reading its answer failed")))
            };
            threads.into_iter().map(join).collect()
        });
        let mut all = Vec::new();
        for part in parts {
            all.extend(part.map_err(|error| EvalError::Elsewhere { source: error.into() })?);
        }
        all.sort_by_key(|(at, _)| *at);
        Ok(all.into_iter().map(|(_, answer)| answer).collect())
    }
}

/// The entry of a model in a list of them: the named one, or the only one.
fn choose<'a>(all: &'a [Value], name: Option<&str>) -> Option<&'a Value> {
    match (name, all) {
        (Some(name), all) => all.iter().find(|entry| entry["id"] == name),
        (None, [only]) => Some(only),
        (None, _) => None,
    }
}

impl LanguageModel for Remote {
    /// Two fewer than the server takes: a text is sent whole, and one token is generated after it,
    /// because few servers generate none.
    fn limit(&self) -> usize {
        self.positions.saturating_sub(2)
    }

    fn score(&mut self, items: &[Item]) -> Result<Vec<Vec<Likelihood>>, EvalError> {
        let options: Vec<&Continuation> = items.iter().flat_map(|item| &item.options).collect();
        let request = |option: &&Continuation| {
            let prompt = [&option.context[..], &option.ids[..]].concat();
            json!({
                "model": self.model, "prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": true, "temperature": 0,
            })
        };
        let requests: Vec<Value> = options.iter().map(request).collect();
        let found = self.ask(&requests, |at, answer| {
            let (whole, scored) = (options[at].positions() + 1, options[at].ids.len());
            let url = || self.client.url("completions");
            answer::likelihood(answer, whole, scored)
                .map_err(|found| RemoteError::NoLogprobs { url: url(), found })
        })?;
        let positions: usize = options.iter().map(|option| option.positions()).sum();
        self.work.computed += positions;
        self.work.alone += positions;
        let mut found = found.into_iter();
        Ok(items.iter().map(|item| found.by_ref().take(item.options.len()).collect()).collect())
    }

    fn write(
        &mut self,
        prompts: &[Vec<u32>],
        writing: &Writing<'_>,
    ) -> Result<Vec<String>, EvalError> {
        let stops = writing.until.iter().filter(|stop| !stop.is_empty()).take(STOPS);
        let stops: Vec<&String> = stops.collect();
        let request = |prompt: &Vec<u32>| {
            let mut request = json!({
                "model": self.model, "prompt": prompt, "max_tokens": writing.max_tokens,
                "temperature": 0,
            });
            if !stops.is_empty() {
                request["stop"] = json!(stops);
            }
            request
        };
        let requests: Vec<Value> = prompts.iter().map(request).collect();
        let texts = self.ask(&requests, |_, answer| {
            let url = self.client.url("completions");
            let text = answer::text(answer).map_err(|cause| RemoteError::Answer { url, cause })?;
            Ok(writing.cut(&text).to_owned())
        })?;
        let positions: usize = prompts.iter().map(Vec::len).sum();
        self.work.computed += positions;
        self.work.alone += positions;
        Ok(texts)
    }

    fn work(&self) -> Work {
        self.work
    }
}
