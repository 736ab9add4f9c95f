//! Training steps of BitNet b1.58 models on NVIDIA GPUs.
//!
//! The whole step happens on the device: masters, moments and gradients stay there, a batch's ids go up and
//! its loss comes down. Kernels are our own (`kernels/`, CUDA C++), products of matrices are cuBLASLt's.
//! Both are loaded when a device is asked for: nothing of CUDA is needed to build this crate or to start a
//! program that has it.
//!
//! What is computed is what `trine_train`'s step on a CPU computes: trits are `clamp(round(w / mean|w|))`,
//! activations are codes of int8, and both are exact in bfloat16, as are their products' sums in f32. So the
//! sums are the integers of the definition; with [`Kind::Bf16`] they are rounded when they are stored, and
//! with [`Kind::F32`] they are not.
//!
//! Of a projection `y = (w / s) (codes . trits)`, with `w` the scale of the weights and `s` that of a row,
//! the gradient of `y` is kept times `w / s`. Then the gradient of the codes' values is `s` times its product
//! with the trits, and `w` times that of the masters is its product with the codes: exact trits and exact
//! codes are multiplied, whoever needs a factor has the row or the tensor at hand, and projections with one
//! input are one product though each has its own scale.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`backend`] | what a device does: memory, kernels, products |
//! | [`driver`] | a card |
//! | `nccl` | the cards of other processes |
//! | [`emulator`] | the kernels on a CPU |
//! | `loopback` | the emulators of other processes |
//! | [`counter`] | how much memory an engine will need |
//! | [`profiled`] | how long each kernel takes |
//! | [`compile`] | kernels to machine code |
//! | [`engine`] | a model's parameters on a device, steps, updates |

pub mod backend;
mod cache;
pub mod compile;
pub mod counter;
pub mod driver;
pub mod emulator;
pub mod engine;
mod error;
mod layout;
mod loopback;
mod nccl;
pub mod profiled;
mod sources;

pub use backend::{Backend, Kind};
pub use counter::Counter;
pub use driver::Driver;
pub use emulator::Emulator;
pub use engine::{AdamW, Adapters, Engine, Mask, Muon, Options};
pub use error::CudaError;
pub use profiled::Profiled;
