//! A model in memory.

use half::{bf16, f16};
use trine_format::{
    DenseTensor, Dtype, HiddenAct, ModelConfig, ModelFile, Projection, Weight, names,
};
use trine_kernels::{Activations, DenseData, PackedMatrix};

use crate::RuntimeError;

/// A full-precision matrix `(rows, cols)` in the element type it was stored in.
pub struct DenseMatrix {
    rows: usize,
    cols: usize,
    data: Elements,
}

enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl DenseMatrix {
    fn new(tensor: &DenseTensor<'_>, rows: usize, cols: usize) -> Self {
        let data = match tensor.dtype {
            Dtype::F32 => Elements::F32(tensor.to_f32()),
            Dtype::F16 => Elements::F16(pairs(&tensor.data).map(f16::from_le_bytes).collect()),
            Dtype::BF16 => Elements::Bf16(pairs(&tensor.data).map(bf16::from_le_bytes).collect()),
        };
        Self { rows, cols, data }
    }

    /// Row `r`, widened to f32, into `out` `(cols,)`.
    pub fn row(&self, r: usize, out: &mut [f32]) {
        let at = r * self.cols..(r + 1) * self.cols;
        match &self.data {
            Elements::F32(data) => out.copy_from_slice(&data[at]),
            Elements::F16(data) => out.iter_mut().zip(&data[at]).for_each(|(o, v)| *o = v.to_f32()),
            Elements::Bf16(data) => {
                out.iter_mut().zip(&data[at]).for_each(|(o, v)| *o = v.to_f32());
            }
        }
    }

    /// `x` `(T, cols)` times the transpose: `out` `(T, rows)`.
    pub fn matmul(&self, x: &[f32], tokens: usize, out: &mut [f32]) {
        let data = match &self.data {
            Elements::F32(data) => DenseData::F32(data),
            Elements::F16(data) => DenseData::F16(data),
            Elements::Bf16(data) => DenseData::Bf16(data),
        };
        trine_kernels::dense_matmul(data, self.rows, self.cols, x, tokens, out);
    }
}

fn pairs(bytes: &[u8]) -> impl Iterator<Item = [u8; 2]> + '_ {
    bytes.chunks_exact(2).map(|b| [b[0], b[1]])
}

/// A projection: ternary, or dense in a full-precision baseline.
pub enum Linear {
    /// Trits with one scale.
    Ternary(PackedMatrix),
    /// Full precision.
    Dense(DenseMatrix),
}

/// Activations on their way into projections: quantized at most once, for all that share them.
pub struct Input<'a> {
    x: &'a [f32],
    tokens: usize,
    quantized: Option<Activations>,
}

impl<'a> Input<'a> {
    /// `x` is `(tokens, cols)`; it is quantized when `first`, the first projection to read it, is
    /// ternary.
    pub fn new(x: &'a [f32], tokens: usize, first: &Linear) -> Self {
        let quantized = match first {
            Linear::Ternary(_) => Some(Activations::quantize(x, tokens, x.len() / tokens)),
            Linear::Dense(_) => None,
        };
        Self { x, tokens, quantized }
    }
}

impl Linear {
    /// Number of output features.
    pub fn rows(&self) -> usize {
        match self {
            Self::Ternary(w) => w.rows(),
            Self::Dense(w) => w.rows,
        }
    }

    /// `out` `(T, rows)` for an input `(T, cols)`.
    pub fn forward(&self, input: &Input<'_>) -> Vec<f32> {
        let mut out = vec![0.0; input.tokens * self.rows()];
        match (self, &input.quantized) {
            (Self::Ternary(w), Some(x)) => trine_kernels::bitlinear(w, x, &mut out),
            (Self::Ternary(w), None) => {
                let x = Activations::quantize(input.x, input.tokens, w.cols());
                trine_kernels::bitlinear(w, &x, &mut out);
            }
            (Self::Dense(w), _) => w.matmul(input.x, input.tokens, &mut out),
        }
        out
    }
}

/// The weights of one layer.
pub struct Layer {
    /// `(D,)`, before attention.
    pub input_norm: Vec<f32>,
    /// `(H * d, D)`
    pub q: Linear,
    /// `(K * d, D)`
    pub k: Linear,
    /// `(K * d, D)`
    pub v: Linear,
    /// `(H * d,)`, before the output projection.
    pub attn_sub_norm: Option<Vec<f32>>,
    /// `(D, H * d)`
    pub o: Linear,
    /// `(D,)`, before the feed-forward part.
    pub post_attention_norm: Vec<f32>,
    /// `(F, D)`
    pub gate: Linear,
    /// `(F, D)`
    pub up: Linear,
    /// `(F,)`, before the down projection.
    pub ffn_sub_norm: Option<Vec<f32>>,
    /// `(D, F)`
    pub down: Linear,
}

/// A model ready to run.
pub struct Model {
    pub(crate) config: ModelConfig,
    /// `(V, D)`
    pub(crate) embed: DenseMatrix,
    pub(crate) layers: Vec<Layer>,
    /// `(D,)`
    pub(crate) final_norm: Vec<f32>,
    /// `(V, D)`; `None` when the head is the embedding.
    pub(crate) head: Option<DenseMatrix>,
    /// `(positions, d/2)`
    pub(crate) cos: Vec<f32>,
    /// `(positions, d/2)`
    pub(crate) sin: Vec<f32>,
}

impl Model {
    /// Loads a model of any format that `trine-format` reads; masters are ternarized.
    ///
    /// # Errors
    /// Missing tensors, shapes that do not fit the configuration, weights that are not finite.
    pub fn load(file: &ModelFile) -> Result<Self, RuntimeError> {
        let config = file.config().clone();
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let matrix = |name| -> Result<_, RuntimeError> {
            Ok(DenseMatrix::new(&file.dense(name)?, vocab, hidden))
        };
        let layers = (0..config.num_hidden_layers)
            .map(|layer| load_layer(file, layer))
            .collect::<Result<_, RuntimeError>>()?;
        let head = match config.tie_word_embeddings {
            true => None,
            false => Some(matrix(names::HEAD)?),
        };
        let (cos, sin) = config.rope_tables(config.max_position_embeddings);
        let embed = matrix(names::EMBED)?;
        let final_norm = file.dense(names::FINAL_NORM)?.to_f32();
        Ok(Self { config, embed, layers, final_norm, head, cos, sin })
    }

    /// What the network looks like.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(crate) fn relu2(&self) -> bool {
        self.config.hidden_act == HiddenAct::Relu2
    }
}

fn load_layer(file: &ModelFile, layer: usize) -> Result<Layer, RuntimeError> {
    let linear = |p| -> Result<Linear, RuntimeError> {
        Ok(match file.projection(layer, p)? {
            Weight::Ternary(matrix) => Linear::Ternary(PackedMatrix::from(&matrix)),
            Weight::Dense(tensor) => {
                let (rows, cols) = file.config().projection_shape(p);
                Linear::Dense(DenseMatrix::new(&tensor, rows, cols))
            }
        })
    };
    let norm = |name: String| -> Result<Vec<f32>, RuntimeError> { Ok(file.dense(&name)?.to_f32()) };
    let sub_norm = |name: String| file.config().sub_norms.then(|| norm(name)).transpose();
    Ok(Layer {
        input_norm: norm(names::input_norm(layer))?,
        q: linear(Projection::Q)?,
        k: linear(Projection::K)?,
        v: linear(Projection::V)?,
        attn_sub_norm: sub_norm(names::attn_sub_norm(layer))?,
        o: linear(Projection::O)?,
        post_attention_norm: norm(names::post_attention_norm(layer))?,
        gate: linear(Projection::Gate)?,
        up: linear(Projection::Up)?,
        ffn_sub_norm: sub_norm(names::ffn_sub_norm(layer))?,
        down: linear(Projection::Down)?,
    })
}
