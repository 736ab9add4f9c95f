//! Changing the elements of a tensor where they lie.

use std::cell::Cell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor};
use half::bf16;
use trine_kernels::parallel;

use super::CHUNK;
use crate::ops::widened;

/// Lets `change` write the elements of a contiguous tensor of f32 or bf16 on the CPU. What it leaves in
/// place of bf16 is rounded to the nearest.
///
/// # Errors
/// Any other tensor.
pub(crate) fn in_place(tensor: &Tensor, change: impl FnOnce(&mut [f32])) -> Result<()> {
    tensor.inplace_op1(&InPlace(Cell::new(Some(change))))
}

/// Candle takes an operation by reference, and this one can be done once only.
struct InPlace<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32])> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        "in-place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("expected a contiguous tensor, found {layout:?}");
        };
        let Some(change) = self.0.take() else { return Ok(()) };
        match storage {
            CpuStorage::F32(values) => change(&mut values[start..end]),
            CpuStorage::BF16(values) => {
                let values = &mut values[start..end];
                let mut wide = widened(values);
                change(&mut wide);
                parallel::for_each_chunk(values, CHUNK, |i, values| {
                    let pairs = values.iter_mut().zip(&wide[i * CHUNK..]);
                    pairs.for_each(|(narrow, wide)| *narrow = bf16::from_f32(*wide));
                });
            }
            _ => candle_core::bail!("expected a tensor of f32 or bf16"),
        }
        Ok(())
    }
}
