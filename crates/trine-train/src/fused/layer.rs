//! One decoder layer, forward and backward.
//!
//! A layer keeps what its products and attention made ([`Kept`]); norms, gates and codes are made of that
//! again in the backward pass, where they are not kept too ([`Work`]). Buffers of the forward pass become gradients, each in its place.

use candle_core::Result;
use trine_format::{HiddenAct, Projection, names};
use trine_kernels::gemm::Store;
use trine_kernels::nn::{self, Gate};
use trine_kernels::parallel;

use super::head::norm_backward;
use super::outputs::{self, Form, Kept, Output};
use super::products::{self, Products, Weights};
use super::relations::{Lesson, States};
use super::work::{self, Entering, Passing, Work};
use super::{Buffer, Extent, Found, Pass, is_ternary, mixture};
use crate::Bitnet;
use crate::adapters::{Adapters, Mask};
use crate::ops::{Attention, view};

/// Rows of which a thread makes the gradients of a gate at a time.
const GATE_ROWS: usize = 16;

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
        let in_training = self.extent.pass.learns();
        let mask = dropout.mask(self.model.step(), self.extent.ids, 4 * self.index + input);
        mask.filter(|_| in_training)
    }

    /// The adapters that this pass is made with.
    fn adapters(&self) -> Option<&'a Adapters> {
        self.model.adapters().filter(|_| self.extent.pass != Pass::Base)
    }

    /// The size of what is kept: sums, where a projection makes these and nothing else is added to them.
    pub(super) fn form(&self) -> Form {
        let sums = is_ternary(self.model) && mixture(self.model).is_none();
        Form::new(self.model.config(), self.extent.rows(), sums && self.adapters().is_none())
    }

    /// Of how many layers the [`Work`] is kept, if `little` bytes are for all of it.
    pub(super) fn works(&self, little: usize) -> usize {
        let (config, codes) = (self.model.config(), is_ternary(self.model));
        let floats = !codes || mixture(self.model).is_some() || self.adapters().is_some();
        let bytes = work::bytes(config, self.extent.rows(), codes, floats);
        work::kept(config, bytes, little)
    }

    /// Computes `out` from `x`, both `(M, D)`; without `out` only what the backward pass needs, which is left
    /// in `memory` and, until the next layer comes, in `work`.
    pub(super) fn forward(
        &mut self,
        x: &[f32],
        weights: &mut Vec<Weights>,
        memory: &mut [f32],
        work: &mut Work,
        out: Option<&mut [f32]>,
    ) -> Result<()> {
        weights.resize_with(Projection::ALL.len(), || Weights::Full);
        for p in Projection::ALL {
            self.ternarize(p, &mut weights[p as usize])?;
        }
        work.of = None;
        let mut kept = self.form().within(memory);

        self.take_qkv_input(x, work)?;
        let [q, k, v, ..] = &mut kept.outputs;
        let outputs = [(Projection::Q, q), (Projection::K, k), (Projection::V, v)];
        self.project(weights, &work.qkv_input, outputs)?;
        self.take_qkv(weights, &kept, work);
        let bf16 = self.products.is_bf16() && self.extent.pass.rounds();
        self.attention().forward(bf16, [&mut work.q, &mut work.k], &work.v, kept.y);

        self.take_o_input(&kept, work)?;
        let [.., o, _, _] = &mut kept.outputs;
        self.project(weights, &work.o_input, [(Projection::O, o)])?;
        self.take_middle(x, weights, &kept, work);

        self.take_gate_input(work)?;
        let [.., gate, up] = &mut kept.outputs;
        self.project(weights, &work.gate_input, [(Projection::Gate, gate), (Projection::Up, up)])?;
        self.take_down_input(weights, &kept, work)?;
        if let Some(out) = out {
            let mut down = Output::Floats(&mut *out);
            self.project(weights, &work.down_input, [(Projection::Down, &mut down)])?;
            add(out, &work.middle);
        }
        work.of = Some(self.index);
        Ok(())
    }

    /// Makes `work` what it was at the end of the forward pass.
    fn restore(
        &self,
        x: &[f32],
        weights: &[Weights],
        kept: &Kept<'_>,
        work: &mut Work,
    ) -> Result<()> {
        let config = self.model.config();
        self.take_qkv_input(x, work)?;
        self.take_qkv(weights, kept, work);
        self.attention().rotate(&mut work.q, config.num_attention_heads);
        self.attention().rotate(&mut work.k, config.num_key_value_heads);
        self.take_o_input(kept, work)?;
        self.take_middle(x, weights, kept, work);
        self.take_gate_input(work)?;
        self.take_down_input(weights, kept, work)
    }

    fn take_qkv_input(&self, x: &[f32], work: &mut Work) -> Result<()> {
        work.qkv_input.mask = self.mask(0);
        self.normed(x, Some(&names::input_norm(self.index)), &mut work.qkv_input)
    }

    /// Queries, keys and values, not yet rotated.
    fn take_qkv(&self, weights: &[Weights], kept: &Kept<'_>, work: &mut Work) {
        let input = &work.qkv_input.input;
        for (i, to) in [&mut work.q, &mut work.k, &mut work.v].into_iter().enumerate() {
            let width = self.model.config().projection_shape(Projection::ALL[i]).0;
            to.resize(self.extent.rows() * width);
            parallel::for_each_chunk(to, width, |row, to| {
                kept.outputs[i].row((&weights[i], input), row, to);
            });
        }
    }

    fn take_o_input(&self, kept: &Kept<'_>, work: &mut Work) -> Result<()> {
        let sub_norm = self.model.config().sub_norms.then(|| names::attn_sub_norm(self.index));
        work.o_input.mask = self.mask(1);
        self.normed(kept.y, sub_norm.as_deref(), &mut work.o_input)
    }

    fn take_middle(&self, x: &[f32], weights: &[Weights], kept: &Kept<'_>, work: &mut Work) {
        let (o, width) = (Projection::O as usize, self.model.config().hidden_size);
        let input = &work.o_input.input;
        work.middle.resize(x.len());
        parallel::for_each_chunk(&mut work.middle, width, |row, to| {
            kept.outputs[o].row((&weights[o], input), row, to);
            to.iter_mut().zip(&x[row * width..]).for_each(|(to, x)| *to += x);
        });
    }

    fn take_gate_input(&self, work: &mut Work) -> Result<()> {
        let norm = names::post_attention_norm(self.index);
        work.gate_input.mask = self.mask(2);
        let Work { middle, gate_input, .. } = work;
        self.normed(middle, Some(&norm), gate_input)
    }

    fn take_down_input(&self, weights: &[Weights], kept: &Kept<'_>, work: &mut Work) -> Result<()> {
        let config = self.model.config();
        let (act, inner, eps) = (self.act, config.intermediate_size, config.rms_norm_eps);
        let sub_norm = config.sub_norms.then(|| names::ffn_sub_norm(self.index));
        let weight = sub_norm.map(|name| self.param(&name)).transpose()?;
        work.down_input.mask = self.mask(3);
        let Work { gate_input, down_input, .. } = work;
        self.keep(down_input, inner, |row, to| {
            let mut up = vec![0.0; inner];
            gate_and_up(weights, kept, gate_input, row, [to, &mut up]);
            nn::gate(act, to, &up);
            if let Some(weight) = &weight {
                nn::rms_norm_in_place(to, weight, eps);
            }
        });
        Ok(())
    }

    /// From `dx` `(M, D)`, the gradient of the layer's output, to that of its input `x`, in its place.
    /// With a `lesson`, the gradient is that of its loss too.
    pub(super) fn backward(
        &mut self,
        x: &mut [f32],
        weights: &[Weights],
        memory: &mut [f32],
        work: &mut Work,
        passing: &mut Passing,
        dx: &[f32],
        found: &mut Found<'_>,
        lesson: Option<&mut Lesson<'_>>,
    ) -> Result<()> {
        let config = self.model.config();
        let (rows, width, eps) = (self.extent.rows(), config.hidden_size, config.rms_norm_eps);
        let kept = self.form().within(memory);
        if work.of.take() != Some(self.index) {
            self.restore(x, weights, &kept, work)?;
        }
        let Passing { gate, up, scratch } = passing;

        gate.resize(rows * config.intermediate_size);
        let dys = [(Projection::Down, dx)];
        self.gradients(weights, &work.down_input, &dys, gate, found)?;
        self.gate_backward(weights, &kept, &work.gate_input, gate, up, found)?;

        scratch.resize(rows * width);
        let dys = [(Projection::Gate, &gate[..]), (Projection::Up, &**up)];
        self.gradients(weights, &work.gate_input, &dys, scratch, found)?;
        let name = names::post_attention_norm(self.index);
        let weight = self.param(&name)?;
        let dw = norm_backward(&mut work.middle, &weight, eps, scratch, Some(dx));
        found.write(&name, |to| to.copy_from_slice(&dw))?;

        let heads_width = config.num_attention_heads * config.head_dim;
        scratch.resize(rows * heads_width);
        let dys = [(Projection::O, &work.middle[..])];
        self.gradients(weights, &work.o_input, &dys, scratch, found)?;
        let mut dy = &**scratch;
        if config.sub_norms {
            let name = names::attn_sub_norm(self.index);
            let weight = self.param(&name)?;
            let dw = norm_backward(kept.y, &weight, eps, dy, None);
            found.write(&name, |to| to.copy_from_slice(&dw))?;
            dy = kept.y;
        }
        let lesson = lesson.map(|lesson| (lesson, self.unrotated(work)));
        let Work { q, k, v, .. } = &mut *work;
        self.attention().backward(self.products.is_bf16(), [q, k, v], dy);
        if let Some((lesson, states)) = lesson {
            lesson.learn(self.extent, &states, [q, k, v]);
        }

        scratch.resize(rows * width);
        let dys =
            [(Projection::Q, &work.q[..]), (Projection::K, &work.k), (Projection::V, &work.v)];
        self.gradients(weights, &work.qkv_input, &dys, scratch, found)?;
        let name = names::input_norm(self.index);
        let weight = self.param(&name)?;
        let dw = norm_backward(x, &weight, eps, scratch, Some(&work.middle));
        found.write(&name, |to| to.copy_from_slice(&dw))?;
        Ok(())
    }

    /// Queries, keys and values after a forward pass, without positions.
    pub(super) fn unrotated(&self, work: &Work) -> States {
        let config = self.model.config();
        let mut states = [&work.q, &work.k, &work.v].map(Buffer::clone);
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

    /// Fills the input of projections: rows of `x` `(M, in)`, after a norm if one is named.
    fn normed(&self, x: &[f32], norm: Option<&str>, to: &mut Entering) -> Result<()> {
        let weight = norm.map(|name| self.param(name)).transpose()?;
        let (cols, eps) = (x.len() / self.extent.rows(), self.model.config().rms_norm_eps);
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
    fn keep(&self, to: &mut Entering, cols: usize, fill: impl Fn(usize, &mut [f32]) + Sync) {
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
        entering: &Entering,
        outputs: [(Projection, &mut Output<'_>); N],
    ) -> Result<()> {
        let mut masters = Vec::with_capacity(N);
        for (p, _) in &outputs {
            masters.push(self.masters(weights, *p)?);
        }
        let mut pairs = Vec::with_capacity(N);
        for ((p, y), masters) in outputs.into_iter().zip(&masters) {
            pairs.push((p, self.projection(weights, p, masters), y));
        }
        outputs::project(self.products, &entering.input, &mut pairs);
        let Some(adapters) = self.adapters() else { return Ok(()) };
        for (p, _, y) in pairs {
            let Output::Floats(y) = y else { continue };
            adapters.with(self.index, p, |adapter| {
                self.products.adapt(&entering.floats, adapter, self.extent.rows(), y)
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
        entering: &Entering,
        dys: &[(Projection, &[f32])],
        dx: &mut [f32],
        found: &mut Found<'_>,
    ) -> Result<()> {
        let rows = self.extent.rows();
        let names = dys.iter().map(|(p, _)| names::projection(self.index, *p));
        let names: Vec<_> = names.collect();
        if names.iter().any(|name| found.wants(name)) {
            self.products.take_input(&entering.input, dx.len() / rows);
        }
        for ((p, dy), name) in dys.iter().zip(&names) {
            let (out, inp) = self.model.config().projection_shape(*p);
            found.write(name, |dw| {
                self.products.weight_gradient(dy, [rows, out, inp], &entering.input, dw);
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
                let (x, mask) = (&entering.floats, entering.mask);
                self.products.adapter_gradients(x, mask, adapter, rows, dy, dx, found)
            })?;
        }
        Ok(())
    }

    /// From the gradient of the down projection's input `(M, F)` to those of gate, in its place, and of up.
    fn gate_backward(
        &self,
        weights: &[Weights],
        kept: &Kept<'_>,
        gate_input: &Entering,
        gradient: &mut [f32],
        up: &mut Buffer,
        found: &mut Found<'_>,
    ) -> Result<()> {
        let config = self.model.config();
        let (inner, eps, act) = (config.intermediate_size, config.rms_norm_eps, self.act);
        let name = names::ffn_sub_norm(self.index);
        let weight = config.sub_norms.then(|| self.param(&name)).transpose()?;
        let group = GATE_ROWS * inner;
        up.resize(gradient.len());
        let chunks = gradient.chunks_mut(group).zip(up.chunks_mut(group));
        let mut work: Vec<_> = chunks.map(|(to, up)| (to, up, vec![0.0; inner])).collect();
        parallel::for_each(&mut work, |i, (to, up, dw)| {
            let [mut gate, mut h, mut dh] = [(); 3].map(|()| vec![0.0; inner]);
            let rows = to.chunks_exact_mut(inner).zip(up.chunks_exact_mut(inner));
            for (r, (to, up)) in rows.enumerate() {
                let row = i * GATE_ROWS + r;
                gate_and_up(weights, kept, gate_input, row, [&mut gate, up]);
                match &weight {
                    None => nn::gate_backward(act, &mut gate, up, to),
                    Some(weight) => {
                        nn::gate_into(act, &gate, up, &mut h);
                        nn::rms_norm_backward(&h, weight, eps, to, &mut dh, dw);
                        nn::gate_backward(act, &mut gate, up, &dh);
                    }
                }
                to.copy_from_slice(&gate);
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

/// Row `row` of gate and up, `(F,)` each.
fn gate_and_up(
    weights: &[Weights],
    kept: &Kept<'_>,
    entering: &Entering,
    row: usize,
    to: [&mut [f32]; 2],
) {
    for (p, to) in [Projection::Gate as usize, Projection::Up as usize].into_iter().zip(to) {
        kept.outputs[p].row((&weights[p], &entering.input), row, to);
    }
}

fn add(to: &mut [f32], x: &[f32]) {
    const CHUNK: usize = 1 << 14;
    parallel::for_each_chunk(to, CHUNK, |i, to| {
        to.iter_mut().zip(&x[i * CHUNK..]).for_each(|(to, x)| *to += x);
    });
}
