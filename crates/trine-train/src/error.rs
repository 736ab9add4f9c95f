//! What can go wrong in a training run.

use std::path::PathBuf;

/// Why a run could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The configuration could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file of the run could not be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The configuration is not valid TOML, has an unknown key, or a value of the wrong type.
    #[error("{path}: {message}")]
    ConfigSyntax {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the line.
        message: String,
    },
    /// An override of the command line cannot be applied.
    #[error("--set {setting}: expected {expected}")]
    Setting {
        /// What was given.
        setting: String,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// A value in the configuration makes no sense.
    #[error("config key `{key}`: expected {expected}, found {found}")]
    ConfigValue {
        /// Dotted key.
        key: String,
        /// What would have been accepted.
        expected: String,
        /// What was there.
        found: String,
    },
    /// A run directory is in the way of a new run, or missing for a resumed one.
    #[error("{path}: {message}")]
    RunDir {
        /// The directory.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// A checkpoint does not fit the run.
    #[error("{path}: {message}")]
    Checkpoint {
        /// The checkpoint.
        path: PathBuf,
        /// What was expected and found.
        message: String,
    },
    /// The loss or a gradient is NaN or infinite, or the loss leapt, and `train.on_spike` does not
    /// say to go on; nothing was updated with it.
    #[error(
        "the run diverged at step {step}: {what}; the last checkpoint is kept. \
         A lower learning rate or a longer warm-up usually helps"
    )]
    Diverged {
        /// The step that was to be made, from 1.
        step: usize,
        /// The number that is not finite or too large, and a parameter.
        what: String,
    },
    /// Processes that train one run hold different parameters: see [`crate::parallel`].
    #[error(
        "at step {step} {differing} of {size} processes hold other parameters than the first: the run \
         cannot go on with them"
    )]
    Apart {
        /// Steps made.
        step: usize,
        /// How many processes differ from the first.
        differing: usize,
        /// How many there are.
        size: usize,
    },
    /// Processes that train one run cannot go on together.
    #[error(transparent)]
    Group(#[from] crate::parallel::GroupError),
    /// A model on disk is not usable.
    #[error(transparent)]
    Format(#[from] trine_format::FormatError),
    /// The data is not usable.
    #[error(transparent)]
    Data(#[from] trine_data::DataError),
    /// The tokenizer is not usable.
    #[error(transparent)]
    Tokenizer(#[from] trine_tokenizer::TokenizerError),
    /// A device failed, or cannot do what a run asks for.
    #[error(transparent)]
    Device(#[from] trine_cuda::CudaError),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
