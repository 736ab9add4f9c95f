//! GGUF v3: the native model file.
//!
//! [`Gguf`] reads the container and [`Writer`] writes it; neither knows what a model is.
//! [`write_model`] puts a model into it, [`ModelFile`](crate::ModelFile) takes one out. The ternary
//! layouts are in [`i2_s`], [`tq1_0`], [`tq2_0`] and [`trn2`].

pub(crate) mod codec;
mod cursor;
pub mod i2_s;
mod i2_s_order;
pub(crate) mod model;
mod reader;
pub mod tq1_0;
pub mod tq2_0;
pub mod trn2;
mod types;
mod value;
mod vocab;
mod write_model;
mod writer;

pub use codec::{CodecError, TernaryType};
pub use model::from_halves;
pub use reader::{Gguf, TensorInfo};
pub use types::GgmlType;
pub use value::{Array, Value};
pub(crate) use vocab::decode as decode_tokenizer;
pub use vocab::is_placeholder_template;
pub use write_model::{WriteOptions, write_model};
pub use writer::{TensorSpec, Writer};

/// The first bytes of a GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is read and written.
pub const VERSION: u32 = 3;
/// Alignment of tensor data in files written here: a cache line, and a 512-bit register.
pub const ALIGNMENT: usize = 64;
/// Alignment of a file that does not name one.
const DEFAULT_ALIGNMENT: usize = 32;
/// The key that names the alignment.
const ALIGNMENT_KEY: &str = "general.alignment";
/// Dimensions that a tensor may have.
const MAX_DIMS: usize = 4;
