//! What is at hand of a layer between its products, and which layers it is kept of.

use trine_format::{ModelConfig, Projection};

use super::Buffer;
use super::products::Input;
use crate::adapters::Mask;

/// Bytes up to which the work of all layers is kept from the forward to the backward pass. Beyond, it is
/// made again of what layers keep in any case ([`Kept`](super::outputs::Kept)), but for the last one's.
pub(crate) const LITTLE: usize = 256 << 20;

/// The input of projections `(M, in)`: as their weights multiply it, and for adapters as it was before,
/// but for what is left out of it.
#[derive(Default)]
pub(super) struct Entering {
    pub(super) input: Input,
    pub(super) floats: Buffer,
    pub(super) mask: Option<Mask>,
}

/// What is at hand of a layer: all of it follows from the layer's input and from what is
/// [`Kept`](super::outputs::Kept) of it.
#[derive(Default)]
pub(super) struct Work {
    /// Of which layer, if all of it is there.
    pub(super) of: Option<usize>,
    /// Input of the queries, keys and values `(M, D)`; of the output projection `(M, H d)`; of gate and
    /// up `(M, D)`; of the down projection `(M, F)`.
    pub(super) qkv_input: Entering,
    pub(super) o_input: Entering,
    pub(super) gate_input: Entering,
    pub(super) down_input: Entering,
    /// Rotated, `(M, H d)` and `(M, K d)`.
    pub(super) q: Buffer,
    pub(super) k: Buffer,
    pub(super) v: Buffer,
    /// The residual stream after attention, `(M, D)`.
    pub(super) middle: Buffer,
}

/// The gradients that a layer's backward pass hands from one of its parts to the next.
#[derive(Default)]
pub(super) struct Passing {
    /// That of the down projection's input, which becomes that of gate, and that of up, `(M, F)`.
    pub(super) gate: Buffer,
    pub(super) up: Buffer,
    /// That of any other input of projections.
    pub(super) scratch: Buffer,
}

/// Bytes of the [`Work`] of a layer for `rows` rows: of inputs as codes, as floats, or both.
pub(crate) fn bytes(config: &ModelConfig, rows: usize, codes: bool, floats: bool) -> usize {
    let input = |p: Projection| config.projection_shape(p).1;
    let inputs = [Projection::Q, Projection::O, Projection::Gate, Projection::Down].map(input);
    let output = |p: Projection| config.projection_shape(p).0;
    let outputs = [Projection::Q, Projection::K, Projection::V, Projection::O].map(output);
    let of_input = usize::from(codes) + 4 * usize::from(floats);
    rows * (of_input * inputs.iter().sum::<usize>() + 4 * outputs.iter().sum::<usize>())
}

/// Of how many layers the work is kept, which takes so many bytes for each: of all of them where that is no more
/// than `little`, otherwise of the one that is being computed.
pub(crate) fn kept(config: &ModelConfig, bytes: usize, little: usize) -> usize {
    let layers = config.num_hidden_layers;
    if layers.saturating_mul(bytes) <= little { layers } else { 1 }
}
