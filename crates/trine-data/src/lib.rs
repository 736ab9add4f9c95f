//! Text to token shards to deterministic batches; the built-in synthetic corpus.
//!
//! ```text
//! text, documents ─► Dataset::from_text, from_documents ─► tokenizer.json, train.bin, val.bin
//!                                                                       │ Dataset::open
//!           training ◄── Batches::batch(step) ◄── train ◄───────────────┤
//!         validation ◄── eval_windows ◄────────── val ◄─────────────────┘
//! ```
//!
//! - [`shard`]: ids on disk, memory-mapped, checked as if somebody hostile had written them.
//! - [`Dataset`]: the directory that training reads; a tokenizer travels with its ids.
//! - [`Batches`]: a pure function of seed and step, so that resuming needs no state.
//! - [`synth`]: stories and arithmetic from a seed, and a score of how well a text keeps their
//!   rules, so that a first training run needs no download and its result no opinion.
//!
//! It knows nothing of models and of tensors.

#![forbid(unsafe_code)]

mod batches;
mod dataset;
mod error;
pub mod shard;
pub mod synth;

pub use batches::{Batch, Batches, eval_windows};
pub use dataset::{Dataset, read_documents, read_text};
pub use error::DataError;
pub use shard::{Shard, ShardWriter};
