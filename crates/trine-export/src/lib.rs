//! Any source model to any target format, with a proof that the model survived.
//!
//! A conversion writes the target beside its final name, opens it again as any user of the file
//! would, and [compares](verify) it with the source: every trit, every scale, every plain number,
//! the configuration. Only then does it take its name. So a file that exists is a file that was
//! verified.
//!
//! The trits of a checkpoint are what `trine-ternary` makes of its masters, which is what the
//! trainer multiplied; the trits of a stored model are taken as stored. This crate knows nothing of
//! Candle or kernels, and runs no model.

#![forbid(unsafe_code)]

mod compare;
mod given;
pub mod import;
mod masters;
mod merge;
mod random;
mod verify;

use std::path::{Path, PathBuf};

use trine_format::gguf::{WriteOptions, write_model};
use trine_format::{
    AtomicDir, Dtype, FormatError, ModelConfig, ModelFile, Projection, Quantization, TensorSource,
    flush_name, names, replaceable, write_hf, write_hf_packed,
};
use trine_ternary::Ambiguity;

use given::Recorder;
use masters::Masters;
use verify::verify_given;

pub use compare::{Comparison, compare};
pub use merge::{MergeCost, MergeCosts, merge};
pub use random::{RandomModel, RandomTrits};
pub use verify::verify;

/// What to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A GGUF file.
    Gguf(WriteOptions),
    /// A Hugging Face directory with packed trits; scales are rounded to bf16.
    HfPacked,
    /// A Hugging Face directory of master weights in this type, which quantize to exactly the trits
    /// and scales of the source; see [`master_dtype`]. The only target of a full-precision model, whose
    /// weights are rounded to the type.
    Hf(Dtype),
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
    /// A plain number of the source is none: no format is to carry it on.
    #[error("{}: tensor `{name}`: expected finite numbers, found {value} at {index}", path.display())]
    NotFinite {
        /// The source.
        path: PathBuf,
        /// Canonical name of the tensor.
        name: String,
        /// Position of the number in it, row-major.
        index: usize,
        /// The number.
        value: f32,
    },
    /// An adapter that cannot be merged into the model.
    #[error("{}: the adapter cannot be merged: {what}", path.display())]
    Adapter {
        /// The model.
        path: PathBuf,
        /// What was expected and found.
        what: String,
    },
    /// What was written does not decode to what was to be written.
    #[error("the models differ: {name}: {what}")]
    Verification {
        /// Canonical name of the tensor, or field of the configuration.
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

impl ExportError {
    /// The same error with the final name where it is about a temporary one.
    fn moved(self, from: &Path, to: &Path) -> Self {
        match self {
            Self::Format(e) => Self::Format(e.moved(from, to)),
            Self::NotTernary { path } if path == from => Self::NotTernary { path: to.to_owned() },
            other => other,
        }
    }
}

/// What a conversion did, all of it verified.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Ternary tensors written.
    pub ternary_tensors: usize,
    /// Trits in them; all are equal to the source's.
    pub trits: u64,
    /// Of master weights that were made into trits: those that another implementation may round the
    /// other way. None where trits were stored, or masters were written.
    pub ambiguity: Ambiguity,
    /// Largest change of a scale, relative to the scale: 0 where the format holds f32 scales.
    pub largest_scale_change: f32,
    /// Tensors of plain numbers written: embedding, norms, a head of its own.
    pub dense_tensors: usize,
    /// Largest change of a plain number by rounding, relative to the largest magnitude in its row
    /// (of a norm: in the norm); 0 where the format holds the source's own type.
    ///
    /// Not relative to the number itself: one that vanishes beside a thousand larger ones in the
    /// vector of a token changes nothing, and would be reported as a change by all of it.
    pub largest_dense_change: f32,
    /// Size of the target in bytes.
    pub bytes: u64,
}

/// The type in which embedding and head of a model are kept as they are: their own, in 16 bits or in
/// blocks. Where they are F32, as most of a small model's file would be, or of two types, it is F16;
/// [`Report`] says what that rounds.
///
/// # Errors
/// A model without an embedding.
pub fn embedding_dtype(source: &ModelFile) -> Result<Dtype, FormatError> {
    let dtype = source.dense(names::EMBED)?.dtype;
    let same = source.config().tie_word_embeddings || source.dense(names::HEAD)?.dtype == dtype;
    Ok(if same && dtype != Dtype::F32 { dtype } else { Dtype::F16 })
}

/// The type of master weights that loses nothing: that of stored masters, F32 where they are of
/// several; BF16 for stored trits.
///
/// # Errors
/// A tensor that is missing.
pub fn master_dtype(source: &ModelFile) -> Result<Dtype, FormatError> {
    let config = source.config();
    if config.quantization == Quantization::Offline {
        return Ok(Dtype::BF16);
    }
    let mut found = None;
    for layer in 0..config.num_hidden_layers {
        for p in Projection::ALL {
            let dtype = source.dense(&names::projection(layer, p))?.dtype;
            if *found.get_or_insert(dtype) != dtype {
                return Ok(Dtype::F32);
            }
        }
    }
    Ok(found.unwrap_or(Dtype::F32))
}

/// How far a conversion is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// Parameters of tensors with which this stage is done.
    pub done: u64,
    /// Parameters of the model.
    pub total: u64,
}

/// The two halves of a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reading the source and writing the target.
    Writing,
    /// Reading the target back and comparing it with the source.
    Verifying,
}

/// Is told after every tensor; from several threads, so what is done may come out of order.
pub type Watch<'a> = dyn Fn(Progress) + Sync + 'a;

/// Writes `source` as `to` in another format.
///
/// Memory holds a few tensors at a time, and time goes into reading and writing files: a tensor is
/// read once, quantized once and written; what was written is read back and compared by digest.
/// The same model makes the same bytes on any number of threads.
///
/// # Errors
/// A source without trits for a target of trits, plain numbers that are not finite, a shape that the target type
/// cannot hold, a disk that refuses, or a verification that failed; nothing is then left under the
/// name `to`.
pub fn convert(source: &ModelFile, to: &Path, target: Target) -> Result<Report, ExportError> {
    convert_watched(source, to, target, &|_| {})
}

/// As [`convert`], and tells how far it is.
///
/// # Errors
/// As [`convert`].
pub fn convert_watched(
    source: &ModelFile,
    to: &Path,
    target: Target,
    watch: &Watch<'_>,
) -> Result<Report, ExportError> {
    let full = source.config().quantization == Quantization::None;
    if full && !matches!(target, Target::Hf(_)) {
        return Err(ExportError::NotTernary { path: source.path().to_owned() });
    }
    let io = |source| ExportError::Io { path: to.to_owned(), source };
    let name = to.file_name().ok_or_else(|| io(std::io::ErrorKind::InvalidInput.into()))?;
    // A name that cannot be taken is refused before the work rather than after it.
    match target {
        Target::Gguf(_) => replaceable(to)?,
        Target::HfPacked | Target::Hf(_) => {
            match std::fs::read_dir(to).map(|mut entries| entries.next()) {
                Ok(Some(_)) => return Err(ExportError::Occupied { path: to.to_owned() }),
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(e)),
                _ => {}
            }
        }
    }
    // A neighbour, so that the last step is a rename and not a copy. It is dropped with all that
    // is in it unless that step is reached.
    let staging = AtomicDir::create(to)?;
    let staged = staging.path().join(name);
    let (config, tokenizer) = (source.config(), source.tokenizer());
    let masters;
    let from: &dyn TensorSource = match target {
        Target::Hf(dtype) if !full => {
            masters = Masters { source, dtype };
            &masters
        }
        _ => source,
    };
    let recorder = Recorder::new(from, config, watch);
    let written = match target {
        Target::Gguf(options) => write_model(&staged, config, &recorder, tokenizer, options),
        Target::HfPacked => write_hf_packed(&staged, config, &recorder, tokenizer),
        Target::Hf(dtype) => {
            let quantization = if full { Quantization::None } else { Quantization::Online };
            let config = ModelConfig { quantization, ..config.clone() };
            write_hf(&staged, &config, dtype, &recorder, tokenizer)
        }
    };
    let about_target = |e: FormatError| e.moved(&staged, to);
    written.map_err(about_target)?;
    let given = recorder.into_given();
    let verified = ModelFile::open(&staged).map_err(ExportError::from);
    let verified = verified.and_then(|written| verify_given(source, &written, &given, watch));
    let mut report = verified.map_err(|e| e.moved(&staged, to))?;
    report.bytes = size(&staged).map_err(io)?;
    std::fs::rename(&staged, to).map_err(io)?;
    flush_name(to)?;
    Ok(report)
}

impl Report {
    /// What was done altogether.
    fn and(self, other: Self) -> Self {
        Self {
            ternary_tensors: self.ternary_tensors + other.ternary_tensors,
            trits: self.trits + other.trits,
            ambiguity: [self.ambiguity, other.ambiguity].into_iter().sum(),
            largest_scale_change: self.largest_scale_change.max(other.largest_scale_change),
            dense_tensors: self.dense_tensors + other.dense_tensors,
            largest_dense_change: self.largest_dense_change.max(other.largest_dense_change),
            bytes: self.bytes + other.bytes,
        }
    }
}

/// Bytes of a file, or of all files of a directory.
fn size(path: &Path) -> std::io::Result<u64> {
    if path.is_file() {
        return Ok(path.metadata()?.len());
    }
    std::fs::read_dir(path)?.map(|entry| Ok(entry?.metadata()?.len())).sum()
}
