//! Perplexity and task scores from any logits function.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `model` | [`LanguageModel`]: what is evaluated; [`OneByOne`]: any logits function as one |
//! | `runtime` | [`RuntimeModel`]: the packed runtime, which computes what texts have in common once |
//! | `tree` | texts that begin alike, as a tree |
//! | `writing` | [`Writing`]: where a text that a model writes ends |
//! | `encode` | texts to ids, with the boundaries of lm-evaluation-harness |
//! | `perplexity` | [`perplexity`](perplexity()): of a text, in sliding windows |
//! | `task` | [`Task`]: a TOML file that says how records become texts and answers scores |
//! | `data` | [`Data`]: records of local files |
//! | `evaluate` | [`Evaluation`]: a task, item by item |
//! | `summary` | [`Summary`]: the scores of a task with their errors |
//! | `metrics`, `answer`, `math` | from likelihoods and from generated text to scores |
//! | `instructions` | [`Instruction`]: what a program can check of a text |
//! | `execution` | [`Sandbox`]: runs programs that a model wrote |
//! | `store` | [`Store`]: results of items, kept as they come |
//! | `statistics` | standard errors, and two models on the same items |
//! | `reference` | published scores |
//!
//! Scores mean what they mean in lm-evaluation-harness, down to the token at which a continuation
//! begins; `scripts/interop/lm_eval_agreement.py` compares every likelihood. A log-likelihood is in
//! nats. Results depend on model, task and data only: not on batches, threads or what was computed
//! before.
//!
//! This crate knows nothing of HTTP, of training and of the terminal.

#![forbid(unsafe_code)]

mod answer;
mod data;
mod encode;
mod error;
mod evaluate;
mod execution;
mod fingerprint;
mod instructions;
mod math;
mod metrics;
mod model;
mod perplexity;
mod reference;
mod runtime;
mod statistics;
mod store;
mod summary;
mod task;
mod tree;
mod writing;

pub use data::{Data, shards};
pub use encode::{encode, encode_pair, prefix_id};
pub use error::EvalError;
pub use evaluate::{Evaluation, Settings, TooLong};
pub use execution::{Outcome, Sandbox};
pub use fingerprint::fingerprint;
pub use instructions::Instruction;
pub use math::equivalent;
pub use model::{Continuation, Done, Item, LanguageModel, Likelihood, OneByOne, Work};
pub use perplexity::{Perplexity, Size, Windows, perplexity, windows};
pub use reference::{Reference, ReferenceRow};
pub use runtime::RuntimeModel;
pub use statistics::{Difference, mean, paired};
pub use store::{Record, Store};
pub use summary::{Score, Summary, paired_scores};
pub use task::{
    Doc, Expected, Extract, Generation, Kind, Metric, Request, Task, names as task_names,
};
pub use writing::Writing;
