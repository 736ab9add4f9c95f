//! A model behind OpenAI's interface, to be evaluated as one that is here.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `model` | [`Remote`]: the model, as [`trine_eval::LanguageModel`] |
//! | `answer` | what completions answer: log-probabilities of a prompt, a text |
//! | `client` | requests, and patience with servers that are busy |
//! | `error` | [`RemoteError`] |
//!
//! Likelihoods come from `/completions` with the ids of context and continuation as the prompt, which
//! `echo` has repeated with its log-probabilities, as local-completions of lm-evaluation-harness does.
//! Of a server that says none of a prompt, only what it writes can be judged. One whose answers depend
//! on what else it is asked at the time gives scores that do, too; ours does not.
//!
//! It knows nothing of models, tasks and the terminal.

#![forbid(unsafe_code)]

mod answer;
mod client;
mod error;
mod model;

pub use error::RemoteError;
pub use model::{Remote, RemoteConfig};
