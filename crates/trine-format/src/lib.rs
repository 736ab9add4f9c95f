#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod atomic;
pub mod blocks;
mod config;
mod dtype;
mod error;
pub mod gguf;
mod hf;
mod mapped;
mod model;
pub mod names;
pub mod peft;
mod pipeline;
mod sentencepiece;
mod tensor;
mod tokenizer;

pub use atomic::{AtomicDir, AtomicFile, flush_name, replaceable};
pub use config::{HiddenAct, ModelConfig, Projection, Quantization};
pub use dtype::Dtype;
pub use error::{BoxError, FormatError};
pub use hf::packed as hf_packed;
pub use hf::write::{write_hf, write_hf_files, write_hf_packed};
pub use mapped::{Mapped, map_file};
pub use model::{Format, ModelFile};
pub use sentencepiece::{Piece, PieceError, PieceKind, SentencePieceBpe};
pub use tensor::{DenseTensor, TensorSource, TensorSummary, Weight};
pub use tokenizer::TokenizerFiles;
