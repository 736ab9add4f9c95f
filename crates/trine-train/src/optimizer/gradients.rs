//! Gradients by name: taken from a backward pass, summed over parts of a batch, measured.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor};
use trine_kernels::parallel;

use super::{CHUNK, in_place};
use crate::ops::view;
use crate::{Params, TrainError};

/// Gradients by parameter name.
pub type Gradients = BTreeMap<String, Tensor>;

/// Takes the gradients of all parameters out of a backward pass.
///
/// # Errors
/// When a parameter received no gradient: an operation without backward cut the graph.
pub fn collect(params: &Params, store: &mut GradStore) -> Result<Gradients, TrainError> {
    let mut gradients = Gradients::new();
    for (name, var) in params.iter() {
        let Some(gradient) = store.remove(var) else {
            return Err(candle_core::Error::Msg(format!("{name} received no gradient")).into());
        };
        gradients.insert(name.to_owned(), gradient.to_dtype(DType::F32)?.contiguous()?);
    }
    Ok(gradients)
}

/// Adds `share` times the gradients of a part of a batch to what other parts have summed up to.
///
/// # Errors
/// When the two are not of the same parameters.
pub fn accumulate(sum: &mut Gradients, part: Gradients, share: f64) -> Result<(), TrainError> {
    for (name, gradient) in part {
        match sum.get(&name) {
            // Scaling makes a tensor of its own: a gradient may share memory with another one.
            None => {
                sum.insert(name, (gradient * share)?);
            }
            Some(sum) => {
                let gradient = view(&gradient)?;
                in_place(sum, |sum| {
                    parallel::for_each_chunk(sum, CHUNK, |i, sum| {
                        for (sum, g) in sum.iter_mut().zip(&gradient[i * CHUNK..]) {
                            *sum += share as f32 * g;
                        }
                    });
                })?;
            }
        }
    }
    Ok(())
}

/// The global L2 norm of all gradients, summed in f64 in name order.
///
/// # Errors
/// When a gradient is not a contiguous f32 tensor on the CPU.
pub fn global_norm(gradients: &Gradients) -> Result<f64, TrainError> {
    let mut sum = 0.0;
    for gradient in gradients.values() {
        sum += squares(&view(gradient)?);
    }
    Ok(sum.sqrt())
}

/// The L2 norm of each gradient.
///
/// # Errors
/// As [`global_norm`].
pub fn norms(gradients: &Gradients) -> Result<BTreeMap<String, f64>, TrainError> {
    gradients.iter().map(|(name, gradient)| Ok((name.clone(), norm(gradient)?))).collect()
}

/// The L2 norm of one gradient.
///
/// # Errors
/// As [`global_norm`].
pub fn norm(gradient: &Tensor) -> Result<f64, TrainError> {
    Ok(squares(&view(gradient)?).sqrt())
}

/// The sum of all squares. Chunks of a fixed size are summed in order: the same bits for any number of
/// threads.
pub(super) fn squares(numbers: &[f32]) -> f64 {
    let squares = |chunk: &[f32]| {
        let mut lanes = [0.0; 8];
        let (whole, rest) = chunk.as_chunks::<8>();
        for numbers in whole {
            for (lane, g) in lanes.iter_mut().zip(numbers) {
                *lane += f64::from(*g).powi(2);
            }
        }
        let rest = rest.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>();
        lanes.iter().sum::<f64>() + rest
    };
    let mut sums = vec![0.0; numbers.len().div_ceil(CHUNK)];
    parallel::for_each(&mut sums, |i, sum| {
        *sum = squares(&numbers[i * CHUNK..numbers.len().min((i + 1) * CHUNK)]);
    });
    sums.iter().sum()
}
