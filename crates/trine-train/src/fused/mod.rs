//! A training step without a graph: loss and gradients of the whole network over plain buffers.
//!
//! The network is that of [`Bitnet`], which remains its definition: there every operation
//! is one of Candle's graph, so that anything can be tried. Here the order of operations is known, and
//! that is what makes it fast and small:
//!
//! - A projection's weights are ternarized once a step, on all threads, into the layout that is
//!   multiplied; queries, keys and values share their codes, as do gate and up.
//! - What a layer's backward pass needs is kept as it is needed: codes instead of floats, packed trits
//!   instead of matrices. With [`Options::recompute`] only the layer's input is kept, and the layer runs
//!   once more.
//! - Products of gradients run in bfloat16 where [`Precision::Bf16`] allows it: trits and codes are
//!   exact there, only the gradient that comes from above is rounded.
//! - Logits exist for some rows at a time; their gradient is made where they stand.
//!
//! The forward pass calls the same kernels as [`ops`](crate::ops) and the runtime, with the same bits up
//! to the head. Values and gradients are compared with those of the graph in tests.
//!
//! Shapes: B batch, T tokens, M = B T rows, D hidden, F feed-forward, V vocabulary.

mod distill;
mod head;
mod layer;
mod products;

use std::borrow::Cow;
use std::collections::BTreeSet;

use candle_core::{DType, Device, Result, Tensor, Var};
use trine_data::{Batch, IGNORED};
use trine_format::names::TensorId;
use trine_format::{Quantization, names};
use trine_kernels::{AlignedBuf, parallel};

use crate::ops::view;
use crate::optimizer::{Gradients, in_place};
use crate::{Bitnet, Params};
use distill::Chunk;
use head::{Head, Targets};
use layer::LayerState;
use products::Products;

pub use distill::{Distillation, Teacher};
pub use products::Precision;

/// How a step is computed.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// In what gradients are multiplied.
    pub precision: Precision,
    /// Keep only the input of every layer, and run it again in the backward pass: activation
    /// checkpointing (arXiv 1604.06174).
    pub recompute: bool,
}

/// Computes steps; keeps its buffers from one to the next, gradients among them.
pub struct Engine {
    options: Options,
    products: Products,
    head: Head,
    /// Of the head of a distillation.
    chunk: Chunk,
    /// `(M, D)`, the input of every layer and the output of the last.
    inputs: Vec<Buffer>,
    /// One for each layer, or one for all of them in turn.
    states: Vec<LayerState>,
    /// The gradient of an input of projections.
    scratch: Buffer,
    /// The rows that predict something, `(n, D)`, where not all do.
    learned: Buffer,
    gradients: Gradients,
}

/// Floats, in large pages where there are many.
type Buffer = AlignedBuf<f32>;

/// The gradients of a step while they are made.
struct Found<'a> {
    gradients: &'a mut Gradients,
    written: BTreeSet<String>,
}

impl<'a> Found<'a> {
    fn new(params: &Params, gradients: &'a mut Gradients) -> Result<Self> {
        let fits = |(name, var): (&str, &Var)| {
            gradients.get(name).is_some_and(|gradient| gradient.shape() == var.shape())
        };
        if gradients.len() != params.iter().count() || !params.iter().all(fits) {
            *gradients = zeros(params)?;
        }
        Ok(Self { gradients, written: BTreeSet::new() })
    }

    /// Whether a parameter is trained.
    fn wants(&self, name: &str) -> bool {
        self.gradients.contains_key(name)
    }

    /// Lets `write` put, or add to, the gradient of a parameter, if it is trained; there may be anything
    /// before.
    fn write(&mut self, name: &str, write: impl FnOnce(&mut [f32])) -> Result<()> {
        let Some(gradient) = self.gradients.get(name) else {
            return Ok(());
        };
        self.written.insert(name.to_owned());
        in_place(gradient, write)
    }

    /// Whether this step has written to a gradient.
    fn has(&self, name: &str) -> bool {
        self.written.contains(name)
    }

    /// Checks that all gradients are there.
    ///
    /// # Errors
    /// When one is missing.
    fn finish(self) -> Result<()> {
        match self.gradients.keys().find(|name| !self.has(name)) {
            Some(name) => candle_core::bail!("{name} received no gradient"),
            None => Ok(()),
        }
    }
}

/// A gradient for every parameter, all in one stretch of memory: single ones would leave gaps.
fn zeros(params: &Params) -> Result<Gradients> {
    let all = Tensor::zeros(params.count(), DType::F32, &Device::Cpu)?;
    let (mut gradients, mut start) = (Gradients::new(), 0);
    for (name, var) in params.iter() {
        let gradient = all.narrow(0, start, var.elem_count())?.reshape(var.shape())?;
        gradients.insert(name.to_owned(), gradient);
        start += var.elem_count();
    }
    Ok(gradients)
}

/// Rows and sequences of a batch.
#[derive(Clone, Copy)]
struct Extent<'a> {
    batch: usize,
    tokens: usize,
    /// The first position that each one sees, `(B, T)`.
    starts: Option<&'a [u32]>,
    /// The ids, `(B, T)`.
    ids: &'a [u32],
    pass: Pass,
}

/// What a forward pass is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    /// A backward pass follows, and adapters leave something out.
    Training,
    Evaluation,
    /// Without adapters.
    Base,
}

impl Extent<'_> {
    fn rows(self) -> usize {
        self.batch * self.tokens
    }
}

impl Engine {
    /// Whether the network is one that it computes: not with norms of projections, and of the
    /// quantizers only the default.
    pub fn fits(model: &Bitnet) -> bool {
        let is_default = model.scheme().is_none_or(|scheme| scheme.is_default(model.step()));
        model.config().projection_norm_eps.is_none() && is_default
    }

    /// An engine without buffers yet, for ternary models or for those in full precision.
    pub fn new(options: Options, ternary: bool) -> Self {
        let options = Options { precision: options.precision.resolved(ternary), ..options };
        Self {
            options,
            products: Products::new(options.precision),
            head: Head::default(),
            chunk: Chunk::default(),
            inputs: Vec::new(),
            states: Vec::new(),
            scratch: Buffer::default(),
            learned: Buffer::default(),
            gradients: Gradients::new(),
        }
    }

    /// How it computes.
    pub fn options(&self) -> Options {
        self.options
    }

    /// Mean cross entropy in nats of the targets of a batch that are to be predicted, and the gradients of
    /// all parameters that are trained. These lie in memory of the engine, and are those of this batch
    /// until the next call.
    ///
    /// # Errors
    /// More tokens than positions, ids outside the vocabulary, nothing to be predicted, masters that are
    /// not finite.
    pub fn gradients(&mut self, model: &Bitnet, batch: &Batch) -> Result<(f32, Gradients)> {
        self.weighted_gradients(model, batch, 1.0 / batch.learned().max(1) as f32)
    }

    /// As [`Self::gradients`], the gradients being those of the sum of the targets' losses times `weight`.
    ///
    /// # Errors
    /// As [`Self::gradients`].
    pub fn weighted_gradients(
        &mut self,
        model: &Bitnet,
        batch: &Batch,
        weight: f32,
    ) -> Result<(f32, Gradients)> {
        let rows = Learned::of(batch)?;
        let extent = self.forward(model, batch, Pass::Training)?;
        let weights = vec![weight; rows.ids.len()];
        let losses = self.backward(model, batch, extent, &rows, |end, x, found| {
            let targets = Targets { ids: &rows.ids, weights: &weights };
            end.head.backward(model, end.products, x, targets, found)
        })?;
        Ok((mean(losses.iter().copied()), self.gradients.clone()))
    }

    /// As [`Self::weighted_gradients`], of the loss of a [`Distillation`]: the means of cross entropy and of
    /// divergence, in nats, and the gradients.
    ///
    /// # Errors
    /// As [`Self::gradients`], and a teacher of another vocabulary.
    pub fn distilled_gradients(
        &mut self,
        model: &Bitnet,
        teacher: &mut Teacher,
        options: Distillation,
        batch: &Batch,
        weight: f32,
    ) -> Result<([f32; 2], Gradients)> {
        let rows = Learned::of(batch)?;
        teacher.look(model, batch, &rows)?;
        let extent = self.forward(model, batch, Pass::Training)?;
        let weights = vec![weight; rows.ids.len()];
        let losses = self.backward(model, batch, extent, &rows, |end, x, found| {
            let targets = Targets { ids: &rows.ids, weights: &weights };
            end.chunk.backward(model, end.products, teacher, options, x, targets, found)
        })?;
        let means = [0, 1].map(|part| mean(losses.iter().map(|losses| losses[part])));
        Ok((means, self.gradients.clone()))
    }

    /// Mean cross entropy in nats of the targets that are to be predicted; the gradients of the sum of their
    /// losses times `weight` are shown to `update` in parts, those of one layer after the other from the last
    /// on, and then the others. No more than one part exists at a time, and what a part is of may change
    /// before the next is made. `go_on` is told the loss first, and whether there is to be a backward pass.
    ///
    /// # Errors
    /// As [`Self::gradients`], what `update` returns, and a model with adapters.
    pub fn gradients_by_layer<E: From<candle_core::Error>>(
        &mut self,
        model: &Bitnet,
        batch: &Batch,
        weight: f32,
        go_on: impl FnOnce(f32) -> std::result::Result<bool, E>,
        mut update: impl FnMut(&Gradients) -> std::result::Result<(), E>,
    ) -> std::result::Result<f32, E> {
        let rows = Learned::of(batch)?;
        let extent = self.forward(model, batch, Pass::Training)?;
        let (layers, width) = (model.config().num_hidden_layers, model.config().hidden_size);
        let weights = vec![weight; rows.ids.len()];
        let Self { options, products, head, inputs, states, scratch, learned, gradients, .. } =
            self;
        let [mut ends, layer] = parts(model, gradients)?;
        let mut found = Found { gradients: &mut ends, written: BTreeSet::new() };
        let targets = Targets { ids: &rows.ids, weights: &weights };
        let at: Vec<usize> = rows.positions().collect();
        gather(&at, width, &inputs[layers], learned);
        let losses = head.backward(model, products, learned, targets, &mut found)?;
        scatter(&at, width, learned, &mut inputs[layers]);
        let loss = mean(losses.into_iter());
        if !go_on(loss)? {
            return Ok(loss);
        }
        for index in (0..layers).rev() {
            let (below, above) = inputs.split_at_mut(index + 1);
            let (x, dx) = (&mut below[index], &above[0]);
            let state = &mut states[if options.recompute { 0 } else { index }];
            let mut of_layer = layer_gradients(&layer, index);
            let mut found = Found { gradients: &mut of_layer, written: BTreeSet::new() };
            let mut layer = layer::Layer::new(model, index, extent, products);
            if options.recompute {
                layer.forward(x, state, None)?;
            }
            layer.backward(x, state, dx, scratch, &mut found)?;
            found.finish()?;
            update(&of_layer)?;
        }
        add_embedding(model, batch, &inputs[0], &mut found)?;
        found.finish()?;
        update(&ends)?;
        // Kept for the next step.
        *gradients = ends.into_iter().chain(layer).collect();
        Ok(loss)
    }

    /// The gradients of an objective of the log-probabilities of sequences. `weigh` is given these, `(B,)` in
    /// nats, summed over the targets that are to be predicted, and returns by how much the objective rises
    /// for each when it falls, `(B,)`.
    ///
    /// # Errors
    /// As [`Self::gradients`].
    pub fn sequence_gradients(
        &mut self,
        model: &Bitnet,
        batch: &Batch,
        weigh: impl FnOnce(&[f64]) -> Vec<f64>,
    ) -> Result<Gradients> {
        let rows = Learned::of(batch)?;
        let extent = self.forward(model, batch, Pass::Training)?;
        let losses = self.losses(model, model.config().num_hidden_layers, &rows)?;
        let weights = weigh(&rows.log_probabilities(&losses, batch));
        let weight = |at: usize| weights[at / batch.seq_len] as f32;
        let weights: Vec<f32> = rows.positions().map(weight).collect();
        self.backward(model, batch, extent, &rows, |end, x, found| {
            let targets = Targets { ids: &rows.ids, weights: &weights };
            end.head.backward(model, end.products, x, targets, found)
        })?;
        Ok(self.gradients.clone())
    }

    /// Log-probabilities of sequences in nats, `(B,)`, summed over the targets that are to be predicted; with
    /// the model's adapters, if it has some, or without.
    ///
    /// # Errors
    /// As [`Self::gradients`].
    pub fn log_probabilities(
        &mut self,
        model: &Bitnet,
        batch: &Batch,
        adapted: bool,
    ) -> Result<Vec<f64>> {
        let rows = Learned::of(batch)?;
        self.forward(model, batch, if adapted { Pass::Evaluation } else { Pass::Base })?;
        let losses = self.losses(model, model.config().num_hidden_layers % 2, &rows)?;
        Ok(rows.log_probabilities(&losses, batch))
    }

    /// Mean cross entropy in nats of the targets of a batch that are to be predicted, with the head in f32.
    ///
    /// # Errors
    /// As [`Self::gradients`].
    pub fn evaluate(&mut self, model: &Bitnet, batch: &Batch) -> Result<f32> {
        let rows = Learned::of(batch)?;
        self.forward(model, batch, Pass::Evaluation)?;
        let losses = self.losses(model, model.config().num_hidden_layers % 2, &rows)?;
        Ok(mean(losses.into_iter()))
    }

    /// The losses of the rows that predict something, of the output of the layers, which lies in the buffer
    /// of that number.
    fn losses(&mut self, model: &Bitnet, output: usize, rows: &Learned<'_>) -> Result<Vec<f32>> {
        let x = &self.inputs[output];
        let Some(at) = &rows.at else {
            return self.head.evaluate(model, x, &rows.ids);
        };
        gather(at, model.config().hidden_size, x, &mut self.learned);
        self.head.evaluate(model, &self.learned, &rows.ids)
    }

    /// After a pass in training: the gradients of what `end` makes of the rows that predict something,
    /// which it turns into their gradients. Returns what it returns.
    fn backward<T>(
        &mut self,
        model: &Bitnet,
        batch: &Batch,
        extent: Extent<'_>,
        rows: &Learned<'_>,
        end: impl FnOnce(End<'_>, &mut [f32], &mut Found<'_>) -> Result<T>,
    ) -> Result<T> {
        let (layers, width) = (model.config().num_hidden_layers, model.config().hidden_size);
        let Self { options, products, head, chunk, inputs, states, scratch, learned, gradients } =
            self;
        let mut found = Found::new(model.trained(), gradients)?;
        let parts = End { head, chunk, products: &mut *products };
        let x = &mut inputs[layers];
        let losses = match &rows.at {
            None => end(parts, x, &mut found)?,
            Some(at) => {
                gather(at, width, x, learned);
                let losses = end(parts, learned, &mut found)?;
                scatter(at, width, learned, x);
                losses
            }
        };
        for index in (0..layers).rev() {
            let (below, above) = inputs.split_at_mut(index + 1);
            let (x, dx) = (&mut below[index], &above[0]);
            let state = &mut states[if options.recompute { 0 } else { index }];
            let mut layer = layer::Layer::new(model, index, extent, products);
            if options.recompute {
                layer.forward(x, state, None)?;
            }
            layer.backward(x, state, dx, scratch, &mut found)?;
        }
        add_embedding(model, batch, &inputs[0], &mut found)?;
        found.finish()?;
        Ok(losses)
    }

    /// Runs all layers. In training, `inputs` are then the input of every layer and the output of the last;
    /// otherwise two of them are used in turn.
    fn forward<'a>(&mut self, model: &Bitnet, batch: &'a Batch, pass: Pass) -> Result<Extent<'a>> {
        let config = model.config();
        let starts = batch.starts.as_deref();
        let extent =
            Extent { batch: batch.batch, tokens: batch.seq_len, starts, ids: &batch.inputs, pass };
        if extent.tokens > config.max_position_embeddings {
            let positions = config.max_position_embeddings;
            candle_core::bail!("{} tokens, but the model has {positions} positions", extent.tokens);
        }
        let predicted = batch.targets.iter().filter(|id| **id != IGNORED);
        for id in batch.inputs.iter().chain(predicted) {
            if *id as usize >= config.vocab_size {
                candle_core::bail!("id {id} outside a vocabulary of {}", config.vocab_size);
            }
        }
        let layers = config.num_hidden_layers;
        let (inputs, states) = match (pass == Pass::Training, self.options.recompute) {
            (true, false) => (layers + 1, layers),
            (true, true) => (layers + 1, 1),
            (false, _) => (2, 1),
        };
        self.inputs.resize_with(inputs.max(self.inputs.len()), Buffer::default);
        self.states.resize_with(states.max(self.states.len()), LayerState::default);
        self.inputs[..inputs].iter_mut().for_each(|x| x.resize(extent.rows() * config.hidden_size));
        embed(model, batch, &mut self.inputs[0])?;
        for index in 0..layers {
            let [x, y] = self
                .inputs
                .get_disjoint_mut([index % inputs, (index + 1) % inputs])
                .expect("an input and another buffer for the output");
            let mut layer = layer::Layer::new(model, index, extent, &mut self.products);
            layer.forward(x, &mut self.states[index % states], Some(y))?;
        }
        Ok(extent)
    }
}

/// The targets of a batch that are to be predicted.
struct Learned<'a> {
    ids: Cow<'a, [u32]>,
    /// The rows that predict them, unless all do.
    at: Option<Vec<usize>>,
}

impl<'a> Learned<'a> {
    fn of(batch: &'a Batch) -> Result<Self> {
        let n = batch.learned();
        if n == 0 {
            candle_core::bail!("a batch in which nothing is to be predicted");
        }
        if n == batch.targets.len() {
            return Ok(Self { ids: Cow::Borrowed(&batch.targets), at: None });
        }
        let at = batch.targets.iter().enumerate().filter(|(_, id)| **id != IGNORED);
        let (at, ids): (Vec<_>, Vec<_>) = at.map(|(at, id)| (at, *id)).unzip();
        Ok(Self { ids: Cow::Owned(ids), at: Some(at) })
    }

    /// Where in the batch they are, `(n,)`.
    fn positions(&self) -> Box<dyn Iterator<Item = usize> + '_> {
        match &self.at {
            None => Box::new(0..self.ids.len()),
            Some(at) => Box::new(at.iter().copied()),
        }
    }

    /// For each sequence, less the sum of its losses.
    fn log_probabilities(&self, losses: &[f32], batch: &Batch) -> Vec<f64> {
        let mut sums = vec![0.0; batch.batch];
        for (at, loss) in self.positions().zip(losses) {
            sums[at / batch.seq_len] -= f64::from(*loss);
        }
        sums
    }
}

fn mean(losses: impl ExactSizeIterator<Item = f32>) -> f32 {
    let n = losses.len() as f64;
    (losses.map(f64::from).sum::<f64>() / n) as f32
}

/// What the end of a network needs.
struct End<'a> {
    head: &'a mut Head,
    chunk: &'a mut Chunk,
    products: &'a mut Products,
}

/// Some rows of `x` `(M, D)`, one after the other.
fn gather(rows: &[usize], width: usize, x: &[f32], out: &mut Buffer) {
    out.resize(rows.len() * width);
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
        out.copy_from_slice(&x[row * width..][..width]);
    }
}

/// Puts such rows back; the others, which predict nothing, have no gradient.
fn scatter(rows: &[usize], width: usize, from: &[f32], x: &mut [f32]) {
    x.fill(0.0);
    for (row, from) in rows.iter().zip(from.chunks_exact(width)) {
        x[row * width..][..width].copy_from_slice(from);
    }
}

/// Memory for the gradients of what is in no layer, and for those of one layer, by the names of the first.
fn parts(model: &Bitnet, kept: &Gradients) -> Result<[Gradients; 2]> {
    let mut parts = [Gradients::new(), Gradients::new()];
    for (name, var) in model.params().iter() {
        let part = match TensorId::from_canonical(name) {
            Some(TensorId::Layer(0, _)) => 1,
            Some(TensorId::Layer(..)) => continue,
            _ => 0,
        };
        let fitting = kept.get(name).filter(|kept| kept.shape() == var.shape());
        let gradient = match fitting {
            Some(kept) => kept.clone(),
            None => Tensor::zeros(var.shape(), DType::F32, &Device::Cpu)?,
        };
        parts[part].insert(name.to_owned(), gradient);
    }
    Ok(parts)
}

/// The same memory by the names of another layer.
fn layer_gradients(first: &Gradients, layer: usize) -> Gradients {
    let renamed = |name: &str| match TensorId::from_canonical(name) {
        Some(TensorId::Layer(_, part)) => TensorId::Layer(layer, part).canonical(),
        _ => name.to_owned(),
    };
    first.iter().map(|(name, gradient)| (renamed(name), gradient.clone())).collect()
}

/// The rows of the embedding for all ids, `(M, D)`.
fn embed(model: &Bitnet, batch: &Batch, x: &mut [f32]) -> Result<()> {
    let width = model.config().hidden_size;
    let embed = model.params().get(names::EMBED)?;
    if embed.dtype() != DType::F32 {
        // Only the rows that are needed are widened.
        let ids = Tensor::from_slice(&batch.inputs, batch.inputs.len(), &Device::Cpu)?;
        x.copy_from_slice(&view(&embed.detach().index_select(&ids, 0)?)?);
        return Ok(());
    }
    let embed = view(embed)?;
    let embed: &[f32] = &embed;
    parallel::for_each_chunk(x, width, |row, to| {
        to.copy_from_slice(&embed[batch.inputs[row] as usize * width..][..width]);
    });
    Ok(())
}

/// Adds the gradient of the embedding's rows, `dx` `(M, D)`.
fn add_embedding(model: &Bitnet, batch: &Batch, dx: &[f32], found: &mut Found<'_>) -> Result<()> {
    let width = model.config().hidden_size;
    let is_shared = found.has(names::EMBED);
    found.write(names::EMBED, |gradient| {
        if !is_shared {
            gradient.fill(0.0);
        }
        for (id, dx) in batch.inputs.iter().zip(dx.chunks_exact(width)) {
            let row = &mut gradient[*id as usize * width..][..width];
            row.iter_mut().zip(dx).for_each(|(sum, dx)| *sum += dx);
        }
    })
}

/// Whether the projections of a model are ternary.
fn is_ternary(model: &Bitnet) -> bool {
    model.config().quantization != Quantization::None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::{Adapters, Dropout};
    use crate::optimizer::collect;
    use trine_format::{HiddenAct, ModelConfig, Projection};

    fn config() -> ModelConfig {
        ModelConfig {
            hidden_size: 24,
            intermediate_size: 40,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 6,
            vocab_size: 37,
            max_position_embeddings: 140,
            rope_theta: 1e4,
            rms_norm_eps: 1e-5,
            hidden_act: HiddenAct::Relu2,
            sub_norms: true,
            projection_norm_eps: None,
            tie_word_embeddings: true,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            quantization: Quantization::Online,
        }
    }

    fn model(config: ModelConfig) -> Bitnet {
        let params = Params::init(&config, 0.3, 7, &Device::Cpu).unwrap();
        Bitnet::new(config, params).unwrap()
    }

    fn batch(batch: usize, seq_len: usize, vocab: usize) -> Batch {
        let id = |i: usize| (i * i * 31 % 101 % vocab) as u32;
        let n = batch * seq_len;
        let (inputs, targets) = ((0..n).map(id).collect(), (1..=n).map(id).collect());
        Batch { inputs, targets, starts: None, batch, seq_len }
    }

    /// Loss and gradients by Candle's graph.
    fn by_graph(model: &Bitnet, batch: &Batch) -> (f32, Gradients) {
        let tensor = |ids: &[u32]| {
            Tensor::from_slice(ids, (batch.batch, batch.seq_len), &Device::Cpu).unwrap()
        };
        let (inputs, targets) = (tensor(&batch.inputs), tensor(&batch.targets));
        let loss = model.loss_within(&inputs, &targets, batch.starts.as_deref()).unwrap();
        let gradients = collect(model.trained(), &mut loss.backward().unwrap()).unwrap();
        (loss.to_scalar().unwrap(), gradients)
    }

    /// The length of the difference relative to that of `expected`.
    fn difference(found: &Tensor, expected: &Tensor) -> f64 {
        let (found, expected) = (view(found).unwrap(), view(expected).unwrap());
        let square = |x: f64| x * x;
        let pairs = found.iter().zip(expected.iter());
        let error: f64 = pairs.map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
        let size: f64 = expected.iter().map(|b| square(f64::from(*b))).sum();
        (error / size.max(1e-12)).sqrt()
    }

    fn check(model: &Bitnet, batch: &Batch, what: &str) {
        let (expected_loss, expected) = by_graph(model, batch);
        for precision in [Precision::F32, Precision::Bf16] {
            for recompute in [false, true] {
                let mut engine = Engine::new(Options { precision, recompute }, is_ternary(model));
                // A larger batch before leaves no trace.
                engine.gradients(model, &self::batch(4, 130, model.config().vocab_size)).unwrap();
                let (loss, gradients) = engine.gradients(model, batch).unwrap();
                // In full precision the forward pass is rounded as well, and so are adapters.
                let (in_loss, in_gradients) = match precision {
                    Precision::F32 => (1e-6, 2e-5),
                    _ if model.adapters().is_some() => (3e-3, 0.1),
                    _ if is_ternary(model) => (3e-3, 2e-2),
                    _ => (3e-3, 5e-2),
                };
                let what = format!("{what}, {precision:?}, recompute {recompute}");
                assert!(((loss - expected_loss) / expected_loss).abs() < in_loss, "{what}: {loss}");
                assert_eq!(gradients.len(), expected.len());
                for (name, gradient) in &gradients {
                    let difference = difference(gradient, &expected[name]);
                    assert!(difference < in_gradients, "{what}, {name}: {difference}");
                }
                let evaluated = engine.evaluate(model, batch).unwrap();
                // Where everything is in bfloat16, so is this forward pass, but for the head.
                assert!(((evaluated - expected_loss) / expected_loss).abs() < in_loss, "{what}");
            }
        }
    }

    #[test]
    fn steps_without_a_graph_are_those_of_the_graph() {
        let shapes = [(1, 1), (3, 17), (2, 130)];
        for (b, t) in shapes {
            check(&model(config()), &batch(b, t, 37), &format!("{b} x {t}"));
        }
        let mut documents = batch(2, 40, 37);
        documents.starts = Some((0..80).map(|i| (i % 40 - i % 40 % 13) as u32).collect());
        check(&model(config()), &documents, "documents");
        for (i, target) in documents.targets.iter_mut().enumerate() {
            if i % 7 < 4 || (20..33).contains(&i) {
                *target = IGNORED;
            }
        }
        check(&model(config()), &documents, "answers");
        let silu = ModelConfig { hidden_act: HiddenAct::Silu, sub_norms: false, ..config() };
        check(&model(silu), &batch(3, 17, 37), "SiLU without sub-norms");
        let untied = ModelConfig { tie_word_embeddings: false, vocab_size: 33, ..config() };
        check(&model(untied), &batch(3, 17, 33), "untied");
        let full = ModelConfig { quantization: Quantization::None, ..config() };
        check(&model(full), &batch(3, 17, 37), "full precision");
        let one_head =
            ModelConfig { num_key_value_heads: 1, hidden_size: 136, head_dim: 34, ..config() };
        check(&model(one_head), &batch(2, 99, 37), "one key head");
    }

    /// Adapters whose `B` is not zero, so that every gradient is something.
    fn adapters(targets: &[Projection]) -> Adapters {
        let adapters = Adapters::init(&config(), 3, 6.0, targets, 5).unwrap();
        for (name, var) in adapters.params().iter().filter(|(name, _)| name.contains("lora_B")) {
            let value = |i: usize| ((i * 37 + name.len()) % 19) as f32 / 90.0 - 0.1;
            in_place(var, |b| b.iter_mut().enumerate().for_each(|(i, b)| *b = value(i))).unwrap();
        }
        adapters
    }

    #[test]
    fn adapters_have_the_gradients_of_the_graph() {
        let some = [Projection::Q, Projection::V, Projection::Up];
        for targets in [&Projection::ALL[..], &some] {
            let model = model(config()).with_adapters(adapters(targets));
            check(&model, &batch(2, 40, 37), &format!("{} adapters", targets.len()));
        }
        let full = ModelConfig { quantization: Quantization::None, ..config() };
        let model = model(full).with_adapters(adapters(&some));
        check(&model, &batch(3, 17, 37), "adapters in full precision");
    }

    /// Checks that along its gradients the loss changes as much as they say. `loss` returns both.
    fn check_slope(model: &Bitnet, mut loss: impl FnMut() -> (f64, Gradients)) {
        let gradients = loss().1;
        let gradients: Gradients =
            gradients.iter().map(|(name, g)| (name.clone(), g.copy().unwrap())).collect();
        let square: f64 = crate::optimizer::global_norm(&gradients).unwrap().powi(2);
        let mut moved = |by: f64| {
            for (name, var) in model.trained().iter() {
                let gradient = view(&gradients[name]).unwrap();
                let step = |w: &mut [f32]| {
                    w.iter_mut().zip(&gradient[..]).for_each(|(w, g)| *w += by as f32 * g);
                };
                in_place(var, step).unwrap();
            }
            loss().0
        };
        let by = 0.01 / square;
        let (above, below) = (moved(by), moved(-2.0 * by));
        moved(by);
        let slope = (above - below) / (2.0 * by);
        assert!((slope / square - 1.0).abs() < 0.01, "{slope}, not {square}");
    }

    #[test]
    fn gradients_by_layer_are_those_of_all_layers() {
        let untied = ModelConfig { tie_word_embeddings: false, ..config() };
        let mut batch = batch(2, 40, 37);
        batch.targets[3..9].fill(IGNORED);
        for (config, recompute) in [(config(), true), (untied, false)] {
            let model = model(config);
            let options = Options { precision: Precision::Bf16, recompute };
            let mut engine = Engine::new(options, true);
            let (expected_loss, expected) = engine.weighted_gradients(&model, &batch, 0.3).unwrap();
            let expected: Gradients =
                expected.iter().map(|(name, g)| (name.clone(), g.copy().unwrap())).collect();
            for _ in 0..2 {
                let mut seen = BTreeSet::new();
                let show = |part: &Gradients| {
                    for (name, gradient) in part {
                        assert!(difference(gradient, &expected[name]) < 1e-6, "{name}");
                        assert!(seen.insert(name.clone()), "{name}");
                    }
                    Ok::<_, candle_core::Error>(())
                };
                let go_on = |_: f32| Ok(true);
                let loss = engine.gradients_by_layer(&model, &batch, 0.3, go_on, show).unwrap();
                assert_eq!(loss, expected_loss);
                assert!(seen.iter().eq(expected.keys()));
            }
            let not = |_: f32| Ok::<_, candle_core::Error>(false);
            let never = |_: &Gradients| panic!("no backward pass was asked for");
            engine.gradients_by_layer(&model, &batch, 0.3, not, never).unwrap();
        }
    }

    /// A student and a teacher in full precision, of which every gradient is that of the loss.
    #[test]
    fn distillation_has_the_gradients_of_its_loss() {
        let full = ModelConfig { quantization: Quantization::None, ..config() };
        let wide = ModelConfig { hidden_size: 32, head_dim: 8, ..full.clone() };
        let options = Options { precision: Precision::F32, recompute: false };
        let (student, engine) = (model(full.clone()), || Engine::new(options, false));
        let mut batch = batch(2, 20, 37);
        batch.targets[5..11].fill(IGNORED);
        for distillation in [
            Distillation { temperature: 2.0, cross_entropy: 0.3, divergence: 1.0 },
            Distillation { temperature: 1.0, cross_entropy: 0.0, divergence: 0.7 },
        ] {
            let mut teacher = Teacher::new(model(wide.clone()), engine());
            let mut engine = engine();
            let weight = 1.0 / batch.learned() as f32;
            check_slope(&student, || {
                let ([hard, soft], gradients) = engine
                    .distilled_gradients(&student, &mut teacher, distillation, &batch, weight)
                    .unwrap();
                assert!(soft > 0.0);
                let soften = distillation.divergence * distillation.temperature.powi(2);
                (f64::from(distillation.cross_entropy * hard + soften * soft), gradients)
            });
        }
        // Who learns from itself diverges from nothing, and has the gradients of the cross entropy.
        let mut itself = Teacher::new(model(full), engine());
        let only = Distillation { temperature: 3.0, cross_entropy: 1.0, divergence: 1.0 };
        let ([hard, soft], found) =
            engine().distilled_gradients(&student, &mut itself, only, &batch, 0.01).unwrap();
        let (expected_loss, expected) =
            engine().weighted_gradients(&student, &batch, 0.01).unwrap();
        assert!(soft.abs() < 1e-5 && (hard - expected_loss).abs() < 1e-5, "{hard}, {soft}");
        for (name, gradient) in &found {
            let difference = difference(gradient, &expected[name]);
            assert!(difference < 1e-4, "{name}: {difference}");
        }
        let other = ModelConfig { vocab_size: 36, ..config() };
        let mut other = Teacher::new(model(other), engine());
        let error = engine().distilled_gradients(&student, &mut other, only, &batch, 0.01);
        assert!(error.unwrap_err().to_string().contains("a teacher of 36 ids, expected 37"));
    }

    /// The gradients of what is left out are those of a loss that leaves it out.
    #[test]
    fn dropout_has_the_gradients_of_its_loss() {
        let full = ModelConfig { quantization: Quantization::None, ..config() };
        let dropout = Dropout { share: 0.3, seed: 4 };
        let adapters = adapters(&Projection::ALL).with_dropout(dropout);
        let model = model(full).with_adapters(adapters);
        let batch = batch(2, 20, 37);
        let mut losses = Vec::new();
        for recompute in [false, true] {
            let mut engine = Engine::new(Options { precision: Precision::F32, recompute }, false);
            let (loss, _) = engine.gradients(&model, &batch).unwrap();
            assert_ne!(engine.evaluate(&model, &batch).unwrap(), loss);
            check_slope(&model, || {
                let (loss, gradients) = engine.gradients(&model, &batch).unwrap();
                (f64::from(loss), gradients)
            });
            losses.push(loss);
        }
        assert!((losses[0] - losses[1]).abs() < 1e-4, "{losses:?}");
    }

    #[test]
    fn a_head_in_blocks_is_the_head_as_a_whole() {
        let model = model(ModelConfig { vocab_size: 200, ..config() });
        let batch = batch(2, 40, 200);
        let mut engine = Engine::new(Options { precision: Precision::F32, recompute: false }, true);
        let (loss, whole) = engine.gradients(&model, &batch).unwrap();
        let whole = whole[names::EMBED].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        engine.head.block = 64 * config().hidden_size;
        let (in_blocks, gradients) = engine.gradients(&model, &batch).unwrap();
        assert!((in_blocks - loss).abs() < 1e-5, "{in_blocks}, not {loss}");
        let whole = Tensor::from_vec(whole, (200, config().hidden_size), &Device::Cpu).unwrap();
        assert!(difference(&gradients[names::EMBED], &whole) < 1e-5);
        assert!((engine.evaluate(&model, &batch).unwrap() - loss).abs() < 1e-5);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let model = model(config());
        let mut engine =
            Engine::new(Options { precision: Precision::Auto, recompute: false }, true);
        let error = |batch: &Batch, engine: &mut Engine| {
            engine.gradients(&model, batch).unwrap_err().to_string()
        };
        assert!(error(&batch(1, 141, 37), &mut engine).contains("141 tokens"));
        let mut outside = batch(1, 5, 37);
        outside.targets[2] = 37;
        assert!(error(&outside, &mut engine).contains("id 37 outside"));
    }
}
