//! Full-precision matrices: embedding and head, and the projections of a baseline.

use half::{bf16, f16};
use rayon::prelude::*;
use trine_format::{DenseTensor, Dtype};
use trine_kernels::{BlockKind, BlockMatrix, DenseData};

use crate::RuntimeError;

/// Elements that a thread checks at a time.
const CHECKED: usize = 1 << 16;

/// A matrix `(rows, cols)` of plain numbers in the type it was stored in; all finite.
pub(crate) struct DenseMatrix {
    rows: usize,
    cols: usize,
    data: Elements,
}

enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Blocks(BlockMatrix),
}

impl DenseMatrix {
    /// `dtype` is the type to hold it in.
    pub(crate) fn new(
        tensor: &DenseTensor<'_>,
        rows: usize,
        cols: usize,
        dtype: Dtype,
    ) -> Result<Self, RuntimeError> {
        let name = &tensor.name;
        let bytes = &*tensor.convert(dtype).map_err(|reason| RuntimeError::HeadType {
            tensor: name.clone(),
            dtype: dtype.name(),
            reason: reason.to_string(),
        })?;
        let data = match dtype {
            Dtype::Q8_0 => Elements::Blocks(blocks(name, BlockKind::Q8_0, rows, cols, bytes)?),
            Dtype::Q6_K => Elements::Blocks(blocks(name, BlockKind::Q6_K, rows, cols, bytes)?),
            Dtype::Q4_0 => Elements::Blocks(blocks(name, BlockKind::Q4_0, rows, cols, bytes)?),
            Dtype::F32 => Elements::F32(finite(name, quads(bytes))?),
            Dtype::F16 => Elements::F16(finite(name, pairs(bytes, f16::from_le_bytes))?),
            Dtype::BF16 => Elements::Bf16(finite(name, pairs(bytes, bf16::from_le_bytes))?),
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
        let data = match &self.data {
            Elements::F32(data) => DenseData::F32(data),
            Elements::F16(data) => DenseData::F16(data),
            Elements::Bf16(data) => DenseData::Bf16(data),
            Elements::Blocks(data) => return trine_kernels::block_matmul(data, x, tokens, out),
        };
        trine_kernels::dense_matmul(data, self.rows, self.cols, x, tokens, out);
    }
}

/// `values`, where all are finite.
pub(crate) fn finite<T: Copy + Sync + Into<f32>>(
    name: &str,
    values: Vec<T>,
) -> Result<Vec<T>, RuntimeError> {
    // Without a branch for each element, as nearly all are finite.
    let bad = |v: &T| !(*v).into().is_finite();
    let first = values.par_chunks(CHECKED).enumerate().find_map_first(|(i, chunk)| {
        let any = chunk.iter().fold(false, |any, v| any | bad(v));
        any.then(|| i * CHECKED + chunk.iter().position(bad).unwrap_or(0))
    });
    match first {
        None => Ok(values),
        Some(index) => {
            let value = values[index].into();
            Err(RuntimeError::NonFinite { tensor: name.to_owned(), index, value })
        }
    }
}

fn pairs<T: Send>(bytes: &[u8], number: impl Fn([u8; 2]) -> T + Sync) -> Vec<T> {
    bytes.as_chunks().0.par_iter().map(|&pair| number(pair)).collect()
}

fn quads(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.par_iter().map(|&quad| f32::from_le_bytes(quad)).collect()
}

fn blocks(
    name: &str,
    kind: BlockKind,
    rows: usize,
    cols: usize,
    bytes: &[u8],
) -> Result<BlockMatrix, RuntimeError> {
    let matrix = BlockMatrix::new(kind, rows, cols, bytes);
    match matrix.first_not_finite() {
        None => Ok(matrix),
        Some(index) => {
            let mut row = vec![0.0; cols];
            matrix.row(index / cols, &mut row);
            let value = row[index % cols];
            Err(RuntimeError::NonFinite { tensor: name.to_owned(), index, value })
        }
    }
}
