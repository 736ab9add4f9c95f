//! Perplexity and task scores from any logits function.
#![forbid(unsafe_code)]

mod encode;
mod error;
mod model;
mod perplexity;
mod runtime;

pub use encode::{encode, encode_pair, prefix_id};
pub use error::EvalError;
pub use model::{Continuation, Done, Item, LanguageModel, Likelihood, OneByOne, Work};
pub use perplexity::{Perplexity, Size, Windows, perplexity, windows};
pub use runtime::RuntimeModel;
