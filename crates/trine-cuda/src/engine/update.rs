//! From masters to trits, and what an optimizer does with gradients.

use super::{Address, Buffer, Engine, Kind, launch};
use crate::error::Result;
use crate::layout::bytes;

/// Parts in which a tensor is summed.
pub(super) const PARTS: usize = 128;

/// An update of AdamW (arXiv 1711.05101).
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// What gradients are multiplied by.
    pub clip: f32,
    /// Decay of the moments.
    pub betas: [f32; 2],
    /// Added to the root of the second moment.
    pub eps: f32,
    /// What is left of matrices after their decay.
    pub keep: f32,
    /// Learning rate, corrected for a first moment that began at zero.
    pub step_size: f32,
    /// Corrects the root of a second moment that began at zero.
    pub inverse_root_correction2: f32,
    /// Decides how masters of bf16 are rounded: a hash of seed and update.
    pub chance: u64,
}

impl Engine {
    /// Makes sure that what is multiplied is what masters are.
    pub(super) fn prepare(&mut self, kind: Kind) -> Result<()> {
        let is_training = kind == self.options.kind;
        let elements = self.layout.copies as usize;
        let copies = if is_training { &mut self.copies } else { &mut self.exact };
        let at = copies.reserve(bytes(elements, kind))?;
        if is_training && !std::mem::take(&mut self.stale) {
            return Ok(());
        }
        let (masters, table, scales) =
            (self.masters.at(), self.tables[0].at(), self.scales.at());
        let scaled = self.layout.scales;
        if scaled > 0 {
            launch!(self.device, "sum_magnitudes", [PARTS, scaled, 1], 256, 0;
                masters, table, self.parts.at())?;
            launch!(self.device, "absmean", [scaled, 1, 1], 256, 0;
                self.parts.at(), PARTS, table, scales)?;
        }
        let kernel = format!("ternarize_{}", kind.name());
        let tensors = self.layout.multiplied.len();
        launch!(self.device, &kernel, [4 * PARTS, tensors, 1], 256, 0;
            masters, table, (scaled > 0).then_some(scales), at)
    }

    /// The square of every parameter's gradient norm, in the order of [`Self::parameters`].
    ///
    /// # Errors
    /// When the device has failed.
    pub fn squares(&mut self) -> Result<Vec<f64>> {
        let tensors = self.layout.tensors.len();
        let scales = self.scales_of_gradients();
        launch!(self.device, "sum_squares", [PARTS, tensors, 1], 256, 0;
            self.gradients.at(), self.tables[1].at(), scales, self.parts.at())?;
        launch!(self.device, "sum_parts", [tensors, 1, 1], 256, 0;
            self.parts.at(), PARTS, self.sums.at())?;
        let mut sums = vec![0f64; tensors];
        self.device.download(self.sums.at(), bytemuck::cast_slice_mut(&mut sums))?;
        Ok(sums)
    }

    fn scales_of_gradients(&self) -> Option<Address> {
        (self.layout.scales > 0).then(|| self.scales.at())
    }

    /// Updates all parameters with the gradients since [`Self::begin`].
    ///
    /// # Errors
    /// When the device has failed.
    pub fn update(&mut self, update: &AdamW) -> Result<()> {
        let tensors = self.layout.tensors.len();
        let scales = self.scales_of_gradients();
        let [m, v] = self.moments.each_ref().map(Buffer::at);
        let [beta1, beta2] = update.betas;
        launch!(self.device, "adamw", [4 * PARTS, tensors, 1], 256, 0;
            self.masters.at(),
            self.gradients.at(),
            m,
            v,
            self.tables[1].at(),
            scales,
            update.clip,
            beta1,
            beta2,
            update.eps,
            update.keep,
            update.step_size,
            update.inverse_root_correction2,
            update.chance)?;
        self.stale = true;
        Ok(())
    }
}
