//! A model's parameters on a device, and the steps that train them.
//!
//! Shapes: B batch, T tokens, M = B T rows, D hidden, F feed-forward, H and K heads of queries and of keys,
//! d their width, V vocabulary.

mod activations;
mod adapters;
mod attention;
mod backward;
mod forward;
mod head;
mod occurrences;
mod sums;
mod update;

use std::ops::Range;
use std::sync::Arc;

use trine_data::{Batch, IGNORED};
use trine_format::names::TensorId;
use trine_format::{HiddenAct, ModelConfig, Projection, Quantization};

use crate::backend::{Address, Backend, Buffer, Kind, Product, launch};
use crate::error::{CudaError, Result};
use crate::layout::{Id, Kept, Layout, Tensor};
use activations::{Activations, Extent, Keep};
use adapters::Base;
use forward::multiplies_bytes;
use occurrences::Occurrences;
use sums::Sums;

pub use adapters::{Adapters, Mask};
pub use update::{AdamW, Muon};

/// How steps are computed.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How activations are kept and gradients multiplied. Sums and what is added up over layers and steps are
    /// f32 in any case.
    pub kind: Kind,
    /// Keep only the input of every layer for the backward pass, and run it again there: activation
    /// checkpointing (arXiv 1604.06174).
    pub recompute: bool,
    /// Whether masters of matrices are bf16, rounded stochastically after every update.
    pub narrow_masters: bool,
}

/// A model on a device.
pub struct Engine {
    device: Arc<dyn Backend>,
    config: ModelConfig,
    options: Options,
    layout: Layout,
    /// Gradients that are summed over processes together, in elements, the last ones first.
    buckets: Vec<Range<u64>>,
    masters: Buffer,
    gradients: Buffer,
    /// First and second moments of gradients.
    moments: [Buffer; 2],
    /// Trits and the head, or adapters, as they are multiplied in training.
    copies: Buffer,
    /// The same in f32, for what is evaluated.
    exact: Buffer,
    /// Trits as bytes, where these are multiplied.
    trits: Buffer,
    /// Scales of weights.
    scales: Buffer,
    /// The tables of what is multiplied, of all parameters that are trained, and of those that are not projections.
    tables: [Buffer; 3],
    /// Cosines and sines, `(positions, d / 2)` each.
    rope: [Buffer; 2],
    /// Parts of sums over parameters, and these sums.
    parts: Buffer,
    sums: Buffer,
    /// Of an update of Muon: the matrix in f32 and as it is multiplied, a product, its own with itself and that
    /// squared in f32, a polynomial of it as it is multiplied.
    orthogonal: [Buffer; 6],
    /// The sum of losses, f64.
    loss: Buffer,
    ids: Ids,
    training: Activations,
    evaluation: Activations,
    /// The model that adapters are beside.
    base: Option<Base>,
    /// Whether masters have changed since they were last made into what is multiplied in training, and into what
    /// is for evaluation.
    stale: [bool; 2],
    /// Batches whose gradients have been added up.
    batches: usize,
}

/// What a batch looks like on the device.
struct Ids {
    /// `(M,)`
    inputs: Buffer,
    /// `(n,)`: what the rows that predict something are to predict.
    targets: Buffer,
    /// `(n,)`: which rows these are, unless all are.
    rows: Buffer,
    /// `(M,)`: the first position that each sees.
    starts: Buffer,
    /// The different ids of a batch, where the rows of each begin, and these rows.
    different: [Buffer; 3],
}

/// A batch on the device.
#[derive(Clone, Copy)]
struct Input {
    extent: Extent,
    starts: Option<Address>,
    rows: Option<Address>,
    /// Rows that predict something.
    learned: usize,
    /// Different ids.
    occurring: usize,
}

impl Engine {
    /// Memory for a model of `config` on a device. Parameters are anything until they are [set](Self::set);
    /// moments are zero.
    ///
    /// # Errors
    /// A model that the engine does not compute, or one that the device has no memory for.
    pub fn new(device: Arc<dyn Backend>, config: &ModelConfig, options: Options) -> Result<Self> {
        let layout = Layout::new(config, options.narrow_masters)?;
        Self::of_layout(device, config, options, layout)
    }

    fn of_layout(
        device: Arc<dyn Backend>,
        config: &ModelConfig,
        options: Options,
        layout: Layout,
    ) -> Result<Self> {
        attention::check(config)?;
        let elements = layout.elements as usize * 4;
        let masters = Buffer::with(&device, layout.masters as usize)?;
        let gradients = Buffer::with(&device, elements)?;
        let moments = [Buffer::with(&device, elements)?, Buffer::with(&device, elements)?];
        for zeros in [&moments[0], &moments[1], &gradients] {
            device.clear(zeros.at(), elements)?;
        }
        let multiplied = layout.multiplied.iter().map(|at| &layout.tensors[*at]);
        let trained = layout.trained();
        let tables =
            [layout.table(multiplied), layout.table(trained.iter()), layout.table(layout.others())];
        let tables = upload_all(&device, tables.each_ref().map(|t| bytemuck::cast_slice(t)))?;
        let (cos, sin) = config.rope_tables(config.max_position_embeddings);
        let rope = upload_all(&device, [&cos, &sin].map(|t| bytemuck::cast_slice(t)))?;
        let scales = Buffer::with(&device, layout.scales.max(1) * 4)?;
        let parts = Buffer::with(&device, trained.len() * update::PARTS * 8)?;
        let sums = Buffer::with(&device, trained.len() * 8)?;
        let loss = Buffer::with(&device, 8)?;
        let buffer = || Buffer::new(&device);
        let ids = Ids {
            inputs: buffer(),
            targets: buffer(),
            rows: buffer(),
            starts: buffer(),
            different: [buffer(), buffer(), buffer()],
        };
        Ok(Self {
            config: config.clone(),
            options,
            masters,
            gradients,
            moments,
            copies: buffer(),
            exact: buffer(),
            trits: buffer(),
            scales,
            tables,
            rope,
            orthogonal: std::array::from_fn(|_| buffer()),
            parts,
            sums,
            loss,
            ids,
            training: Activations::new(&device, options.kind),
            evaluation: Activations::new(&device, Kind::F32),
            base: None,
            stale: [true; 2],
            batches: 0,
            buckets: layout.buckets(),
            layout,
            device,
        })
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Backend> {
        &self.device
    }

    /// How steps are computed.
    pub fn options(&self) -> Options {
        self.options
    }

    /// Names of the parameters that are trained, and how many numbers each has.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, usize)> {
        self.layout.trained().iter().map(|tensor| (tensor.name.as_str(), tensor.count()))
    }

    fn tensor(&self, name: &str, found: usize) -> Result<&Tensor> {
        let tensor = self.layout.named(name);
        tensor.filter(|tensor| tensor.count() == found).ok_or_else(|| CudaError::Unsupported {
            what: "a parameter",
            expected: tensor.map_or("a name of the model".to_owned(), |t| format!("{:?}", t.shape)),
            found: format!("{name} of {found} numbers"),
        })
    }

    /// As [`Self::tensor`], of those that are trained.
    fn trained(&self, name: &str, found: usize) -> Result<&Tensor> {
        let trained = self.layout.trained().iter().any(|tensor| tensor.name == name);
        self.tensor(name, if trained { found } else { usize::MAX })
    }

    /// Gives a parameter its values; where masters are bf16 they must be values that bf16 has.
    ///
    /// # Errors
    /// No such parameter, or one of another size.
    pub fn set(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let tensor = self.tensor(name, values.len())?;
        let at = self.masters.at() + tensor.masters;
        let values = &*tensor.as_it_lies(values);
        if tensor.kept == Kept::Bf16 {
            let upper: Vec<u16> = values.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
            self.device.upload(at, bytemuck::cast_slice(&upper))?;
        } else {
            self.device.upload(at, bytemuck::cast_slice(values))?;
        }
        self.stale = [true; 2];
        Ok(())
    }

    /// The values of a parameter.
    ///
    /// # Errors
    /// No such parameter, or one of another size.
    pub fn get(&self, name: &str, values: &mut [f32]) -> Result<()> {
        let tensor = self.tensor(name, values.len())?;
        let at = self.masters.at() + tensor.masters;
        if tensor.kept == Kept::Bf16 {
            let mut upper = vec![0u16; values.len()];
            self.device.download(at, bytemuck::cast_slice_mut(&mut upper))?;
            let widened = upper.iter().map(|upper| f32::from_bits(u32::from(*upper) << 16));
            values.iter_mut().zip(widened).for_each(|(value, widened)| *value = widened);
        } else {
            self.device.download(at, bytemuck::cast_slice_mut(values))?;
        }
        tensor.turn_back(values);
        Ok(())
    }

    /// The moments of a parameter: the first, and of AdamW the second.
    ///
    /// # Errors
    /// No such parameter, or one of another size.
    pub fn moments(&self, name: &str, values: &mut [&mut [f32]]) -> Result<()> {
        for (moments, values) in self.moments.iter().zip(values) {
            let tensor = self.trained(name, values.len())?;
            self.device
                .download(moments.at() + tensor.start * 4, bytemuck::cast_slice_mut(values))?;
            tensor.turn_back(values);
        }
        Ok(())
    }

    /// Gives the moments of a parameter their values.
    ///
    /// # Errors
    /// No such parameter, or one of another size.
    pub fn set_moments(&mut self, name: &str, values: &[&[f32]]) -> Result<()> {
        for (moments, values) in self.moments.iter().zip(values) {
            let tensor = self.trained(name, values.len())?;
            let values = tensor.as_it_lies(values);
            self.device.upload(moments.at() + tensor.start * 4, bytemuck::cast_slice(&values))?;
        }
        Ok(())
    }

    /// Makes all moments zero.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn clear_moments(&mut self) -> Result<()> {
        let bytes = self.layout.elements as usize * 4;
        self.moments.iter().try_for_each(|moments| self.device.clear(moments.at(), bytes))
    }

    /// The gradient of a parameter, of the batches since [`Self::begin`].
    ///
    /// # Errors
    /// No such parameter, or one of another size.
    pub fn gradient(&self, name: &str, values: &mut [f32]) -> Result<()> {
        let tensor = self.trained(name, values.len())?;
        let at = self.gradients.at() + tensor.start * 4;
        self.device.download(at, bytemuck::cast_slice_mut(values))?;
        tensor.turn_back(values);
        if let Some(scale) = tensor.scale {
            // It is kept times the scale of its weights.
            let mut factor = [0f32];
            let at = self.scales.at() + 4 * scale as u64;
            self.device.download(at, bytemuck::cast_slice_mut(&mut factor))?;
            values.iter_mut().for_each(|value| *value /= factor[0]);
        }
        Ok(())
    }

    /// Begins a step: gradients and losses of batches are added up from here on.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn begin(&mut self) -> Result<()> {
        self.prepare(self.options.kind)?;
        self.batches = 0;
        self.device.clear(self.loss.at(), 8)
    }

    /// Adds the losses of a batch, and the gradients of the sum of its tokens' losses times `weight`.
    ///
    /// # Errors
    /// More tokens than positions, ids outside the vocabulary, nothing to be predicted.
    pub fn add(&mut self, batch: &Batch, weight: f32) -> Result<()> {
        self.add_masked(batch, weight, Vec::new())
    }

    /// As [`Self::add`], with what is left out of the inputs of adapters (dropout): of queries, keys and values, of
    /// the output projection, of gate and up, and of the down projection, of one layer after the other; or of none.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn add_masked(&mut self, batch: &Batch, weight: f32, masks: Vec<Mask>) -> Result<()> {
        self.add_part(batch, weight, masks, false)
    }

    /// As [`Self::add_masked`]; sums begin if it is the `last` one of several processes' batches.
    fn add_part(&mut self, batch: &Batch, weight: f32, masks: Vec<Mask>, last: bool) -> Result<()> {
        if let Some(base) = &mut self.base {
            base.masks = masks;
        }
        let input = self.upload(batch, true)?;
        let keep = if self.options.recompute { Keep::Inputs } else { Keep::All };
        let mut pass = self.pass(input, keep, last)?;
        pass.forward()?;
        pass.backward(weight)?;
        self.batches += 1;
        Ok(())
    }

    /// The sum of the losses of the targets in nats that were added since [`Self::begin`].
    ///
    /// # Errors
    /// When the device has failed.
    pub fn loss(&self) -> Result<f64> {
        let mut loss = [0f64];
        self.device.download(self.loss.at(), bytemuck::cast_slice_mut(&mut loss))?;
        Ok(loss[0])
    }

    /// The sum of the losses in nats of the targets of a batch, everything in f32.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn evaluate(&mut self, batch: &Batch) -> Result<f64> {
        self.prepare(Kind::F32)?;
        let input = self.upload(batch, false)?;
        self.device.clear(self.loss.at(), 8)?;
        let mut pass = self.pass(input, Keep::Nothing, false)?;
        pass.forward()?;
        pass.losses()?;
        self.loss()
    }

    /// As [`Self::evaluate`], for each target that is to be predicted, in order: its loss in nats, and by how
    /// much the largest logit is larger than its own.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn score(&mut self, batch: &Batch) -> Result<Vec<(f32, f32)>> {
        self.evaluate(batch)?;
        let mut found = [vec![0f32; batch.learned()], vec![0f32; batch.learned()]];
        let memory = [&self.evaluation.losses, &self.evaluation.delta];
        for (found, memory) in found.iter_mut().zip(memory) {
            self.device.download(memory.at(), bytemuck::cast_slice_mut(found))?;
        }
        let [losses, margins] = found;
        Ok(losses.into_iter().zip(margins).collect())
    }

    /// A pass, which begins sums over processes where it `sums`.
    fn pass(&mut self, input: Input, keep: Keep, sums: bool) -> Result<Pass<'_>> {
        let Self { training, evaluation, copies, exact, base, .. } = self;
        let (memory, multiplied) = match keep {
            Keep::Nothing if self.options.kind != Kind::F32 => (evaluation, exact),
            Keep::Nothing => (evaluation, copies),
            _ => (training, copies),
        };
        let adapters = base.as_ref().map(|base| &base.adapters);
        memory.reserve(&self.config, input.extent, keep, adapters)?;
        let as_bytes = multiplies_bytes(&*self.device, &self.config);
        if let Some(base) = base {
            let as_kind = (keep != Keep::Nothing || !as_bytes).then_some(memory.kind);
            base.reserve(self.layout.layer as usize, as_bytes, as_kind)?;
        }
        let bytes = base.as_ref().map_or(self.trits.at(), |base| base.at()[0]);
        let buckets = if sums { &self.buckets[..] } else { &[] };
        Ok(Pass {
            sums: Sums::new(&*self.device, self.gradients.at(), buckets),
            device: &*self.device,
            config: &self.config,
            layout: &self.layout,
            masters: self.masters.at(),
            gradients: self.gradients.at(),
            multiplied: multiplied.at(),
            trits: as_bytes.then_some(bytes),
            base: base.as_mut(),
            scales: self.scales.at(),
            rope: self.rope.each_ref().map(Buffer::at),
            loss: self.loss.at(),
            ids: &self.ids,
            memory,
            input,
            keep,
            add: self.batches > 0,
        })
    }

    /// Copies the ids of a batch to the device.
    fn upload(&mut self, batch: &Batch, backward: bool) -> Result<Input> {
        let config = &self.config;
        let too = |what, expected: String, found: usize| {
            Err(CudaError::Unsupported { what, expected, found: found.to_string() })
        };
        let extent = Extent { batch: batch.batch, tokens: batch.seq_len };
        let (positions, vocab) = (config.max_position_embeddings, config.vocab_size);
        if extent.tokens > positions {
            return too("tokens of a sequence", format!("at most {positions}"), extent.tokens);
        }
        let targets = batch.targets.iter().filter(|id| **id != IGNORED);
        if let Some(id) = batch.inputs.iter().chain(targets).find(|id| **id as usize >= vocab) {
            return too("an id", format!("below {vocab}"), *id as usize);
        }
        let learned = batch.learned();
        if learned == 0 {
            return too("targets of a batch", "at least one".to_owned(), 0);
        }
        let device = &self.device;
        let put = |buffer: &mut Buffer, values: &[u32]| {
            let at = buffer.reserve(size_of_val(values))?;
            device.upload(at, bytemuck::cast_slice(values)).map(|()| at)
        };
        put(&mut self.ids.inputs, &batch.inputs)?;
        let starts = match &batch.starts {
            Some(starts) => Some(put(&mut self.ids.starts, starts)?),
            None => None,
        };
        let rows = if learned == batch.targets.len() {
            put(&mut self.ids.targets, &batch.targets)?;
            None
        } else {
            let learned = (0u32..).zip(&batch.targets).filter(|(_, id)| **id != IGNORED);
            let (rows, targets): (Vec<u32>, Vec<u32>) = learned.unzip();
            put(&mut self.ids.targets, &targets)?;
            Some(put(&mut self.ids.rows, &rows)?)
        };
        let mut occurring = 0;
        if backward && self.base.is_none() {
            let Occurrences { ids, starts, rows } = Occurrences::of(&batch.inputs, vocab);
            for (buffer, values) in self.ids.different.iter_mut().zip([&ids, &starts, &rows]) {
                put(buffer, values)?;
            }
            occurring = ids.len();
        }
        Ok(Input { extent, starts, rows, learned, occurring })
    }
}

/// One pass through the network.
struct Pass<'a> {
    device: &'a dyn Backend,
    config: &'a ModelConfig,
    layout: &'a Layout,
    masters: Address,
    gradients: Address,
    /// What is made of masters.
    multiplied: Address,
    /// Trits as bytes, where these are multiplied: all, or those of a layer of `base`.
    trits: Option<Address>,
    base: Option<&'a mut Base>,
    scales: Address,
    rope: [Address; 2],
    loss: Address,
    ids: &'a Ids,
    memory: &'a mut Activations,
    input: Input,
    keep: Keep,
    /// Whether gradients are added to those that are there.
    add: bool,
    /// What is summed over processes when it is finished.
    sums: Sums<'a>,
}

impl Pass<'_> {
    fn kind(&self) -> Kind {
        self.memory.kind
    }

    fn act(&self) -> u32 {
        match self.config.hidden_act {
            HiddenAct::Relu2 => 0,
            HiddenAct::Silu => 1,
        }
    }

    /// The masters of a parameter, if the model has it.
    fn master(&self, id: TensorId) -> Option<Address> {
        self.layout.get(Id::Of(id)).map(|tensor| self.masters + tensor.masters)
    }

    /// Says that the gradient of a parameter is finished, if it is trained, and all that lie after it.
    fn finished(&self, id: Id) -> Result<()> {
        self.layout.get_trained(id).map_or(Ok(()), |tensor| self.sums.finished(tensor.start))
    }

    /// The gradient of a parameter, if there is one that is trained.
    fn gradient(&self, id: Id) -> Option<Address> {
        self.layout.get_trained(id).map(|tensor| self.gradients + tensor.start * 4)
    }

    /// Where the scale of a projection's weights is, if it has one.
    fn scale(&self, layer: usize, p: Projection) -> Option<Address> {
        let quantized = self.config.quantization != Quantization::None;
        quantized.then(|| self.scales + 4 * (7 * layer + p as usize) as u64)
    }

    /// What scales of rows are, where activations are codes.
    fn rows(&self, scales: &Buffer) -> Option<Address> {
        (self.config.quantization != Quantization::None).then(|| scales.at())
    }
}

fn upload_all<const N: usize>(device: &Arc<dyn Backend>, all: [&[u8]; N]) -> Result<[Buffer; N]> {
    let mut buffers = Vec::with_capacity(N);
    for bytes in all {
        let buffer = Buffer::with(device, bytes.len())?;
        device.upload(buffer.at(), bytes)?;
        buffers.push(buffer);
    }
    Ok(buffers.try_into().unwrap_or_else(|_| unreachable!("as many as there were")))
}

/// Threads of a block that has a row of `width` in registers, and how many groups of four each has.
fn row_block(width: usize) -> (usize, usize) {
    let groups = match width {
        0..=4096 => 2,
        4097..=7168 => 4,
        _ => 8,
    };
    (width.div_ceil(4 * groups).next_multiple_of(32), groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_a_whole_row() {
        for width in [8, 64, 768, 2560, 4096, 4104, 6912, 7168, 7176, 16384] {
            let (threads, groups) = row_block(width);
            let most = if groups == 4 { 448 } else { 512 };
            assert!(threads <= most && threads * groups * 4 >= width, "{width}");
        }
    }
}
