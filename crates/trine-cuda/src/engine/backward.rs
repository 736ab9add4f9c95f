//! The layers, backward: from gradients of the residual stream to those of all parameters.

use trine_format::Projection;
use trine_format::names::{Part, TensorId};

use super::activations::Codes;
use super::{Address, Keep, Kind, Pass, Product, launch, row_block};
use crate::error::Result;
use crate::layout::{INPUTS, Id, bytes};

/// Threads of a multiprocessor that go through rows; and those that ask for a row ahead, for which they need
/// registers.
const THREADS: usize = 1152;
const AHEAD: usize = 640;

/// What a norm's backward pass is given and what it fills.
struct NormBackward {
    x: Address,
    /// How `x` is kept.
    kind: Kind,
    norm: TensorId,
    rms: Address,
    dy: Address,
    /// What `dy` is to be multiplied by.
    dy_scales: Option<Address>,
    residual: Option<Address>,
    rows: Option<Address>,
    dx: Option<Address>,
    /// `dx` times the scales of the projections below, and these.
    scaled: Address,
    next: Option<(Option<Address>, Option<Address>)>,
    /// Rows, and their width.
    shape: (usize, usize),
}

impl Pass<'_> {
    /// The backward pass of everything, after [`Self::forward`].
    pub(super) fn backward(&mut self, weight: f32) -> Result<()> {
        self.head_backward(weight)?;
        let (width, layers) = (self.config.hidden_size, self.config.num_hidden_layers);
        let (all, kind) = (self.input.extent.rows(), self.kind());
        let widths = [width, self.config.attention_width(), self.config.intermediate_size];
        let partial =
            widths.map(|width| self.row_blocks(all, width, THREADS) * width).into_iter().max();
        self.memory.partial.reserve(4 * partial.unwrap_or(0))?;
        let (dx, scaled) = (self.memory.dx.at(), self.memory.scaled.at());
        if self.input.rows.is_some() {
            self.device.clear(dx, all * width * 4)?;
            self.device.clear(scaled, bytes(all * width, kind))?;
        }
        self.norm_backward(&NormBackward {
            x: self.memory.input(layers),
            kind: Kind::F32,
            norm: TensorId::FinalNorm,
            rms: self.memory.hidden_rms.at(),
            dy: self.memory.dhidden.at(),
            dy_scales: None,
            residual: None,
            rows: self.input.rows,
            dx: Some(dx),
            scaled,
            next: Some(self.down(layers - 1)),
            shape: (self.input.learned, width),
        })?;
        self.finished(Id::Of(TensorId::FinalNorm))?;
        for layer in (0..layers).rev() {
            if self.keep == Keep::Inputs {
                self.layer(layer, None, true)?;
            }
            self.unpack(layer, true)?;
            self.layer_backward(layer)?;
        }
        self.embedding_backward()
    }

    /// The scales of a down projection, and of the rows that it multiplies.
    fn down(&self, layer: usize) -> (Option<Address>, Option<Address>) {
        let rows = self.rows(&self.memory.down_scales[layer]);
        (self.scale(layer, Projection::Down), rows)
    }

    fn layer_backward(&self, layer: usize) -> Result<()> {
        let (config, kind) = (self.config, self.kind());
        let (rows, width, inner) =
            (self.input.extent.rows(), config.hidden_size, config.intermediate_size);
        let heads = config.attention_width();
        let all = heads + 2 * config.key_value_width();
        let blocks = self.row_blocks(rows, inner, AHEAD);
        let memory = &*self.memory;
        let state = memory.state(layer);
        let (dx, scaled, dinput) = (memory.dx.at(), memory.scaled.at(), memory.dinput.at());
        let of = |part| TensorId::Layer(layer, part);

        let input = &state.down_input;
        self.projection_backward(layer, 3, scaled, input, Some(dinput), (width, inner))?;
        let gates = state.gates.at();
        let (threads, groups) = row_block(inner);
        let norm = self.master(of(Part::FfnSubNorm));
        let kernel = format!("gate_backward_{}_{groups}", kind.name());
        launch!(self.device, &kernel, [blocks, 1, 1], threads, 0;
            gates,
            self.scale(layer, Projection::Gate),
            self.scale(layer, Projection::Up),
            self.rows(&state.gate_input.scales),
            self.act(),
            norm,
            state.down_input.rms.at(),
            dinput,
            self.rows(&memory.down_scales[layer]),
            self.gradient(Id::Of(of(Part::FfnSubNorm))).map(|_| memory.partial.at()),
            rows,
            inner)?;
        self.sum_norm(of(Part::FfnSubNorm), blocks, inner)?;

        let input = &state.gate_input;
        self.projection_backward(layer, 2, gates, input, Some(dinput), (2 * inner, width))?;
        self.norm_backward(&NormBackward {
            x: state.middle.at(),
            kind: Kind::F32,
            norm: of(Part::PostAttentionNorm),
            rms: state.gate_input.rms.at(),
            dy: dinput,
            dy_scales: self.rows(&state.gate_input.scales),
            residual: Some(dx),
            rows: None,
            dx: Some(dx),
            scaled,
            next: Some((self.scale(layer, Projection::O), self.rows(&state.o_input.scales))),
            shape: (rows, width),
        })?;

        let input = &state.o_input;
        self.projection_backward(layer, 1, scaled, input, Some(dinput), (width, heads))?;
        self.norm_backward(&NormBackward {
            x: state.y.at(),
            kind,
            norm: of(Part::AttnSubNorm),
            rms: state.o_input.rms.at(),
            dy: dinput,
            dy_scales: self.rows(&state.o_input.scales),
            residual: None,
            rows: None,
            dx: None,
            scaled: dinput,
            next: None,
            shape: (rows, heads),
        })?;
        self.attention_backward(layer, dinput)?;
        let dqkv = memory.dqkv.at();
        self.rope(layer, dqkv, true)?;

        // Nothing is trained below the lowest adapters.
        let wanted = (layer > 0 || self.base.is_none()).then_some(dinput);
        self.projection_backward(layer, 0, dqkv, &state.qkv_input, wanted, (all, width))?;
        if wanted.is_none() {
            return Ok(());
        }
        self.norm_backward(&NormBackward {
            x: memory.input(layer),
            kind: Kind::F32,
            norm: of(Part::InputNorm),
            rms: state.qkv_input.rms.at(),
            dy: dinput,
            dy_scales: self.rows(&state.qkv_input.scales),
            residual: Some(dx),
            rows: None,
            dx: Some(dx),
            scaled,
            next: layer.checked_sub(1).map(|below| self.down(below)),
            shape: (rows, width),
        })
    }

    /// From `dy` `(M, out)`, which is times the scales of weights over those of rows, to the gradient of the
    /// values of codes over their scales, `dx` `(M, in)`, where that is wanted, and to that of the projections'
    /// masters, or of their adapters, times their scales.
    fn projection_backward(
        &self,
        layer: usize,
        input: usize,
        dy: Address,
        x: &Codes,
        dx: Option<Address>,
        (out, inp): (usize, usize),
    ) -> Result<()> {
        let (kind, first) = (self.kind(), INPUTS[input][0]);
        let rows = self.input.extent.rows();
        let of_input = Product::new(kind, [rows, inp, out], [out, inp, inp]);
        if let Some(dx) = dx {
            self.device.multiply(&of_input, dy, self.weights(layer, first), dx)?;
        }
        let projection = Id::Of(TensorId::Layer(layer, Part::Projection(first)));
        let Some(gradient) = self.gradient(projection) else {
            return self.adapt_backward(layer, input, x, (dy, out), dx);
        };
        let of_weights = Product {
            m: out,
            n: inp,
            k: rows,
            a_transposed: true,
            result: Kind::F32,
            add: self.add,
            ..of_input
        };
        self.device.multiply(&of_weights, dy, x.codes.at(), gradient)?;
        self.finished(projection)
    }

    fn norm_backward(&self, norm: &NormBackward) -> Result<()> {
        let (rows, width) = norm.shape;
        let (threads, groups) = row_block(width);
        let blocks = self.row_blocks(rows, width, THREADS);
        let weight = self.master(norm.norm);
        let kernel = format!("norm_backward_{}_{}_{groups}", norm.kind.name(), self.kind().name());
        let (next_weight, next_rows) = norm.next.unwrap_or_default();
        launch!(self.device, &kernel, [blocks, 1, 1], threads, 0;
            norm.x,
            weight,
            norm.rms,
            norm.dy,
            norm.dy_scales,
            norm.residual,
            norm.rows,
            norm.dx,
            norm.scaled,
            next_weight,
            next_rows,
            self.gradient(Id::Of(norm.norm)).map(|_| self.memory.partial.at()),
            rows,
            width)?;
        self.sum_norm(norm.norm, blocks, width)
    }

    /// Sums the parts of a norm's gradient, if there is a norm that is trained.
    fn sum_norm(&self, norm: TensorId, parts: usize, width: usize) -> Result<()> {
        let Some(gradient) = self.gradient(Id::Of(norm)) else { return Ok(()) };
        launch!(self.device, "sum_columns", [width.div_ceil(32), 1, 1], 1024, 0;
            self.memory.partial.at(), parts, width, self.add, gradient)
    }

    fn embedding_backward(&self) -> Result<()> {
        let width = self.config.hidden_size;
        let embed = Id::Of(TensorId::Embed);
        let Some(gradient) = self.gradient(embed) else { return Ok(()) };
        if !self.config.tie_word_embeddings && !self.add {
            // Otherwise the head's gradient is there already.
            self.device.clear(gradient, self.config.vocab_size * width * 4)?;
        }
        let [ids, starts, rows] = self.ids.different.each_ref().map(|buffer| buffer.at());
        let threads = width.div_ceil(4).next_multiple_of(32).min(256);
        launch!(self.device, "embed_backward", [self.input.occurring, 1, 1], threads, 0;
            self.memory.dx.at(), ids, starts, rows, gradient, width)?;
        self.finished(embed)
    }
}
