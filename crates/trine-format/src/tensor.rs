//! Tensors as they pass between files and programs: plain numbers, trits, and where they come from.

use std::borrow::Cow;
use std::path::Path;

use half::{bf16, f16};
use trine_ternary::TernaryMatrix;

use crate::error::BoxError;
use crate::{FormatError, ModelConfig, Projection, names};

/// Plain number types; files hold them little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Dtype {
    F32,
    F16,
    BF16,
}

impl Dtype {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The name in `config.json`: `float32`, `float16`, `bfloat16`.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }
}

/// A tensor of plain numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseTensor<'a> {
    /// Canonical name.
    pub name: String,
    /// Type of the numbers.
    pub dtype: Dtype,
    /// Row-major shape; a projection's is `[out, in]`.
    pub shape: Vec<usize>,
    /// Little-endian numbers, as many as the shape says.
    pub data: Cow<'a, [u8]>,
}

impl<'a> DenseTensor<'a> {
    /// A tensor over f32 values, copying only where the machine is big-endian.
    ///
    /// The length is checked against the shape by whoever reads or writes the tensor.
    pub fn from_f32(name: impl Into<String>, shape: &[usize], values: &'a [f32]) -> Self {
        let data = if cfg!(target_endian = "little") {
            Cow::Borrowed(bytemuck::cast_slice(values))
        } else {
            Cow::Owned(values.iter().flat_map(|v| v.to_le_bytes()).collect())
        };
        Self { name: name.into(), dtype: Dtype::F32, shape: shape.to_vec(), data }
    }

    /// The numbers widened to f32, which is exact.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => numbers(&self.data, f32::from_le_bytes),
            Dtype::F16 => numbers(&self.data, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => numbers(&self.data, |b| bf16::from_le_bytes(b).to_f32()),
        }
    }

    /// The same numbers as another type, rounded half to even; no copy when the type is the same.
    ///
    /// # Errors
    /// When a finite number overflows the type: no infinity must appear where there was none.
    pub fn convert(&self, dtype: Dtype) -> Result<Cow<'_, [u8]>, BoxError> {
        if dtype == self.dtype {
            return Ok(Cow::Borrowed(&self.data));
        }
        let values = self.to_f32();
        let overflows = |v: f32| match dtype {
            Dtype::F32 => false,
            Dtype::F16 => v.is_finite() && !f16::from_f32(v).is_finite(),
            Dtype::BF16 => v.is_finite() && !bf16::from_f32(v).is_finite(),
        };
        if let Some(&v) = values.iter().find(|v| overflows(**v)) {
            return Err(format!("{v} does not fit {}", dtype.torch_name()).into());
        }
        Ok(Cow::Owned(match dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        }))
    }
}

fn numbers<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&chunk| number(chunk)).collect()
}

/// The weight of a projection.
#[derive(Clone, Debug, PartialEq)]
pub enum Weight<'a> {
    /// Trits and their scale.
    Ternary(TernaryMatrix),
    /// Plain numbers, of a model that is not quantized.
    Dense(DenseTensor<'a>),
}

/// One tensor as a file holds it, for display.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSummary {
    /// Name in the file.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// The format's own name of the type.
    pub dtype: String,
    /// Size in the file.
    pub bytes: usize,
}

/// Where a writer gets a model's tensors from, one at a time.
///
/// [`ModelFile`](crate::ModelFile) is one, so a file of any readable format can be written in any
/// other; a trainer is another.
pub trait TensorSource {
    /// A tensor of plain numbers by its canonical name; for a projection its master weights.
    ///
    /// # Errors
    /// When there is no such tensor.
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError>;

    /// The trits of a projection; by default those that the definition gives for its masters.
    ///
    /// # Errors
    /// When there is no such tensor, or its masters are not finite.
    fn projection(&self, layer: usize, p: Projection) -> Result<TernaryMatrix, BoxError> {
        let masters = self.dense(&names::projection(layer, p))?;
        Ok(ternarize(&masters)?)
    }
}

/// Applies the definition to master weights `(out, in)`.
pub(crate) fn ternarize(
    masters: &DenseTensor<'_>,
) -> Result<TernaryMatrix, trine_ternary::TernaryError> {
    let rows = masters.shape.first().copied().unwrap_or(1);
    let cols = masters.shape.iter().skip(1).product();
    TernaryMatrix::from_weights(&masters.to_f32(), rows, cols)
}

/// A dense tensor from `source`, checked to be what the model of a file needs.
pub(crate) fn checked<'a>(
    source: &'a dyn TensorSource,
    path: &Path,
    name: &str,
    shape: &[usize],
) -> Result<DenseTensor<'a>, FormatError> {
    let tensor = source.dense(name).map_err(FormatError::source(path, name))?;
    let bytes = shape.iter().product::<usize>() * tensor.dtype.size();
    if tensor.shape != shape || tensor.data.len() != bytes {
        let found = format!("shape {:?} in {} bytes", tensor.shape, tensor.data.len());
        return Err(FormatError::tensor(path, name, format_args!("shape {shape:?}"), found));
    }
    Ok(tensor)
}

/// The trits of a projection from `source`, checked to have the shape that the model needs.
pub(crate) fn checked_trits(
    source: &dyn TensorSource,
    path: &Path,
    config: &ModelConfig,
    layer: usize,
    p: Projection,
) -> Result<TernaryMatrix, FormatError> {
    let name = names::projection(layer, p);
    let matrix = source.projection(layer, p).map_err(FormatError::source(path, &name))?;
    let (found, expected) = ((matrix.rows(), matrix.cols()), config.projection_shape(p));
    if found != expected {
        let (expected, found) = (format!("shape {expected:?}"), format!("shape {found:?}"));
        return Err(FormatError::tensor(path, name, expected, found));
    }
    Ok(matrix)
}
