//! A model that stays as it is, and adapters (LoRA, arXiv 2106.09685) beside its projections.
//!
//! Trits are kept in 2 bits. Those of one layer at a time are unpacked to what is multiplied, so that a model
//! takes a quarter of a byte for each and a little more.
//!
//! A projection with an adapter is `y = W x + (alpha / r) B A x`, `x` being its input before that becomes codes.
//! What is multiplied in place of `x` is `s x`, with `s` the scale of the row's codes, and in place of `B` it is
//! `B alpha / (r w)`, with `w` the scale of the trits:
//!
//! `y = (w / s) (codes . trits + (B alpha / (r w)) A (s x))`
//!
//! So the product of an adapter is added to that of the trits before whoever reads it takes the factor `w / s`,
//! and gradients, which are kept times that, are those of `B` and `A` but for a factor of the tensor.
//!
//! `B` lies transposed, `(r, out)`, and both matrices of a projection are filled up with rows of zeros to a
//! multiple of eight, which is what products are fast with.

use std::sync::Arc;

use trine_format::names::{Part, TensorId};
use trine_format::{ModelConfig, Projection, Quantization};

use super::activations::Codes;
use super::{Address, Engine, Keep, Kind, Options, Pass, Product, launch};
use crate::backend::{Backend, Buffer};
use crate::error::{CudaError, Result};
use crate::layout::{self, INPUTS, Id, Kept, bytes};

/// Ids whose weights of the head are widened at a time.
const HEAD_IDS: usize = 8 << 10;

/// Blocks of a kernel that goes through any number of elements.
const BLOCKS: usize = 1024;

/// Adapters beside projections of every layer.
#[derive(Clone, Debug)]
pub struct Adapters {
    /// Rows of `A`, columns of `B`.
    pub rank: usize,
    /// What their products are multiplied by, times the rank.
    pub alpha: f64,
    /// The projections that have one.
    pub targets: Vec<Projection>,
    /// Whether bf16 has the values of all matrices of the model that are not trits; they are kept so then.
    pub narrow_base: bool,
}

impl Adapters {
    /// Rows of a matrix as it is multiplied.
    pub(crate) fn rows(&self) -> usize {
        self.rank.next_multiple_of(8)
    }

    /// The projections of an input that have one, in order.
    pub(crate) fn of(&self, input: usize) -> impl Iterator<Item = Projection> + Clone {
        INPUTS[input].iter().copied().filter(|p| self.targets.contains(p))
    }

    /// Columns of what lies between the matrices `A` of an input and their matrices `B`.
    pub(super) fn between(&self, input: usize) -> usize {
        self.of(input).count() * self.rows()
    }

    /// The same of the input that has most.
    pub(super) fn most_between(&self) -> usize {
        (0..INPUTS.len()).map(|input| self.between(input)).max().unwrap_or(0)
    }
}

/// What is left out of an input of adapters in a step: elements whose number is below `below`, that of element
/// `i` being a hash of `key + i`.
#[derive(Clone, Copy, Debug)]
pub struct Mask {
    /// Of this input and step.
    pub key: u64,
    /// 0 leaves nothing out.
    pub below: u64,
    /// What the others are multiplied by.
    pub kept: f32,
}

/// An input of adapters, where it goes.
#[derive(Clone, Copy, Default)]
pub(super) struct Plain {
    pub(super) at: Option<Address>,
    mask: Option<Mask>,
}

impl Plain {
    /// `key`, `below` and `kept`, as kernels take them.
    pub(super) fn mask(self) -> (u64, u64, f32) {
        self.mask.map_or((0, 0, 1.0), |Mask { key, below, kept }| (key, below, kept))
    }
}

/// What an engine of adapters has besides.
pub(super) struct Base {
    pub(super) adapters: Adapters,
    /// Trits of all projections, in 2 bits.
    packed: Buffer,
    /// Of one layer: trits as bytes, and all that is multiplied otherwise.
    bytes: Buffer,
    unpacked: Buffer,
    /// Which layers these are.
    bytes_of: Option<usize>,
    unpacked_of: Option<(usize, Kind)>,
    /// Some of the head's weights, where they are not kept as they are multiplied.
    head: Buffer,
    /// What is left out of inputs, four of each layer; nothing where it is empty.
    pub(super) masks: Vec<Mask>,
}

impl Base {
    fn new(engine: &Engine, adapters: &Adapters) -> Result<Self> {
        let (device, config) = (&engine.device, &engine.config);
        let buffer = || Buffer::new(device);
        let all = config.num_hidden_layers * engine.layout.layer as usize;
        let packed = if is_ternary(config) { Buffer::with(device, all / 4)? } else { buffer() };
        Ok(Self {
            adapters: adapters.clone(),
            packed,
            bytes: buffer(),
            unpacked: buffer(),
            bytes_of: None,
            unpacked_of: None,
            head: buffer(),
            masks: Vec::new(),
        })
    }
}

fn is_ternary(config: &ModelConfig) -> bool {
    config.quantization != Quantization::None
}

impl Engine {
    /// As [`Self::new`], for adapters that are trained beside a model that stays as it is: its trits are those of
    /// [`Self::freeze`], everything else is [set](Self::set). Parameters are the adapters' matrices, by PEFT's
    /// names.
    ///
    /// # Errors
    /// As [`Self::new`], and a rank of 0.
    pub fn with_adapters(
        device: Arc<dyn Backend>,
        config: &ModelConfig,
        options: Options,
        adapters: &Adapters,
    ) -> Result<Self> {
        let layout = layout::Layout::adapted(config, adapters, options.narrow_masters)?;
        let mut engine = Self::of_layout(device, config, options, layout)?;
        engine.base = Some(Base::new(&engine, adapters)?);
        for layer in 0..config.num_hidden_layers {
            for p in &adapters.targets {
                engine.scale_adapter(layer, *p, 1.0)?;
            }
        }
        Ok(engine)
    }

    /// Gives a projection that stays as it is its trits, `(out, in)`, four in a byte (`trine_ternary::pack_2bit`),
    /// and their scale.
    ///
    /// # Errors
    /// An engine that was made for masters, or another number of trits.
    pub fn freeze(&mut self, layer: usize, p: Projection, trits: &[u8], scale: f32) -> Result<()> {
        let (out, inp) = self.config.projection_shape(p);
        let at = (layer as u64 * self.layout.layer + self.layout.offset(p)) / 4;
        let base = self.base.as_mut().filter(|_| is_ternary(&self.config));
        let fits = trits.len() == out * inp / 4 && layer < self.config.num_hidden_layers;
        let Some(base) = base.filter(|_| fits) else {
            return Err(CudaError::Unsupported {
                what: "trits that stay as they are",
                expected: format!(
                    "{} bytes of a ternary model's projection, and adapters",
                    out * inp / 4
                ),
                found: format!("{} bytes", trits.len()),
            });
        };
        (base.bytes_of, base.unpacked_of) = (None, None);
        self.device.upload(base.packed.at() + at, trits)?;
        let number = layer * Projection::ALL.len() + p as usize;
        self.device.upload(self.scales.at() + 4 * number as u64, &scale.to_ne_bytes())?;
        self.scale_adapter(layer, p, scale)
    }

    /// Makes `w r / alpha` the scale of an adapter's matrix `B`, if there is one.
    fn scale_adapter(&mut self, layer: usize, p: Projection, w: f32) -> Result<()> {
        let Some(Base { adapters, .. }) = &self.base else { return Ok(()) };
        let Some(number) = self.layout.get(Id::B(layer, p)).and_then(|b| b.scale) else {
            return Ok(());
        };
        let scale = f64::from(w) * adapters.rank as f64 / adapters.alpha;
        self.stale = [true; 2];
        self.device.upload(self.scales.at() + 4 * number as u64, &(scale as f32).to_ne_bytes())
    }

    /// Makes sure that what is multiplied is what the adapters are.
    pub(super) fn prepare_adapters(&mut self, kind: Kind, at: Address) -> Result<()> {
        let (table, scales) = (self.tables[0].at(), self.scales.at());
        // Rows that fill up others are zeros.
        self.device.clear(at, bytes(self.layout.copies as usize, kind))?;
        let kernel = format!("adapters_{}", kind.name());
        launch!(self.device, &kernel, [32, self.layout.multiplied.len(), 1], 256, 0;
            self.masters.at(), table, scales, at)
    }
}

impl Pass<'_> {
    /// Where codes go as they are multiplied, unless they are multiplied as bytes and not needed again.
    pub(super) fn codes(&self, input: &Codes) -> Option<Address> {
        match &self.base {
            None => Some(input.codes.at()),
            Some(_) => self.narrow_codes().is_none().then(|| self.memory.codes.at()),
        }
    }

    /// Where an input of a layer goes for adapters.
    pub(super) fn plain(&self, layer: usize, input: usize, codes: &Codes) -> Plain {
        let base = self.base.as_deref().filter(|base| base.adapters.between(input) > 0);
        Plain { at: base.map(|_| codes.codes.at()), mask: self.mask(layer, input) }
    }

    fn mask(&self, layer: usize, input: usize) -> Option<Mask> {
        let base = self.base.as_deref().filter(|_| self.keep != Keep::Nothing)?;
        base.masks.get(INPUTS.len() * layer + input).copied().filter(|mask| mask.below > 0)
    }

    /// Makes sure that the weights of a layer that stay as they are are there as they are multiplied: forward, or
    /// `backward`.
    pub(super) fn unpack(&mut self, layer: usize, backward: bool) -> Result<()> {
        let kind = self.kind();
        let as_bytes = self.trits.is_some() && !backward;
        let (elements, ternary) = (self.layout.layer as usize, is_ternary(self.config));
        let (layout, device, masters) = (self.layout, self.device, self.masters);
        let Some(base) = &mut self.base else { return Ok(()) };
        let packed = base.packed.at() + layer as u64 * self.layout.layer / 4;
        let words = (elements / 16) as u64;
        if as_bytes {
            if base.bytes_of.replace(layer) != Some(layer) {
                let to = base.bytes.at();
                launch!(device, "unpack_bytes", [BLOCKS, 1, 1], 256, 0; packed, to, words)?;
            }
            return Ok(());
        }
        if base.unpacked_of.replace((layer, kind)) == Some((layer, kind)) {
            return Ok(());
        }
        let to = base.unpacked.at();
        if ternary {
            let kernel = format!("unpack_{}", kind.name());
            return launch!(device, &kernel, [BLOCKS, 1, 1], 256, 0; packed, to, words);
        }
        for p in Projection::ALL {
            let id = TensorId::Layer(layer, Part::Projection(p));
            let tensor = layout.get(Id::Of(id)).expect("every layer has its projections");
            let to = to + layout.offset(p) * kind.bytes() as u64;
            convert(
                device,
                (masters + tensor.masters, kept(tensor.kept)),
                (to, kind),
                tensor.count(),
            )?;
        }
        Ok(())
    }

    /// Of a head that stays as it is and is not kept as it is multiplied, how many of its ids are at hand at a time;
    /// of others all.
    pub(super) fn head_ids(&mut self) -> Result<usize> {
        let (kind, vocab) = (self.kind(), self.config.vocab_size);
        let tensor =
            self.layout.get(Id::Of(layout::head(self.config))).expect("the model has a head");
        match &mut self.base {
            Some(base) if kept(tensor.kept) != kind => {
                // Sums of several parts are f32, or there is one part.
                let ids = if kind == Kind::F32 { HEAD_IDS.min(vocab) } else { vocab };
                base.head.reserve(bytes(ids * self.config.hidden_size, kind))?;
                Ok(ids)
            }
            _ => Ok(vocab),
        }
    }

    /// The weights of some ids of a head that stays as it is.
    pub(super) fn frozen_head(&self, base: &Base, (first, ids): (usize, usize)) -> Result<Address> {
        let (kind, width) = (self.kind(), self.config.hidden_size);
        let tensor =
            self.layout.get(Id::Of(layout::head(self.config))).expect("the model has a head");
        let of = kept(tensor.kept);
        let from = self.masters + tensor.masters + bytes(first * width, of) as u64;
        if of == kind {
            return Ok(from);
        }
        convert(self.device, (from, of), (base.head.at(), kind), ids * width)?;
        Ok(base.head.at())
    }

    /// Where a matrix of an adapter lies as it is multiplied.
    fn matrix(&self, id: Id) -> Address {
        let copy = self.layout.get_trained(id).and_then(|tensor| tensor.copy);
        self.multiplied + copy.expect("adapters are multiplied") * self.kind().bytes() as u64
    }

    /// The adapters of an input of a layer: their number among them, and where their outputs begin among those of
    /// all projections of the input.
    fn adapters(&self, base: &Base, input: usize) -> Vec<(usize, Projection, usize)> {
        let mut found = Vec::new();
        let mut at = 0;
        for p in INPUTS[input] {
            if base.adapters.targets.contains(p) {
                found.push((found.len(), *p, at));
            }
            at += self.config.projection_shape(*p).0;
        }
        found
    }

    /// The products of an input with the matrices `A` of its adapters.
    pub(super) fn lower(&self, layer: usize, input: usize, x: &Codes) -> Result<()> {
        let Some(base) = self.base.as_deref() else { return Ok(()) };
        let Some(first) = base.adapters.of(input).next() else { return Ok(()) };
        let (between, (_, inp)) =
            (base.adapters.between(input), self.config.projection_shape(first));
        let m = self.input.extent.rows();
        let product = Product::new(self.kind(), [m, between, inp], [inp, inp, between]);
        let product = Product { b_transposed: true, ..product };
        self.device.multiply(&product, x.codes.at(), self.matrix(Id::A(layer, first)), x.low.at())
    }

    /// Adds the products of these with the matrices `B` to what the projections of the input made of it, `y`
    /// `(M, out)`.
    pub(super) fn raise(
        &self,
        layer: usize,
        input: usize,
        x: &Codes,
        y: Address,
        out: usize,
    ) -> Result<()> {
        let Some(base) = self.base.as_deref() else { return Ok(()) };
        let (m, kind, rows) = (self.input.extent.rows(), self.kind(), base.adapters.rows());
        let between = base.adapters.between(input);
        for (i, p, at) in self.adapters(base, input) {
            let (outputs, _) = self.config.projection_shape(p);
            let product = Product::new(kind, [m, outputs, rows], [between, outputs, out]);
            let product = Product { add: true, ..product };
            let from = x.low.at() + bytes(i * rows, kind) as u64;
            let to = y + bytes(at, kind) as u64;
            self.device.multiply(&product, from, self.matrix(Id::B(layer, p)), to)?;
        }
        Ok(())
    }

    /// The gradients of the adapters of an input, from those of its projections, `dy` `(M, out)`; and what they add
    /// to that of the input, `dx` `(M, in)`, where that is wanted.
    pub(super) fn adapt_backward(
        &self,
        layer: usize,
        input: usize,
        x: &Codes,
        (dy, out): (Address, usize),
        dx: Option<Address>,
    ) -> Result<()> {
        let Some(base) = self.base.as_deref() else { return Ok(()) };
        let adapters = self.adapters(base, input);
        let Some((_, first, _)) = adapters.first().copied() else { return Ok(()) };
        let (m, kind, rows) = (self.input.extent.rows(), self.kind(), base.adapters.rows());
        let between = base.adapters.between(input);
        let (low, dlow) = (x.low.at(), self.memory.dlow.at());
        let gradient = |id| self.gradient(id).expect("adapters are trained");
        let of_weights =
            |product| Product { a_transposed: true, result: Kind::F32, add: self.add, ..product };
        for (i, p, at) in adapters {
            let (outputs, _) = self.config.projection_shape(p);
            let column = bytes(i * rows, kind) as u64;
            let dy = dy + bytes(at, kind) as u64;
            let of_low = Product::new(kind, [m, rows, outputs], [out, outputs, between]);
            let of_low = Product { b_transposed: true, ..of_low };
            self.device.multiply(&of_low, dy, self.matrix(Id::B(layer, p)), dlow + column)?;
            let of_b = of_weights(Product::new(kind, [rows, outputs, m], [between, out, outputs]));
            self.device.multiply(&of_b, low + column, dy, gradient(Id::B(layer, p)))?;
        }
        let (_, inp) = self.config.projection_shape(first);
        let of_a = of_weights(Product::new(kind, [between, inp, m], [between, inp, inp]));
        self.device.multiply(&of_a, dlow, x.codes.at(), gradient(Id::A(layer, first)))?;
        self.finished(Id::A(layer, first))?;
        let Some(dx) = dx else { return Ok(()) };
        let a = self.matrix(Id::A(layer, first));
        let of_input = Product::new(kind, [m, inp, between], [between, inp, inp]);
        let Some(Mask { key, below, kept }) = self.mask(layer, input) else {
            return self.device.multiply(&Product { add: true, ..of_input }, dlow, a, dx);
        };
        let more = self.memory.codes.at();
        self.device.multiply(&of_input, dlow, a, more)?;
        let kernel = format!("add_kept_{}", kind.name());
        launch!(self.device, &kernel, [BLOCKS, 1, 1], 256, 0;
            more, dx, key, below, kept, (m * inp) as u64)
    }
}

impl Base {
    /// Memory for what is unpacked: as bytes where these are multiplied, and as `kind` where that is.
    pub(super) fn reserve(
        &mut self,
        elements: usize,
        as_bytes: bool,
        as_kind: Option<Kind>,
    ) -> Result<()> {
        if as_bytes {
            self.bytes.reserve(elements)?;
        }
        if let Some(kind) = as_kind {
            // There is more of another kind, and what was there goes.
            self.unpacked_of = self.unpacked_of.filter(|(_, of)| *of == kind);
            self.unpacked.reserve(bytes(elements, kind))?;
        }
        Ok(())
    }

    /// Where what is multiplied of a layer lies, as bytes and otherwise.
    pub(super) fn at(&self) -> [Address; 2] {
        [self.bytes.at(), self.unpacked.at()]
    }
}

/// What matrices that stay as they are are kept as.
fn kept(kept: Kept) -> Kind {
    if kept == Kept::Bf16 { Kind::Bf16 } else { Kind::F32 }
}

fn convert(
    device: &dyn Backend,
    (from, of): (Address, Kind),
    (to, kind): (Address, Kind),
    count: usize,
) -> Result<()> {
    let kernel = format!("convert_{}_{}", of.name(), kind.name());
    launch!(device, &kernel, [BLOCKS, 1, 1], 256, 0; from, to, count as u64)
}
