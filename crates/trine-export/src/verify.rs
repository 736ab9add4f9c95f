//! The comparison of two models, one of which was made of the other.
//!
//! What has to be equal is equal: trits, and every field of the configuration but how projections
//! are stored. What a format rounds may differ by that one rounding and no more: plain numbers are
//! those that [`DenseTensor::convert`] gives, a scale is within half a step of its type. A format
//! that was chosen badly is thus reported, one that was written wrongly is refused.

use trine_format::gguf::GgmlType;
use trine_format::names::{Part, TensorId};
use trine_format::{
    DenseTensor, Format, ModelConfig, ModelFile, Projection, Quantization, Weight, names,
};
use trine_ternary::TernaryMatrix;

use crate::{ExportError, Report};

/// Compares `written` with the model that it was made of.
///
/// # Errors
/// The first field of the configuration, projection, scale or plain tensor that differs by more
/// than the format's rounding; a plain number of the source that is not finite; a tensor that one
/// of the models does not have.
pub fn verify(source: &ModelFile, written: &ModelFile) -> Result<Report, ExportError> {
    compare_configs(source.config(), written.config())?;
    let mut report = Report::default();
    for id in source.config().tensor_ids() {
        match id {
            TensorId::Layer(layer, Part::Projection(p)) => {
                compare_projections(source, written, layer, p, &mut report)?;
            }
            _ => compare_dense(source, written, &id.canonical(), &mut report)?,
        }
    }
    Ok(report)
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
    report: &mut Report,
) -> Result<(), ExportError> {
    let name = names::projection(layer, p);
    let (a, b) = (trits(source, layer, p)?, trits(written, layer, p)?);
    if (a.rows(), a.cols(), a.packed()) != (b.rows(), b.cols(), b.packed()) {
        return failed(name, difference(&a, &b));
    }
    report.ternary_tensors += 1;
    report.trits += (a.rows() * a.cols()) as u64;
    let change = f64::from(b.scale()) - f64::from(a.scale());
    // A matrix of zeros may lose its scale: nothing is multiplied by it.
    if change == 0.0 || a.counts()[1] == a.rows() * a.cols() {
        return Ok(());
    }
    let Rounding { relative, absolute } = Rounding::of(written, layer, p);
    let scale = f64::from(a.scale());
    if b.scale() == 0.0 || change.abs() > (scale * relative).max(absolute) {
        let what = format!("scale {} became {}, beyond rounding", a.scale(), b.scale());
        return failed(name, what);
    }
    let change = (change.abs() / scale.max(f64::from(f32::MIN_POSITIVE))) as f32;
    report.largest_scale_change = report.largest_scale_change.max(change);
    Ok(())
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
    report: &mut Report,
) -> Result<(), ExportError> {
    let (a, b) = (source.dense(name)?, written.dense(name)?);
    let values = a.to_f32();
    if let Some((index, &value)) = values.iter().enumerate().find(|(_, v)| !v.is_finite()) {
        let path = source.path().to_owned();
        return Err(ExportError::NotFinite { path, name: name.to_owned(), index, value });
    }
    report.dense_tensors += 1;
    let expected = match a.convert(b.dtype) {
        Ok(data) => DenseTensor { data, ..b.clone() },
        Err(e) => return failed(name, e.to_string()),
    };
    if expected.data != b.data {
        let pairs = expected.to_f32().into_iter().zip(b.to_f32());
        let differ = pairs.filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        return failed(name, format!("{differ} of {} numbers differ", values.len()));
    }
    if a.dtype != b.dtype {
        let change = largest_change(&values, &b);
        report.largest_dense_change = report.largest_dense_change.max(change);
    }
    Ok(())
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
    let (a, b) = (a.trits(), b.trits());
    let differ = a.iter().zip(&b).filter(|(a, b)| a != b).count();
    format!("{differ} of {} trits differ", a.len())
}
