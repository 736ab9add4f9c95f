//! What can be wrong with a run directory.

use std::path::PathBuf;

/// Why a run could not be reported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// A file of the run is not there.
    #[error("{run}: expected a run directory, found no {file} in it")]
    Missing {
        /// The directory.
        run: PathBuf,
        /// Name of the file.
        file: &'static str,
    },
    /// A file of the run cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file of the run is not what its name says.
    #[error("{path}: expected {expected}, found {found}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was expected there.
        expected: &'static str,
        /// What the parser says.
        found: String,
    },
}
