//! What can go wrong between text and batches.

use std::path::PathBuf;

use thiserror::Error;
use trine_format::FormatError;
use trine_tokenizer::TokenizerError;

/// An error of this crate, with the file and position it is about.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file or directory could not be read or made.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },

    /// A file could not be written or mapped.
    #[error(transparent)]
    Format(#[from] FormatError),

    /// A text could not be tokenized.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),

    /// A text file is not UTF-8.
    #[error("{}: not UTF-8 at byte {position}", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Bytes before the first that is no text.
        position: usize,
    },

    /// A line of a .jsonl file has no document under its key.
    #[error("{}: line {line}: {cause}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong with it.
        cause: String,
    },

    /// A row of a parquet file has no document in its column.
    #[error("{}: row {row}: {cause}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Number of the row, from 1.
        row: usize,
        /// What is wrong with it.
        cause: String,
    },

    /// A parquet file is damaged, or has no column of that name.
    #[error("{}: {cause}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What the library said, or what columns there are.
        cause: String,
    },

    /// A file is of a kind that this build does not read.
    #[error(
        "{}: this build reads no such files, build it with `--features {feature}`", path.display()
    )]
    Feature {
        /// The file.
        path: PathBuf,
        /// The cargo feature that reads it.
        feature: &'static str,
    },

    /// A document, or a line of a text, is too long to be held.
    #[error("{}: a document or line is longer than {most} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Most bytes it may have.
        most: usize,
    },

    /// There is no text.
    #[error("{}: the corpus is empty", path.display())]
    EmptyCorpus {
        /// The file, or the directory the dataset was to be written to.
        path: PathBuf,
    },

    /// A share of the corpus is not between 0 and 1.
    #[error("the validation fraction is {found}, it must be at least 0 and below 1")]
    Fraction {
        /// What was asked for.
        found: f64,
    },

    /// A file is not a token shard, or not one this version reads.
    #[error("{}: not a token shard: {field} is {found}, expected {expected}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// The field of the header.
        field: &'static str,
        /// What it should hold.
        expected: String,
        /// What it holds.
        found: String,
    },

    /// A shard's length is not what its token count says.
    #[error("{}: {found} bytes long, expected {expected}: truncated or damaged", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes that the count asks for.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },

    /// A token is not in the vocabulary of its shard.
    #[error("{}: token {position} is {id}, the vocabulary has {vocab_size}", path.display())]
    Token {
        /// The shard.
        path: PathBuf,
        /// Index of the token.
        position: usize,
        /// The id found there.
        id: u32,
        /// Ids there are.
        vocab_size: usize,
    },

    /// A shard was made with another tokenizer: its ids mean other text.
    #[error(
        "{}: made with the tokenizer of hash {expected}, this one has {found}", path.display()
    )]
    OtherTokenizer {
        /// The shard.
        path: PathBuf,
        /// Hash in the shard, first half in hexadecimal.
        expected: String,
        /// Hash of the tokenizer at hand.
        found: String,
    },

    /// Two sources of a mixture were made with different tokenizers.
    #[error(
        "{}: not made with the tokenizer of {}, the sources of a mixture need the same one",
        path.display(), first.display()
    )]
    MixedTokenizers {
        /// The shard that differs.
        path: PathBuf,
        /// The shard of the first source.
        first: PathBuf,
    },

    /// The weight of a source is no share.
    #[error("{}: its weight is {found}, it must be a positive number", path.display())]
    Weight {
        /// The shard of the source.
        path: PathBuf,
        /// What was asked for.
        found: f64,
    },

    /// A mixture has no source.
    #[error("a mixture needs at least one source, there is none")]
    NoSource,

    /// A shard does not hold one window.
    #[error("{}: {tokens} tokens, too short for one window of {needed}", path.display())]
    TooShort {
        /// The shard.
        path: PathBuf,
        /// Tokens it has.
        tokens: usize,
        /// Tokens of a window: the sequence and the target of its last token.
        needed: usize,
    },

    /// Tokens were asked for that are beyond the end of a shard.
    #[error("{}: tokens {start}..{end} were asked for, there are {tokens}", path.display())]
    OutOfRange {
        /// The shard.
        path: PathBuf,
        /// First token asked for.
        start: usize,
        /// End of the range asked for.
        end: usize,
        /// Tokens there are.
        tokens: usize,
    },

    /// A batch of no sequences or of empty ones was asked for.
    #[error("a batch of {batch} sequences of {seq_len} tokens is empty")]
    EmptyBatch {
        /// Sequences of a batch.
        batch: usize,
        /// Tokens of a sequence.
        seq_len: usize,
    },

    /// Conversations that cannot be divided into some to learn from and some to validate on.
    #[error(
        "{}: {conversations} conversations, of which a share of {fraction} leaves none to {lacks}",
        path.display()
    )]
    Split {
        /// The file of conversations.
        path: PathBuf,
        /// Conversations that can be learned from.
        conversations: usize,
        /// Share that was to validate.
        fraction: f64,
        /// What none is left for.
        lacks: &'static str,
    },

    /// Rows of another length than the sequences of a batch.
    #[error(
        "{}: rows of {row} tokens, expected those of one or two sequences of {seq_len} and one more each: \
         prepare the data anew",
        path.display()
    )]
    RowLength {
        /// The shard.
        path: PathBuf,
        /// Tokens of a row.
        row: usize,
        /// Tokens of a sequence that was asked for.
        seq_len: usize,
    },
}
