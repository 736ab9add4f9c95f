//! Text to token shards to deterministic batches; the built-in synthetic corpus.
//!
//! ```text
//!   files ─► Corpus ─► Dataset::from_corpus ─► tokenizer.json, train.bin, val.bin
//!                                                           │ Dataset::open, Mixture::open
//!        training ◄── Batches::batch(step) ◄── train ◄──────┤
//!      validation ◄── eval_windows ◄────────── val ◄────────┘
//! ```
//!
//! - [`Corpus`]: documents of text, JSON lines and parquet, one at a time; [`parquet_records`]: whole rows.
//! - [`shard`]: ids on disk, memory-mapped, checked as if somebody hostile had written them.
//! - [`Dataset`]: the directory that training reads; a tokenizer travels with its ids.
//! - [`Batches`]: a pure function of seed and step, so that resuming needs no state; of one dataset
//!   or a weighted [`Mixture`] of several.
//! - [`Boundaries`]: where documents begin, so that attention can stay within them.
//! - [`chats`]: conversations in the forms in which they are shared, laid into [`rows`] of which only
//!   the answers are learned.
//! - [`synth`]: stories and arithmetic from a seed, and a score of how well a text keeps their
//!   rules, so that a first training run needs no download and its result no opinion.
//!
//! It knows nothing of models and of tensors.

#![forbid(unsafe_code)]

mod batches;
mod boundaries;
pub mod chats;
mod corpus;
mod dataset;
mod error;
mod mixture;
mod parquet;
pub mod rows;
pub mod shard;
pub mod synth;
mod text;

pub use batches::{Batch, Batches, eval_windows};
pub use boundaries::Boundaries;
pub use corpus::{Corpus, read_text};
pub use dataset::{Dataset, Progress, evenly};
pub use error::DataError;
pub use mixture::{Mixture, Source};
pub use parquet::parquet_records;
pub use rows::IGNORED;
pub use shard::{Shard, ShardWriter};
