//! Hugging Face directories: `config.json`, `model.safetensors` and the tokenizer's files.
//!
//! What transformers writes for `BitNetForCausalLM` (and for LLaMA models with `quant_method:
//! bitnet`) is read, and what is written here, transformers reads. Masters ("online") and packed
//! trits ("offline") are both supported; [`packed`] has the layout of the latter.

pub(crate) mod config;
pub(crate) mod header;
pub mod packed;
pub(crate) mod read;
pub(crate) mod write;
