//! What a token costs: multiplications, and bytes that have to come from memory.
//!
//! Counted is what no runtime gets around: every ternary weight and the head once a step (or its sketch
//! and the rows that are read beside it), and the keys and values that are attended to once for each
//! sequence. Not counted are norms, the row of
//! the embedding, activations and padding: together under a percent.

use trine_format::{Dtype, ModelConfig, Projection};
use trine_kernels::Packing;
use trine_kernels::nn::{KV_BLOCK, KvLayout, KvType};
use trine_runtime::block_kind;

/// How the parts of a model lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Formats {
    pub(crate) weights: Packing,
    /// Of the head, which may be the embedding.
    pub(crate) head: Dtype,
    pub(crate) kv: KvType,
}

/// The costs of a model in some formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Traffic {
    /// Products of a trit and an int8 that one token needs: the number of ternary weights.
    pub(crate) macs: u64,
    /// Bytes of all ternary weights.
    pub(crate) weights: u64,
    /// Bytes of the head, in memory.
    pub(crate) head: u64,
    /// Bytes of the keys and values of one position, in all layers.
    pub(crate) position: u64,
}

impl Traffic {
    pub(crate) fn new(config: &ModelConfig, formats: Formats) -> Self {
        let shapes = Projection::ALL.map(|p| config.projection_shape(p));
        let layers = config.num_hidden_layers as u64;
        let trits = |(rows, cols)| rows as u64 * cols as u64;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let head = match block_kind(formats.head) {
            Some(kind) => vocab * (hidden / kind.block()) * kind.memory_bytes(),
            None => formats.head.bytes(&[vocab, hidden]).unwrap_or(0),
        };
        let block = KvLayout::new(formats.kv, config.head_dim).map_or(0, KvLayout::block_bytes);
        let position = (config.num_key_value_heads * block / KV_BLOCK) as u64;
        Self {
            macs: layers * shapes.into_iter().map(trits).sum::<u64>(),
            weights: layers
                * shapes
                    .map(|s| trits(s).div_ceil(formats.weights.digits() as u64))
                    .iter()
                    .sum::<u64>(),
            head: head as u64,
            position: layers * position,
        }
    }

    /// Bytes that a step of `batch` sequences reads for each of its tokens, where every sequence
    /// attends to `positions` positions on average, with `head` bytes for the logits of all.
    pub(crate) fn bytes_per_token(&self, batch: usize, positions: f64, head: f64) -> f64 {
        (self.weights as f64 + head) / batch as f64 + self.position as f64 * positions
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::synth_model::Shape;

    /// Counted by hand: a layer has 2560 * (2560 + 640 + 640 + 2560) + 3 * 2560 * 6912 weights.
    #[test]
    fn the_costs_of_2b4t_are_those_counted_by_hand() {
        let formats = Formats { weights: Packing::Bits2, head: Dtype::Q6_K, kv: KvType::F16 };
        let traffic = Traffic::new(&Shape::B2.config(), formats);
        let layer = 16_384_000 + 53_084_160;
        assert_eq!(traffic.macs, 30 * layer);
        assert_eq!(traffic.weights, 521_011_200);
        // 256 numbers in 210 bytes.
        assert_eq!(traffic.head, 128_256 * 10 * 210);
        assert_eq!(traffic.position, 30 * 2 * 640 * 2);
        let int8 = Traffic::new(&Shape::B2.config(), Formats { kv: KvType::Int8, ..formats });
        // For each of 5 heads a code of each feature, and 12 bytes of scales and sums.
        assert_eq!(int8.position, 30 * 5 * (2 * 128 + 12));
        let bf16 = Traffic::new(&Shape::B2.config(), Formats { head: Dtype::BF16, ..formats });
        assert_eq!(bf16.head, 656_670_720);
        let q3 = Traffic::new(&Shape::B2.config(), Formats { head: Dtype::Q3_K, ..formats });
        assert_eq!(q3.head, 128_256 * 10 * 114);
        let dense = Formats { weights: Packing::Trits5, ..formats };
        assert_eq!(Traffic::new(&Shape::B2.config(), dense).weights, 416_808_960);
    }

    #[test]
    fn a_batch_shares_the_weights_and_not_the_cache() {
        let traffic = Traffic { macs: 1, weights: 600, head: 200, position: 3 };
        assert_eq!(traffic.bytes_per_token(1, 0.0, 200.0), 800.0);
        assert_eq!(traffic.bytes_per_token(1, 100.0, 200.0), 1100.0);
        assert_eq!(traffic.bytes_per_token(8, 100.0, 200.0), 400.0);
        assert_eq!(traffic.bytes_per_token(1, 0.0, 120.0), 720.0);
    }
}
