//! The differentiable operations of the network.
//!
//! Each is one Candle custom operation with its own backward pass. The forward passes call
//! `trine-kernels`, as the runtime does, so that trainer and runtime see the same activations bit
//! for bit up to the head. Beside each stands, as a test, its slow composition of Candle's own
//! operations: the oracle for values and gradients. (Candle's fused `rms_norm`, `rope` and
//! `softmax_last_dim` are not used anywhere: they cut the gradient silently.)
//!
//! Shapes: B batch, T tokens, D features, H query heads, K key/value heads, d features of a head,
//! V vocabulary.

mod attention;
mod bitlinear;
mod gate;
mod loss;
mod norm;

pub(crate) use attention::Attention;
pub use attention::{RopeTables, attention};
pub use bitlinear::bitlinear;
pub use gate::gate;
pub use loss::cross_entropy;
pub use norm::rms_norm;

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor};
use trine_kernels::parallel;

/// Elements that one thread takes at a time.
const CHUNK: usize = 1 << 14;

/// The elements of a contiguous tensor on the CPU; made by [`view`].
pub(crate) enum View<G> {
    /// Those of an f32 tensor where they lie.
    Borrowed {
        /// Candle's read guard, whose type it does not name.
        storage: G,
        range: Range<usize>,
    },
    /// Those of a tensor of 16 bits in f32, which loses nothing.
    Widened(Vec<f32>),
}

/// The elements of a contiguous tensor of f32, bf16 or f16 on the CPU, as f32.
pub(crate) fn view(tensor: &Tensor) -> Result<View<impl Deref<Target = Storage> + '_>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("expected a contiguous tensor, found {layout:?}");
    };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(_)) => Ok(View::Borrowed { storage, range: start..end }),
        Storage::Cpu(CpuStorage::BF16(data)) => Ok(View::Widened(widened(&data[start..end]))),
        Storage::Cpu(CpuStorage::F16(data)) => Ok(View::Widened(widened(&data[start..end]))),
        _ => candle_core::bail!("expected a tensor of f32, bf16 or f16 on the CPU"),
    }
}

/// Numbers of 16 bits in f32.
fn widened<T: Copy + Into<f32> + Sync>(numbers: &[T]) -> Vec<f32> {
    let mut out = vec![0.0; numbers.len()];
    parallel::for_each_chunk(&mut out, CHUNK, |i, out| {
        out.iter_mut().zip(&numbers[i * CHUNK..]).for_each(|(out, x)| *out = (*x).into());
    });
    out
}

impl<G: Deref<Target = Storage>> Deref for View<G> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Widened(data) => data,
            Self::Borrowed { storage, range } => match &**storage {
                Storage::Cpu(CpuStorage::F32(data)) => &data[range.clone()],
                _ => unreachable!("checked when the view was made"),
            },
        }
    }
}

/// The elements of a contiguous f32 storage, as custom operations get them.
pub(crate) fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&data[start..end]),
        (CpuStorage::F32(_), None) => candle_core::bail!("expected a contiguous tensor"),
        _ => candle_core::bail!("expected an f32 tensor"),
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! What the oracle tests share.

    use candle_core::{Device, Shape, Tensor, Var};

    /// Values painted with a prime period, in about -2..2, different for every `phase`.
    pub(crate) fn painted(shape: impl Into<Shape>, phase: usize) -> Var {
        let shape = shape.into();
        let value = |i: usize| ((i * 37 + phase * 101) % 257) as f32 / 64.0 - 2.0;
        Var::from_vec((0..shape.elem_count()).map(value).collect(), shape, &Device::Cpu).unwrap()
    }

    /// Largest difference of two tensors, relative to the largest value.
    pub(crate) fn difference(a: &Tensor, b: &Tensor) -> f32 {
        let largest = |t: &Tensor| {
            let flat = t.abs().unwrap().flatten_all().unwrap();
            flat.max(0).unwrap().to_scalar::<f32>().unwrap()
        };
        assert_eq!(a.shape(), b.shape());
        largest(&(a - b).unwrap()) / largest(b).max(1e-30)
    }

    /// Requires that two functions of `inputs` agree in value and in every gradient to 1e-5.
    pub(crate) fn check(
        inputs: &[Var],
        ours: impl Fn(&[Tensor]) -> Tensor,
        oracle: impl Fn(&[Tensor]) -> Tensor,
    ) {
        let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
        let (y, expected) = (ours(&tensors), oracle(&tensors));
        assert!(difference(&y, &expected) < 1e-5, "value");
        let dy = painted(y.shape(), 5).into_inner();
        let backward = |y: Tensor| (y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
        let (grads, expected) = (backward(y), backward(expected));
        for (i, input) in inputs.iter().enumerate() {
            let of = |store: &candle_core::backprop::GradStore| store.get(input).unwrap().clone();
            let difference = difference(&of(&grads), &of(&expected));
            assert!(difference < 1e-5, "gradient of input {i}: {difference}");
        }
    }
}
