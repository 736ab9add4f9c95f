//! The only crate that knows HTTP: a model behind OpenAI's interface, with a chat page.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `config` | [`ServerConfig`]: names, keys, limits |
//! | `app` | [`App`]: engine, adapters, tokenizer, template and configuration, shared by all handlers |
//! | `serve` | [`serve()`]: connections, their limits, and the end that waits for what runs |
//! | `layers` | around every request: an id, a log line, the key |
//! | `body` | a JSON body, read within limits |
//! | `error` | what is answered instead, in OpenAI's form, naming the parameter |
//! | `params` | sampling parameters of a request, checked |
//! | `prompt` | text and conversations to ids, off the threads that answer |
//! | `generation`, `stop` | events of the engine to pieces of text, up to a stop string |
//! | `response_format`, `grammar` | answers of a given form |
//! | `tools` | functions that a model may call: described to it, and read from its answers |
//! | `events` | server-sent events |
//! | `api` | one file an endpoint |
//! | `metrics` | counters and histograms in Prometheus' form |
//! | `page` | the chat page: three files, no network |
//!
//! The model itself is run by [`trine_runtime::Engine`], which knows no text: this crate turns text to
//! ids before and ids to text after, on its own threads.

#![forbid(unsafe_code)]

mod api;
mod app;
mod body;
mod config;
mod error;
mod events;
mod generation;
mod grammar;
mod layers;
mod metrics;
mod page;
mod params;
mod prompt;
mod response_format;
mod serve;
mod stop;
mod tools;

pub use app::{App, ServedAdapter};
pub use config::ServerConfig;
pub use serve::serve;
