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
//! | [`fused`] | a whole step over plain buffers: what the trainer runs |
//! | [`quantizers`] | other ways from masters to trits, as a research axis |
//! | [`params`], [`model`] | named variables (Hugging Face names) and the network over them |
//! | [`adapters`] | LoRA: what is trained beside weights that stay as they are |
//! | [`preference`] | direct preference optimization |
//! | [`card`] | steps on a device other than the CPU |
//! | [`base`] | the trained model that a run begins with, for fine-tuning |
//! | [`optimizer`], [`schedule`] | AdamW and Muon with clipping; learning rate and weight decay over time |
//! | [`batching`] | how many sequences each step takes |
//! | [`stability`] | numbers that are not finite, losses that leap |
//! | [`checkpoint`] | a Hugging Face directory plus optimizer state, written atomically, with checksums |
//! | [`trainer`], [`observer`] | the loop, resume; its events |
//! | [`parallel`] | several processes that train one run |
//! | [`diagnostics`], [`samples`] | shares and flips of trits, scales, activations; texts on the way |
//! | [`tensorboard`] | the metrics as event files |
//! | [`plan`] | what a run will need, before it begins |
//! | [`machine`] | what a run was made with |
//!
//! `examples/train.rs` trains with it as a library.
//!
//! This crate knows nothing of GGUF, of HTTP, or of the terminal: progress goes to an
//! [`trainer::Observer`].

#![forbid(unsafe_code)]

pub mod adapters;
pub mod base;
pub mod batching;
pub mod card;
pub mod checkpoint;
pub mod config;
pub mod diagnostics;
mod error;
pub mod fused;
pub mod machine;
pub mod model;
pub mod naive;
pub mod observer;
pub mod ops;
pub mod optimizer;
pub mod parallel;
pub mod params;
pub mod plan;
pub mod preference;
pub mod quantizers;
mod run_dir;
pub mod samples;
pub mod schedule;
pub mod stability;
mod teacher_cache;
mod teaching;
pub mod tensorboard;
pub mod trainer;
mod watch;

pub use base::Base;
pub use candle_core::Device;
pub use config::RunConfig;
pub use error::TrainError;
pub use model::Bitnet;
pub use params::Params;
pub use trainer::Trainer;
