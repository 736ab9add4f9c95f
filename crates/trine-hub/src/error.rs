//! Why a model did not come from the hub, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use trine_format::FormatError;

/// An error of this crate, with the repository, file or setting it is about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// What the user wrote names no repository.
    #[error("`{text}`: expected {expected}")]
    Reference {
        /// What was written.
        text: String,
        /// What was expected there.
        expected: String,
    },
    /// An environment variable makes no sense.
    #[error("{name}: expected {expected}, found {found}")]
    Setting {
        /// The variable.
        name: &'static str,
        /// What it may hold.
        expected: &'static str,
        /// What it holds; never a token.
        found: String,
    },
    /// The hub has no such thing, or not for everybody.
    #[error("{what}: the hub answers {status}: {advice}")]
    Refused {
        /// The repository, with revision and file where they matter.
        what: String,
        /// The HTTP status.
        status: u16,
        /// What it means and what to do.
        advice: String,
    },
    /// The hub could not be reached, or did not answer to the end, often enough to give up.
    #[error("{url}: {cause} (attempts without progress: {attempts})")]
    Network {
        /// What was asked for.
        url: String,
        /// How the last attempt ended.
        cause: String,
        /// Attempts since the last byte that came.
        attempts: u32,
    },
    /// An answer that no hub gives.
    #[error("{what}: expected {expected}, found {found}")]
    Answer {
        /// The URL or the file.
        what: String,
        /// What is valid there.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// A file is not the one the hub described. It was deleted.
    #[error(
        "{file}: expected {kind} {expected}, found {found}: the download was damaged and is \
         deleted; the next attempt begins anew"
    )]
    Hash {
        /// Repository and file.
        file: String,
        /// `SHA-256` or `git SHA-1`.
        kind: &'static str,
        /// What the hub says, in hexadecimal.
        expected: String,
        /// What the bytes have.
        found: String,
    },
    /// The repository holds no model, or several.
    #[error("{repo}: expected {expected}, found {found}")]
    NoModel {
        /// The repository and its revision.
        repo: String,
        /// What makes a model.
        expected: String,
        /// What is there.
        found: String,
    },
    /// Nothing may be downloaded, and the cache does not have it.
    #[error("{repo}: not in the cache at {}: {missing}; {why}", cache.display())]
    NotCached {
        /// The repository and its revision.
        repo: String,
        /// Where it was looked for.
        cache: PathBuf,
        /// What is missing there.
        missing: String,
        /// Why it is not downloaded now.
        why: String,
    },
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}{}", path.display(), io_advice(source))]
    Io {
        /// The file or directory of the cache.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A small file of the cache could not be written.
    #[error(transparent)]
    Format(#[from] FormatError),
}

impl HubError {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, action, source }
    }

    pub(crate) fn answer(
        what: impl Into<String>,
        expected: &'static str,
        found: impl Into<String>,
    ) -> Self {
        Self::Answer { what: what.into(), expected, found: found.into() }
    }
}

/// What helps against a disk that says no.
fn io_advice(e: &io::Error) -> &'static str {
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space and try again: what is here already is kept. HF_HOME names another \
             place"
        }
        io::ErrorKind::PermissionDenied
        | io::ErrorKind::ReadOnlyFilesystem
        | io::ErrorKind::NotADirectory => "; HF_HOME names another place",
        _ => "",
    }
}
