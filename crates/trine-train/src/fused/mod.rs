//! A training step without a graph: loss and gradients of the whole network over plain buffers.
//!
//! The network is that of [`Bitnet`], which remains its definition: there every operation
//! is one of Candle's graph, so that anything can be tried. Here the order of operations is known, and
//! that is what makes it fast and small:
//!
//! - A projection's weights are ternarized once a step, on all threads, into the layout that is
//!   multiplied; queries, keys and values share their codes, as do gate and up.
//! - A layer keeps for its backward pass what its products made, which are integers of 16 bits where it is
//!   ternary; what is cheap to make of these is made again, unless it is little memory. With
//!   [`Options::recompute`] only the layer's input is kept, and the layer runs once more.
//! - The gradients of a layer lie where the layer above has kept its things.
//! - Products of gradients run in bfloat16 or int8 where [`Precision`] allows it: trits and codes are
//!   exact there, only the gradient that comes from above is rounded. So do head and attention.
//! - Logits exist for some rows at a time, and of their softmax only what products need.
//!
//! The forward pass calls the same kernels as [`ops`](crate::ops) and the runtime, with the same bits up
//! to the head, but for attention in a step in bfloat16. Values and gradients are compared with those of the
//! graph in tests.
//!
//! Shapes: B batch, T tokens, M = B T rows, D hidden, F feed-forward, V vocabulary.

mod distill;
mod found;
mod head;
mod layer;
mod learned;
mod likeliest;
mod memory;
mod outputs;
mod products;
mod relations;
mod work;

use candle_core::{DType, Device, Result, Tensor};
use trine_data::{Batch, IGNORED};
use trine_format::{Quantization, names};
use trine_kernels::{AlignedBuf, parallel};

use crate::Bitnet;
use crate::ops::view;
use crate::optimizer::Gradients;
use distill::Chunk;
pub(crate) use found::zeros;
use found::{Found, layer_gradients, parts};
use head::{Head, Targets};
use layer::Layer;
use learned::{Learned, gather, mean, scatter};
use memory::Memory;
use products::{Products, Weights};
use relations::{Lesson, States};
use work::{Passing, Work};

pub use distill::{Distillation, Divergences, Says, Teacher};
pub(crate) use head::{BLOCK, LEAST_ROWS};
pub use likeliest::Likeliest;
pub(crate) use outputs::Form;
pub use products::Precision;
pub use relations::Relations;
pub(crate) use work::{LITTLE, bytes as work_bytes, kept as works_kept};

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
    /// Of the projections of each layer, or of all layers in turn; and what layers keep.
    weights: Vec<Vec<Weights>>,
    memory: Memory,
    /// Of each layer, where that takes no more bytes than `little`, or of the one that is being computed.
    works: Vec<Work>,
    little: usize,
    passing: Passing,
    /// The rows that predict something, `(n, D)`, where not all do.
    learned: Buffer,
    /// The gradients of one layer and of what is in none, where there are not all at once.
    by_layer: Gradients,
    /// A layer whose states are kept in a pass without a backward pass, and these.
    watched: Option<(usize, States)>,
}

/// Floats, in large pages where there are many.
type Buffer = AlignedBuf<f32>;

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
    /// As in training, but there are never the gradients of all layers.
    ByLayer,
    /// As in training, of log-probabilities that are compared with those of other passes: attention is as
    /// exact as there.
    Compared,
    Evaluation,
    /// Without adapters.
    Base,
}

impl Pass {
    fn learns(self) -> bool {
        matches!(self, Self::Training | Self::ByLayer | Self::Compared)
    }

    /// Whether the gradients of all parameters that are trained exist at once.
    fn has_all_gradients(self) -> bool {
        matches!(self, Self::Training | Self::Compared)
    }

    /// Whether attention may be rounded.
    fn rounds(self) -> bool {
        matches!(self, Self::Training | Self::ByLayer)
    }
}

impl Extent<'_> {
    fn rows(self) -> usize {
        self.batch * self.tokens
    }
}

impl Engine {
    /// Whether the network is one that it computes: not with norms of projections, and of the
    /// quantizers only the default, with or without a warm-up from full precision.
    pub fn fits(model: &Bitnet) -> bool {
        let is_default = model.scheme().is_none_or(|scheme| scheme.is_default(model.step()));
        let fits = is_default || mixture(model).is_some();
        model.config().projection_norm_eps.is_none() && fits
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
            weights: Vec::new(),
            memory: Memory::default(),
            works: Vec::new(),
            little: if options.recompute { 0 } else { LITTLE },
            passing: Passing::default(),
            learned: Buffer::default(),
            by_layer: Gradients::new(),
            watched: None,
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
        let losses = self.backward(model, batch, extent, &rows, None, |end, x, found| {
            let targets = Targets { ids: &rows.ids, weights: &weights };
            end.head.backward(model, end.products, x, targets, found)
        })?;
        Ok((mean(losses.iter().copied()), self.memory.gradients()))
    }

    /// As [`Self::weighted_gradients`], of the loss of a [`Distillation`]: the mean cross entropy in nats,
    /// how far the student is from what a teacher `says`, and the gradients.
    ///
    /// # Errors
    /// As [`Self::gradients`]; a teacher of another vocabulary, and relations without a teacher that is
    /// there.
    pub fn distilled_gradients(
        &mut self,
        model: &Bitnet,
        mut says: Says<'_>,
        options: Distillation,
        batch: &Batch,
        weight: f32,
    ) -> Result<(f32, Divergences, Gradients)> {
        let rows = Learned::of(batch)?;
        let taught = says.look(model, batch, &rows, options)?;
        let extent = self.forward(model, batch, Pass::Training)?;
        let weights = vec![weight; rows.ids.len()];
        let weight = weight * rows.ids.len() as f32;
        let mut lesson = options.relations.zip(taught.as_ref()).map(|(relations, taught)| Lesson {
            relations,
            taught,
            weight,
            divergence: 0.0,
        });
        let losses =
            self.backward(model, batch, extent, &rows, lesson.as_mut(), |end, x, found| {
                let targets = Targets { ids: &rows.ids, weights: &weights };
                end.chunk.backward(model, end.products, says, options, x, targets, found)
            })?;
        let [loss, tokens] = [0, 1].map(|part| mean(losses.iter().map(|losses| losses[part])));
        let relations = lesson.map(|lesson| lesson.divergence);
        Ok((loss, Divergences { tokens, relations }, self.memory.gradients()))
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
        let extent = self.forward(model, batch, Pass::ByLayer)?;
        let weights = vec![weight; rows.ids.len()];
        let [mut ends, first] = parts(model, &self.by_layer)?;
        let mut found = Found::within(&mut ends);
        let losses = self.end(model, &rows, &mut found, |end, x, found| {
            let targets = Targets { ids: &rows.ids, weights: &weights };
            end.head.backward(model, end.products, x, targets, found)
        })?;
        let loss = mean(losses.into_iter());
        if !go_on(loss)? {
            return Ok(loss);
        }
        for index in (0..model.config().num_hidden_layers).rev() {
            let mut of_layer = layer_gradients(&first, index);
            let mut found = Found::within(&mut of_layer);
            self.layer_backward(model, index, extent, &mut found, None)?;
            found.finish()?;
            update(&of_layer)?;
        }
        add_embedding(model, batch, &self.inputs[0], &mut found)?;
        found.finish()?;
        update(&ends)?;
        // Kept for the next step.
        self.by_layer = ends.into_iter().chain(first).collect();
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
        let extent = self.forward(model, batch, Pass::Compared)?;
        let losses = self.losses(model, model.config().num_hidden_layers, &rows)?;
        let weights = weigh(&rows.log_probabilities(&losses, batch));
        let weight = |at: usize| weights[at / batch.seq_len] as f32;
        let weights: Vec<f32> = rows.positions().map(weight).collect();
        self.backward(model, batch, extent, &rows, None, |end, x, found| {
            let targets = Targets { ids: &rows.ids, weights: &weights };
            end.head.backward(model, end.products, x, targets, found)
        })?;
        Ok(self.memory.gradients())
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
    /// which it turns into their gradients, and of what a layer is to learn besides. Returns what `end`
    /// returns.
    fn backward<T>(
        &mut self,
        model: &Bitnet,
        batch: &Batch,
        extent: Extent<'_>,
        rows: &Learned<'_>,
        mut lesson: Option<&mut Lesson<'_>>,
        end: impl FnOnce(End<'_>, &mut [f32], &mut Found<'_>) -> Result<T>,
    ) -> Result<T> {
        let mut gradients = self.memory.gradients();
        let mut found = Found::within(&mut gradients);
        let made = self.end(model, rows, &mut found, end)?;
        for index in (0..model.config().num_hidden_layers).rev() {
            let lesson = lesson.as_deref_mut().filter(|lesson| lesson.relations.layer == index);
            self.layer_backward(model, index, extent, &mut found, lesson)?;
        }
        add_embedding(model, batch, &self.inputs[0], &mut found)?;
        found.finish()?;
        Ok(made)
    }

    /// The end of the network, and the beginning of a backward pass: `end` turns the rows that predict
    /// something into their gradients. Returns what it returns.
    fn end<T>(
        &mut self,
        model: &Bitnet,
        rows: &Learned<'_>,
        found: &mut Found<'_>,
        end: impl FnOnce(End<'_>, &mut [f32], &mut Found<'_>) -> Result<T>,
    ) -> Result<T> {
        let (layers, width) = (model.config().num_hidden_layers, model.config().hidden_size);
        let Self { products, head, chunk, inputs, learned, .. } = self;
        let (parts, x) = (End { head, chunk, products }, &mut inputs[layers]);
        let Some(at) = &rows.at else { return end(parts, x, found) };
        gather(at, width, x, learned);
        let made = end(parts, learned, found)?;
        scatter(at, width, learned, x);
        Ok(made)
    }

    /// The gradients of a layer, after those of the layers above it.
    fn layer_backward(
        &mut self,
        model: &Bitnet,
        index: usize,
        extent: Extent<'_>,
        found: &mut Found<'_>,
        lesson: Option<&mut Lesson<'_>>,
    ) -> Result<()> {
        let Self { options, products, inputs, weights, memory, works, little, passing, .. } = self;
        let (below, above) = inputs.split_at_mut(index + 1);
        let (x, dx) = (&mut below[index], &above[0]);
        let at = if options.recompute { 0 } else { index };
        let weights = &mut weights[at];
        let mut layer = Layer::new(model, index, extent, products);
        let work = &mut works[index % layer.works(*little)];
        memory.keep(at, |memory| {
            if options.recompute {
                layer.forward(x, weights, memory, work, None)?;
            }
            layer.backward(x, weights, memory, work, passing, dx, found, lesson)
        })
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
        let (inputs, states) = match (pass.learns(), self.options.recompute) {
            (true, false) => (layers + 1, layers),
            (true, true) => (layers + 1, 1),
            (false, _) => (2, 1),
        };
        let Self { products, inputs: buffers, weights, memory, works, watched, .. } = self;
        buffers.resize_with(inputs.max(buffers.len()), Buffer::default);
        buffers[..inputs].iter_mut().for_each(|x| x.resize(extent.rows() * config.hidden_size));
        weights.resize_with(states.max(weights.len()), Vec::new);
        let first = Layer::new(model, 0, extent, products);
        let floats = first.form().floats();
        let at_hand = if pass.learns() { first.works(self.little) } else { 1 };
        works.resize_with(at_hand.max(works.len()), Work::default);
        memory.prepare(states, floats, pass.has_all_gradients().then(|| model.trained()))?;
        embed(model, batch, &mut buffers[0])?;
        for index in 0..layers {
            let [x, y] = buffers
                .get_disjoint_mut([index % inputs, (index + 1) % inputs])
                .expect("an input and another buffer for the output");
            let mut layer = Layer::new(model, index, extent, products);
            let (weights, work) = (&mut weights[index % states], &mut works[index % at_hand]);
            memory
                .keep(index % states, |memory| layer.forward(x, weights, memory, work, Some(y)))?;
            if let Some((_, kept)) = watched.as_mut().filter(|(at, _)| *at == index) {
                *kept = layer.unrotated(work);
            }
        }
        Ok(extent)
    }
}

/// What the end of a network needs.
struct End<'a> {
    head: &'a mut Head,
    chunk: &'a mut Chunk,
    products: &'a mut Products,
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

/// How much of the quantized values a model takes that is warming up from full precision.
fn mixture(model: &Bitnet) -> Option<f32> {
    model.scheme()?.mixture(model.step())
}

#[cfg(test)]
mod tests;
