//! How two models of one shape differ, tensor by tensor, whatever their origin.
//!
//! Where [`verify`](crate::verify) asks whether a conversion did its work, this only measures.

use trine_format::names::{Part, TensorId};
use trine_format::{ModelConfig, ModelFile};

use crate::ExportError;
use crate::verify::{compare_configs, largest_change, trits, trits_that_differ};

/// What is equal and what is not. All zero differences: the two compute the same.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// Trits compared.
    pub trits: u64,
    /// Trits that differ.
    pub trits_differ: u64,
    /// Scales compared, one a ternary tensor.
    pub scales: usize,
    /// Scales that differ.
    pub scales_differ: usize,
    /// Largest difference of a scale, relative to the first model's.
    pub largest_scale_change: f32,
    /// Tensors of plain numbers compared.
    pub dense_tensors: usize,
    /// Of them, those with a number that differs.
    pub dense_differ: usize,
    /// Largest difference of a plain number, relative to the largest magnitude in its row.
    pub largest_dense_change: f32,
    /// Canonical names of all tensors that differ.
    pub differing: Vec<String>,
}

/// Compares two models.
///
/// # Errors
/// Configurations that compute differently (what only bounds or ends a text may differ), a tensor
/// that one of the models does not have, a model without trits.
pub fn compare(a: &ModelFile, b: &ModelFile) -> Result<Comparison, ExportError> {
    let alike = ModelConfig {
        max_position_embeddings: a.config().max_position_embeddings,
        bos_token_id: a.config().bos_token_id,
        eos_token_ids: a.config().eos_token_ids.clone(),
        ..b.config().clone()
    };
    compare_configs(a.config(), &alike)?;
    let mut found = Comparison::default();
    for id in a.config().tensor_ids() {
        let name = id.canonical();
        let differs = match id {
            TensorId::Layer(layer, Part::Projection(p)) => {
                let (x, y) = (trits(a, layer, p)?, trits(b, layer, p)?);
                let differ = trits_that_differ(&x, &y);
                a.release(&name);
                b.release(&name);
                let change = (y.scale() - x.scale()).abs() / x.scale().max(f32::MIN_POSITIVE);
                found.trits += (x.rows() * x.cols()) as u64;
                found.trits_differ += differ as u64;
                found.scales += 1;
                found.scales_differ += usize::from(change > 0.0);
                found.largest_scale_change = found.largest_scale_change.max(change);
                differ > 0 || change > 0.0
            }
            _ => {
                let (x, y) = (a.dense(&name)?.to_f32(), b.dense(&name)?);
                let change = largest_change(&x, &y);
                found.dense_tensors += 1;
                found.dense_differ += usize::from(change > 0.0);
                found.largest_dense_change = found.largest_dense_change.max(change);
                change > 0.0
            }
        };
        if differs {
            found.differing.push(name);
        }
    }
    Ok(found)
}
