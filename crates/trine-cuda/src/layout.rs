//! Where parameters, their gradients and what is multiplied lie in the memory of a device.
//!
//! Projections that have the same input lie one after the other, so that one product computes them all. What
//! the forward pass comes to first lies first, norms of a layer before its projections: so the backward pass
//! finishes gradients from the last one to the first, the tied head's with the embedding's.

use std::ops::Range;

use trine_format::names::{Part, TensorId};
use trine_format::{ModelConfig, Projection, Quantization};

use crate::backend::Kind;
use crate::error::{CudaError, Result};

/// Elements that a tensor's first one is a multiple of: 256 bytes of bf16.
const ALIGNMENT: u64 = 128;

/// Elements of a bucket of gradients that are summed over processes together, at least: 32 MB, or a sixteenth of
/// all where that is less. So sums begin early, and there are not so many that what each costs by itself counts.
const BUCKET: u64 = 8 << 20;
const BUCKETS: u64 = 16;

/// A parameter.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) id: TensorId,
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// In elements of gradients and moments.
    pub(crate) start: u64,
    /// In bytes of masters.
    pub(crate) masters: u64,
    /// In elements of what is multiplied.
    pub(crate) copy: Option<u64>,
    /// Its scale's number.
    pub(crate) scale: Option<usize>,
    pub(crate) kept: Kept,
    /// Its number among all, by name.
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
        matches!(self.id, TensorId::Layer(_, Part::Projection(_)))
    }

    /// Bytes of its masters.
    pub(crate) fn masters_bytes(&self) -> usize {
        self.count() * if self.kept == Kept::Bf16 { 2 } else { 4 }
    }
}

/// All parameters of a model.
pub(crate) struct Layout {
    pub(crate) tensors: Vec<Tensor>,
    /// Elements of gradients, and of each moment.
    pub(crate) elements: u64,
    /// Bytes of masters.
    pub(crate) masters: u64,
    /// Elements of what is multiplied.
    pub(crate) copies: u64,
    /// Number of scales.
    pub(crate) scales: usize,
    /// Tensors that are multiplied, scaled ones first: where `tensors` has them.
    pub(crate) multiplied: Vec<usize>,
}

/// The parameters of a layer, in the order in which they lie.
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

impl Layout {
    /// Of a model, with its masters in bf16 where `narrow`.
    ///
    /// # Errors
    /// A model that the engine does not compute.
    pub(crate) fn new(config: &ModelConfig, narrow: bool) -> Result<Self> {
        check(config)?;
        let ids = config.tensor_ids();
        let mut names: Vec<String> = ids.iter().map(|id| id.canonical()).collect();
        names.sort_unstable();
        let layers = (0..config.num_hidden_layers)
            .flat_map(|layer| ORDER.iter().map(move |part| TensorId::Layer(layer, *part)));
        let order = [TensorId::Embed].into_iter().chain(layers);
        let order = order.chain([TensorId::FinalNorm, TensorId::Head]);
        let head = if config.tie_word_embeddings { TensorId::Embed } else { TensorId::Head };
        let quantized = config.quantization != Quantization::None;
        let mut layout = Self {
            tensors: Vec::new(),
            elements: 0,
            masters: 0,
            copies: 0,
            scales: 0,
            multiplied: Vec::new(),
        };
        for id in order.filter(|id| ids.contains(id)) {
            let (name, shape) = (id.canonical(), config.tensor_shape(id));
            let count = shape.iter().product::<usize>() as u64;
            let is_projection = matches!(id, TensorId::Layer(_, Part::Projection(_)));
            let follows =
                is_projection && !matches!(id, TensorId::Layer(_, Part::Projection(FIRST)));
            // Not between projections that are multiplied together: their sizes are multiples of 64.
            let up = |at: u64| if follows { at } else { at.next_multiple_of(ALIGNMENT) };
            let kept = match (narrow, shape.len() > 1) {
                (true, true) => Kept::Bf16,
                (true, false) => Kept::Rounded,
                (false, _) => Kept::F32,
            };
            let copy = (is_projection || id == head).then(|| up(layout.copies));
            let scale = (is_projection && quantized).then_some(layout.scales);
            let number = names.binary_search(&name).expect("the names are those of the tensors");
            let tensor = Tensor {
                id,
                name,
                shape,
                start: up(layout.elements),
                masters: layout.masters.next_multiple_of(256),
                copy,
                scale,
                kept,
                number,
            };
            layout.elements = tensor.start + count;
            layout.masters = tensor.masters + tensor.masters_bytes() as u64;
            if let Some(copy) = copy {
                layout.copies = copy + count;
                layout.multiplied.push(layout.tensors.len());
            }
            layout.scales += usize::from(scale.is_some());
            layout.tensors.push(tensor);
        }
        let tensors = &layout.tensors;
        layout.multiplied.sort_by_key(|at| tensors[*at].scale.is_none());
        Ok(layout)
    }

    /// Gradients that are summed over processes together, in the order in which the backward pass finishes
    /// them: it depends on the model alone, so it is the same for all processes.
    pub(crate) fn buckets(&self) -> Vec<Range<u64>> {
        let least = (self.elements / BUCKETS).min(BUCKET);
        let (mut buckets, mut end) = (Vec::new(), self.elements);
        for start in self.tensors.iter().rev().map(|tensor| tensor.start) {
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

    /// How many tensors are no projections.
    pub(crate) fn others(&self) -> usize {
        self.tensors.iter().filter(|tensor| !tensor.is_projection()).count()
    }

    pub(crate) fn get(&self, id: TensorId) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.id == id)
    }

    pub(crate) fn named(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

/// Widest rows that a block has in registers.
pub(crate) const WIDEST: usize = 16 << 10;

fn check(config: &ModelConfig) -> Result<()> {
    let unsupported = |what, expected: &str, found: String| {
        Err(CudaError::Unsupported { what, expected: expected.to_owned(), found })
    };
    if config.projection_norm_eps.is_some() {
        return unsupported("norms of projections", "none", "some".to_owned());
    }
    for (what, size) in [
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("head_dim", config.head_dim),
        ("hidden_size of all query heads", config.attention_width()),
    ] {
        if size % 8 != 0 || size > WIDEST {
            let expected = format!("a multiple of 8, at most {WIDEST}");
            return unsupported(what, &expected, size.to_string());
        }
    }
    Ok(())
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
            matches!(tensor.id, TensorId::Layer(_, Part::Projection(Projection::Q)))
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
