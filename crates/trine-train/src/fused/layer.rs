//! One decoder layer, forward and backward.
//!
//! Buffers of the forward pass become gradients in the backward pass, each in its place.

use candle_core::Result;
use trine_format::{HiddenAct, Projection, names};
use trine_kernels::gemm::Store;
use trine_kernels::nn::{self, Gate};
use trine_kernels::parallel;

use super::head::norm_backward;
use super::products::{self, Input, Products, Weights};
use super::relations::{Lesson, States};
use super::{Buffer, Extent, Found, Pass, is_ternary, mixture};
use crate::Bitnet;
use crate::adapters::{Adapters, Mask};
use crate::ops::{Attention, view};

/// Rows of which a thread makes the gradients of a gate at a time.
const GATE_ROWS: usize = 16;

/// The input of projections `(M, in)`: as their weights multiply it, and for adapters as it was before,
/// but for what is left out of it.
#[derive(Default)]
struct Kept {
    input: Input,
    floats: Buffer,
    mask: Option<Mask>,
}

/// What the backward pass needs of a layer's forward pass.
#[derive(Default)]
pub(super) struct LayerState {
    /// In the order of [`Projection::ALL`].
    weights: Vec<Weights>,
    /// Input of the queries, keys and values `(M, D)`; of the output projection `(M, H d)`; of gate and
    /// up `(M, D)`; of the down projection `(M, F)`.
    qkv_input: Kept,
    o_input: Kept,
    gate_input: Kept,
    down_input: Kept,
    /// Rotated, `(M, H d)` and `(M, K d)`.
    q: Buffer,
    k: Buffer,
    v: Buffer,
    /// What attention returned, `(M, H d)`.
    y: Buffer,
    /// The residual stream after attention, `(M, D)`.
    middle: Buffer,
    /// `(M, F)`
    gate: Buffer,
    up: Buffer,
}

/// A layer of a step.
pub(super) struct Layer<'a> {
    model: &'a Bitnet,
    index: usize,
    extent: Extent<'a>,
    products: &'a mut Products,
    act: Gate,
}

impl<'a> Layer<'a> {
    pub(super) fn new(
        model: &'a Bitnet,
        index: usize,
        extent: Extent<'a>,
        products: &'a mut Products,
    ) -> Self {
        let act = match model.config().hidden_act {
            HiddenAct::Relu2 => Gate::Relu2,
            HiddenAct::Silu => Gate::Silu,
        };
        Self { model, index, extent, products, act }
    }

    /// What is left out of an input of adapters in this step, the inputs of a layer being numbered.
    fn mask(&self, input: usize) -> Option<Mask> {
        let dropout = self.adapters()?.dropout();
        let in_training = self.extent.pass == Pass::Training;
        let mask = dropout.mask(self.model.step(), self.extent.ids, 4 * self.index + input);
        mask.filter(|_| in_training)
    }

    /// The adapters that this pass is made with.
    fn adapters(&self) -> Option<&'a Adapters> {
        self.model.adapters().filter(|_| self.extent.pass != Pass::Base)
    }

    /// Computes `out` from `x`, both `(M, D)`; without `out` only what the backward pass needs.
    pub(super) fn forward(
        &mut self,
        x: &[f32],
        state: &mut LayerState,
        out: Option<&mut [f32]>,
    ) -> Result<()> {
        let config = self.model.config();
        let (rows, width, eps) = (self.extent.rows(), config.hidden_size, config.rms_norm_eps);
        state.weights.resize_with(Projection::ALL.len(), || Weights::Full);
        for p in Projection::ALL {
            self.ternarize(p, &mut state.weights[p as usize])?;
        }
        state.qkv_input.mask = self.mask(0);
        self.normed(x, width, Some(&names::input_norm(self.index)), &mut state.qkv_input)?;
        let heads_width = config.num_attention_heads * config.head_dim;
        let kv_width = config.num_key_value_heads * config.head_dim;
        for (buffer, width) in
            [(&mut state.q, heads_width), (&mut state.k, kv_width), (&mut state.v, kv_width)]
        {
            buffer.resize(rows * width);
        }
        let LayerState { weights, qkv_input, q, k, v, .. } = state;
        let work = [(Projection::Q, &mut q[..]), (Projection::K, k), (Projection::V, v)];
        self.project(weights, qkv_input, work)?;
        state.y.resize(rows * heads_width);
        self.attention().forward(&mut state.q, &mut state.k, &state.v, &mut state.y);

        let sub_norm = config.sub_norms.then(|| names::attn_sub_norm(self.index));
        state.o_input.mask = self.mask(1);
        self.normed(&state.y, heads_width, sub_norm.as_deref(), &mut state.o_input)?;
        state.middle.resize(rows * width);
        self.project(&state.weights, &state.o_input, [(Projection::O, &mut state.middle)])?;
        add(&mut state.middle, x);

        let norm = names::post_attention_norm(self.index);
        state.gate_input.mask = self.mask(2);
        self.normed(&state.middle, width, Some(&norm), &mut state.gate_input)?;
        let inner = config.intermediate_size;
        state.gate.resize(rows * inner);
        state.up.resize(rows * inner);
        let LayerState { weights, gate_input, gate, up, .. } = state;
        self.project(weights, gate_input, [(Projection::Gate, gate), (Projection::Up, up)])?;
        let sub_norm = config.sub_norms.then(|| names::ffn_sub_norm(self.index));
        let weight = sub_norm.map(|name| self.param(&name)).transpose()?;
        let (gate, up, act) = (&state.gate, &state.up, self.act);
        state.down_input.mask = self.mask(3);
        self.keep(&mut state.down_input, inner, |row, to| {
            let at = row * inner;
            nn::gate_into(act, &gate[at..][..inner], &up[at..][..inner], to);
            if let Some(weight) = &weight {
                nn::rms_norm_in_place(to, weight, eps);
            }
        });
        if let Some(out) = out {
            self.project(&state.weights, &state.down_input, [(Projection::Down, &mut *out)])?;
            add(out, &state.middle);
        }
        Ok(())
    }

    /// From `dx` `(M, D)`, the gradient of the layer's output, to that of its input `x`, in its place.
    /// `scratch` may hold anything. With a `lesson`, the gradient is that of its loss too.
    pub(super) fn backward(
        &mut self,
        x: &mut [f32],
        state: &mut LayerState,
        dx: &[f32],
        scratch: &mut Buffer,
        found: &mut Found<'_>,
        lesson: Option<&mut Lesson<'_>>,
    ) -> Result<()> {
        let config = self.model.config();
        let (rows, width, eps) = (self.extent.rows(), config.hidden_size, config.rms_norm_eps);

        scratch.resize(rows * config.intermediate_size);
        let dys = [(Projection::Down, dx)];
        self.gradients(&state.weights, &state.down_input, &dys, scratch, found)?;
        self.gate_backward(state, scratch, found)?;

        scratch.resize(rows * width);
        let dys = [(Projection::Gate, &state.gate[..]), (Projection::Up, &state.up)];
        self.gradients(&state.weights, &state.gate_input, &dys, scratch, found)?;
        let name = names::post_attention_norm(self.index);
        let weight = self.param(&name)?;
        let dw = norm_backward(&mut state.middle, &weight, eps, scratch, Some(dx));
        found.write(&name, |to| to.copy_from_slice(&dw))?;

        let heads_width = config.num_attention_heads * config.head_dim;
        scratch.resize(rows * heads_width);
        let dys = [(Projection::O, &state.middle[..])];
        self.gradients(&state.weights, &state.o_input, &dys, scratch, found)?;
        let mut dy = &*scratch;
        if config.sub_norms {
            let name = names::attn_sub_norm(self.index);
            let weight = self.param(&name)?;
            let dw = norm_backward(&mut state.y, &weight, eps, dy, None);
            found.write(&name, |to| to.copy_from_slice(&dw))?;
            dy = &state.y;
        }
        let lesson = lesson.map(|lesson| (lesson, self.unrotated(state)));
        let LayerState { q, k, v, .. } = state;
        self.attention().backward(self.products.is_bf16(), [q, k, v], dy);
        if let Some((lesson, states)) = lesson {
            lesson.learn(self.extent, &states, [q, k, v]);
        }

        scratch.resize(rows * width);
        let dys =
            [(Projection::Q, &state.q[..]), (Projection::K, &state.k), (Projection::V, &state.v)];
        self.gradients(&state.weights, &state.qkv_input, &dys, scratch, found)?;
        let name = names::input_norm(self.index);
        let weight = self.param(&name)?;
        let dw = norm_backward(x, &weight, eps, scratch, Some(&state.middle));
        found.write(&name, |to| to.copy_from_slice(&dw))
    }

    /// Queries, keys and values after a forward pass, without positions.
    pub(super) fn unrotated(&self, state: &LayerState) -> States {
        let config = self.model.config();
        let mut states = [&state.q, &state.k, &state.v].map(Buffer::clone);
        let [q, k, _] = &mut states;
        self.attention().turn_back(q, config.num_attention_heads);
        self.attention().turn_back(k, config.num_key_value_heads);
        states
    }

    fn attention(&self) -> Attention<'a> {
        let (config, Extent { tokens, starts, .. }) = (self.model.config(), self.extent);
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (d, rope) = (config.head_dim, self.model.rope());
        Attention { tokens, heads, kv_heads, d, rope, starts }
    }

    fn param(&self, name: &str) -> Result<impl std::ops::Deref<Target = [f32]> + use<'a>> {
        view(self.model.params().get(name)?)
    }

    fn ternarize(&self, p: Projection, weights: &mut Weights) -> Result<()> {
        let name = names::projection(self.index, p);
        if let Some(frozen) = self.model.frozen_weights(&name) {
            *weights = Weights::Frozen(frozen.clone());
            return Ok(());
        }
        let (out, inp) = self.model.config().projection_shape(p);
        let masters = self.param(&name)?;
        let made = match mixture(self.model) {
            Some(share) => weights.mix(&masters, [out, inp], share),
            None => weights.refill(is_ternary(self.model), &masters, [out, inp]),
        };
        made.map_err(|e| candle_core::Error::Msg(format!("{name}: {e}")))
    }

    /// Fills the input of projections: rows of `x`, after a norm if one is named.
    fn normed(&self, x: &[f32], cols: usize, norm: Option<&str>, to: &mut Kept) -> Result<()> {
        let weight = norm.map(|name| self.param(name)).transpose()?;
        let eps = self.model.config().rms_norm_eps;
        self.keep(to, cols, |row, to| {
            let x = &x[row * cols..][..cols];
            match &weight {
                Some(weight) => {
                    nn::rms_norm(x, weight, eps, to);
                }
                None => to.copy_from_slice(x),
            }
        });
        Ok(())
    }

    /// Fills the input of projections with rows `(cols,)` that `fill` writes.
    fn keep(&self, to: &mut Kept, cols: usize, fill: impl Fn(usize, &mut [f32]) + Sync) {
        let (ternary, rows) = (is_ternary(self.model), self.extent.rows());
        if let Some(share) = mixture(self.model) {
            return to.input.mix(rows, cols, share, fill);
        }
        if self.adapters().is_none() {
            return to.input.refill(ternary, rows, cols, fill);
        }
        to.floats.resize(rows * cols);
        parallel::for_each_chunk(&mut to.floats, cols, fill);
        let floats = &to.floats;
        to.input.refill(ternary, rows, cols, |row, to| {
            to.copy_from_slice(&floats[row * cols..][..cols]);
        });
        if let Some(mask) = to.mask {
            parallel::for_each_chunk(&mut to.floats, cols, |row, x| {
                let factors = (row * cols..).map(|at| mask.factor(at));
                x.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
            });
        }
    }

    /// Outputs of projections with the same input.
    fn project<const N: usize>(
        &mut self,
        weights: &[Weights],
        kept: &Kept,
        mut work: [(Projection, &mut [f32]); N],
    ) -> Result<()> {
        let masters = work.each_ref().map(|(p, _)| self.masters(weights, *p));
        let mut pairs = Vec::with_capacity(N);
        for ((p, y), masters) in work.iter_mut().zip(&masters) {
            let masters = masters.as_ref().map_err(|e| candle_core::Error::Msg(e.to_string()))?;
            pairs.push((self.projection(weights, *p, masters), &mut **y));
        }
        self.products.forward(&kept.input, &mut pairs);
        let Some(adapters) = self.adapters() else { return Ok(()) };
        for (p, y) in work {
            adapters.with(self.index, p, |adapter| {
                self.products.adapt(&kept.floats, adapter, self.extent.rows(), y)
            })?;
        }
        Ok(())
    }

    /// The masters of a projection, if they are multiplied.
    fn masters(
        &self,
        weights: &[Weights],
        p: Projection,
    ) -> Result<Option<impl std::ops::Deref<Target = [f32]> + use<'a>>> {
        match weights[p as usize] {
            Weights::Full => self.param(&names::projection(self.index, p)).map(Some),
            _ => Ok(None),
        }
    }

    fn projection<'w>(
        &self,
        weights: &'w [Weights],
        p: Projection,
        masters: &'w Option<impl std::ops::Deref<Target = [f32]>>,
    ) -> products::Projection<'w> {
        let (out, inp) = self.model.config().projection_shape(p);
        let masters = match &weights[p as usize] {
            Weights::Mixed(mixed) => mixed,
            _ => masters.as_deref().unwrap_or_default(),
        };
        products::Projection { out, inp, masters, weights: &weights[p as usize] }
    }

    /// The gradients of the weights, or of their adapters, and of the input `(M, in)` of projections that
    /// share it, of the gradients of their outputs.
    fn gradients(
        &mut self,
        weights: &[Weights],
        kept: &Kept,
        dys: &[(Projection, &[f32])],
        dx: &mut [f32],
        found: &mut Found<'_>,
    ) -> Result<()> {
        let rows = self.extent.rows();
        let names = dys.iter().map(|(p, _)| names::projection(self.index, *p));
        let names: Vec<_> = names.collect();
        if names.iter().any(|name| found.wants(name)) {
            self.products.take_input(&kept.input, dx.len() / rows);
        }
        for ((p, dy), name) in dys.iter().zip(&names) {
            let (out, inp) = self.model.config().projection_shape(*p);
            found.write(name, |dw| {
                self.products.weight_gradient(dy, [rows, out, inp], &kept.input, dw);
            })?;
        }
        for (i, (p, dy)) in dys.iter().enumerate() {
            let store = if i == 0 { Store::Set } else { Store::Add };
            let masters = self.masters(weights, *p)?;
            let projection = self.projection(weights, *p, &masters);
            self.products.input_gradient(dy, &projection, store, dx);
        }
        let Some(adapters) = self.adapters() else { return Ok(()) };
        for (p, dy) in dys {
            adapters.with(self.index, *p, |adapter| {
                let (x, mask) = (&kept.floats, kept.mask);
                self.products.adapter_gradients(x, mask, adapter, rows, dy, dx, found)
            })?;
        }
        Ok(())
    }

    /// From `ds` `(M, F)`, the gradient of the down projection's input, to those of gate and up, in
    /// their places.
    fn gate_backward(
        &self,
        state: &mut LayerState,
        ds: &[f32],
        found: &mut Found<'_>,
    ) -> Result<()> {
        let config = self.model.config();
        let (inner, eps, act) = (config.intermediate_size, config.rms_norm_eps, self.act);
        let name = names::ffn_sub_norm(self.index);
        let weight = config.sub_norms.then(|| self.param(&name)).transpose()?;
        let group = GATE_ROWS * inner;
        let chunks = state.gate.chunks_mut(group).zip(state.up.chunks_mut(group));
        let mut work: Vec<_> = chunks.map(|(gate, up)| (gate, up, vec![0.0; inner])).collect();
        parallel::for_each(&mut work, |i, (gate, up, dw)| {
            let (mut h, mut dh) = (vec![0.0; inner], vec![0.0; inner]);
            let rows = gate.chunks_exact_mut(inner).zip(up.chunks_exact_mut(inner));
            for (r, (gate, up)) in rows.enumerate() {
                let ds = &ds[i * group + r * inner..][..inner];
                match &weight {
                    None => nn::gate_backward(act, gate, up, ds),
                    Some(weight) => {
                        nn::gate_into(act, gate, up, &mut h);
                        nn::rms_norm_backward(&h, weight, eps, ds, &mut dh, dw);
                        nn::gate_backward(act, gate, up, &dh);
                    }
                }
            }
        });
        if weight.is_some() {
            found.write(&name, |dw| {
                dw.fill(0.0);
                work.iter().for_each(|(_, _, part)| add(dw, part));
            })?;
        }
        Ok(())
    }
}

fn add(to: &mut [f32], x: &[f32]) {
    const CHUNK: usize = 1 << 14;
    parallel::for_each_chunk(to, CHUNK, |i, to| {
        to.iter_mut().zip(&x[i * CHUNK..]).for_each(|(to, x)| *to += x);
    });
}
