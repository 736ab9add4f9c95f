//! What all handlers share.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::Semaphore;
use trine_runtime::{Adapter, Engine};
use trine_tokenizer::{ChatTemplate, Tokenizer};

use crate::ServerConfig;
use crate::grammar::Grammars;
use crate::metrics::Metrics;

/// An adapter that is served beside the model, under a name of its own.
#[derive(Clone, Debug)]
pub struct ServedAdapter {
    /// What requests name.
    pub name: String,
    /// What it was loaded from, as clients are told.
    pub root: String,
    /// What the model is run with.
    pub adapter: Arc<Adapter>,
    /// The template that it was trained with; without one that of the model.
    pub template: Option<Arc<ChatTemplate>>,
}

/// A model that is being served.
pub struct App {
    pub(crate) engine: Engine,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<Arc<ChatTemplate>>,
    /// Ids that end an answer.
    pub(crate) stop: Vec<u32>,
    pub(crate) config: ServerConfig,
    pub(crate) adapters: Vec<ServedAdapter>,
    pub(crate) grammars: Grammars,
    pub(crate) metrics: Metrics,
    /// When it began, in seconds since 1970.
    pub(crate) created: u64,
    /// Whether it is ending.
    pub(crate) draining: AtomicBool,
    /// One permit for each text that may be tokenized at a time.
    pub(crate) tokenizing: Semaphore,
    /// Makes names that nobody else has given.
    names: RandomState,
    count: AtomicU64,
}

impl App {
    /// A model with its tokenizer, the template of its conversations if it has one, and the ids that
    /// end an answer.
    pub fn new(
        engine: Engine,
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        stop: Vec<u32>,
        config: ServerConfig,
    ) -> Self {
        // Found out now, no request has to wait for it.
        let _format = template.as_ref().and_then(|template| template.call_format(&tokenizer));
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            engine,
            tokenizer,
            template: template.map(Arc::new),
            stop,
            config,
            adapters: Vec::new(),
            grammars: Grammars::default(),
            metrics: Metrics::default(),
            created: seconds(),
            draining: AtomicBool::new(false),
            tokenizing: Semaphore::new(threads),
            names: RandomState::new(),
            count: AtomicU64::new(0),
        }
    }

    /// The same, with adapters beside the model. Of those with the same name the first is served, and
    /// none with the model's.
    #[must_use]
    pub fn with_adapters(self, adapters: Vec<ServedAdapter>) -> Self {
        for template in adapters.iter().filter_map(|served| served.template.as_ref()) {
            let _format = template.call_format(&self.tokenizer);
        }
        Self { adapters, ..self }
    }

    /// Most positions of a text.
    pub(crate) fn context(&self) -> usize {
        self.engine.model().config().max_position_embeddings
    }

    /// A number that differs every time, also between runs: for names and for seeds.
    pub(crate) fn unique(&self) -> u64 {
        self.names.hash_one(self.count.fetch_add(1, Ordering::Relaxed))
    }

    /// A number for a thing, the same until the end of the process.
    pub(crate) fn number(&self, thing: &impl Hash) -> u64 {
        self.names.hash_one(thing)
    }
}

/// Now, in seconds since 1970.
pub(crate) fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
