//! Claims that span crates: what the trainer computes, the file holds and the runtime says agree,
//! with each other and with transformers.

#![allow(clippy::unwrap_used)]

mod adapters;
mod bitllama2c;
mod blocks;
mod evaluation;
mod fixtures;
mod life;
mod parity;
mod tokenizers;
mod trace;
