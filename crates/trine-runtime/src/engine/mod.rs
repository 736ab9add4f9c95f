//! Many requests at once: a thread that owns a model and does continuous batching.
//!
//! The life of a request:
//!
//! 1. [`Engine::submit`] checks it and puts it into a queue of bounded length.
//! 2. It is admitted once the memory for all of its keys and values is there; the prefix cache forgets
//!    its oldest entries to make room. So nothing that runs is ever thrown out. Clients take turns:
//!    whose requests run or wait in front already comes after who has fewer, and one client's are
//!    admitted in the order of arrival.
//! 3. It begins with what the prefix cache has of its prompt. One that begins like a prompt that is
//!    being gone through waits for that, so that a common beginning is computed once.
//! 4. Every pass of the model takes one id of each text that is being generated, and some ids of
//!    prompts: a long prompt goes through in parts and holds nobody up, and the parts of several
//!    prompts are alike, so that a short one is soon through.
//! 5. Each id is given to the request's sink as it is chosen.
//! 6. It ends by a stop id, its length, its deadline, or because its [`Ticket`] was dropped; what it
//!    has seen goes into the prefix cache.
//!
//! Requests with different adapters go through the model together; what is computed once for several
//! requests is so only for those with the same adapter.
//!
//! A token's bits do not depend on what goes through beside it (see [`Model::step`]), so every
//! request gets the ids that it would get alone.

mod choose;
mod constraint;
mod logprobs;
mod prefix;
mod request;
mod scheduler;
mod stats;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

pub use constraint::Constraint;
pub use logprobs::Logprob;
pub use request::{End, Event, Pooling, Request, Sampling, Token, Usage};
use scheduler::Scheduler;
use stats::Counters;
pub use stats::Stats;

use crate::{Model, RuntimeError, Sequence};

/// How much an engine takes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Bytes of keys and values, at most, of requests and of the prefix cache.
    pub kv_bytes: usize,
    /// Requests that run at once, at most.
    pub max_running: usize,
    /// Requests that wait, at most; of one client three quarters of them, so that others find a place.
    pub max_waiting: usize,
    /// Ids of prompts that go along while texts are generated: more are sooner through, fewer hold
    /// the others' next ids up less.
    pub prompt_share: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self { kv_bytes: 1 << 30, max_running: 32, max_waiting: 256, prompt_share: 64 }
    }
}

impl EngineConfig {
    /// Requests of one client that wait, at most.
    fn places_of_one(&self) -> usize {
        self.max_waiting - self.max_waiting / 4
    }
}

/// Why a request was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// It could only fail.
    #[error(transparent)]
    Invalid(#[from] RuntimeError),
    /// It alone needs more memory than there is for all.
    #[error("keys and values of {positions} positions take {needed} bytes, the limit is {limit}")]
    TooLarge {
        /// Positions of prompt and answer.
        positions: usize,
        /// Bytes of them.
        needed: usize,
        /// Bytes that there are.
        limit: usize,
    },
    /// As many wait as may wait.
    #[error("{waiting} requests wait already, the most that may")]
    Busy {
        /// How many.
        waiting: usize,
    },
    /// As many of one client wait as may wait.
    #[error("{waiting} requests of this client wait already, the most that may is {limit}")]
    ClientBusy {
        /// How many.
        waiting: usize,
        /// How many may.
        limit: usize,
    },
    /// The engine is ending.
    #[error("the engine is ending and takes no more requests")]
    Closed,
}

/// What an engine calls with each event of a request, on its own thread: it must not block.
pub type Sink = Box<dyn FnMut(Event) + Send>;

/// A request in the hands of an engine; dropping it cancels the request.
#[must_use = "dropping it cancels the request"]
#[derive(Debug)]
pub struct Ticket(Arc<AtomicBool>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A request that waits.
struct Waiting {
    request: Request,
    sink: Sink,
    cancelled: Arc<AtomicBool>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    /// Takes nothing more.
    closed: bool,
    /// Ends everything at once.
    aborted: bool,
}

/// What the engine's thread shares with those who talk to it.
struct Shared {
    model: Arc<Model>,
    config: EngineConfig,
    queue: Mutex<Queue>,
    changed: Condvar,
    counters: Counters,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread that continues texts. See the module's documentation.
pub struct Engine {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no thread.
    pub fn start(model: Arc<Model>, config: EngineConfig) -> std::io::Result<Self> {
        let queue = Mutex::default();
        let (changed, counters) = (Condvar::new(), Counters::default());
        let shared = Arc::new(Shared { model, config, queue, changed, counters });
        let scheduler = Scheduler::new(shared.clone());
        let thread = std::thread::Builder::new().name("trine-engine".to_owned());
        let thread = thread.spawn(move || scheduler.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.shared.model
    }

    /// What it takes on.
    pub fn config(&self) -> EngineConfig {
        self.shared.config
    }

    /// Takes a request, whose events `sink` is given, from the engine's thread.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn submit(
        &self,
        request: Request,
        sink: impl FnMut(Event) + Send + 'static,
    ) -> Result<Ticket, SubmitError> {
        let sinks: Vec<Sink> = vec![Box::new(sink)];
        let mut tickets = self.submit_all(vec![request], sinks)?;
        tickets.pop().ok_or(SubmitError::Closed)
    }

    /// Takes all of some requests or none; there is a sink for each.
    ///
    /// # Errors
    /// See [`SubmitError`]; [`SubmitError::Busy`] and [`SubmitError::ClientBusy`] when not all of them may
    /// wait.
    pub fn submit_all(
        &self,
        requests: Vec<Request>,
        sinks: Vec<Sink>,
    ) -> Result<Vec<Ticket>, SubmitError> {
        requests.iter().try_for_each(|request| self.check(request))?;
        let mut queue = self.shared.queue();
        if queue.closed || !self.is_alive() {
            return Err(SubmitError::Closed);
        }
        // Those that nobody wants any more take no place.
        queue.waiting.retain(|waiting| !waiting.cancelled.load(Ordering::Relaxed));
        let waiting = queue.waiting.len();
        if waiting + requests.len() > self.shared.config.max_waiting {
            return Err(SubmitError::Busy { waiting });
        }
        let limit = self.shared.config.places_of_one();
        for client in requests.iter().filter_map(|request| request.client) {
            let same = |request: &&Request| request.client == Some(client);
            let waiting = queue.waiting.iter().map(|waiting| &waiting.request).filter(same).count();
            if waiting + requests.iter().filter(same).count() > limit {
                return Err(SubmitError::ClientBusy { waiting, limit });
            }
        }
        let mut tickets = Vec::with_capacity(requests.len());
        for (request, sink) in requests.into_iter().zip(sinks) {
            let cancelled = Arc::new(AtomicBool::new(false));
            tickets.push(Ticket(cancelled.clone()));
            queue.waiting.push_back(Waiting { request, sink, cancelled });
        }
        stats::set(&self.shared.counters.waiting, queue.waiting.len());
        self.shared.changed.notify_all();
        Ok(tickets)
    }

    /// Refuses what could never run.
    ///
    /// # Errors
    /// [`SubmitError::Invalid`] and [`SubmitError::TooLarge`].
    pub fn check(&self, request: &Request) -> Result<(), SubmitError> {
        let Shared { model, config, .. } = &*self.shared;
        request.check(model)?;
        let positions = request.positions(model.config().max_position_embeddings);
        let needed = Sequence::new(model).growth(positions);
        if needed > config.kv_bytes {
            return Err(SubmitError::TooLarge { positions, needed, limit: config.kv_bytes });
        }
        Ok(())
    }

    /// What it does.
    pub fn stats(&self) -> Stats {
        self.shared.counters.read()
    }

    /// Whether its thread runs: it ends after [`Self::close`], or if it panics.
    pub fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Takes no more requests; those it has are served, then the thread ends.
    pub fn close(&self) {
        self.shared.queue().closed = true;
        self.shared.changed.notify_all();
    }

    /// Takes no more requests and ends those it has.
    pub fn abort(&self) {
        {
            let mut queue = self.shared.queue();
            (queue.closed, queue.aborted) = (true, true);
        }
        self.shared.changed.notify_all();
    }
}

impl Drop for Engine {
    /// Ends all requests, and waits for the thread.
    fn drop(&mut self) {
        self.abort();
        if let Some(thread) = self.thread.take() {
            // A panic has been reported where it happened.
            let _panicked = thread.join();
        }
    }
}
