//! Any source model to any target format, with a proof that the trits survived.
//!
//! A conversion writes the target beside its final name, opens it again as any user of the file
//! would, and compares every trit and every scale with the source; only then does it take its
//! name. So a file that exists is a file that was verified.
//!
//! The trits of a checkpoint are what `trine-ternary` makes of its masters, which is what the
//! trainer multiplied; the trits of a stored model are taken as stored. This crate knows nothing of
//! Candle or kernels, and runs no model.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use trine_format::gguf::{WriteOptions, write_model};
use trine_format::{
    AtomicDir, BoxError, FormatError, ModelFile, Projection, Quantization, TensorSource, names,
    replaceable, write_hf_packed,
};
use trine_ternary::TernaryMatrix;

/// What to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A GGUF file.
    Gguf(WriteOptions),
    /// A Hugging Face directory with packed trits; scales are rounded to bf16.
    HfPacked,
}

impl Default for Target {
    /// A GGUF file that keeps scales exact.
    fn default() -> Self {
        Self::Gguf(WriteOptions::default())
    }
}

/// Why a conversion was refused or undone. In every case nothing is left under the target's name.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The source could not be read, or the target not written.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The source has no trits.
    #[error(
        "{}: expected a ternary model, found full-precision projections; \
         there is nothing to pack", path.display()
    )]
    NotTernary {
        /// The source.
        path: PathBuf,
    },
    /// A tensor could not be read back for the comparison.
    #[error("{name}: {source}")]
    Tensor {
        /// Canonical name.
        name: String,
        /// The cause.
        source: BoxError,
    },
    /// What was written does not decode to what was to be written.
    #[error("verification failed, nothing was kept: {name}: {what}")]
    Verification {
        /// Canonical name of the tensor.
        name: String,
        /// What differs.
        what: String,
    },
    /// A directory that was to be written is there already.
    #[error("{}: expected a new name or an empty directory, found other files", path.display())]
    Occupied {
        /// The target.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The target.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
}

/// What a conversion did, all of it verified.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Ternary tensors written.
    pub ternary_tensors: usize,
    /// Trits in them; all are equal to the source's.
    pub trits: u64,
    /// Largest change of a scale, relative to the scale: 0 where the format holds f32 scales.
    pub largest_scale_change: f32,
    /// Size of the target in bytes.
    pub bytes: u64,
}

/// Writes `source` as `to` in another format.
///
/// # Errors
/// A source without trits, a shape that the target type cannot hold, a disk that refuses, or a
/// verification that failed; nothing is then left under the name `to`.
pub fn convert(source: &ModelFile, to: &Path, target: Target) -> Result<Report, ExportError> {
    if source.config().quantization == Quantization::None {
        return Err(ExportError::NotTernary { path: source.path().to_owned() });
    }
    let io = |source| ExportError::Io { path: to.to_owned(), source };
    let name = to.file_name().ok_or_else(|| io(std::io::ErrorKind::InvalidInput.into()))?;
    // A name that cannot be taken is refused before the work rather than after it.
    match target {
        Target::Gguf(_) => replaceable(to)?,
        Target::HfPacked => match std::fs::read_dir(to).map(|mut entries| entries.next()) {
            Ok(Some(_)) => return Err(ExportError::Occupied { path: to.to_owned() }),
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(e)),
            _ => {}
        },
    }
    // A neighbour, so that the last step is a rename and not a copy. It is dropped with all that
    // is in it unless that step is reached.
    let staging = AtomicDir::create(to)?;
    let staged = staging.path().join(name);
    let written = match target {
        Target::Gguf(options) => {
            write_model(&staged, source.config(), source, source.tokenizer(), options)
        }
        Target::HfPacked => write_hf_packed(&staged, source.config(), source, source.tokenizer()),
    };
    let about_target = |e: FormatError| e.moved(&staged, to);
    written.map_err(about_target)?;
    let mut report = verify(source, &ModelFile::open(&staged).map_err(about_target)?)?;
    report.bytes = size(&staged).map_err(io)?;
    std::fs::rename(&staged, to).map_err(io)?;
    Ok(report)
}

/// Compares every trit and scale of two models; the trits must be equal.
///
/// # Errors
/// The first tensor whose trits differ, or that one of the models does not have.
pub fn verify(source: &ModelFile, written: &ModelFile) -> Result<Report, ExportError> {
    let mut report = Report::default();
    for layer in 0..source.config().num_hidden_layers {
        for p in Projection::ALL {
            let name = names::projection(layer, p);
            let (a, b) = (trits(source, layer, p)?, trits(written, layer, p)?);
            if (a.rows(), a.cols(), a.packed()) != (b.rows(), b.cols(), b.packed()) {
                return Err(ExportError::Verification { name, what: difference(&a, &b) });
            }
            report.ternary_tensors += 1;
            report.trits += (a.rows() * a.cols()) as u64;
            report.largest_scale_change = report.largest_scale_change.max(scale_change(&a, &b));
        }
    }
    Ok(report)
}

fn trits(file: &ModelFile, layer: usize, p: Projection) -> Result<TernaryMatrix, ExportError> {
    TensorSource::projection(file, layer, p)
        .map_err(|source| ExportError::Tensor { name: names::projection(layer, p), source })
}

fn difference(a: &TernaryMatrix, b: &TernaryMatrix) -> String {
    if (a.rows(), a.cols()) != (b.rows(), b.cols()) {
        let (ar, ac, br, bc) = (a.rows(), a.cols(), b.rows(), b.cols());
        return format!("shape ({ar}, {ac}) became ({br}, {bc})");
    }
    let (a, b) = (a.trits(), b.trits());
    let differ = a.iter().zip(&b).filter(|(a, b)| a != b).count();
    format!("{differ} of {} trits differ", a.len())
}

/// A matrix of zeros may lose its scale: nothing is multiplied by it.
fn scale_change(a: &TernaryMatrix, b: &TernaryMatrix) -> f32 {
    if a.scale() == b.scale() || a.counts()[1] == a.rows() * a.cols() {
        return 0.0;
    }
    (b.scale() - a.scale()).abs() / a.scale().max(f32::MIN_POSITIVE)
}

/// Bytes of a file, or of all files of a directory.
fn size(path: &Path) -> std::io::Result<u64> {
    if path.is_file() {
        return Ok(path.metadata()?.len());
    }
    std::fs::read_dir(path)?.map(|entry| Ok(entry?.metadata()?.len())).sum()
}
