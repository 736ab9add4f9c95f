//! Changing the elements of a tensor where they lie.

use std::cell::Cell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor};
use half::bf16;
use trine_kernels::parallel;

use super::CHUNK;

/// Lets `change` write the elements of a contiguous f32 tensor on the CPU.
///
/// # Errors
/// Any other tensor.
pub(crate) fn in_place(tensor: &Tensor, change: impl FnOnce(&mut [f32])) -> Result<()> {
    tensor.inplace_op1(&InPlace(Cell::new(Some(change))))
}

/// Lets `change` write the elements of a contiguous tensor of f32 or bf16 on the CPU in parts of [`CHUNK`], on
/// all threads, with a `beside` for each part. No more than a part of a bf16 tensor is f32 at a time for a
/// thread; what is left in its place is rounded to the nearest.
///
/// # Errors
/// Any other tensor.
pub(super) fn in_place_parts<T: Send>(
    tensor: &Tensor,
    beside: &mut [T],
    change: impl Fn(usize, &mut [f32], &mut T) + Sync,
) -> Result<()> {
    tensor.inplace_op1(&Parts(Cell::new(Some((beside, change)))))
}

struct Parts<P>(Cell<Option<P>>);

impl<T: Send, F: Fn(usize, &mut [f32], &mut T) + Sync> InplaceOp1 for Parts<(&mut [T], F)> {
    fn name(&self) -> &'static str {
        "in-place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (start, end) = offsets(layout)?;
        let Some((beside, change)) = self.0.take() else { return Ok(()) };
        match storage {
            CpuStorage::F32(values) => {
                let parts = values[start..end].chunks_mut(CHUNK).zip(beside);
                let mut parts: Vec<_> = parts.collect();
                parallel::for_each(&mut parts, |i, (values, beside)| change(i, values, beside));
            }
            CpuStorage::BF16(values) => {
                let parts = values[start..end].chunks_mut(CHUNK).zip(beside);
                let mut parts: Vec<_> = parts.collect();
                parallel::for_each(&mut parts, |i, (values, beside)| {
                    let mut wide: Vec<f32> = values.iter().map(|x| x.to_f32()).collect();
                    change(i, &mut wide, beside);
                    values.iter_mut().zip(wide).for_each(|(x, wide)| *x = bf16::from_f32(wide));
                });
            }
            _ => candle_core::bail!("expected a tensor of f32 or bf16"),
        }
        Ok(())
    }
}

fn offsets(layout: &Layout) -> Result<(usize, usize)> {
    match layout.contiguous_offsets() {
        Some(offsets) => Ok(offsets),
        None => candle_core::bail!("expected a contiguous tensor, found {layout:?}"),
    }
}

/// Candle takes an operation by reference, and this one can be done once only.
struct InPlace<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32])> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        "in-place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (start, end) = offsets(layout)?;
        let Some(change) = self.0.take() else { return Ok(()) };
        let CpuStorage::F32(values) = storage else {
            candle_core::bail!("expected an f32 tensor");
        };
        change(&mut values[start..end]);
        Ok(())
    }
}
