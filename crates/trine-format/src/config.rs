//! What a model looks like: sizes, activation, norms, and how its projections are stored.
//!
//! One struct serves the trainer, the exporter and the runtime; each format has its own reader for
//! it. Sizes are bounded by [`ModelConfig::validate`], so that no product of them overflows anywhere
//! else.

use crate::FormatError;
use crate::names::{Part, TensorId};

/// Gate activation of the feed-forward part, `down(act(gate) * up)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HiddenAct {
    /// `relu(x)^2`, of the 2B4T model.
    Relu2,
    /// `x * sigmoid(x)`, of LLaMA.
    Silu,
}

impl HiddenAct {
    /// The name in `config.json` and in GGUF's `hidden_activation`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Relu2 => "relu2",
            Self::Silu => "silu",
        }
    }

    /// The activation of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Relu2, Self::Silu].into_iter().find(|act| act.name() == name)
    }
}

/// How the projections are stored and computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// Full precision: plain linear layers, nothing is ternary.
    None,
    /// Master weights are stored; trits and scale come from `trine_ternary` on load.
    Online,
    /// Trits and scale are stored, and taken as they are.
    Offline,
}

/// The seven projections of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Projection {
    /// All seven, in the order in which a forward pass meets them.
    pub const ALL: [Self; 7] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];
}

/// The shape of a model and how it is computed.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; even, because rotary pairs are (i, i + head_dim / 2).
    pub head_dim: usize,
    /// Number of token ids, and rows of the embedding.
    pub vocab_size: usize,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Added to the mean square in every RMSNorm, but for those of [`Self::projection_norm_eps`].
    pub rms_norm_eps: f32,
    /// Gate activation.
    pub hidden_act: HiddenAct,
    /// Whether RMSNorms stand before `o_proj` and `down_proj`.
    pub sub_norms: bool,
    /// Where every projection has an RMSNorm of its own before it (`use_rms_norm` of transformers'
    /// BitLinear, the Falcon-E models), what that adds to the mean square.
    pub projection_norm_eps: Option<f32>,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Token that starts a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text or a turn; the first is the one that ends a text.
    pub eos_token_ids: Vec<u32>,
    /// How the projections are stored.
    pub quantization: Quantization,
}

impl ModelConfig {
    /// Checks that the sizes describe a possible model.
    ///
    /// The bounds are far above any model and keep every product of sizes under 2^63. Where addresses
    /// are narrower, as in WebAssembly, every matrix must fit them in f32.
    ///
    /// # Errors
    /// [`FormatError::Config`] naming the field.
    pub fn validate(&self) -> Result<(), FormatError> {
        for (key, value, bits) in [
            ("hidden_size", self.hidden_size, 20),
            ("intermediate_size", self.intermediate_size, 22),
            ("num_hidden_layers", self.num_hidden_layers, 12),
            ("num_attention_heads", self.num_attention_heads, 12),
            ("num_key_value_heads", self.num_key_value_heads, 12),
            ("head_dim", self.head_dim, 12),
            ("vocab_size", self.vocab_size, 26),
            ("max_position_embeddings", self.max_position_embeddings, 31),
        ] {
            if value == 0 || value > 1 << bits {
                return Err(FormatError::config(key, format_args!("1 to 2^{bits}"), value));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(FormatError::config(
                "num_key_value_heads",
                format_args!("a divisor of num_attention_heads = {}", self.num_attention_heads),
                self.num_key_value_heads,
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(FormatError::config("head_dim", "an even number", self.head_dim));
        }
        if self.sub_norms && self.attention_width() != self.hidden_size {
            return Err(FormatError::config(
                "head_dim",
                format_args!(
                    "hidden_size {} / num_attention_heads {}, as attn_sub_norm spans both",
                    self.hidden_size, self.num_attention_heads
                ),
                self.head_dim,
            ));
        }
        if self.quantization == Quantization::None && self.projection_norm_eps.is_some() {
            let expected = "nothing, as they belong to ternary projections";
            return Err(FormatError::config("projection_norm_eps", expected, "a number"));
        }
        let floats = [
            ("rope_theta", Some(self.rope_theta)),
            ("rms_norm_eps", Some(self.rms_norm_eps)),
            ("projection_norm_eps", self.projection_norm_eps),
        ];
        for (key, value) in floats.into_iter().filter_map(|(key, v)| Some((key, v?))) {
            if !(value.is_finite() && value > 0.0) {
                return Err(FormatError::config(key, "a positive finite number", value));
            }
        }
        let rows = self.vocab_size.max(self.intermediate_size).max(self.attention_width());
        let cols = self.hidden_size.max(self.intermediate_size).max(self.attention_width());
        if 4 * rows as u64 * cols as u64 > isize::MAX as u64 {
            let found = format!("a matrix of ({rows}, {cols})");
            return Err(FormatError::config("hidden_size", "what the address space holds", found));
        }
        let ids = self.bos_token_id.iter().map(|id| ("bos_token_id", id));
        for (key, &id) in ids.chain(self.eos_token_ids.iter().map(|id| ("eos_token_id", id))) {
            if id as usize >= self.vocab_size {
                let expected = format!("an id below vocab_size = {}", self.vocab_size);
                return Err(FormatError::config(key, expected, id));
            }
        }
        Ok(())
    }

    /// Width of all query heads together, `num_attention_heads * head_dim`.
    pub fn attention_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key (or value) heads together, `num_key_value_heads * head_dim`.
    pub fn key_value_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Shape of a projection, `(out, in)`.
    pub fn projection_shape(&self, p: Projection) -> (usize, usize) {
        let (h, f) = (self.hidden_size, self.intermediate_size);
        match p {
            Projection::Q => (self.attention_width(), h),
            Projection::K | Projection::V => (self.key_value_width(), h),
            Projection::O => (h, self.attention_width()),
            Projection::Gate | Projection::Up => (f, h),
            Projection::Down => (h, f),
        }
    }

    /// Shape of a tensor; a projection's is `[out, in]`.
    pub fn tensor_shape(&self, id: TensorId) -> Vec<usize> {
        match id {
            TensorId::Embed | TensorId::Head => vec![self.vocab_size, self.hidden_size],
            TensorId::Layer(_, Part::Projection(p)) => {
                let (out, input) = self.projection_shape(p);
                vec![out, input]
            }
            TensorId::Layer(_, Part::ProjectionNorm(p)) => vec![self.projection_shape(p).1],
            TensorId::Layer(_, Part::AttnSubNorm) => vec![self.attention_width()],
            TensorId::Layer(_, Part::FfnSubNorm) => vec![self.intermediate_size],
            TensorId::FinalNorm | TensorId::Layer(..) => vec![self.hidden_size],
        }
    }

    /// Every tensor that such a model has, in the order in which a forward pass meets them.
    pub fn tensor_ids(&self) -> Vec<TensorId> {
        let layers = 0..self.num_hidden_layers;
        let mut ids = vec![TensorId::Embed];
        ids.extend(layers.flat_map(|layer| TensorId::of_layer(layer, self)));
        ids.push(TensorId::FinalNorm);
        if !self.tie_word_embeddings {
            ids.push(TensorId::Head);
        }
        ids
    }

    /// Number of parameters; a tied head counts once, scales do not count.
    pub fn parameter_count(&self) -> u64 {
        let area = |id| self.tensor_shape(id).iter().map(|&n| n as u64).product::<u64>();
        self.tensor_ids().into_iter().map(area).sum()
    }

    /// Rotary frequencies of the pairs, `(head_dim / 2)`: `1 / theta^(2i / head_dim)` for pair `i`.
    ///
    /// Every step is rounded to f32 as transformers does, with the power taken in f64 and rounded
    /// once. [`libm`] computes it, and the cosines of [`Self::rope_rows`], so that the bits do not
    /// depend on the C library of the machine.
    pub fn rope_inv_freq(&self) -> Vec<f32> {
        (0..self.head_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / self.head_dim as f32;
                1.0 / libm::pow(f64::from(self.rope_theta), f64::from(exponent)) as f32
            })
            .collect()
    }

    /// Rotary rows from `position` on: `inv_freq` is [`Self::rope_inv_freq`], `cos` and `sin` are
    /// `(rows, head_dim / 2)` for as many consecutive positions as they hold.
    ///
    /// The angle is position times frequency in f32; its cosine and sine are taken in f64 and
    /// rounded once, so that every caller sees the same bits, whatever range it asks for.
    ///
    /// # Panics
    /// When `cos` and `sin` are not of one length, a multiple of `inv_freq`'s.
    pub fn rope_rows(inv_freq: &[f32], position: usize, cos: &mut [f32], sin: &mut [f32]) {
        let pairs = inv_freq.len();
        assert!(cos.len() == sin.len() && cos.len().is_multiple_of(pairs), "rotary rows are whole");
        let rows = cos.chunks_exact_mut(pairs).zip(sin.chunks_exact_mut(pairs));
        for (row, (cos, sin)) in rows.enumerate() {
            let position = (position + row) as f32;
            for ((cos, sin), freq) in cos.iter_mut().zip(sin).zip(inv_freq) {
                let angle = f64::from(position * freq);
                *cos = libm::cos(angle) as f32;
                *sin = libm::sin(angle) as f32;
            }
        }
    }

    /// Rotary tables `(cos, sin)` for positions `0..positions`, each `(positions, head_dim / 2)`:
    /// [`Self::rope_rows`] from the first position on.
    pub fn rope_tables(&self, positions: usize) -> (Vec<f32>, Vec<f32>) {
        let inv_freq = self.rope_inv_freq();
        let (mut cos, mut sin) =
            (vec![0.0; positions * inv_freq.len()], vec![0.0; positions * inv_freq.len()]);
        Self::rope_rows(&inv_freq, 0, &mut cos, &mut sin);
        (cos, sin)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The shape of microsoft/bitnet-b1.58-2B-4T.
    pub(crate) fn config_2b4t() -> ModelConfig {
        ModelConfig {
            hidden_size: 2560,
            intermediate_size: 6912,
            num_hidden_layers: 30,
            num_attention_heads: 20,
            num_key_value_heads: 5,
            head_dim: 128,
            vocab_size: 128_256,
            max_position_embeddings: 4096,
            rope_theta: 500_000.0,
            rms_norm_eps: 1e-5,
            hidden_act: HiddenAct::Relu2,
            sub_norms: true,
            projection_norm_eps: None,
            tie_word_embeddings: true,
            bos_token_id: Some(128_000),
            eos_token_ids: vec![128_001],
            quantization: Quantization::Online,
        }
    }

    #[test]
    fn parameter_count_of_2b4t_is_the_published_one() {
        assert_eq!(config_2b4t().parameter_count(), 2_412_820_480);
    }

    #[test]
    fn impossible_models_are_refused_by_field() {
        let check = |key: &str, change: &dyn Fn(&mut ModelConfig)| {
            let mut config = config_2b4t();
            change(&mut config);
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(&format!("`{key}`")), "{error}");
        };
        assert!(config_2b4t().validate().is_ok());
        check("hidden_size", &|c| c.hidden_size = 0);
        check("vocab_size", &|c| c.vocab_size = usize::MAX);
        check("num_hidden_layers", &|c| c.num_hidden_layers = 1 << 40);
        check("num_key_value_heads", &|c| c.num_key_value_heads = 3);
        check("head_dim", &|c| c.head_dim = 127);
        check("head_dim", &|c| c.head_dim = 64);
        check("rope_theta", &|c| c.rope_theta = f32::NAN);
        check("rms_norm_eps", &|c| c.rms_norm_eps = -1e-5);
        check("projection_norm_eps", &|c| c.projection_norm_eps = Some(0.0));
        check("bos_token_id", &|c| c.bos_token_id = Some(128_256));
        check("eos_token_id", &|c| c.eos_token_ids = vec![0, u32::MAX]);
    }

    #[test]
    fn rope_tables_have_the_documented_values() {
        let (cos, sin) = config_2b4t().rope_tables(3);
        assert_eq!((cos.len(), sin.len()), (3 * 64, 3 * 64));
        assert_eq!((cos[0], sin[0], cos[63], sin[63]), (1.0, 0.0, 1.0, 0.0));
        assert_eq!(cos[2 * 64], 2f64.cos() as f32);
        assert_eq!(sin[2 * 64], 2f64.sin() as f32);
    }

    #[test]
    fn rope_rows_of_a_range_are_those_of_the_table() {
        let config = config_2b4t();
        let (cos, sin) = config.rope_tables(300);
        let inv_freq = config.rope_inv_freq();
        for (start, rows) in [(0, 1), (1, 2), (131, 7), (299, 1)] {
            let (mut c, mut s) = (vec![f32::NAN; rows * 64], vec![f32::NAN; rows * 64]);
            ModelConfig::rope_rows(&inv_freq, start, &mut c, &mut s);
            assert_eq!(c, cos[start * 64..][..rows * 64]);
            assert_eq!(s, sin[start * 64..][..rows * 64]);
        }
    }

    #[test]
    fn rope_bits_are_the_same_on_every_machine() {
        // FNV-1a of the bits, so that a platform's own power or cosine would show.
        let (cos, sin) = config_2b4t().rope_tables(4096);
        let hash = cos
            .iter()
            .chain(&sin)
            .flat_map(|x| x.to_bits().to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
            });
        assert_eq!(hash, 0x7108_7e1b_30d8_09b7, "{hash:#018x}");
    }
}
