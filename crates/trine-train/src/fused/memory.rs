//! Memory of a step: for what layers keep, and for gradients.
//!
//! When the gradients of a layer are made, what the layer above has kept is of no use any more. So they
//! go there, and what takes the more memory of the two is all that there is of both.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, Var};
use trine_format::names::TensorId;

use crate::Params;
use crate::optimizer::{Gradients, in_place};

/// Memory that stays from one step to the next.
#[derive(Default)]
pub(super) struct Memory {
    /// What layer `i` keeps, and after that the gradients of layer `i - 1`. One is written while the next
    /// is, or any one beside the first, so these are of different tensors; single ones would leave gaps.
    parts: Vec<Tensor>,
    /// Those of layers within `parts`, all others together.
    gradients: Gradients,
}

impl Memory {
    /// Makes room for what `layers` layers keep, so many `floats` each, and beside or in their place for
    /// the gradients of `params`, if all of these are to be there at once.
    pub(super) fn prepare(
        &mut self,
        layers: usize,
        floats: usize,
        params: Option<&Params>,
    ) -> Result<()> {
        let mut sizes = vec![floats; layers];
        for (layer, n) in params.into_iter().flat_map(of_layers) {
            sizes.resize(sizes.len().max(layer + 2), 0);
            sizes[layer + 1] = sizes[layer + 1].max(n);
        }
        let has = |at: usize| self.parts.get(at).map_or(0, Tensor::elem_count);
        if sizes.iter().enumerate().any(|(at, size)| has(at) < *size) {
            sizes.resize(sizes.len().max(self.parts.len()), 0);
            sizes.iter_mut().enumerate().for_each(|(at, size)| *size = has(at).max(*size));
            self.allocate(&sizes)?;
        }
        match params {
            Some(params) => self.lay_out(params),
            None => Ok(()),
        }
    }

    /// Parts of these sizes.
    fn allocate(&mut self, sizes: &[usize]) -> Result<()> {
        // What is given up need not be there beside the new ones.
        self.parts.clear();
        self.gradients.clear();
        let tensor = |at: usize| if at == 0 { 0 } else { 1 + at % 2 };
        let mut totals = [0; 3];
        sizes.iter().enumerate().for_each(|(at, size)| totals[tensor(at)] += size);
        let [first, even, odd] = totals;
        let (tensors, mut starts) = ([zeros(first)?, zeros(even)?, zeros(odd)?], [0; 3]);
        for (at, size) in sizes.iter().enumerate() {
            let start = &mut starts[tensor(at)];
            self.parts.push(tensors[tensor(at)].narrow(0, *start, *size)?);
            *start += size;
        }
        Ok(())
    }

    /// Gives every parameter its gradient.
    fn lay_out(&mut self, params: &Params) -> Result<()> {
        let fits = |(name, var): (&str, &Var)| {
            self.gradients.get(name).is_some_and(|gradient| gradient.shape() == var.shape())
        };
        if self.gradients.len() == params.iter().count() && params.iter().all(fits) {
            return Ok(());
        }
        self.gradients.clear();
        let others = params.iter().filter(|(name, _)| layer_of(name).is_none());
        let others = others.map(|(_, var)| var.elem_count()).sum::<usize>();
        let others = zeros(others)?;
        // Where the next one of each layer begins, and of the others.
        let (mut starts, mut start) = (vec![0; self.parts.len()], 0);
        for (name, var) in params.iter() {
            let (memory, start) = match layer_of(name) {
                Some(layer) => (&self.parts[layer + 1], &mut starts[layer + 1]),
                None => (&others, &mut start),
            };
            let gradient = memory.narrow(0, *start, var.elem_count())?.reshape(var.shape())?;
            *start += var.elem_count();
            self.gradients.insert(name.to_owned(), gradient);
        }
        Ok(())
    }

    /// The gradients that there is room for, of which those of a layer are in the place of what the layer
    /// above keeps.
    pub(super) fn gradients(&self) -> Gradients {
        self.gradients.clone()
    }

    /// Lets `work` write what layer `layer` keeps.
    pub(super) fn keep<T>(
        &self,
        layer: usize,
        work: impl FnOnce(&mut [f32]) -> Result<T>,
    ) -> Result<T> {
        let mut made = None;
        in_place(&self.parts[layer], |memory| made = Some(work(memory)))?;
        made.expect("done in place")
    }
}

fn zeros(n: usize) -> Result<Tensor> {
    Tensor::zeros(n, DType::F32, &Device::Cpu)
}

fn layer_of(name: &str) -> Option<usize> {
    match TensorId::from_canonical(name) {
        Some(TensorId::Layer(layer, _)) => Some(layer),
        _ => None,
    }
}

/// Numbers of the parameters of layers, by layer.
fn of_layers(params: &Params) -> BTreeMap<usize, usize> {
    let mut sizes = BTreeMap::new();
    for (name, var) in params.iter() {
        if let Some(layer) = layer_of(name) {
            *sizes.entry(layer).or_default() += var.elem_count();
        }
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> Params {
        let names = ["embed_tokens.weight", "layers.0.mlp.up_proj.weight"];
        let more = ["layers.1.mlp.up_proj.weight", "norm.weight"];
        let names = names.into_iter().chain(more).map(|name| format!("model.{name}"));
        let var = || Var::zeros((3, 5), DType::F32, &Device::Cpu).unwrap();
        Params::from_vars(names.map(|name| (name, var())))
    }

    fn sums(memory: &Memory) -> Vec<f32> {
        let sum = |gradient: Tensor| gradient.sum_all().unwrap().to_scalar().unwrap();
        memory.gradients().into_values().map(sum).collect()
    }

    /// Lets layer `layer` keep this number everywhere.
    fn keep(memory: &Memory, layer: usize, number: f32) {
        let fill = |floats: &mut [f32]| {
            floats.fill(number);
            Ok(())
        };
        memory.keep(layer, fill).unwrap();
    }

    #[test]
    fn gradients_of_a_layer_lie_where_the_layer_above_has_kept_its_things() {
        let (params, mut memory) = (params(), Memory::default());
        memory.prepare(2, 20, Some(&params)).unwrap();
        for layer in [0, 1] {
            keep(&memory, layer, 1.0 + layer as f32);
        }
        // Embedding, first and second layer, final norm; the second layer has none above it.
        assert_eq!(sums(&memory), [0.0, 30.0, 0.0, 0.0]);
        let places = memory.parts.iter().map(Tensor::elem_count).collect::<Vec<_>>();
        assert_eq!(places, [20, 20, 15]);
    }

    #[test]
    fn memory_stays_until_more_is_kept() {
        let (params, mut memory) = (params(), Memory::default());
        memory.prepare(2, 20, Some(&params)).unwrap();
        let ids = |memory: &Memory| memory.parts.iter().map(Tensor::id).collect::<Vec<_>>();
        let before = ids(&memory);
        memory.prepare(2, 7, Some(&params)).unwrap();
        memory.prepare(1, 20, None).unwrap();
        assert_eq!(ids(&memory), before);
        memory.prepare(2, 30, Some(&params)).unwrap();
        assert_eq!(sums(&memory), [0.0; 4]);
        keep(&memory, 1, 1.0);
        assert_eq!(sums(&memory)[1], 15.0);
    }
}
