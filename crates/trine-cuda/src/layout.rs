//! Where parameters, their gradients and what is multiplied lie in the memory of a device.
//!
//! Projections that have the same input lie one after the other, so that one product computes them all. What
//! the forward pass comes to first lies first, norms of a layer before its projections: so the backward pass
//! finishes gradients from the last one to the first, the tied head's with the embedding's.

use std::borrow::Cow;
use std::ops::Range;

use trine_format::names::{self, Part, TensorId};
use trine_format::{ModelConfig, Projection, Quantization};

use crate::backend::Kind;
use crate::engine::Adapters;
use crate::error::{CudaError, Result};

/// Elements that a tensor's first one is a multiple of: 256 bytes of bf16.
const ALIGNMENT: u64 = 128;

/// Elements of a bucket of gradients that are summed over processes together, at least: 32 MB, or a sixteenth of
/// all where that is less. So sums begin early, and there are not so many that what each costs by itself counts.
const BUCKET: u64 = 8 << 20;
const BUCKETS: u64 = 16;

/// What a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Id {
    /// Of the model.
    Of(TensorId),
    /// The matrix `A` `(r, in)` of the adapter of a layer's projection.
    A(usize, Projection),
    /// Its matrix `B`, `(out, r)`, which lies transposed.
    B(usize, Projection),
}

impl Id {
    fn name(self) -> String {
        match self {
            Self::Of(id) => id.canonical(),
            Self::A(layer, p) => names::adapter(layer, p)[0].clone(),
            Self::B(layer, p) => names::adapter(layer, p)[1].clone(),
        }
    }
}

/// A parameter.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) id: Id,
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// In elements of gradients and moments, if it is trained.
    pub(crate) start: u64,
    /// In bytes of masters.
    pub(crate) masters: u64,
    /// In elements of what is multiplied.
    pub(crate) copy: Option<u64>,
    /// Its scale's number.
    pub(crate) scale: Option<usize>,
    pub(crate) kept: Kept,
    /// Its number among all that are trained, by name.
    number: usize,
}

/// How masters are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    F32,
    Bf16,
    /// As f32 that bf16 has.
    Rounded,
}

impl Tensor {
    pub(crate) fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it is a matrix of a layer.
    pub(crate) fn is_projection(&self) -> bool {
        matches!(self.id, Id::Of(TensorId::Layer(_, Part::Projection(_))))
    }

    /// Its values in the order in which they lie.
    pub(crate) fn as_it_lies<'a>(&self, values: &'a [f32]) -> Cow<'a, [f32]> {
        match self.id {
            Id::B(..) => Cow::Owned(transposed(values, self.shape[1])),
            _ => Cow::Borrowed(values),
        }
    }

    /// The inverse of that, in place.
    pub(crate) fn turn_back(&self, values: &mut [f32]) {
        if let Id::B(..) = self.id {
            let turned = transposed(values, self.shape[0]);
            values.copy_from_slice(&turned);
        }
    }

    /// Bytes of its masters.
    pub(crate) fn masters_bytes(&self) -> usize {
        self.count() * if self.kept == Kept::Bf16 { 2 } else { 4 }
    }
}

/// All parameters of a model.
pub(crate) struct Layout {
    /// Those that are trained first.
    pub(crate) tensors: Vec<Tensor>,
    /// How many are trained.
    trained: usize,
    /// Elements of gradients, and of each moment.
    pub(crate) elements: u64,
    /// Bytes of masters.
    pub(crate) masters: u64,
    /// Elements of what is made of masters to be multiplied.
    pub(crate) copies: u64,
    /// Number of scales.
    pub(crate) scales: usize,
    /// Tensors that such is made of, scaled ones first: where `tensors` has them.
    pub(crate) multiplied: Vec<usize>,
    /// Elements of the projections of a layer, and where in these each begins, in the order of
    /// [`Projection::ALL`].
    pub(crate) layer: u64,
    offsets: [u64; 7],
}

/// Projections that have one input, each of which is multiplied once.
pub(crate) const INPUTS: [&[Projection]; 4] = [
    &[Projection::Q, Projection::K, Projection::V],
    &[Projection::O],
    &[Projection::Gate, Projection::Up],
    &[Projection::Down],
];

/// The parameters of a layer in the order in which they lie; projections of one input side by side.
const ORDER: [Part; 11] = [
    Part::InputNorm,
    Part::AttnSubNorm,
    Part::PostAttentionNorm,
    Part::FfnSubNorm,
    Part::Projection(FIRST),
    Part::Projection(Projection::K),
    Part::Projection(Projection::V),
    Part::Projection(Projection::O),
    Part::Projection(Projection::Gate),
    Part::Projection(Projection::Up),
    Part::Projection(Projection::Down),
];
const FIRST: Projection = Projection::Q;

/// A tensor that gets its place.
struct New {
    id: Id,
    shape: Vec<usize>,
    kept: Kept,
    is_trained: bool,
    is_multiplied: bool,
    scale: Option<usize>,
    /// Whether it lies beside the one before, with which it is multiplied together.
    joins: bool,
    /// Elements that it takes, where these are more than it has.
    room: u64,
}

impl Layout {
    /// Of a model, with its masters in bf16 where `narrow`.
    ///
    /// # Errors
    /// A model that the engine does not compute.
    pub(crate) fn new(config: &ModelConfig, narrow: bool) -> Result<Self> {
        let mut layout = Self::empty(config)?;
        let quantized = config.quantization != Quantization::None;
        let head = head(config);
        for id in in_order(config) {
            let is_projection = matches!(id, TensorId::Layer(_, Part::Projection(_)));
            let is_first = matches!(id, TensorId::Layer(_, Part::Projection(FIRST)));
            layout.push(New {
                is_trained: true,
                is_multiplied: is_projection || id == head,
                scale: (is_projection && quantized).then_some(layout.scales),
                // Their sizes are multiples of 64.
                joins: is_projection && !is_first,
                ..New::of(id, config, narrow)
            });
        }
        Ok(layout.numbered())
    }

    /// Of adapters, with masters in bf16 where `narrow`, beside a model that stays as it is.
    ///
    /// # Errors
    /// As [`Self::new`], and no rank.
    pub(crate) fn adapted(config: &ModelConfig, adapters: &Adapters, narrow: bool) -> Result<Self> {
        let mut layout = Self::empty(config)?;
        if adapters.rank == 0 {
            let expected = "at least 1".to_owned();
            return Err(unsupported("the rank of adapters", expected, "0".to_owned()));
        }
        let kept = if narrow { Kept::Bf16 } else { Kept::F32 };
        let (rank, rows) = (adapters.rank, adapters.rows() as u64);
        let quantized = config.quantization != Quantization::None;
        if quantized {
            layout.scales = config.num_hidden_layers * Projection::ALL.len();
        }
        for layer in 0..config.num_hidden_layers {
            for input in 0..INPUTS.len() {
                for (i, p) in adapters.of(input).enumerate() {
                    let (_, inp) = config.projection_shape(p);
                    layout.push(New {
                        id: Id::A(layer, p),
                        shape: vec![rank, inp],
                        kept,
                        is_trained: true,
                        is_multiplied: true,
                        scale: None,
                        joins: i > 0,
                        room: rows * inp as u64,
                    });
                }
                for p in adapters.of(input) {
                    let (out, _) = config.projection_shape(p);
                    layout.push(New {
                        id: Id::B(layer, p),
                        shape: vec![out, rank],
                        kept,
                        is_trained: true,
                        is_multiplied: true,
                        scale: Some(layout.scales),
                        joins: false,
                        room: rows * out as u64,
                    });
                }
            }
        }
        for id in in_order(config) {
            // Trits are kept apart.
            let is_projection = matches!(id, TensorId::Layer(_, Part::Projection(_)));
            if !(is_projection && quantized) {
                layout.push(New::of(id, config, adapters.narrow_base));
            }
        }
        Ok(layout.numbered())
    }

    fn empty(config: &ModelConfig) -> Result<Self> {
        check(config)?;
        let mut layer = 0;
        let offsets = Projection::ALL.map(|p| {
            let (out, inp) = config.projection_shape(p);
            let at = layer;
            layer += (out * inp) as u64;
            at
        });
        Ok(Self {
            tensors: Vec::new(),
            trained: 0,
            elements: 0,
            masters: 0,
            copies: 0,
            scales: 0,
            multiplied: Vec::new(),
            layer,
            offsets,
        })
    }

    fn push(&mut self, new: New) {
        let New { id, shape, kept, scale, .. } = new;
        let up = |at: u64| if new.joins { at } else { at.next_multiple_of(ALIGNMENT) };
        let start = if new.is_trained { up(self.elements) } else { 0 };
        let copy = new.is_multiplied.then(|| up(self.copies));
        let masters = self.masters.next_multiple_of(256);
        let tensor =
            Tensor { id, name: id.name(), shape, start, masters, copy, scale, kept, number: 0 };
        if new.is_trained {
            self.elements = start + new.room;
            self.trained += 1;
        }
        if let Some(copy) = copy {
            self.copies = copy + new.room;
            self.multiplied.push(self.tensors.len());
        }
        self.masters = masters + tensor.masters_bytes() as u64;
        self.scales += usize::from(scale.is_some());
        self.tensors.push(tensor);
    }

    /// Numbers what is trained, and puts what has a scale first.
    fn numbered(mut self) -> Self {
        let Self { multiplied, tensors, .. } = &mut self;
        multiplied.sort_by_key(|at| tensors[*at].scale.is_none());
        let trained = &mut self.tensors[..self.trained];
        let mut names: Vec<String> = trained.iter().map(|tensor| tensor.name.clone()).collect();
        names.sort_unstable();
        for tensor in trained {
            let number = names.binary_search(&tensor.name);
            tensor.number = number.expect("the names are those of the tensors");
        }
        self
    }

    /// Parameters that are trained.
    pub(crate) fn trained(&self) -> &[Tensor] {
        &self.tensors[..self.trained]
    }

    /// Where a projection begins among those of its layer, in elements.
    pub(crate) fn offset(&self, p: Projection) -> u64 {
        self.offsets[p as usize]
    }

    /// Gradients that are summed over processes together, in the order in which the backward pass finishes
    /// them: it depends on the model alone, so it is the same for all processes.
    pub(crate) fn buckets(&self) -> Vec<Range<u64>> {
        let least = (self.elements / BUCKETS).min(BUCKET);
        let (mut buckets, mut end) = (Vec::new(), self.elements);
        for start in self.trained().iter().rev().map(|tensor| tensor.start) {
            if end - start >= least || start == 0 {
                buckets.push(start..end);
                end = start;
            }
        }
        buckets
    }

    /// The table of some tensors that kernels read: struct `Entry` of `weights.cu`.
    pub(crate) fn table<'a>(&self, tensors: impl Iterator<Item = &'a Tensor>) -> Vec<u64> {
        let pair = |low: i32, high: i32| u64::from(low as u32) | u64::from(high as u32) << 32;
        let entry = |tensor: &Tensor| {
            let scale = tensor.scale.map_or(-1, |scale| scale as i32);
            let decays = i32::from(tensor.shape.len() > 1);
            [
                tensor.start,
                tensor.count() as u64,
                tensor.masters,
                tensor.copy.unwrap_or(0),
                pair(scale, tensor.kept as i32),
                pair(decays, tensor.number as i32),
            ]
        };
        tensors.flat_map(entry).collect()
    }

    /// Parameters that are trained and no projections.
    pub(crate) fn others(&self) -> impl Iterator<Item = &Tensor> {
        self.trained().iter().filter(|tensor| !tensor.is_projection())
    }

    pub(crate) fn get(&self, id: Id) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.id == id)
    }

    /// The same of those that are trained.
    pub(crate) fn get_trained(&self, id: Id) -> Option<&Tensor> {
        self.trained().iter().find(|tensor| tensor.id == id)
    }

    pub(crate) fn named(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

impl New {
    /// A parameter of a model, which is neither trained nor multiplied.
    fn of(id: TensorId, config: &ModelConfig, narrow: bool) -> Self {
        let shape = config.tensor_shape(id);
        let kept = match (narrow, shape.len() > 1) {
            (true, true) => Kept::Bf16,
            (true, false) => Kept::Rounded,
            (false, _) => Kept::F32,
        };
        let room = shape.iter().product::<usize>() as u64;
        let (is_trained, is_multiplied, joins) = (false, false, false);
        Self { id: Id::Of(id), shape, kept, is_trained, is_multiplied, scale: None, joins, room }
    }
}

/// The parameter that is the head.
pub(crate) fn head(config: &ModelConfig) -> TensorId {
    if config.tie_word_embeddings { TensorId::Embed } else { TensorId::Head }
}

/// A model's parameters in the order in which they lie.
fn in_order(config: &ModelConfig) -> impl Iterator<Item = TensorId> {
    let ids = config.tensor_ids();
    let layers = (0..config.num_hidden_layers)
        .flat_map(|layer| ORDER.iter().map(move |part| TensorId::Layer(layer, *part)));
    let order = [TensorId::Embed].into_iter().chain(layers);
    let order = order.chain([TensorId::FinalNorm, TensorId::Head]);
    order.filter(move |id| ids.contains(id))
}

/// Widest rows that a block has in registers.
pub(crate) const WIDEST: usize = 16 << 10;

fn unsupported(what: &'static str, expected: String, found: String) -> CudaError {
    CudaError::Unsupported { what, expected, found }
}

fn check(config: &ModelConfig) -> Result<()> {
    if config.projection_norm_eps.is_some() {
        return Err(unsupported("norms of projections", "none".to_owned(), "some".to_owned()));
    }
    for (what, size) in [
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("head_dim", config.head_dim),
        ("hidden_size of all query heads", config.attention_width()),
    ] {
        if size % 8 != 0 || size > WIDEST {
            let expected = format!("a multiple of 8, at most {WIDEST}");
            return Err(unsupported(what, expected, size.to_string()));
        }
    }
    Ok(())
}

/// Of a matrix of so many columns.
fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
}

/// Bytes of matrices of `kind`.
pub(crate) fn bytes(elements: usize, kind: Kind) -> usize {
    elements * kind.bytes()
}

#[cfg(test)]
mod tests {
    use trine_format::HiddenAct;

    use super::*;

    fn layout(layers: usize, vocab: usize, tied: bool) -> Layout {
        let config = ModelConfig {
            hidden_size: 64,
            intermediate_size: 104,
            num_hidden_layers: layers,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            vocab_size: vocab,
            max_position_embeddings: 16,
            rope_theta: 1e4,
            rms_norm_eps: 1e-5,
            hidden_act: HiddenAct::Relu2,
            sub_norms: true,
            projection_norm_eps: None,
            tie_word_embeddings: tied,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            quantization: Quantization::Online,
        };
        Layout::new(&config, false).unwrap()
    }

    #[test]
    fn buckets_are_all_gradients_from_the_last_to_the_first() {
        for (layers, vocab, tied) in [(1, 8, true), (1, 3000, false), (40, 33, true)] {
            let layout = layout(layers, vocab, tied);
            let buckets = layout.buckets();
            assert_eq!(buckets[0].end, layout.elements);
            assert!(buckets.windows(2).all(|pair| pair[1].end == pair[0].start));
            assert_eq!(buckets.last().unwrap().start, 0);
            let is_enough = |b: &Range<u64>| b.end - b.start >= layout.elements / BUCKETS;
            assert!(buckets.iter().rev().skip(1).all(is_enough) && buckets.len() <= 17);
            assert!(buckets.len() > 2, "{buckets:?}");
        }
    }

    #[test]
    fn a_layers_first_projection_is_aligned_and_scaled_tensors_are_multiplied_first() {
        let layout = layout(3, 33, true);
        let first = |tensor: &&Tensor| {
            matches!(tensor.id, Id::Of(TensorId::Layer(_, Part::Projection(Projection::Q))))
        };
        assert_eq!(layout.tensors.iter().filter(first).count(), 3);
        for tensor in layout.tensors.iter().filter(first) {
            assert_eq!(tensor.start % ALIGNMENT, 0, "{}", tensor.name);
        }
        let scales: Vec<_> = layout.multiplied.iter().map(|at| layout.tensors[*at].scale).collect();
        let expected: Vec<_> = (0..21).map(Some).chain([None]).collect();
        assert_eq!(scales, expected);
    }
}
