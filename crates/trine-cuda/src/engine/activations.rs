//! What a pass through the network keeps on the device.

use std::sync::Arc;

use trine_format::ModelConfig;

use super::Adapters;
use crate::backend::{Address, Backend, Buffer, Kind};
use crate::error::Result;
use crate::layout::bytes;

/// How large a batch is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    pub(super) batch: usize,
    pub(super) tokens: usize,
}

impl Extent {
    pub(super) fn rows(self) -> usize {
        self.batch * self.tokens
    }
}

/// Rows of codes, and of their scales.
pub(super) struct Codes {
    pub(super) codes: Buffer,
    pub(super) scales: Buffer,
    /// One over the root of the mean square of what the norm before them was given.
    pub(super) rms: Buffer,
    /// What adapters have between their matrices, `(M, n r)`. Then `codes` are what adapters read.
    pub(super) low: Buffer,
}

impl Codes {
    fn new(device: &Arc<dyn Backend>) -> Self {
        let [codes, scales, rms, low] = std::array::from_fn(|_| Buffer::new(device));
        Self { codes, scales, rms, low }
    }

    /// `between`: columns of what adapters have between their matrices.
    fn reserve(
        &mut self,
        rows: usize,
        width: usize,
        kind: Kind,
        between: Option<usize>,
    ) -> Result<()> {
        if between != Some(0) {
            self.codes.reserve(bytes(rows * width, kind))?;
        }
        self.low.reserve(bytes(rows * between.unwrap_or(0), kind))?;
        self.scales.reserve(rows * 4)?;
        self.rms.reserve(rows * 4)?;
        Ok(())
    }
}

/// What a layer's backward pass needs of its forward pass.
pub(super) struct State {
    /// The residual stream after attention, `(M, D)` f32.
    pub(super) middle: Buffer,
    /// Input of queries, keys and values `(M, D)`; of the output projection `(M, H d)`; of gate and up
    /// `(M, D)`; of the down projection `(M, F)`.
    pub(super) qkv_input: Codes,
    pub(super) o_input: Codes,
    pub(super) gate_input: Codes,
    pub(super) down_input: Codes,
    /// Rotated, `(M, (H + 2 K) d)`.
    pub(super) qkv: Buffer,
    /// What attention returned, `(M, H d)`.
    pub(super) y: Buffer,
    /// Logarithms of the sums of its exponentials, `(B, H, T)` f32.
    pub(super) lse: Buffer,
    /// Products of gate and up, `(M, 2 F)`.
    pub(super) gates: Buffer,
}

impl State {
    fn new(device: &Arc<dyn Backend>) -> Self {
        let codes = || Codes::new(device);
        let [middle, qkv, y, lse, gates] = std::array::from_fn(|_| Buffer::new(device));
        Self {
            middle,
            qkv_input: codes(),
            o_input: codes(),
            gate_input: codes(),
            down_input: codes(),
            qkv,
            y,
            lse,
            gates,
        }
    }

    fn reserve(
        &mut self,
        config: &ModelConfig,
        extent: Extent,
        kind: Kind,
        adapters: Option<&Adapters>,
    ) -> Result<()> {
        let (rows, width, inner) = (extent.rows(), config.hidden_size, config.intermediate_size);
        let heads = config.attention_width();
        let all = heads + 2 * config.key_value_width();
        self.middle.reserve(rows * width * 4)?;
        let inputs = [
            (&mut self.qkv_input, width),
            (&mut self.o_input, heads),
            (&mut self.gate_input, width),
            (&mut self.down_input, inner),
        ];
        for (i, (input, width)) in inputs.into_iter().enumerate() {
            input.reserve(rows, width, kind, adapters.map(|adapters| adapters.between(i)))?;
        }
        self.qkv.reserve(bytes(rows * all, kind))?;
        self.y.reserve(bytes(rows * heads, kind))?;
        self.lse.reserve(rows * config.num_attention_heads * 4)?;
        self.gates.reserve(bytes(rows * 2 * inner, kind))?;
        Ok(())
    }
}

/// The memory of a pass.
pub(super) struct Activations {
    device: Arc<dyn Backend>,
    pub(super) kind: Kind,
    /// `(M, D)` f32: the input of every layer and the output of the last; without a backward pass two that
    /// are used in turn.
    pub(super) inputs: Vec<Buffer>,
    pub(super) states: Vec<State>,
    /// Scales of the inputs of down projections, which the backward pass of the layer above needs.
    pub(super) down_scales: Vec<Buffer>,
    /// `(M, max(D, H d, F))`: codes as bytes, until they are multiplied.
    pub(super) narrow: Buffer,
    /// The same as they are multiplied, where nobody needs them again; and in the backward pass what adapters add to
    /// the gradient of an input, of which something is left out.
    pub(super) codes: Buffer,
    /// `(M, n r)`: the gradient of what adapters have between their matrices.
    pub(super) dlow: Buffer,
    /// `(M, D)`: a product that is to be added to the residual stream.
    pub(super) product: Buffer,
    /// Rows that predict something, after the last norm, `(n, D)`, and their gradient.
    pub(super) hidden: Buffer,
    pub(super) hidden_rms: Buffer,
    pub(super) dhidden: Buffer,
    /// Some rows of logits.
    pub(super) logits: Buffer,
    /// `(n,)` f32
    pub(super) losses: Buffer,
    /// Gradient of the residual stream, `(M, D)` f32, and times what the projections below want.
    pub(super) dx: Buffer,
    pub(super) scaled: Buffer,
    /// Gradients of inputs of projections, `(M, max(D, H d, F))`, and of queries, keys and values.
    pub(super) dinput: Buffer,
    pub(super) dqkv: Buffer,
    /// `(B, H, T)` f32, of attention; without a backward pass `(n,)`, by how much the largest logits are larger
    /// than the targets'.
    pub(super) delta: Buffer,
    /// Parts of gradients of norms.
    pub(super) partial: Buffer,
}

impl Activations {
    pub(super) fn new(device: &Arc<dyn Backend>, kind: Kind) -> Self {
        let buffer = || Buffer::new(device);
        Self {
            device: device.clone(),
            kind,
            inputs: Vec::new(),
            states: Vec::new(),
            down_scales: Vec::new(),
            narrow: buffer(),
            codes: buffer(),
            dlow: buffer(),
            product: buffer(),
            hidden: buffer(),
            hidden_rms: buffer(),
            dhidden: buffer(),
            logits: buffer(),
            losses: buffer(),
            dx: buffer(),
            scaled: buffer(),
            dinput: buffer(),
            dqkv: buffer(),
            delta: buffer(),
            partial: buffer(),
        }
    }

    /// Memory for a batch: for every layer's backward pass, for that of one at a time, or for none.
    pub(super) fn reserve(
        &mut self,
        config: &ModelConfig,
        extent: Extent,
        keep: Keep,
        adapters: Option<&Adapters>,
    ) -> Result<()> {
        let (rows, width, layers) = (extent.rows(), config.hidden_size, config.num_hidden_layers);
        let (inputs, states) = match keep {
            Keep::All => (layers + 1, layers),
            Keep::Inputs => (layers + 1, 1),
            Keep::Nothing => (2, 1),
        };
        let device = &self.device;
        self.inputs.resize_with(inputs.max(self.inputs.len()), || Buffer::new(device));
        self.states.resize_with(states.max(self.states.len()), || State::new(device));
        self.down_scales.resize_with(layers, || Buffer::new(device));
        for input in &mut self.inputs[..inputs] {
            input.reserve(rows * width * 4)?;
        }
        for state in &mut self.states[..states] {
            state.reserve(config, extent, self.kind, adapters)?;
        }
        for scales in &mut self.down_scales {
            scales.reserve(rows * 4)?;
        }
        let kind = self.kind;
        let heads = config.attention_width();
        let widest = width.max(heads).max(config.intermediate_size);
        self.narrow.reserve(rows * widest)?;
        if let Some(adapters) = adapters {
            self.codes.reserve(bytes(rows * widest, kind))?;
            self.dlow.reserve(bytes(rows * adapters.most_between(), kind))?;
        }
        self.product.reserve(bytes(rows * width, kind))?;
        self.hidden.reserve(bytes(rows * width, kind))?;
        self.hidden_rms.reserve(rows * 4)?;
        self.losses.reserve(rows * 4)?;
        if keep != Keep::Nothing {
            self.dhidden.reserve(bytes(rows * width, kind))?;
            self.dx.reserve(rows * width * 4)?;
            self.scaled.reserve(bytes(rows * width, kind))?;
            self.dinput.reserve(bytes(rows * widest, kind))?;
            self.dqkv.reserve(bytes(rows * (heads + 2 * config.key_value_width()), kind))?;
            self.delta.reserve(rows * config.num_attention_heads * 4)?;
        } else {
            self.delta.reserve(rows * 4)?;
        }
        Ok(())
    }

    /// The state of a layer.
    pub(super) fn state(&self, layer: usize) -> &State {
        &self.states[layer % self.states.len()]
    }

    /// The input of a layer; of the number of layers, the output of the last.
    pub(super) fn input(&self, layer: usize) -> Address {
        self.inputs[layer % self.inputs.len()].at()
    }
}

/// What a pass keeps for a backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    All,
    /// Layers are run once more.
    Inputs,
    Nothing,
}
