//! Ids in, ids out: the CPU runtime for packed ternary models.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `adapter` | [`Adapter`]: what a low-rank adapter adds to the projections of a sequence |
//! | `weights` | [`Model`]: weights in memory, in the layout the kernels multiply |
//! | `linear`, `dense` | projections on ternary and on full-precision weights |
//! | `sequence` | [`Sequence`]: keys and values of the positions that were seen |
//! | `forward` | [`Model::step`]: one pass for any number of sequences, parts of prompts and single tokens alike |
//! | `sketch` | [`HeadSketch`]: which passes spare reading the whole head |
//! | `session` | [`Session`]: one sequence on a model, prefill and decode |
//! | `sampler` | [`Sampler`]: from logits to the next id |
//! | `generator` | [`Generator`]: from a text to the ids that continue it, an iterator |
//! | `speculative` | [`Drafter`]: guesses that are checked together, so that ids come sooner |
//! | `engine` | [`Engine`]: a thread that serves many requests at once, by continuous batching |
//! | `loss` | [`cross_entropy`], [`log_sum_exp`]: how well logits predict a text |
//!
//! Projections are integer products, bit-identical on every ISA and thread count; the float parts
//! (norms, rotary embedding, attention, head) run in one documented order, in f32. So generation is
//! reproducible for a given build. Shapes: T tokens, D hidden, H query heads, K key/value heads,
//! d features of a head, F feed-forward, V vocabulary.
//!
//! This crate knows nothing of text, HTTP or Candle.
//!
//! ```no_run
//! use trine_runtime::{GeneratorConfig, Model, Sampler, SamplerConfig, Session};
//!
//! let file = trine_format::ModelFile::open("model.gguf".as_ref())?;
//! let model = Model::load(&file)?;
//! let mut session = Session::new(&model);
//! let mut sampler = Sampler::new(SamplerConfig { temperature: 0.7, ..Default::default() })?;
//! let config = GeneratorConfig { max_tokens: 32, ..Default::default() };
//! for id in session.generate(&[1, 2, 3], &mut sampler, config)? {
//!     println!("{}", id?);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `examples/generate.rs` is that program, with what it took. [`Session`] alone gives the logits.

#![forbid(unsafe_code)]

mod adapter;
mod dense;
mod engine;
mod error;
mod forward;
mod generator;
mod linear;
mod loss;
mod outputs;
mod sampler;
mod sequence;
mod session;
mod sketch;
mod speculative;
mod weights;

pub use adapter::Adapter;
pub use dense::block_kind;
pub use engine::{
    Constraint, End, Engine, EngineConfig, Event, Logprob, Pooling, Request, Sampling, Sink, Stats,
    SubmitError, Ticket, Token, Usage,
};
pub use error::RuntimeError;
pub use forward::{Logits, Step};
pub use generator::{Choose, Finish, Generator, GeneratorConfig, GeneratorStats};
pub use loss::{cross_entropy, log_sum_exp};
pub use outputs::Outputs;
pub use sampler::{Sampler, SamplerConfig};
pub use sequence::Sequence;
pub use session::Session;
pub use sketch::HeadSketch;
pub use speculative::{Draft, Drafter};
pub use trine_kernels::{Largest, LowRankType};
pub use weights::{LoadOptions, Model};
