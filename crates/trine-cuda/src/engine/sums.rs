//! Gradients of several processes, added up: beside the backward pass where devices have met.
//!
//! The backward pass finishes gradients from the end of their memory to its beginning. A bucket of them is
//! summed as soon as it is finished, while the pass goes on. Which buckets there are, the model alone decides,
//! so a process may have come to its gradients in any way: by a pass, or by having nothing to add.

use std::cell::Cell;
use std::ops::Range;

use trine_data::Batch;

use super::{Address, Backend, Engine, Mask};
use crate::error::{CudaError, Result};

/// Numbers that are on the host at a time.
const PART: usize = 4 << 20;

/// The sums that a pass begins.
pub(super) struct Sums<'a> {
    device: &'a dyn Backend,
    gradients: Address,
    /// Those that have not begun, in elements of gradients, the last ones first.
    left: Cell<&'a [Range<u64>]>,
}

impl<'a> Sums<'a> {
    pub(super) fn new(
        device: &'a dyn Backend,
        gradients: Address,
        buckets: &'a [Range<u64>],
    ) -> Self {
        Self { device, gradients, left: Cell::new(buckets) }
    }

    /// Says that gradients are finished: that of the element `from`, and all after it.
    pub(super) fn finished(&self, from: u64) -> Result<()> {
        while let [bucket, left @ ..] = self.left.get()
            && bucket.start >= from
        {
            let count = (bucket.end - bucket.start) as usize;
            self.device.sum_beside(self.gradients + 4 * bucket.start, count)?;
            self.left.set(left);
        }
        Ok(())
    }
}

impl Engine {
    /// As [`Self::add_masked`], of a step's last batch, by a process whose device has met others: what has been added
    /// since [`Self::begin`] is summed over all of them, each part of it as soon as it is finished.
    ///
    /// # Errors
    /// As [`Self::add`], and when another process has failed. This one has then left them.
    pub fn add_last(&mut self, batch: &Batch, weight: f32, masks: Vec<Mask>) -> Result<()> {
        let added = self.add_part(batch, weight, masks, true);
        self.join(added)
    }

    /// Gradients that are zero, of no batch.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn add_nothing(&mut self) -> Result<()> {
        self.device.clear(self.gradients.at(), self.layout.elements as usize * 4)
    }

    /// Sums the gradients that are there over all processes, as those do that [add their last
    /// batch](Self::add_last).
    ///
    /// # Errors
    /// When another process has failed. This one has then left them.
    pub fn sum_gradients(&mut self) -> Result<()> {
        let sums = Sums::new(&*self.device, self.gradients.at(), &self.buckets);
        self.join(sums.finished(0))
    }

    /// Waits for the sums that have begun, if nothing went wrong.
    fn join(&self, begun: Result<()>) -> Result<()> {
        let joined = begun.and_then(|()| self.device.join_sums());
        if joined.is_err() {
            self.device.leave();
        }
        joined
    }

    /// Lets `change` rewrite all gradients in parts, as they are kept: to add up those of processes by way of
    /// the host.
    ///
    /// # Errors
    /// When the device has failed, and those of `change`.
    pub fn change_gradients<E: From<CudaError>>(
        &mut self,
        mut change: impl FnMut(&mut [f32]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let elements = self.layout.elements as usize;
        let mut part = vec![0f32; elements.min(PART)];
        for start in (0..elements).step_by(PART) {
            let part = &mut part[..PART.min(elements - start)];
            let at = self.gradients.at() + 4 * start as u64;
            self.device.download(at, bytemuck::cast_slice_mut(part))?;
            change(part)?;
            self.device.upload(at, bytemuck::cast_slice(part))?;
        }
        Ok(())
    }
}
