//! Changing the elements of a tensor where they lie.

use std::cell::Cell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor};

/// Lets `change` write the elements of a contiguous f32 tensor on the CPU.
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
        let CpuStorage::F32(values) = storage else {
            candle_core::bail!("expected an f32 tensor");
        };
        if let Some(change) = self.0.take() {
            change(&mut values[start..end]);
        }
        Ok(())
    }
}
