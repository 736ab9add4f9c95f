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
use super::{Extent, Found, is_ternary};
use crate::Bitnet;
use crate::ops::{Attention, view};

/// Rows of which a thread makes the gradients of a gate at a time.
const GATE_ROWS: usize = 16;

/// What the backward pass needs of a layer's forward pass.
#[derive(Default)]
pub(super) struct LayerState {
    /// In the order of [`Projection::ALL`].
    weights: Vec<Weights>,
    /// Input of the queries, keys and values `(M, D)`; of the output projection `(M, H d)`; of gate and
    /// up `(M, D)`; of the down projection `(M, F)`.
    qkv_input: Input,
    o_input: Input,
    gate_input: Input,
    down_input: Input,
    /// Rotated, `(M, H d)` and `(M, K d)`.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// What attention returned, `(M, H d)`.
    y: Vec<f32>,
    /// The residual stream after attention, `(M, D)`.
    middle: Vec<f32>,
    /// `(M, F)`
    gate: Vec<f32>,
    up: Vec<f32>,
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

    /// Computes `out` from `x`, both `(M, D)`; without `out` only what the backward pass needs.
    pub(super) fn forward(
        &mut self,
        x: &[f32],
        state: &mut LayerState,
        out: Option<&mut [f32]>,
    ) -> Result<()> {
        let config = self.model.config();
        let (rows, width, eps) = (self.extent.rows(), config.hidden_size, config.rms_norm_eps);
        state.weights.clear();
        for p in Projection::ALL {
            state.weights.push(self.weights(p)?);
        }
        state.qkv_input = self.normed(x, width, Some(&names::input_norm(self.index)))?;
        let heads_width = config.num_attention_heads * config.head_dim;
        let kv_width = config.num_key_value_heads * config.head_dim;
        for (buffer, width) in
            [(&mut state.q, heads_width), (&mut state.k, kv_width), (&mut state.v, kv_width)]
        {
            buffer.resize(rows * width, 0.0);
        }
        let LayerState { weights, qkv_input, q, k, v, .. } = state;
        let work = [(Projection::Q, &mut q[..]), (Projection::K, k), (Projection::V, v)];
        self.project(weights, qkv_input, work)?;
        state.y.resize(rows * heads_width, 0.0);
        self.attention().forward(&mut state.q, &mut state.k, &state.v, &mut state.y);

        let sub_norm = config.sub_norms.then(|| names::attn_sub_norm(self.index));
        state.o_input = self.normed(&state.y, heads_width, sub_norm.as_deref())?;
        state.middle.resize(rows * width, 0.0);
        self.project(&state.weights, &state.o_input, [(Projection::O, &mut state.middle)])?;
        add(&mut state.middle, x);

        let norm = names::post_attention_norm(self.index);
        state.gate_input = self.normed(&state.middle, width, Some(&norm))?;
        let inner = config.intermediate_size;
        state.gate.resize(rows * inner, 0.0);
        state.up.resize(rows * inner, 0.0);
        let LayerState { weights, gate_input, gate, up, .. } = state;
        self.project(weights, gate_input, [(Projection::Gate, gate), (Projection::Up, up)])?;
        let sub_norm = config.sub_norms.then(|| names::ffn_sub_norm(self.index));
        let weight = sub_norm.map(|name| self.param(&name)).transpose()?;
        let (gate, up, act) = (&state.gate, &state.up, self.act);
        state.down_input = Input::new(is_ternary(self.model), rows, inner, |row, to| {
            let at = row * inner;
            to.copy_from_slice(&gate[at..][..inner]);
            nn::gate(act, to, &up[at..][..inner]);
            if let Some(weight) = &weight {
                let x = to.to_vec();
                nn::rms_norm(&x, weight, eps, to);
            }
        });
        if let Some(out) = out {
            self.project(&state.weights, &state.down_input, [(Projection::Down, &mut *out)])?;
            add(out, &state.middle);
        }
        Ok(())
    }

    /// From `dx` `(M, D)`, the gradient of the layer's output, to that of its input, in its place; `x`
    /// is the input.
    pub(super) fn backward(
        &mut self,
        mut x: Vec<f32>,
        state: &mut LayerState,
        dx: &mut Vec<f32>,
        found: &mut Found,
    ) -> Result<()> {
        let config = self.model.config();
        let (rows, width, eps) = (self.extent.rows(), config.hidden_size, config.rms_norm_eps);
        let inner = config.intermediate_size;

        let mut ds = vec![0.0; rows * inner];
        self.gradients(
            &state.weights,
            &state.down_input,
            &[(Projection::Down, dx)],
            &mut ds,
            found,
        )?;
        self.gate_backward(state, &ds, found)?;
        drop(ds);
        let mut dn = vec![0.0; rows * width];
        let dys = [(Projection::Gate, &state.gate[..]), (Projection::Up, &state.up)];
        self.gradients(&state.weights, &state.gate_input, &dys, &mut dn, found)?;
        let name = names::post_attention_norm(self.index);
        let mut dw = vec![0.0; width];
        norm_backward(&mut state.middle, &self.param(&name)?, eps, &dn, Some(dx), &mut dw);
        found.insert(name, dw);

        let heads_width = config.num_attention_heads * config.head_dim;
        let mut dy = vec![0.0; rows * heads_width];
        let dys = [(Projection::O, &state.middle[..])];
        self.gradients(&state.weights, &state.o_input, &dys, &mut dy, found)?;
        if config.sub_norms {
            let name = names::attn_sub_norm(self.index);
            let mut dw = vec![0.0; heads_width];
            norm_backward(&mut state.y, &self.param(&name)?, eps, &dy, None, &mut dw);
            found.insert(name, dw);
            dy.copy_from_slice(&state.y);
        }
        let LayerState { q, k, v, .. } = state;
        self.attention().backward(self.products.is_bf16(), [q, k, v], &dy);
        let dys =
            [(Projection::Q, &state.q[..]), (Projection::K, &state.k), (Projection::V, &state.v)];
        self.gradients(&state.weights, &state.qkv_input, &dys, &mut dn, found)?;
        let name = names::input_norm(self.index);
        let mut dw = vec![0.0; width];
        norm_backward(&mut x, &self.param(&name)?, eps, &dn, Some(&state.middle), &mut dw);
        found.insert(name, dw);
        *dx = x;
        Ok(())
    }

    fn attention(&self) -> Attention<'a> {
        let (config, Extent { batch, tokens, starts }) = (self.model.config(), self.extent);
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (d, rope) = (config.head_dim, self.model.rope());
        Attention { batch, tokens, heads, kv_heads, d, rope, starts }
    }

    fn param(&self, name: &str) -> Result<impl std::ops::Deref<Target = [f32]> + use<'a>> {
        view(self.model.params().get(name)?)
    }

    fn weights(&self, p: Projection) -> Result<Weights> {
        let name = names::projection(self.index, p);
        let (out, inp) = self.model.config().projection_shape(p);
        self.products.weights(is_ternary(self.model), &self.param(&name)?, [out, inp], &name)
    }

    /// The input of projections: rows of `x`, after a norm if one is named.
    fn normed(&self, x: &[f32], cols: usize, norm: Option<&str>) -> Result<Input> {
        let weight = norm.map(|name| self.param(name)).transpose()?;
        let (rows, eps) = (self.extent.rows(), self.model.config().rms_norm_eps);
        Ok(Input::new(is_ternary(self.model), rows, cols, |row, to| {
            let x = &x[row * cols..][..cols];
            match &weight {
                Some(weight) => {
                    nn::rms_norm(x, weight, eps, to);
                }
                None => to.copy_from_slice(x),
            }
        }))
    }

    /// Outputs of projections with the same input.
    fn project<const N: usize>(
        &mut self,
        weights: &[Weights],
        input: &Input,
        work: [(Projection, &mut [f32]); N],
    ) -> Result<()> {
        let masters = work.each_ref().map(|(p, _)| self.param(&names::projection(self.index, *p)));
        let mut work: Vec<_> = work
            .into_iter()
            .zip(&masters)
            .map(|((p, y), masters)| {
                (self.projection(weights, p, masters.as_deref().unwrap_or_default()), y)
            })
            .collect();
        self.products.forward(input, &mut work);
        masters.into_iter().try_for_each(|masters| masters.map(|_| ()))
    }

    fn projection<'w>(
        &self,
        weights: &'w [Weights],
        p: Projection,
        masters: &'w [f32],
    ) -> products::Projection<'w> {
        let (out, inp) = self.model.config().projection_shape(p);
        products::Projection { out, inp, masters, weights: &weights[p as usize] }
    }

    /// The gradients of the weights and of the input `(M, in)` of projections that share it, of the
    /// gradients of their outputs.
    fn gradients(
        &mut self,
        weights: &[Weights],
        input: &Input,
        dys: &[(Projection, &[f32])],
        dx: &mut [f32],
        found: &mut Found,
    ) -> Result<()> {
        let (rows, inp) = (self.extent.rows(), dx.len() / self.extent.rows());
        let only: Vec<&[f32]> = dys.iter().map(|(_, dy)| *dy).collect();
        let dws = self.products.weight_gradients(input, rows, inp, &only);
        for ((p, dy), dw) in dys.iter().zip(dws) {
            let name = names::projection(self.index, *p);
            let store = if *p == dys[0].0 { Store::Set } else { Store::Add };
            let masters = self.param(&name)?;
            let projection = self.projection(weights, *p, &masters);
            self.products.input_gradient(dy, &projection, store, dx);
            found.insert(name, dw);
        }
        Ok(())
    }

    /// From `ds` `(M, F)`, the gradient of the down projection's input, to those of gate and up, in
    /// their places.
    fn gate_backward(&self, state: &mut LayerState, ds: &[f32], found: &mut Found) -> Result<()> {
        let config = self.model.config();
        let (inner, eps, act) = (config.intermediate_size, config.rms_norm_eps, self.act);
        let name = names::ffn_sub_norm(self.index);
        let weight = config.sub_norms.then(|| self.param(&name)).transpose()?;
        let group = GATE_ROWS * inner;
        let chunks = state.gate.chunks_mut(group).zip(state.up.chunks_mut(group));
        let mut work: Vec<_> = chunks.map(|(gate, up)| (gate, up, vec![0.0; inner])).collect();
        parallel::for_each(&mut work, |i, (gate, up, dw)| {
            let mut dh = vec![0.0; inner];
            let rows = gate.chunks_exact_mut(inner).zip(up.chunks_exact_mut(inner));
            for (r, (gate, up)) in rows.enumerate() {
                let ds = &ds[i * group + r * inner..][..inner];
                match &weight {
                    None => nn::gate_backward(act, gate, up, ds),
                    Some(weight) => {
                        let mut h = gate.to_vec();
                        nn::gate(act, &mut h, up);
                        nn::rms_norm_backward(&h, weight, eps, ds, &mut dh, dw);
                        nn::gate_backward(act, gate, up, &dh);
                    }
                }
            }
        });
        if weight.is_some() {
            let mut dw = vec![0.0; inner];
            for (_, _, part) in work {
                add(&mut dw, &part);
            }
            found.insert(name, dw);
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
