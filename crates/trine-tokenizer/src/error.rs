//! What can go wrong between text and ids.

use std::path::PathBuf;

use thiserror::Error;

/// An error of this crate, with the file, character, id or token it is about.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A file could not be read.
    #[error("{}: cannot read the tokenizer: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// A text is not a tokenizer.json this crate can use.
    #[error("{origin}: not a usable tokenizer.json: {cause}")]
    Json {
        /// The file's path, or "tokenizer.json" for a text that was not a file.
        origin: String,
        /// What is wrong with it.
        cause: String,
    },

    /// An added token has another id than the file states: every id after it would be shifted.
    #[error("added token {token:?} should have id {expected}, the vocabulary gives it {found:?}")]
    AddedToken {
        /// The token.
        token: String,
        /// The id the file states.
        expected: u32,
        /// The id that encoding would produce.
        found: Option<u32>,
    },

    /// A text holds a character that no token of the vocabulary covers.
    #[error("the vocabulary cannot express {character:?} (U+{:04X}) in {context:?}", *character as u32)]
    Inexpressible {
        /// The first such character, as the vocabulary would have to know it.
        character: char,
        /// The text around it.
        context: String,
    },

    /// An id is not in the vocabulary.
    #[error("id {id} is not in the vocabulary (size {vocab_size})")]
    UnknownId {
        /// The id.
        id: u32,
        /// Highest id of the vocabulary, plus one.
        vocab_size: usize,
    },

    /// The tokenizer's own model refused a text or ids.
    #[error("the tokenizer cannot {operation}: {cause}")]
    Model {
        /// "encode", "decode" or "train".
        operation: &'static str,
        /// What it said.
        cause: String,
    },

    /// A vocabulary was asked for that cannot hold all bytes and special tokens.
    #[error("a byte-level vocabulary needs at least {minimum} tokens, {found} were asked for")]
    VocabSize {
        /// 256 bytes and the special tokens.
        minimum: usize,
        /// What was asked for.
        found: usize,
    },

    /// A tokenizer of characters was asked for, of a text that has none.
    #[error("an empty text has no alphabet")]
    EmptyAlphabet,

    /// Nothing to continue, and no token that would begin a text.
    #[error("an empty prompt, and the tokenizer has no token that begins a text")]
    NoPrompt,

    /// A chat template does not compile, or refuses the conversation.
    #[error("chat template: {cause}")]
    Template {
        /// The template engine's message, with its line.
        cause: String,
    },

    /// A conversation that a model cannot learn answers from.
    #[error("{cause}")]
    Turns {
        /// The message, and what is wrong with it or with how the template renders it.
        cause: String,
    },
}
