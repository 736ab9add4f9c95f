//! Models of random weights, of any size: what conversion, loading and kernels are measured on.
//!
//! A published model cannot always be had, its shape can. Weights are drawn so that a model of any
//! shape behaves like a trained one as far as speed and size are concerned: as many zeros among the
//! trits, and finite logits of ordinary size. It knows nothing of any language.
//!
//! | tensor | distribution | why |
//! | --- | --- | --- |
//! | projection `(out, in)` | Laplace, mean magnitude `1 / sqrt(in)` | of its trits `1 - exp(-1/2)` = 39 % are zeros; outputs are about as large as inputs |
//! | embedding, head `(vocab, hidden)` | Laplace, mean magnitude `2 / sqrt(hidden)` | logits spread by about 3 |
//! | norm | uniform from 0.9 to 1.1 | gains near 1 |
//!
//! Every number is one of 65536 quantiles of its distribution, rounded to bf16; which one, say 16
//! bits of ChaCha8. The generator has a counter, so a number is a function of seed, tensor and
//! position, and no thread has to wait for another.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use trine_format::names::{self, Part, TensorId};
use trine_format::{BoxError, DenseTensor, Dtype, ModelConfig, Projection, TensorSource};
use trine_ternary::TernaryMatrix;

/// Numbers that a thread makes at a time; a whole number of ChaCha's blocks.
const CHUNK: usize = 1 << 16;

/// Bytes of a number: of what is drawn, and of a bf16.
const BYTES: usize = 2;

/// A model that exists only as a seed: a [`TensorSource`] that makes one tensor at a time, in bf16.
#[derive(Clone, Debug)]
pub struct RandomModel {
    config: ModelConfig,
    seed: u64,
}

impl RandomModel {
    /// The model of this shape and seed.
    pub fn new(config: ModelConfig, seed: u64) -> Self {
        Self { config, seed }
    }

    /// What it looks like.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }
}

impl TensorSource for RandomModel {
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        let ids = self.config.tensor_ids();
        let stream = ids.iter().position(|id| id.canonical() == name);
        let stream = stream.ok_or_else(|| format!("the model has no tensor `{name}`"))?;
        let shape = self.config.tensor_shape(ids[stream]);
        let fan_in = *shape.last().unwrap_or(&1) as f64;
        let quantiles = match ids[stream] {
            TensorId::Embed | TensorId::Head => quantiles(|u| laplace(u, 2.0 / fan_in.sqrt())),
            TensorId::Layer(_, Part::Projection(_)) => {
                quantiles(|u| laplace(u, 1.0 / fan_in.sqrt()))
            }
            TensorId::FinalNorm | TensorId::Layer(..) => quantiles(|u| 0.9 + 0.2 * u),
        };
        let data = draw(self.seed, stream as u64, shape.iter().product(), &quantiles);
        Ok(DenseTensor { name: name.to_owned(), dtype: Dtype::BF16, shape, data: data.into() })
    }
}

/// As [`RandomModel`], with trits that are drawn as such: many times quicker where nobody looks at
/// masters. 42 % of them are zeros, as in trained models; embedding, head and norms are the same.
#[derive(Clone, Debug)]
pub struct RandomTrits(RandomModel);

impl RandomTrits {
    /// The model of this shape and seed.
    pub fn new(config: ModelConfig, seed: u64) -> Self {
        Self(RandomModel::new(config, seed))
    }

    /// What it looks like.
    pub fn config(&self) -> &ModelConfig {
        self.0.config()
    }
}

impl TensorSource for RandomTrits {
    /// A projection has no masters.
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        match self.config().tensor_ids().into_iter().find(|id| id.canonical() == name) {
            Some(TensorId::Layer(_, Part::Projection(_))) => {
                Err(format!("`{name}` was drawn as trits, it has no masters").into())
            }
            _ => self.0.dense(name),
        }
    }

    fn projection(&self, layer: usize, p: Projection) -> Result<TernaryMatrix, BoxError> {
        let name = names::projection(layer, p);
        let ids = self.config().tensor_ids();
        let stream = ids.iter().position(|id| id.canonical() == name);
        let stream = stream.ok_or_else(|| format!("the model has no tensor `{name}`"))?;
        let (rows, cols) = self.config().projection_shape(p);
        let mut rng = ChaCha8Rng::seed_from_u64(self.0.seed);
        rng.set_stream(stream as u64);
        let mut bytes = vec![0; cols];
        let scale = 1.0 / (cols as f32).sqrt();
        Ok(TernaryMatrix::from_trit_rows(rows, cols, scale, |_, trits| {
            rng.fill_bytes(&mut bytes);
            for (trit, byte) in trits.iter_mut().zip(&bytes) {
                // 108 of 256 values are 0, 74 each the others.
                *trit = i8::from(*byte >= 182) - i8::from(*byte < 74);
            }
        })?)
    }
}

/// `count` little-endian bf16 numbers, each one of the quantiles.
fn draw(seed: u64, stream: u64, count: usize, quantiles: &[[u8; BYTES]]) -> Vec<u8> {
    let mut data = vec![0; count * BYTES];
    data.par_chunks_mut(CHUNK * BYTES).enumerate().for_each(|(i, chunk)| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        rng.set_word_pos((i * (CHUNK * BYTES / size_of::<u32>())) as u128);
        rng.fill_bytes(chunk);
        for number in chunk.as_chunks_mut().0 {
            *number = quantiles[usize::from(u16::from_le_bytes(*number))];
        }
    });
    data
}

/// The distribution with this inverse, at the middles of 65536 equal shares of probability.
fn quantiles(inverse: impl Fn(f64) -> f64) -> Vec<[u8; BYTES]> {
    let shares = 1 << u16::BITS;
    let value = |i| inverse((f64::from(i) + 0.5) / f64::from(shares));
    (0..shares).map(|i| half::bf16::from_f64(value(i)).to_le_bytes()).collect()
}

/// The number below which a share `u` of a Laplace distribution around 0 lies; its mean magnitude
/// is `scale`. [`libm`]'s logarithm has the same bits on every machine.
fn laplace(u: f64, scale: f64) -> f64 {
    let magnitude = |tail: f64| -scale * libm::log(2.0 * tail);
    if u < 0.5 { -magnitude(u) } else { magnitude(1.0 - u) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use trine_format::{HiddenAct, Quantization};

    fn model(seed: u64) -> RandomModel {
        RandomModel::new(
            ModelConfig {
                hidden_size: 256,
                intermediate_size: 512,
                num_hidden_layers: 1,
                num_attention_heads: 2,
                num_key_value_heads: 1,
                head_dim: 128,
                vocab_size: 1000,
                max_position_embeddings: 32,
                rope_theta: 10_000.0,
                rms_norm_eps: 1e-5,
                hidden_act: HiddenAct::Relu2,
                sub_norms: true,
                projection_norm_eps: None,
                tie_word_embeddings: true,
                bos_token_id: None,
                eos_token_ids: vec![],
                quantization: Quantization::Online,
            },
            seed,
        )
    }

    fn gate(model: &RandomModel) -> TernaryMatrix {
        model.projection(0, Projection::Gate).unwrap()
    }

    #[test]
    fn two_fifths_of_the_trits_are_zeros() {
        let gate = gate(&model(1));
        let n = (gate.rows() * gate.cols()) as f64;
        let [minus, zero, plus] = gate.counts().map(|count| count as f64 / n);
        assert!((zero - (1.0 - (-0.5f64).exp())).abs() < 0.005, "{zero}");
        assert!((minus - plus).abs() < 0.01, "{minus} {plus}");
        assert!((gate.scale() * 16.0 - 1.0).abs() < 0.01, "{}", gate.scale());
    }

    #[test]
    fn drawn_trits_have_42_percent_zeros_and_no_masters() {
        let model = RandomTrits::new(model(1).config().clone(), 1);
        let gate = model.projection(0, Projection::Gate).unwrap();
        assert_eq!((gate.rows(), gate.cols(), gate.scale()), (512, 256, 1.0 / 16.0));
        let n = (gate.rows() * gate.cols()) as f64;
        let [minus, zero, plus] = gate.counts().map(|count| count as f64 / n);
        assert!((zero - 108.0 / 256.0).abs() < 0.005, "{zero}");
        assert!((minus - plus).abs() < 0.01, "{minus} {plus}");
        assert_eq!(model.projection(0, Projection::Gate).unwrap(), gate);
        assert_ne!(model.projection(0, Projection::Up).unwrap(), gate);
        assert_eq!(model.dense(names::EMBED).unwrap(), model.0.dense(names::EMBED).unwrap());
        let error = model.dense(&names::projection(0, Projection::Up)).unwrap_err().to_string();
        assert!(error.contains("no masters"), "{error}");
    }

    #[test]
    fn gains_are_near_one() {
        let gains = model(1).dense(&names::ffn_sub_norm(0)).unwrap().to_f32();
        assert_eq!(gains.len(), 512);
        assert!(gains.iter().all(|gain| (0.89..=1.11).contains(gain)));
        assert!(gains.iter().any(|gain| *gain < 0.95) && gains.iter().any(|gain| *gain > 1.05));
    }

    #[test]
    fn numbers_depend_on_the_seed_and_the_tensor_and_not_on_the_threads() {
        let all = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let model = model(1);
            pool.install(|| model.dense(names::EMBED).unwrap().data.into_owned())
        };
        assert!(all(1) == all(3));
        let up = model(1).projection(0, Projection::Up).unwrap();
        assert_ne!(gate(&model(1)), gate(&model(2)));
        assert_ne!(gate(&model(1)), up);
        assert_eq!(gate(&model(1)), gate(&model(1)));
    }

    /// A seed names the same model tomorrow and on every machine.
    #[test]
    fn a_seed_always_means_the_same_numbers() {
        let embedding = model(7).dense(names::EMBED).unwrap().data.into_owned();
        // FNV-1a.
        let hash = embedding.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        });
        assert_eq!(hash, 0xd274_1348_30b3_d177, "{hash:#018x}");
    }

    #[test]
    fn a_tensor_that_the_model_has_not_is_refused() {
        let error = model(1).dense(names::HEAD).unwrap_err().to_string();
        assert!(error.contains("lm_head"), "{error}");
    }
}
