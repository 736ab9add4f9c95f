//! The layers, forward.

use std::ffi::c_void;

use trine_format::names::{Part, TensorId};
use trine_format::{ModelConfig, Projection, Quantization};

use super::activations::Codes;
use super::adapters::Plain;
use super::{Address, Kind, Pass, Product, launch, row_block};
use crate::backend::Backend;
use crate::error::Result;
use crate::layout::{INPUTS, Id, Kept};

/// A product that is to be added to the residual stream.
#[derive(Clone, Copy)]
pub(super) struct Pending {
    /// `(M, D)`
    pub(super) product: Address,
    /// Of the weights.
    pub(super) weight: Option<Address>,
    /// Of the rows that were multiplied.
    pub(super) rows: Option<Address>,
    /// Where the sum goes, `(M, D)` f32.
    pub(super) sum: Address,
}

/// What a norm is given and what it fills.
pub(super) struct Norm {
    pub(super) x: Address,
    /// How `x` is kept.
    pub(super) kind: Kind,
    pub(super) pending: Option<Pending>,
    pub(super) rows: Option<Address>,
    /// `None` for a norm that the model does not have.
    pub(super) weight: Option<Address>,
    /// `None` where codes are wanted as bytes only.
    pub(super) out: Option<Address>,
    /// Where codes go as bytes too.
    pub(super) narrow: Option<Address>,
    /// Where they go for adapters.
    pub(super) plain: Plain,
    /// `None` where values and not codes are wanted.
    pub(super) scales: Option<Address>,
    pub(super) rms: Address,
    /// Rows of the output, and its width.
    pub(super) shape: (usize, usize),
}

impl Pass<'_> {
    /// Runs all layers. What the last one adds to the residual stream is left for the head's norm.
    pub(super) fn forward(&mut self) -> Result<()> {
        let width = self.config.hidden_size;
        let table = self.layout.get(Id::Of(TensorId::Embed)).expect("every model has an embedding");
        let (at, narrow) = (self.masters + table.masters, table.kept == Kept::Bf16);
        let rows = self.input.extent.rows();
        let threads = width.div_ceil(4).next_multiple_of(32).min(256);
        launch!(self.device, "embed", [rows, 1, 1], threads, 0;
            at, narrow, self.ids.inputs.at(), self.memory.input(0), width)?;
        for layer in 0..self.config.num_hidden_layers {
            self.layer(layer, self.pending(layer), false)?;
        }
        Ok(())
    }

    /// What the layer below `layer` is still to add to the residual stream.
    pub(super) fn pending(&self, layer: usize) -> Option<Pending> {
        let below = layer.checked_sub(1)?;
        Some(Pending {
            product: self.memory.product.at(),
            weight: self.scale(below, Projection::Down),
            rows: self.rows(&self.memory.down_scales[below]),
            sum: self.memory.input(layer),
        })
    }

    /// Runs a layer up to the product that it adds to the residual stream. With something `pending` its
    /// input is the residual stream of the layer below, after attention, and that. Run `again` for its backward
    /// pass, it leaves out that product.
    pub(super) fn layer(
        &mut self,
        layer: usize,
        pending: Option<Pending>,
        again: bool,
    ) -> Result<()> {
        self.unpack(layer, false)?;
        let (config, memory) = (self.config, &*self.memory);
        let (rows, width, inner) =
            (self.input.extent.rows(), config.hidden_size, config.intermediate_size);
        let (heads, kv) = (config.attention_width(), config.key_value_width());
        let (state, kind) = (memory.state(layer), self.kind());
        let of = |part| self.master(TensorId::Layer(layer, part));

        let x = match layer.checked_sub(1).filter(|_| pending.is_some()) {
            Some(below) => memory.state(below).middle.at(),
            None => memory.input(layer),
        };
        self.norm(&Norm {
            x,
            kind: Kind::F32,
            pending,
            rows: None,
            weight: of(Part::InputNorm),
            out: self.codes(&state.qkv_input),
            narrow: self.narrow_codes(),
            plain: self.plain(layer, 0, &state.qkv_input),
            scales: self.rows(&state.qkv_input.scales),
            rms: state.qkv_input.rms.at(),
            shape: (rows, width),
        })?;
        let all = heads + 2 * kv;
        self.project(layer, 0, &state.qkv_input, state.qkv.at(), (all, width))?;
        self.rope(layer, state.qkv.at(), false)?;
        self.attention(layer)?;

        self.norm(&Norm {
            x: state.y.at(),
            kind,
            pending: None,
            rows: None,
            weight: of(Part::AttnSubNorm),
            out: self.codes(&state.o_input),
            narrow: self.narrow_codes(),
            plain: self.plain(layer, 1, &state.o_input),
            scales: self.rows(&state.o_input.scales),
            rms: state.o_input.rms.at(),
            shape: (rows, heads),
        })?;
        let product = memory.product.at();
        self.project(layer, 1, &state.o_input, product, (width, heads))?;

        self.norm(&Norm {
            x: memory.input(layer),
            kind: Kind::F32,
            pending: Some(Pending {
                product,
                weight: self.scale(layer, Projection::O),
                rows: self.rows(&state.o_input.scales),
                sum: state.middle.at(),
            }),
            rows: None,
            weight: of(Part::PostAttentionNorm),
            out: self.codes(&state.gate_input),
            narrow: self.narrow_codes(),
            plain: self.plain(layer, 2, &state.gate_input),
            scales: self.rows(&state.gate_input.scales),
            rms: state.gate_input.rms.at(),
            shape: (rows, width),
        })?;
        let gates = state.gates.at();
        self.project(layer, 2, &state.gate_input, gates, (2 * inner, width))?;
        let (threads, groups) = row_block(inner);
        let kernel = format!("gate_{}_{groups}", kind.name());
        let plain = self.plain(layer, 3, &state.down_input);
        let (key, below, kept) = plain.mask();
        launch!(self.device, &kernel, [rows, 1, 1], threads, 0;
            gates,
            self.scale(layer, Projection::Gate),
            self.scale(layer, Projection::Up),
            self.rows(&state.gate_input.scales),
            self.act(),
            of(Part::FfnSubNorm),
            config.rms_norm_eps,
            self.codes(&state.down_input),
            self.narrow_codes(),
            self.rows(&memory.down_scales[layer]),
            state.down_input.rms.at(),
            plain.at,
            key,
            below,
            kept,
            inner)?;
        match again {
            true => self.lower(layer, 3, &state.down_input),
            false => self.project(layer, 3, &state.down_input, product, (width, inner)),
        }
    }

    pub(super) fn norm(&self, norm: &Norm) -> Result<()> {
        let (rows, width) = norm.shape;
        let (threads, groups) = row_block(width);
        let kernel = format!("norm_{}_{}_{groups}", norm.kind.name(), self.kind().name());
        let pending = norm.pending;
        let (key, below, kept) = norm.plain.mask();
        launch!(self.device, &kernel, [rows, 1, 1], threads, 0;
            norm.x,
            pending.map(|pending| pending.product),
            pending.and_then(|pending| pending.weight),
            pending.and_then(|pending| pending.rows),
            pending.map(|pending| pending.sum),
            norm.rows,
            norm.weight,
            self.config.rms_norm_eps,
            norm.out,
            norm.narrow,
            norm.scales,
            norm.rms,
            norm.plain.at,
            key,
            below,
            kept,
            width)
    }

    /// `y (M, out) = x (M, in) W^T`, of the projections of an input, and what their adapters add.
    fn project(
        &self,
        layer: usize,
        input: usize,
        x: &Codes,
        y: Address,
        shape: (usize, usize),
    ) -> Result<()> {
        self.project_base(layer, INPUTS[input][0], x, y, shape)?;
        self.lower(layer, input, x)?;
        self.raise(layer, input, x, y, shape.0)
    }

    /// The same without adapters, of the projections that lie together from `first` on.
    fn project_base(
        &self,
        layer: usize,
        first: Projection,
        x: &Codes,
        y: Address,
        (out, inp): (usize, usize),
    ) -> Result<()> {
        let kind = self.kind();
        if let (Some(trits), Some(codes)) = (self.trits, self.narrow_codes()) {
            let trits = trits + self.copy(layer, first);
            return self.multiply_bytes(codes, trits, y, (self.input.extent.rows(), out, inp));
        }
        let x = self.codes(x).expect("codes that are not bytes");
        let product = Product::new(kind, [self.input.extent.rows(), out, inp], [inp, inp, out]);
        let product = Product { b_transposed: true, ..product };
        self.device.multiply(&product, x, self.weights(layer, first), y)
    }

    /// `y (m, n) = codes (m, k) trits (n, k)^T`, both of bytes; the sums are exact.
    fn multiply_bytes(
        &self,
        codes: Address,
        trits: Address,
        y: Address,
        (m, n, k): (usize, usize, usize),
    ) -> Result<()> {
        let mut codes = self.device.bytes_map(codes, m, k, k)?;
        let mut trits = self.device.bytes_map(trits, n, k, k)?;
        let mut y = y;
        let mut sizes = [m, n, k, n].map(|size| size as u32);
        let mut arguments: Vec<*mut c_void> =
            vec![(&raw mut codes).cast(), (&raw mut trits).cast(), (&raw mut y).cast()];
        arguments.extend(sizes.iter_mut().map(|size| std::ptr::from_mut(size).cast::<c_void>()));
        // Two blocks share what they read, and each has a tile of 128 x 256 at a time.
        let works = m.div_ceil(256) * n.div_ceil(256);
        let pairs = works.min(self.device.processors() / 2).max(1);
        let kernel = format!("product_int8_{}", self.kind().name());
        self.device.launch(&kernel, [2 * pairs as u32, 1, 1], 288, 230_528, &mut arguments)
    }

    /// Where the weights of projections lie, from `first` on.
    pub(super) fn weights(&self, layer: usize, first: Projection) -> Address {
        let weights = self.base.as_ref().map_or(self.multiplied, |base| base.at()[1]);
        weights + self.copy(layer, first) * self.kind().bytes() as u64
    }

    /// The same in elements of what is multiplied.
    fn copy(&self, layer: usize, first: Projection) -> u64 {
        if self.base.is_some() {
            // Of a model that stays as it is one layer is at hand.
            return self.layout.offset(first);
        }
        let tensor = self.layout.get(Id::Of(TensorId::Layer(layer, Part::Projection(first))));
        tensor.and_then(|tensor| tensor.copy).expect("projections are multiplied")
    }

    /// Where the codes of the input that is next multiplied go as bytes, if they are multiplied so.
    pub(super) fn narrow_codes(&self) -> Option<Address> {
        self.trits.map(|_| self.memory.narrow.at())
    }

    /// Turns queries and keys by their positions, or their gradients back.
    pub(super) fn rope(&self, layer: usize, qkv: Address, backward: bool) -> Result<()> {
        let (config, kind) = (self.config, self.kind());
        let (heads, kv_heads, d) =
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let rows = self.input.extent.rows();
        let threads = ((heads + 2 * kv_heads) * (d / 8)).next_multiple_of(32).min(256);
        let kernel = format!("rope_{}{}", if backward { "backward_" } else { "" }, kind.name());
        let [cos, sin] = self.rope;
        launch!(self.device, &kernel, [rows, 1, 1], threads, 0;
            qkv,
            self.scale(layer, Projection::Q),
            self.rows(&self.memory.state(layer).qkv_input.scales),
            cos, sin, self.input.extent.tokens, heads, kv_heads, d)
    }
}

/// Whether codes and trits are multiplied as bytes in the forward pass: with four warps at a time, it is
/// faster, and as exact.
pub(super) fn multiplies_bytes(device: &dyn Backend, config: &ModelConfig) -> bool {
    let widths = [config.hidden_size, config.attention_width(), config.intermediate_size];
    let fits = widths.iter().all(|width| width % 16 == 0);
    config.quantization != Quantization::None && device.has_wgmma() && fits
}
