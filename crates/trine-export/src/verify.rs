//! The comparison of two models, one of which was made of the other.
//!
//! What has to be equal is equal: trits, and every field of the configuration but how projections
//! are stored. What a format rounds may differ by that one rounding and no more: plain numbers are
//! those that [`DenseTensor::convert`] gives, a scale is within half a step of its type. A format
//! that was chosen badly is thus reported, one that was written wrongly is refused.

use rayon::prelude::*;
use trine_format::gguf::GgmlType;
use trine_format::names::{Part, TensorId};
use trine_format::{
    DenseTensor, Format, ModelConfig, ModelFile, Projection, Quantization, Weight, names,
};
use trine_ternary::TernaryMatrix;

use crate::given::{Counter, Given, Givens};
use crate::{ExportError, Report, Stage, Watch};

/// Compares `written` with the model that it was made of.
///
/// # Errors
/// The first field of the configuration, projection, scale or plain tensor that differs by more
/// than the format's rounding; a plain number of the source that is not finite; a tensor that one
/// of the models does not have.
pub fn verify(source: &ModelFile, written: &ModelFile) -> Result<Report, ExportError> {
    verify_given(source, written, &Givens::new(), &|_| {})
}

/// As [`verify`], with what is known of the trits that were to be written; the source is asked for
/// others.
pub(crate) fn verify_given(
    source: &ModelFile,
    written: &ModelFile,
    given: &Givens,
    watch: &Watch<'_>,
) -> Result<Report, ExportError> {
    let config = source.config();
    compare_configs(config, written.config())?;
    let counter = Counter::new(Stage::Verifying, config, watch);
    let verify = |&id: &TensorId| {
        let report = match id {
            TensorId::Layer(layer, Part::Projection(p))
                if config.quantization != Quantization::None =>
            {
                compare_projections(source, written, layer, p, given.get(&(layer, p)))
            }
            _ => compare_dense(source, written, &id.canonical()),
        };
        source.release(&id.canonical());
        written.release(&id.canonical());
        counter.done(config, id);
        report
    };
    let reports: Vec<_> = config.tensor_ids().par_iter().map(verify).collect();
    reports.into_iter().try_fold(Report::default(), |all, report| Ok(all.and(report?)))
}

fn failed<T>(name: impl Into<String>, what: String) -> Result<T, ExportError> {
    Err(ExportError::Verification { name: name.into(), what })
}

pub(crate) fn compare_configs(a: &ModelConfig, b: &ModelConfig) -> Result<(), ExportError> {
    let b = &ModelConfig { quantization: a.quantization, ..b.clone() };
    macro_rules! compare {
        ($($field:ident),*) => {$(
            if a.$field != b.$field {
                let what = format!("{:?} became {:?}", a.$field, b.$field);
                return failed(concat!("configuration: ", stringify!($field)), what);
            }
        )*};
    }
    compare!(
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        vocab_size,
        max_position_embeddings,
        rope_theta,
        rms_norm_eps,
        hidden_act,
        sub_norms,
        projection_norm_eps,
        tie_word_embeddings,
        bos_token_id,
        eos_token_ids
    );
    // A field that is new and not in the list above.
    if a == b { Ok(()) } else { failed("configuration", format!("{a:?} became {b:?}")) }
}

fn compare_projections(
    source: &ModelFile,
    written: &ModelFile,
    layer: usize,
    p: Projection,
    given: Option<&Given>,
) -> Result<Report, ExportError> {
    let name = names::projection(layer, p);
    let read = trits(written, layer, p)?;
    let b = Given::of(&read);
    let a = match given {
        Some(given) => given.clone(),
        None => Given::of(&trits(source, layer, p)?),
    };
    if (a.shape, a.digest) != (b.shape, b.digest) {
        return failed(name, difference(&trits(source, layer, p)?, &read));
    }
    let trits = (a.shape.0 * a.shape.1) as u64;
    let ambiguity = a.ambiguity;
    let equal = Report { ternary_tensors: 1, trits, ambiguity, ..Report::default() };
    let change = f64::from(b.scale) - f64::from(a.scale);
    // A matrix of zeros may lose its scale: nothing is multiplied by it.
    if change == 0.0 || a.zero {
        return Ok(equal);
    }
    let Rounding { relative, absolute } = Rounding::of(written, layer, p);
    let scale = f64::from(a.scale);
    if b.scale == 0.0 || change.abs() > (scale * relative).max(absolute) {
        let what = format!("scale {} became {}, beyond rounding", a.scale, b.scale);
        return failed(name, what);
    }
    let largest_scale_change = (change.abs() / scale.max(f64::from(f32::MIN_POSITIVE))) as f32;
    Ok(Report { largest_scale_change, ..equal })
}

/// The most that storing changes a scale by: a share of it, or among the type's subnormal numbers
/// half their step.
struct Rounding {
    relative: f64,
    absolute: f64,
}

impl Rounding {
    const EXACT: Self = Self { relative: 0.0, absolute: 0.0 };
    const F16: Self = Self { relative: 1.0 / (1 << 11) as f64, absolute: 1.0 / (1 << 25) as f64 };
    const BF16: Self =
        Self { relative: 1.0 / (1 << 8) as f64, absolute: 1.0 / (1u128 << 126) as f64 / 256.0 };

    fn of(written: &ModelFile, layer: usize, p: Projection) -> Self {
        let gguf_name = TensorId::Layer(layer, Part::Projection(p)).gguf();
        let stored = written.as_gguf().and_then(|file| file.tensor(&gguf_name));
        match (stored.map(|info| info.kind), written.format()) {
            (Some(GgmlType::TQ1_0 | GgmlType::TQ2_0 | GgmlType::F16), _) => Self::F16,
            (Some(GgmlType::BF16), _) => Self::BF16,
            (None, Format::HuggingFace)
                if written.config().quantization == Quantization::Offline =>
            {
                Self::BF16
            }
            _ => Self::EXACT,
        }
    }
}

fn compare_dense(
    source: &ModelFile,
    written: &ModelFile,
    name: &str,
) -> Result<Report, ExportError> {
    let (a, b) = (source.dense(name)?, written.dense(name)?);
    if a.shape != b.shape {
        return failed(name, format!("shape {:?} became {:?}", a.shape, b.shape));
    }
    let (rows, columns) = match a.shape[..] {
        [rows, columns] => (rows, columns),
        // The whole of a norm is one row.
        _ => (1, a.shape.iter().product()),
    };
    let step = (PART / columns.max(1)).max(1);
    let compare = |part: usize| {
        let rows = part * step..rows.min((part + 1) * step);
        match (a.shape.len(), a.rows(rows.clone()), b.rows(rows.clone())) {
            (2, Some(a), Some(b)) => compare_part(source, &a, &b, rows.start * columns),
            _ => compare_part(source, &a, &b, 0),
        }
    };
    let parts: Vec<_> = (0..rows.div_ceil(step)).into_par_iter().map(compare).collect();
    let (mut differ, mut largest_dense_change) = (0, 0f32);
    for part in parts {
        let part = part?;
        differ += part.differ;
        largest_dense_change = largest_dense_change.max(part.largest_change);
    }
    if differ > 0 {
        return failed(name, format!("{differ} of {} numbers differ", rows * columns));
    }
    Ok(Report { dense_tensors: 1, largest_dense_change, ..Report::default() })
}

/// Numbers that are compared at a time.
const PART: usize = 1 << 20;

/// How a part of a plain tensor was written.
#[derive(Default)]
struct Compared {
    differ: usize,
    largest_change: f32,
}

/// Compares some rows, of which the first number is number `first` of the tensor.
fn compare_part(
    source: &ModelFile,
    a: &DenseTensor<'_>,
    b: &DenseTensor<'_>,
    first: usize,
) -> Result<Compared, ExportError> {
    let values = a.to_f32();
    let finite = values.iter().fold(true, |all, v| all & v.is_finite());
    if let Some(index) = (!finite).then(|| values.iter().position(|v| !v.is_finite())).flatten() {
        let (path, name) = (source.path().to_owned(), a.name.clone());
        let value = values[index];
        return Err(ExportError::NotFinite { path, name, index: first + index, value });
    }
    let expected = match a.convert(b.dtype) {
        Ok(data) => DenseTensor { data, ..b.clone() },
        Err(e) => return failed(&a.name, e.to_string()),
    };
    if expected.data != b.data {
        let pairs = expected.to_f32().into_iter().zip(b.to_f32());
        let differ = pairs.filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        return Ok(Compared { differ: differ.max(1), ..Compared::default() });
    }
    let largest_change = if a.dtype == b.dtype { 0.0 } else { largest_change(&values, b) };
    Ok(Compared { differ: 0, largest_change })
}

/// Largest change of a number, relative to the largest magnitude of its row.
pub(crate) fn largest_change(values: &[f32], written: &DenseTensor<'_>) -> f32 {
    let row = written.shape.last().map_or(1, |&n| n.max(1));
    let written = written.to_f32();
    let changes = values.chunks(row).zip(written.chunks(row)).map(|(a, b)| {
        let largest = a.iter().fold(0f32, |max, v| max.max(v.abs()));
        let change = a.iter().zip(b).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
        if change == 0.0 { 0.0 } else { change / largest }
    });
    changes.fold(0.0, f32::max)
}

pub(crate) fn trits(
    file: &ModelFile,
    layer: usize,
    p: Projection,
) -> Result<TernaryMatrix, ExportError> {
    match file.projection(layer, p)? {
        Weight::Ternary(matrix) => Ok(matrix),
        Weight::Dense(_) => Err(ExportError::NotTernary { path: file.path().to_owned() }),
    }
}

fn difference(a: &TernaryMatrix, b: &TernaryMatrix) -> String {
    if (a.rows(), a.cols()) != (b.rows(), b.cols()) {
        let (ar, ac, br, bc) = (a.rows(), a.cols(), b.rows(), b.cols());
        return format!("shape ({ar}, {ac}) became ({br}, {bc})");
    }
    match trits_that_differ(a, b) {
        0 => "the trits read back are not those that were written".to_owned(),
        differ => format!("{differ} of {} trits differ", a.rows() * a.cols()),
    }
}

/// How many trits of two matrices of one shape are not the same.
pub(crate) fn trits_that_differ(a: &TernaryMatrix, b: &TernaryMatrix) -> usize {
    if a.packed() == b.packed() {
        return 0;
    }
    a.trits().iter().zip(&b.trits()).filter(|(a, b)| a != b).count()
}
