//! What can be wrong with a model on disk.
//!
//! Every variant names the file and the part of it that was refused, and says what was expected
//! there. A hostile or damaged file ends in one of these, never in a panic. What comes from the file
//! is shown in one line of bounded length, so that it can neither flood a terminal nor steer it.

use std::fmt::{Display, Write as _};
use std::io;
use std::path::{Path, PathBuf};

use crate::gguf::CodecError;

/// Characters of a file that an error repeats in one place.
const SHOWN: usize = 300;

/// An error of somebody else's [`TensorSource`](crate::TensorSource), carried through a writer.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a model was not read or not written.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The final name of the file or directory, also where a temporary one was in hand.
        path: PathBuf,
        /// What was attempted, e.g. `"create"`.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The file's own structure is broken.
    #[error("{}: {what}: expected {expected}, found {found}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The part of the file, e.g. `"tensor count"`.
        what: String,
        /// What a valid file has there.
        expected: String,
        /// What this file has there.
        found: String,
    },
    /// A configuration or metadata key is missing, of the wrong type, or asks for another model.
    #[error("{}: key `{key}`: expected {expected}, found {found}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key, with dots between levels.
        key: String,
        /// What is supported there.
        expected: String,
        /// What the file says.
        found: String,
    },
    /// A field of [`ModelConfig`](crate::ModelConfig) describes no possible model.
    #[error("model configuration: `{key}`: expected {expected}, found {found}")]
    Config {
        /// The field.
        key: &'static str,
        /// What is possible.
        expected: String,
        /// What it holds.
        found: String,
    },
    /// A tensor is missing, superfluous, or of the wrong shape or type.
    #[error("{}: tensor `{name}`: expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in that file.
        name: String,
        /// What the configuration asks for.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// The bytes of a tensor are no trits, or trits do not fit the type they were to be stored as.
    #[error("{}: tensor `{name}`: {source}", path.display())]
    Codec {
        /// The file.
        path: PathBuf,
        /// The tensor's name in that file.
        name: String,
        /// What is wrong with them.
        source: CodecError,
    },
    /// The source of a model that was being written failed.
    #[error("{}: tensor `{name}`: {source}", path.display())]
    Source {
        /// The file being written.
        path: PathBuf,
        /// The tensor that was asked for.
        name: String,
        /// The source's own error.
        source: BoxError,
    },
}

impl FormatError {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, action, source }
    }

    pub(crate) fn malformed(
        path: &Path,
        what: impl Display,
        expected: impl Display,
        found: impl Display,
    ) -> Self {
        Self::Malformed {
            path: path.to_owned(),
            what: shown(what),
            expected: shown(expected),
            found: shown(found),
        }
    }

    pub(crate) fn key(
        path: &Path,
        key: impl Display,
        expected: impl Display,
        found: impl Display,
    ) -> Self {
        Self::Key {
            path: path.to_owned(),
            key: shown(key),
            expected: shown(expected),
            found: shown(found),
        }
    }

    pub(crate) fn config(key: &'static str, expected: impl Display, found: impl Display) -> Self {
        Self::Config { key, expected: shown(expected), found: shown(found) }
    }

    /// A refused field of a configuration that was read from a file is a refused key of the file.
    #[must_use]
    pub fn in_file(self, path: &Path) -> Self {
        match self {
            Self::Config { key, expected, found } => Self::key(path, key, expected, found),
            other => other,
        }
    }

    /// The same error about `to`, where it is about `from` or a file below it: what happens to a
    /// temporary is told with the name that was asked for.
    #[must_use]
    pub fn moved(mut self, from: &Path, to: &Path) -> Self {
        match &mut self {
            Self::Config { .. } => {}
            Self::Io { path, .. }
            | Self::Malformed { path, .. }
            | Self::Key { path, .. }
            | Self::Tensor { path, .. }
            | Self::Codec { path, .. }
            | Self::Source { path, .. } => {
                let below = path.strip_prefix(from).ok().map(Path::to_owned);
                if let Some(below) = below {
                    *path = if below.as_os_str().is_empty() { to.into() } else { to.join(below) };
                }
            }
        }
        self
    }

    pub(crate) fn tensor(
        path: &Path,
        name: impl Display,
        expected: impl Display,
        found: impl Display,
    ) -> Self {
        Self::Tensor {
            path: path.to_owned(),
            name: shown(name),
            expected: shown(expected),
            found: shown(found),
        }
    }

    pub(crate) fn codec(path: &Path, name: &str) -> impl FnOnce(CodecError) -> Self {
        let (path, name) = (path.to_owned(), shown(name));
        move |source| Self::Codec { path, name, source }
    }

    pub(crate) fn source(path: &Path, name: &str) -> impl FnOnce(BoxError) -> Self {
        let (path, name) = (path.to_owned(), shown(name));
        move |source| Self::Source { path, name, source }
    }
}

/// A text for a message: the start of a long one, and control characters escaped.
fn shown(text: impl Display) -> String {
    let mut out = Shown { text: String::new(), left: SHOWN };
    // The one error is that of a full `Shown`, which stops whoever displays a long text.
    if write!(out, "{text}").is_err() {
        out.text.push('…');
    }
    out.text
}

struct Shown {
    text: String,
    /// Characters that there is room for.
    left: usize,
}

impl std::fmt::Write for Shown {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for c in text.chars() {
            let plain = matches!(c, '"' | '\'' | '\\');
            let count = if plain { 1 } else { c.escape_debug().len() };
            self.left = self.left.checked_sub(count).ok_or(std::fmt::Error)?;
            if plain { self.text.push(c) } else { self.text.extend(c.escape_debug()) }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_texts_are_cut_and_escaped() {
        let error = |key: &str| FormatError::key(Path::new("f"), key, 1, 2).to_string();
        assert_eq!(error("a.b_é\"'"), "f: key `a.b_é\"'`: expected 1, found 2");
        assert_eq!(error("\x1b[2J\n"), "f: key `\\u{1b}[2J\\n`: expected 1, found 2");
        assert_eq!(error("\u{202e}x"), "f: key `\\u{202e}x`: expected 1, found 2");
        let full = "x".repeat(SHOWN);
        assert_eq!(shown(&full), full);
        assert_eq!(shown("x".repeat(1 << 20)), full + "…");
    }
}
