//! Formats of other programs that are read to be converted, and never written.

pub mod bitllama2c;
pub mod llama2c;
