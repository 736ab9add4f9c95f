//! Tensors as they pass between files and programs: plain numbers, trits, and where they come from.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use trine_ternary::{Ambiguity, TernaryError, TernaryMatrix};

use crate::error::BoxError;
use crate::{Dtype, FormatError, ModelConfig, Projection, names};

/// Numbers that a thread converts at a time; whole blocks of every type.
const CHUNK: usize = 1 << 14;

/// A tensor of plain numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseTensor<'a> {
    /// Canonical name.
    pub name: String,
    /// Type of the numbers.
    pub dtype: Dtype,
    /// Row-major shape; a projection's is `[out, in]`.
    pub shape: Vec<usize>,
    /// The numbers as the type stores them, as many as the shape says.
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

    /// The rows in a range of the first dimension, or `None` where not all are there.
    ///
    /// Rows are whole blocks of every type, so what is done to them one by one is done to the tensor.
    pub fn rows(&self, rows: Range<usize>) -> Option<DenseTensor<'_>> {
        let (&count, row) = self.shape.split_first()?;
        if rows.end > count {
            return None;
        }
        let bytes = self.dtype.bytes(row)?;
        let data = self.data.get(rows.start.checked_mul(bytes)?..rows.end.checked_mul(bytes)?)?;
        let shape = [&[rows.len()], row].concat();
        Some(DenseTensor { name: self.name.clone(), dtype: self.dtype, shape, data: data.into() })
    }

    /// Applies the definition to master weights `(out, in)`, without a copy of them as f32.
    ///
    /// # Errors
    /// Weights that are not finite, or not as many as the shape says.
    pub fn ternarize(&self) -> Result<TernaryMatrix, TernaryError> {
        let (rows, cols) = self.matrix()?;
        TernaryMatrix::from_weight_rows(rows, cols, |r, out| self.widen_row(r, rows, out))
    }

    /// As [`Self::ternarize`], and counts the weights whose trit is not the same in all
    /// implementations.
    ///
    /// # Errors
    /// As [`Self::ternarize`].
    pub fn ternarize_counted(&self) -> Result<(TernaryMatrix, Ambiguity), TernaryError> {
        let (rows, cols) = self.matrix()?;
        TernaryMatrix::from_weight_rows_counted(rows, cols, |r, out| self.widen_row(r, rows, out))
    }

    /// Rows and columns, after checking that there are as many numbers.
    fn matrix(&self) -> Result<(usize, usize), TernaryError> {
        let rows = self.shape.first().copied().unwrap_or(1);
        let cols = self.shape.iter().skip(1).product();
        let (expected, found) = (self.dtype.bytes(&[rows, cols]).unwrap_or(0), self.data.len());
        if expected != found {
            return Err(TernaryError::Length { what: "bytes of weights", expected, found });
        }
        Ok((rows, cols))
    }

    fn widen_row(&self, r: usize, rows: usize, out: &mut [f32]) {
        let bytes = self.data.len() / rows.max(1);
        self.dtype.decode(&self.data[r * bytes..][..bytes], out);
    }

    /// How many numbers there are.
    fn count(&self) -> usize {
        let (block, bytes) = self.dtype.ggml_type().block();
        self.data.len() / bytes * block
    }

    /// The numbers widened to f32: exactly, and those in blocks with the bits of ggml.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.count()];
        let (block, bytes) = self.dtype.ggml_type().block();
        let chunks = self.data.par_chunks(CHUNK / block * bytes);
        values.par_chunks_mut(CHUNK).zip(chunks).for_each(|(out, data)| {
            self.dtype.decode(data, out);
        });
        values
    }

    /// The same numbers as another type; no copy when the type is the same.
    ///
    /// Numbers are rounded half to even, in blocks as [`blocks`](crate::blocks) says.
    ///
    /// # Errors
    /// When a finite number overflows the type, as no infinity must appear where there was none; for
    /// blocks also when a number is not finite, or rows are not whole blocks.
    pub fn convert(&self, dtype: Dtype) -> Result<Cow<'_, [u8]>, BoxError> {
        if dtype == self.dtype {
            return Ok(Cow::Borrowed(&self.data));
        }
        let (from, to) = (self.dtype.ggml_type().block(), dtype.ggml_type().block());
        let columns = self.shape.last().copied().unwrap_or(1);
        dtype.check_columns(columns)?;
        let mut out = vec![0; self.count() / to.0 * to.1];
        let data = self.data.par_chunks(CHUNK / from.0 * from.1);
        let chunks = out.par_chunks_mut(CHUNK / to.0 * to.1).zip(data).enumerate();
        let failed = chunks.filter_map(|(i, (out, data))| {
            let mut values = vec![0.0; data.len() / from.1 * from.0];
            self.dtype.decode(data, &mut values);
            let at = dtype.encode(&values, out).err()?;
            Some((i * CHUNK + at, values[at]))
        });
        match failed.find_first(|_| true) {
            None => Ok(Cow::Owned(out)),
            Some((at, v)) => Err(unfit(v, at, dtype)),
        }
    }

    /// Row `r` of a matrix of `rows` rows as another type, into `out`, the bytes of a row: what
    /// [`Self::convert`] does, without memory for all of it.
    ///
    /// # Errors
    /// As [`Self::convert`].
    ///
    /// # Panics
    /// When there is no row `r`, or `out` is not a row.
    pub fn convert_row(
        &self,
        r: usize,
        rows: usize,
        dtype: Dtype,
        out: &mut [u8],
    ) -> Result<(), BoxError> {
        let columns = self.count() / rows;
        if dtype == self.dtype {
            out.copy_from_slice(&self.data[r * out.len()..][..out.len()]);
            return Ok(());
        }
        dtype.check_columns(columns)?;
        let mut values = vec![0.0; columns];
        self.widen_row(r, rows, &mut values);
        let fits = dtype.encode(&values, out);
        fits.map_err(|at| unfit(values[at], r * columns + at, dtype))
    }
}

fn unfit(value: f32, at: usize, dtype: Dtype) -> BoxError {
    format!("{value} at {at} does not fit {}", dtype.name()).into()
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
/// other; a trainer is another. Several threads ask at once.
pub trait TensorSource: Sync {
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
        Ok(masters.ternarize()?)
    }

    /// Every tensor as it is stored, for display; nothing where that is not known.
    fn tensors(&self) -> Vec<TensorSummary> {
        Vec::new()
    }

    /// Told when a tensor, by its canonical name, has been written: its memory may be given back.
    fn release(&self, _name: &str) {}
}

/// The numbers of a dense tensor from `source` as another type, checked.
pub(crate) fn checked_data<'a>(
    source: &'a dyn TensorSource,
    path: &Path,
    name: &str,
    shape: &[usize],
    dtype: Dtype,
) -> Result<Cow<'a, [u8]>, FormatError> {
    let tensor = checked(source, path, name, shape)?;
    if tensor.dtype == dtype {
        return Ok(tensor.data);
    }
    let data = tensor.convert(dtype).map_err(FormatError::source(path, name))?;
    Ok(Cow::Owned(data.into_owned()))
}

/// A dense tensor from `source`, checked to be what the model of a file needs.
fn checked<'a>(
    source: &'a dyn TensorSource,
    path: &Path,
    name: &str,
    shape: &[usize],
) -> Result<DenseTensor<'a>, FormatError> {
    let tensor = source.dense(name).map_err(FormatError::source(path, name))?;
    if tensor.shape != shape || Some(tensor.data.len()) != tensor.dtype.bytes(shape) {
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
