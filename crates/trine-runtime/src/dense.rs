//! Full-precision matrices: embedding and head, and the projections of a baseline.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use bytemuck::Pod;
use half::{bf16, f16};
use rayon::prelude::*;
use trine_format::{BoxError, DenseTensor, Dtype};
use trine_kernels::{AlignedBuf, BlockKind, BlockMatrix, DenseData, HeadRows};

use crate::RuntimeError;
use crate::sketch::Use;

/// Elements that a thread checks, or copies, at a time.
const CHECKED: usize = 1 << 16;

/// Rows that are converted before the memory of what they were made of is given back.
const RELEASED: usize = 64;

/// A matrix `(rows, cols)` of plain numbers in the type it was stored in; all finite.
pub(crate) struct DenseMatrix {
    rows: usize,
    cols: usize,
    data: Elements,
}

enum Elements {
    F32(AlignedBuf<f32>),
    F16(AlignedBuf<f16>),
    Bf16(AlignedBuf<bf16>),
    Blocks(BlockMatrix),
}

impl DenseMatrix {
    /// `dtype` is the type to hold it in. `release` is told which bytes of the tensor have been copied.
    pub(crate) fn new(
        tensor: &DenseTensor<'_>,
        rows: usize,
        cols: usize,
        dtype: Dtype,
        release: impl Fn(Range<usize>) + Sync,
    ) -> Result<Self, RuntimeError> {
        let name = &tensor.name;
        if let Some(kind) = block_kind(dtype) {
            let data = Elements::Blocks(blocks(tensor, kind, rows, cols, dtype, release)?);
            return Ok(Self { rows, cols, data });
        }
        let bytes = &*tensor.convert(dtype).map_err(|reason| head_type(name, dtype, reason))?;
        let release = |bytes| {
            if dtype == tensor.dtype {
                release(bytes)
            }
        };
        let data = match dtype {
            Dtype::F16 => Elements::F16(numbers(name, bytes, f16::from_le_bytes, release)?),
            Dtype::BF16 => Elements::Bf16(numbers(name, bytes, bf16::from_le_bytes, release)?),
            _ => Elements::F32(numbers(name, bytes, f32::from_le_bytes, release)?),
        };
        Ok(Self { rows, cols, data })
    }

    /// Row `r`, widened to f32, into `out` `(cols,)`.
    pub(crate) fn row(&self, r: usize, out: &mut [f32]) {
        let at = r * self.cols..(r + 1) * self.cols;
        match &self.data {
            Elements::F32(data) => out.copy_from_slice(&data[at]),
            Elements::F16(data) => out.iter_mut().zip(&data[at]).for_each(|(o, v)| *o = v.to_f32()),
            Elements::Bf16(data) => {
                out.iter_mut().zip(&data[at]).for_each(|(o, v)| *o = v.to_f32());
            }
            Elements::Blocks(data) => data.row(r, out),
        }
    }

    /// `x` `(T, cols)` times the transpose: `out` `(T, rows)`.
    pub(crate) fn matmul(&self, x: &[f32], tokens: usize, out: &mut [f32]) {
        match self.head_rows() {
            HeadRows::Dense(data) => {
                trine_kernels::dense_matmul(data, self.rows, self.cols, x, tokens, out);
            }
            HeadRows::Blocks(data) => trine_kernels::block_matmul(data, x, tokens, out),
        }
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// The rows, as a sketch of them reads them.
    pub(crate) fn head_rows(&self) -> HeadRows<'_> {
        match &self.data {
            Elements::F32(data) => HeadRows::Dense(DenseData::F32(data)),
            Elements::F16(data) => HeadRows::Dense(DenseData::F16(data)),
            Elements::Bf16(data) => HeadRows::Dense(DenseData::Bf16(data)),
            Elements::Blocks(data) => HeadRows::Blocks(data),
        }
    }

    /// For what a sketch of it is used.
    pub(crate) fn sketch_use(&self) -> Use {
        const NEVER: usize = usize::MAX;
        let (rows, count, weights) = match &self.data {
            Elements::F32(_) | Elements::F16(_) | Elements::Bf16(_) => (32, 64, 1 << 24),
            Elements::Blocks(data) => match data.kind() {
                BlockKind::Q8_0 => (1, 16, 1 << 24),
                BlockKind::Q6_K => (1, 8, NEVER),
                BlockKind::Q4_0 | BlockKind::Q3_K => (0, 0, NEVER),
            },
        };
        Use { rows, count, weights }
    }
}

/// The blocks that a type consists of, if it does.
pub fn block_kind(dtype: Dtype) -> Option<BlockKind> {
    match dtype {
        Dtype::Q8_0 => Some(BlockKind::Q8_0),
        Dtype::Q6_K => Some(BlockKind::Q6_K),
        Dtype::Q4_0 => Some(BlockKind::Q4_0),
        Dtype::Q3_K => Some(BlockKind::Q3_K),
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => None,
    }
}

/// Checks that all values of a tensor are finite.
pub(crate) fn check_finite<T: Copy + Sync + Into<f32>>(
    name: &str,
    values: &[T],
) -> Result<(), RuntimeError> {
    // Without a branch for each element, as nearly all are finite.
    let bad = |v: &T| !(*v).into().is_finite();
    let first = values.par_chunks(CHECKED).enumerate().find_map_first(|(i, chunk)| {
        let any = chunk.iter().fold(false, |any, v| any | bad(v));
        any.then(|| i * CHECKED + chunk.iter().position(bad).unwrap_or(0))
    });
    match first {
        None => Ok(()),
        Some(index) => {
            let value = values[index].into();
            Err(RuntimeError::NonFinite { tensor: name.to_owned(), index, value })
        }
    }
}

/// Numbers of `B` bytes each, all finite.
fn numbers<T: Pod + Send + Sync + Into<f32>, const B: usize>(
    name: &str,
    bytes: &[u8],
    number: impl Fn([u8; B]) -> T + Sync,
    release: impl Fn(Range<usize>) + Sync,
) -> Result<AlignedBuf<T>, RuntimeError> {
    let bytes = bytes.as_chunks().0;
    let mut values = AlignedBuf::new(bytes.len());
    let chunks = values.par_chunks_mut(CHECKED).zip(bytes.par_chunks(CHECKED));
    chunks.enumerate().for_each(|(i, (values, bytes))| {
        values.iter_mut().zip(bytes).for_each(|(value, bytes)| *value = number(*bytes));
        release(i * CHECKED * B..(i * CHECKED + bytes.len()) * B);
    });
    check_finite(name, &values)?;
    Ok(values)
}

fn head_type(tensor: &str, dtype: Dtype, reason: BoxError) -> RuntimeError {
    RuntimeError::HeadType {
        tensor: tensor.to_owned(),
        dtype: dtype.name(),
        reason: reason.to_string(),
    }
}

/// The tensor in blocks, converted row by row where it is stored as something else.
fn blocks(
    tensor: &DenseTensor<'_>,
    kind: BlockKind,
    rows: usize,
    cols: usize,
    dtype: Dtype,
    release: impl Fn(Range<usize>) + Sync,
) -> Result<BlockMatrix, RuntimeError> {
    let name = &tensor.name;
    dtype.check_columns(cols).map_err(|reason| head_type(name, dtype, reason))?;
    // The first by row, whichever thread meets another one before.
    let failed: Mutex<Option<(usize, BoxError)>> = Mutex::new(None);
    let row_bytes = tensor.data.len() / rows.max(1);
    let matrix = BlockMatrix::from_rows(kind, rows, cols, |r, out| {
        if let Err(reason) = tensor.convert_row(r, rows, dtype, out) {
            let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
            if failed.as_ref().is_none_or(|(first, _)| r < *first) {
                *failed = Some((r, reason));
            }
        }
        // Rows that another thread is still at are read again.
        if (r + 1).is_multiple_of(RELEASED) || r + 1 == rows {
            release(r / RELEASED * RELEASED * row_bytes..(r + 1) * row_bytes);
        }
    });
    if let Some((_, reason)) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(head_type(name, dtype, reason));
    }
    match matrix.first_not_finite() {
        None => Ok(matrix),
        Some(index) => {
            let mut row = vec![0.0; cols];
            matrix.row(index / cols, &mut row);
            let value = row[index % cols];
            Err(RuntimeError::NonFinite { tensor: name.clone(), index, value })
        }
    }
}
