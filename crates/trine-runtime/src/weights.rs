//! A model in memory.

use std::cell::OnceCell;

use half::{bf16, f16};
use rayon::prelude::*;
use trine_format::{
    DenseTensor, Dtype, HiddenAct, ModelConfig, ModelFile, Projection, Weight, names,
};
use trine_kernels::{Activations, DenseData, PackedMatrix, nn};

use crate::RuntimeError;

/// Elements that a thread checks at a time.
const CHECKED: usize = 1 << 16;

/// A full-precision matrix `(rows, cols)` in the element type it was stored in; all finite.
pub(crate) struct DenseMatrix {
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
    fn new(tensor: &DenseTensor<'_>, rows: usize, cols: usize) -> Result<Self, RuntimeError> {
        let (name, bytes) = (&tensor.name, &tensor.data);
        let data = match tensor.dtype {
            // Blocks are widened, as no kernel multiplies them.
            Dtype::F32 | Dtype::Q8_0 | Dtype::Q6_K | Dtype::Q4_0 => {
                Elements::F32(finite(name, tensor.to_f32())?)
            }
            Dtype::F16 => Elements::F16(finite(name, pairs(bytes, f16::from_le_bytes))?),
            Dtype::BF16 => Elements::Bf16(finite(name, pairs(bytes, bf16::from_le_bytes))?),
        };
        Ok(Self { rows, cols, data })
    }

    /// Row `r`, widened to f32, into `out` `(cols,)`.
    pub(crate) fn row(&self, r: usize, out: &mut [f32]) {
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
    pub(crate) fn matmul(&self, x: &[f32], tokens: usize, out: &mut [f32]) {
        let data = match &self.data {
            Elements::F32(data) => DenseData::F32(data),
            Elements::F16(data) => DenseData::F16(data),
            Elements::Bf16(data) => DenseData::Bf16(data),
        };
        trine_kernels::dense_matmul(data, self.rows, self.cols, x, tokens, out);
    }
}

/// `values`, where all are finite.
fn finite<T: Copy + Sync + Into<f32>>(name: &str, values: Vec<T>) -> Result<Vec<T>, RuntimeError> {
    // Without a branch for each element, as nearly all are finite.
    let bad = |v: &T| !(*v).into().is_finite();
    let first = values.par_chunks(CHECKED).enumerate().find_map_first(|(i, chunk)| {
        let any = chunk.iter().fold(false, |any, v| any | bad(v));
        any.then(|| i * CHECKED + chunk.iter().position(bad).unwrap_or(0))
    });
    match first {
        None => Ok(values),
        Some(index) => {
            let value = values[index].into();
            Err(RuntimeError::NonFinite { tensor: name.to_owned(), index, value })
        }
    }
}

fn pairs<T: Send>(bytes: &[u8], number: impl Fn([u8; 2]) -> T + Sync) -> Vec<T> {
    bytes.as_chunks().0.par_iter().map(|&pair| number(pair)).collect()
}

/// A projection: its weights, and the norm of its input in a model that has projection norms.
pub(crate) struct Projected {
    linear: Linear,
    /// `(cols,)`, and what is added to the mean square.
    norm: Option<(Vec<f32>, f32)>,
}

/// The weights of a projection: ternary, or dense in a full-precision baseline.
enum Linear {
    /// Trits with one scale.
    Ternary(PackedMatrix),
    /// Full precision.
    Dense(DenseMatrix),
}

/// Activations on their way into projections: quantized at most once, for all that share them.
pub(crate) struct Input<'a> {
    x: &'a [f32],
    tokens: usize,
    /// Made by the first ternary projection.
    quantized: OnceCell<Activations>,
}

impl<'a> Input<'a> {
    /// `x` is `(tokens, cols)`.
    pub(crate) fn new(x: &'a [f32], tokens: usize) -> Self {
        Self { x, tokens, quantized: OnceCell::new() }
    }
}

impl Projected {
    /// `out` `(T, rows)` for an input `(T, cols)`.
    pub(crate) fn forward(&self, input: &Input<'_>) -> Vec<f32> {
        match &self.norm {
            None => self.linear.forward(input),
            Some((weight, eps)) => {
                let x = rms_norm(input.x, weight, *eps);
                self.linear.forward(&Input::new(&x, input.tokens))
            }
        }
    }
}

/// RMSNorm of every row of `x` `(T, n)` with `weight` `(n,)`.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        nn::rms_norm(x, weight, eps, out);
    }
    out
}

impl Linear {
    /// Number of output features.
    fn rows(&self) -> usize {
        match self {
            Self::Ternary(w) => w.rows(),
            Self::Dense(w) => w.rows,
        }
    }

    /// As [`Projected::forward`], without the norm.
    fn forward(&self, input: &Input<'_>) -> Vec<f32> {
        let &Input { x, tokens, ref quantized } = input;
        let mut out = vec![0.0; tokens * self.rows()];
        match self {
            Self::Ternary(w) => {
                let x = quantized.get_or_init(|| Activations::quantize(x, tokens, w.cols()));
                trine_kernels::bitlinear(w, x, &mut out);
            }
            Self::Dense(w) => w.matmul(x, tokens, &mut out),
        }
        out
    }
}

/// The weights of one layer.
pub(crate) struct Layer {
    /// `(D,)`, before attention.
    pub(crate) input_norm: Vec<f32>,
    /// `(H * d, D)`
    pub(crate) q: Projected,
    /// `(K * d, D)`
    pub(crate) k: Projected,
    /// `(K * d, D)`
    pub(crate) v: Projected,
    /// `(H * d,)`, before the output projection.
    pub(crate) attn_sub_norm: Option<Vec<f32>>,
    /// `(D, H * d)`
    pub(crate) o: Projected,
    /// `(D,)`, before the feed-forward part.
    pub(crate) post_attention_norm: Vec<f32>,
    /// `(F, D)`
    pub(crate) gate: Projected,
    /// `(F, D)`
    pub(crate) up: Projected,
    /// `(F,)`, before the down projection.
    pub(crate) ffn_sub_norm: Option<Vec<f32>>,
    /// `(D, F)`
    pub(crate) down: Projected,
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
    /// Rotary frequencies, `(d/2,)`. No table of positions: a file may claim any number of them.
    pub(crate) inv_freq: Vec<f32>,
}

impl Model {
    /// Loads a model of any format that `trine-format` reads; masters are ternarized.
    ///
    /// # Errors
    /// Missing tensors, shapes that do not fit the configuration, weights that are not finite.
    pub fn load(file: &ModelFile) -> Result<Self, RuntimeError> {
        let config = file.config().clone();
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let matrix = |name| {
            let matrix = DenseMatrix::new(&file.dense(name)?, vocab, hidden);
            file.release(name);
            matrix
        };
        // All are loaded before the first error is looked for, so that it is always the same one.
        let layers: Vec<_> = (0..config.num_hidden_layers)
            .into_par_iter()
            .map(|layer| load_layer(file, layer))
            .collect();
        let layers = layers.into_iter().collect::<Result<_, RuntimeError>>()?;
        let head = match config.tie_word_embeddings {
            true => None,
            false => Some(matrix(names::HEAD)?),
        };
        let embed = matrix(names::EMBED)?;
        let final_norm = norm(file, names::FINAL_NORM)?;
        let inv_freq = config.rope_inv_freq();
        Ok(Self { config, embed, layers, final_norm, head, inv_freq })
    }

    /// What the network looks like.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(crate) fn relu2(&self) -> bool {
        self.config.hidden_act == HiddenAct::Relu2
    }
}

fn norm(file: &ModelFile, name: &str) -> Result<Vec<f32>, RuntimeError> {
    let tensor = file.dense(name)?;
    finite(&tensor.name, tensor.to_f32())
}

fn load_layer(file: &ModelFile, layer: usize) -> Result<Layer, RuntimeError> {
    let config = file.config();
    let linear = |p| -> Result<Projected, RuntimeError> {
        let linear = match file.projection(layer, p)? {
            Weight::Ternary(matrix) => Linear::Ternary(PackedMatrix::from(&matrix)),
            Weight::Dense(tensor) => {
                let (rows, cols) = config.projection_shape(p);
                Linear::Dense(DenseMatrix::new(&tensor, rows, cols)?)
            }
        };
        // It has been copied: the file's own bytes need not stay in memory beside.
        file.release(&names::projection(layer, p));
        let norm = match config.projection_norm_eps {
            None => None,
            Some(eps) => Some((norm(file, &names::projection_norm(layer, p))?, eps)),
        };
        Ok(Projected { linear, norm })
    };
    let norm = |name: String| norm(file, &name);
    let sub_norm = |name: String| config.sub_norms.then(|| norm(name)).transpose();
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
