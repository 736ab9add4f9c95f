//! What can go wrong in an evaluation.

use std::io;
use std::path::{Path, PathBuf};

use trine_data::DataError;
use trine_runtime::RuntimeError;
use trine_tokenizer::TokenizerError;

/// An error of this crate, with the task, file, item or field it is about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// The model refused.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A logits function that is not the runtime's refused.
    #[error("no logits: {source}")]
    Logits {
        /// Its own words.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A model that is elsewhere.
    #[error(transparent)]
    Elsewhere {
        /// What it, or the way to it, says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A text that has no ids.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A task file that is not one.
    #[error("task {origin}: {cause}")]
    Task {
        /// The file, or the name of a built-in task.
        origin: String,
        /// Line and key, what was expected and what was found.
        cause: String,
    },
    /// A task that does not exist.
    #[error("no task `{name}`: expected the path of a .toml file, or of {}", known.join(", "))]
    UnknownTask {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// The items of a task are not there.
    #[error("task {task}: no {} in {} or a folder of it; {source_hint}", files.join(" or "), dir.display())]
    NoData {
        /// The task.
        task: String,
        /// Names that it looks for.
        files: Vec<String>,
        /// Where.
        dir: PathBuf,
        /// How to get the file.
        source_hint: String,
    },
    /// Several files could be meant.
    #[error("task {task}: expected one {name}, found {} and {}", first.display(), second.display())]
    Ambiguous {
        /// The task.
        task: String,
        /// Name that it looks for.
        name: String,
        /// One of them.
        first: PathBuf,
        /// Another.
        second: PathBuf,
    },
    /// A file of items that is none.
    #[error("{}: line {line}: {cause}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong with it.
        cause: String,
    },
    /// A file of items that cannot be read as what its ending says.
    #[error(transparent)]
    Records(#[from] DataError),
    /// An item that the templates of its task make nothing of.
    #[error("task {task}, item {item}, `{field}`: {cause}")]
    Item {
        /// The task.
        task: String,
        /// Its number in the file, from 0.
        item: usize,
        /// Field of the form.
        field: &'static str,
        /// What was expected and found.
        cause: String,
    },
    /// A task that runs programs, and nobody said that it may.
    #[error(
        "task {task} runs programs that the model wrote, which may do anything that you may: \
         allow it with --allow-code-execution, best in a container"
    )]
    CodeExecution {
        /// The task.
        task: String,
    },
    /// No programs can be run.
    #[error("Python programs cannot be run: {cause}")]
    Python {
        /// What was tried and what came.
        cause: String,
    },
    /// A likelihood that is no number.
    #[error(
        "task {task}, item {item}: the model returned a log-likelihood of {found}: its weights are not finite"
    )]
    NotFinite {
        /// The task.
        task: String,
        /// Its number in the file, from 0.
        item: usize,
        /// What came.
        found: f64,
    },
    /// A text without tokens to predict.
    #[error("{what}: nothing to predict: expected at least one token after the first")]
    Empty {
        /// The text.
        what: String,
    },
    /// A window or stride that is none.
    #[error("{name} {found}: expected {expected}")]
    Setting {
        /// Name of the setting.
        name: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was given.
        found: usize,
    },
    /// Two models cannot be compared.
    #[error("task {task}: nothing to compare: no item was scored by both models")]
    NothingInCommon {
        /// The task.
        task: String,
    },
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
}

impl EvalError {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, action, source }
    }
}
