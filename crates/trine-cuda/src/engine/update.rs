//! From masters to trits, and what an optimizer does with gradients.

use super::{Address, Buffer, Engine, Kind, Product, launch, multiplies_bytes};
use crate::error::Result;
use crate::layout;

/// Parts in which a tensor is summed.
pub(super) const PARTS: usize = 128;

/// An update of Muon (Jordan et al. 2024), of the matrices of the layers.
#[derive(Clone, Copy, Debug)]
pub struct Muon {
    /// Decay of the running mean of gradients.
    pub momentum: f32,
    /// What is left of weights after their decay.
    pub keep: f32,
    /// Learning rate.
    pub learning_rate: f64,
    /// Of the quintic `a x + b x^3 + c x^5` that makes a matrix orthogonal.
    pub coefficients: [f32; 3],
    /// Applications of the quintic.
    pub steps: usize,
    /// How far an orthogonal matrix of so many rows and columns goes at a learning rate of 1.
    pub scale: fn(usize, usize) -> f64,
}

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
        let at = copies.reserve(layout::bytes(elements, kind))?;
        if !std::mem::take(&mut self.stale[usize::from(!is_training)]) {
            return Ok(());
        }
        if self.base.is_some() {
            return self.prepare_adapters(kind, at);
        }
        let (masters, table, scales) = (self.masters.at(), self.tables[0].at(), self.scales.at());
        let scaled = self.layout.scales;
        if scaled > 0 {
            launch!(self.device, "sum_magnitudes", [PARTS, scaled, 1], 256, 0;
                masters, table, self.parts.at())?;
            launch!(self.device, "absmean", [scaled, 1, 1], 256, 0;
                self.parts.at(), PARTS, table, scales)?;
        }
        let bytes = multiplies_bytes(&*self.device, &self.config);
        let trits = match bytes {
            true => Some(self.trits.reserve(elements)?),
            false => None,
        };
        let kernel = format!("ternarize_{}", kind.name());
        let tensors = self.layout.multiplied.len();
        launch!(self.device, &kernel, [4 * PARTS, tensors, 1], 256, 0;
            masters, table, (scaled > 0).then_some(scales), at, trits)
    }

    /// The square of every parameter's gradient norm, in the order of [`Self::parameters`].
    ///
    /// # Errors
    /// When the device has failed.
    pub fn squares(&mut self) -> Result<Vec<f64>> {
        let tensors = self.layout.trained().len();
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

    /// Updates all parameters with the gradients since [`Self::begin`]: the matrices of the layers with Muon
    /// where it is given, which the engine was made for, and everything else with AdamW.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn update(&mut self, update: &AdamW, muon: Option<&Muon>) -> Result<()> {
        if let Some(muon) = muon {
            for at in 0..self.layout.trained().len() {
                if self.layout.tensors[at].is_projection() {
                    self.orthogonal_update(at, update, muon)?;
                }
            }
        }
        let (table, tensors) = match muon {
            Some(_) => (&self.tables[2], self.layout.others().count()),
            None => (&self.tables[1], self.layout.trained().len()),
        };
        let scales = self.scales_of_gradients();
        let [m, v] = self.moments.each_ref().map(Buffer::at);
        let [beta1, beta2] = update.betas;
        launch!(self.device, "adamw", [4 * PARTS, tensors, 1], 256, 0;
            self.masters.at(),
            self.gradients.at(),
            m,
            v,
            table.at(),
            scales,
            update.clip,
            beta1,
            beta2,
            update.eps,
            update.keep,
            update.step_size,
            update.inverse_root_correction2,
            update.chance)?;
        self.stale = [true; 2];
        Ok(())
    }

    /// Moves a matrix against its running mean of gradients, made orthogonal by Newton-Schulz steps.
    fn orthogonal_update(&mut self, at: usize, update: &AdamW, muon: &Muon) -> Result<()> {
        let tensor = &self.layout.tensors[at];
        let [rows, columns] = [tensor.shape[0], tensor.shape[1]];
        let (n, small) = (rows * columns, rows.min(columns));
        let kind = self.options.kind;
        let square = small * small;
        let sizes = [4 * n, layout::bytes(n, kind), 4 * n, 4 * square, 4 * square];
        let [x, factors, product, gram, squared] = {
            let mut at = [0; 5];
            for ((at, buffer), bytes) in at.iter_mut().zip(&mut self.orthogonal).zip(sizes) {
                *at = buffer.reserve(bytes)?;
            }
            at
        };
        let polynomial = self.orthogonal[5].reserve(layout::bytes(square, kind))?;
        let (offset, blocks) = (tensor.start * 4, 4 * PARTS);
        let scale = tensor.scale.map(|scale| self.scales.at() + 4 * scale as u64);
        let (parts, sum) = (self.parts.at(), self.sums.at());
        launch!(self.device, "muon_direction", [PARTS, 1, 1], 256, 0;
            self.gradients.at() + offset, scale, update.clip, muon.momentum,
            self.moments[0].at() + offset, x, parts, n as u64)?;
        launch!(self.device, "sum_parts", [1, 1, 1], 256, 0; parts, PARTS, sum)?;
        let run = |kernel: &str| format!("{kernel}_{}", kind.name());
        launch!(self.device, &run("muon_begin"), [blocks, 1, 1], 256, 0; x, sum, factors, n as u64)?;
        let [a, b, c] = muon.coefficients;
        let of = |m, n, k, a_stride, b_stride| Product {
            result: Kind::F32,
            ..Product::new(kind, [m, n, k], [a_stride, b_stride, n])
        };
        // The products of a matrix with itself are of the smaller size; that of a tall one is turned.
        let wide = rows <= columns;
        let with_itself = Product {
            a_transposed: !wide,
            b_transposed: wide,
            ..of(small, small, rows.max(columns), columns, columns)
        };
        let symmetric = of(small, small, small, small, small);
        let (next, left, right) = match wide {
            true => (of(rows, columns, rows, rows, columns), polynomial, factors),
            false => (of(rows, columns, columns, columns, columns), factors, polynomial),
        };
        for _ in 0..muon.steps {
            self.device.multiply(&with_itself, factors, factors, gram)?;
            launch!(self.device, &run("cast"), [blocks, 1, 1], 256, 0;
                gram, polynomial, square as u64)?;
            self.device.multiply(&symmetric, polynomial, polynomial, squared)?;
            launch!(self.device, &run("muon_polynomial"), [blocks, 1, 1], 256, 0;
                gram, squared, b, c, polynomial, square as u64)?;
            self.device.multiply(&next, left, right, product)?;
            launch!(self.device, &run("muon_add"), [blocks, 1, 1], 256, 0;
                x, product, a, factors, n as u64)?;
        }
        let step = (muon.learning_rate * (muon.scale)(rows, columns)) as f32;
        launch!(self.device, "muon_update", [blocks, 1, 1], 256, 0;
            self.masters.at(), self.tables[1].at(), at, x, muon.keep, step, update.chance)
    }
}
