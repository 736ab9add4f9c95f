//! Run directories in, one HTML page out.
//!
//! The page compares runs: what they were, how their losses went, what their trits did, what they
//! wrote. It is one file without anything from elsewhere, and its content security policy says so:
//! curves are inline SVG, a few lines of script show values under the pointer, and without script
//! nothing is missing but those.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`run`] | `config.toml`, `run.json` and `metrics.jsonl` of a run |
//! | [`summary`] | a run in ten numbers; where configurations differ |
//! | `series`, `scale`, `chart` | smoothing and thinning, axes, a chart |
//! | [`Evaluation`] | a task on a checkpoint, as `trine eval` says it |
//! | `layers`, `samples`, `page` | the parts of the page |
//!
//! It reads files and knows nothing of how a model is trained: a measure or an event of which it has
//! never heard is passed over.

#![forbid(unsafe_code)]

mod chart;
mod curves;
mod error;
mod evaluations;
mod layers;
mod page;
pub mod run;
mod samples;
mod scale;
mod series;
pub mod summary;
mod text;

pub use error::ReportError;
pub use evaluations::Evaluation;
pub use page::page;
pub use run::Run;
pub use summary::Summary;
