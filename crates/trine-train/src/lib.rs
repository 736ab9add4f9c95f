//! Quantization-aware training of BitNet b1.58 models in Candle.
//!
//! The trainer keeps full-precision master weights; every forward pass of a projection ternarizes
//! them with `trine-ternary` and multiplies trits by int8 activations with `trine-kernels`, the
//! same code the runtime runs. Gradients pass the rounding unchanged (straight-through estimator).
//! So the loss that is logged is the loss of the model that is exported, but for the rounding of an
//! embedding that is stored in 16 bits.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`config`] | one TOML file is one run; unknown keys are refused |
//! | [`ops`] | BitLinear, norms, attention, loss: forward and backward |
//! | [`params`], [`model`] | named variables (Hugging Face names) and the network over them |
//! | [`optimizer`], [`schedule`] | AdamW with clipping; learning rate and weight decay over time |
//! | [`checkpoint`] | a Hugging Face directory plus optimizer state, written atomically |
//! | [`trainer`] | the loop, its events, resume |
//! | [`diagnostics`], [`samples`] | shares and flips of trits, scales, activations; texts on the way |
//! | [`tensorboard`] | the metrics as event files |
//!
//! This crate knows nothing of GGUF, of HTTP, or of the terminal: progress goes to an
//! [`trainer::Observer`].

#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod config;
pub mod diagnostics;
mod error;
pub mod model;
pub mod ops;
pub mod optimizer;
pub mod params;
pub mod samples;
pub mod schedule;
pub mod tensorboard;
pub mod trainer;
mod watch;

pub use config::RunConfig;
pub use error::TrainError;
pub use model::Bitnet;
pub use params::Params;
pub use trainer::Trainer;

// Candle's f32 matrix products use AVX-512 only when somebody enables `gemm`'s `x86-v4`;
// this crate does, in its Cargo.toml, and needs nothing else from it.
use gemm as _;
