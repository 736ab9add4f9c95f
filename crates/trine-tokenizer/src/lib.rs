//! Text to ids and back.
//!
//! Every tokenizer here is a Hugging Face `tokenizer.json`: one that came with a model, one trained
//! by [`Tokenizer::train_bpe`], the 256 bytes of [`Tokenizer::bytes`], the alphabet of
//! [`Tokenizer::characters`]. So what is trained here loads in transformers, and there is one path
//! from text to ids, not one per kind. The `tokenizers` crate does the work; this crate adds what a
//! toolkit needs around it:
//!
//! - Nothing is dropped in silence. A character the vocabulary cannot express, an id beyond it, an
//!   added token whose id is not the one the file states: each is an error that names it.
//!   Truncation and padding that a file asks for are switched off.
//! - Text somebody wrote and text a template rendered are told apart: [`Tokenizer::encode_plain`]
//!   never produces a special token, [`Tokenizer::encode`] reads them as Hugging Face does, and
//!   [`ChatTemplate::encode`] does both at once, so that no message can forge the end of a turn.
//! - A [`Detokenizer`] gives text as ids arrive and never half a character.
//! - [`ChatTemplate`] renders the Jinja templates that models carry, as transformers does, and says
//!   which ids of a conversation a model is to write itself ([`ChatTemplate::turns`]). How a model
//!   calls functions is learned from its template as well ([`CallFormat`]).
//!
//! It knows nothing of models, batches or HTTP.

#![forbid(unsafe_code)]

mod calls;
mod chat;
mod detokenizer;
mod error;
mod guard;
mod jinja;
mod make;
mod message;
mod tokenizer;
mod turns;

pub use calls::CallFormat;
pub use chat::ChatTemplate;
pub use detokenizer::Detokenizer;
pub use error::TokenizerError;
pub use jinja::spaced_json;
pub use message::{Call, Message};
pub use tokenizer::Tokenizer;
pub use turns::Turns;

/// Opens a document (the name LLaMA-3 and BitNet b1.58 2B4T give it).
pub const BOS: &str = "<|begin_of_text|>";

/// Closes a document.
pub const EOS: &str = "<|end_of_text|>";

/// Closes a turn of a conversation.
pub const EOT: &str = "<|eot_id|>";
