//! Memory for the gradients of a step, and which of them it has made.

use std::collections::BTreeSet;

use candle_core::{DType, Device, Result, Tensor};
use trine_format::names::TensorId;

use crate::optimizer::{Gradients, in_place};
use crate::{Bitnet, Params};

/// The gradients of a step while they are made.
pub(super) struct Found<'a> {
    gradients: &'a mut Gradients,
    written: BTreeSet<String>,
}

impl<'a> Found<'a> {
    /// Of the parameters that have a gradient in `gradients`.
    pub(super) fn within(gradients: &'a mut Gradients) -> Self {
        Self { gradients, written: BTreeSet::new() }
    }

    /// Whether a parameter is trained.
    pub(super) fn wants(&self, name: &str) -> bool {
        self.gradients.contains_key(name)
    }

    /// Lets `write` put, or add to, the gradient of a parameter, if it is trained; there may be anything
    /// before.
    pub(super) fn write(&mut self, name: &str, write: impl FnOnce(&mut [f32])) -> Result<()> {
        let Some(gradient) = self.gradients.get(name) else {
            return Ok(());
        };
        self.written.insert(name.to_owned());
        in_place(gradient, write)
    }

    /// Whether this step has written to a gradient.
    pub(super) fn has(&self, name: &str) -> bool {
        self.written.contains(name)
    }

    /// Checks that all gradients are there.
    ///
    /// # Errors
    /// When one is missing.
    pub(super) fn finish(self) -> Result<()> {
        match self.gradients.keys().find(|name| !self.has(name)) {
            Some(name) => candle_core::bail!("{name} received no gradient"),
            None => Ok(()),
        }
    }
}

/// A gradient for every parameter, all in one stretch of memory: single ones would leave gaps.
pub(crate) fn zeros(params: &Params) -> Result<Gradients> {
    let all = Tensor::zeros(params.count(), DType::F32, &Device::Cpu)?;
    let (mut gradients, mut start) = (Gradients::new(), 0);
    for (name, var) in params.iter() {
        let gradient = all.narrow(0, start, var.elem_count())?.reshape(var.shape())?;
        gradients.insert(name.to_owned(), gradient);
        start += var.elem_count();
    }
    Ok(gradients)
}

/// Memory for the gradients of what is in no layer, and for those of one layer, by the names of the first.
pub(super) fn parts(model: &Bitnet, kept: &Gradients) -> Result<[Gradients; 2]> {
    let mut parts = [Gradients::new(), Gradients::new()];
    for (name, var) in model.params().iter() {
        let part = match TensorId::from_canonical(name) {
            Some(TensorId::Layer(0, _)) => 1,
            Some(TensorId::Layer(..)) => continue,
            _ => 0,
        };
        let fitting = kept.get(name).filter(|kept| kept.shape() == var.shape());
        let gradient = match fitting {
            Some(kept) => kept.clone(),
            None => Tensor::zeros(var.shape(), DType::F32, &Device::Cpu)?,
        };
        parts[part].insert(name.to_owned(), gradient);
    }
    Ok(parts)
}

/// The same memory by the names of another layer.
pub(super) fn layer_gradients(first: &Gradients, layer: usize) -> Gradients {
    let renamed = |name: &str| match TensorId::from_canonical(name) {
        Some(TensorId::Layer(_, part)) => TensorId::Layer(layer, part).canonical(),
        _ => name.to_owned(),
    };
    first.iter().map(|(name, gradient)| (renamed(name), gradient.clone())).collect()
}
