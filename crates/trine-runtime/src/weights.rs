//! A model in memory.

use rayon::prelude::*;
use trine_format::{
    Dtype, HiddenAct, ModelConfig, ModelFile, Projection, Quantization, Weight, names,
};
use trine_kernels::nn::{Gate, KvLayout, KvType};
use trine_kernels::{PackedMatrix, Packing, TwoStageHead, isa};
use trine_ternary::TernaryMatrix;

use crate::RuntimeError;
use crate::dense::{DenseMatrix, check_finite};
use crate::linear::{Linear, Norm, Projected};
use crate::sketch::{self, HeadSketch};

/// How a model is held in memory.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// How trits lie in memory, which changes no result.
    pub packing: Packing,
    /// Type to hold head and embedding in; `None` for the one in which they are stored. A smaller one
    /// makes every token quicker and changes the logits by its rounding.
    pub head: Option<Dtype>,
    /// How sequences store keys and values.
    pub kv: KvType,
    /// Whether a sketch of the head spares reading the rest of it where only the largest logits are
    /// asked for, which changes no result.
    pub sketch: HeadSketch,
}

impl Default for LoadOptions {
    /// Trits as the processor reads them fastest, everything else as it is stored, and f32 for keys and
    /// values: the bits that the trainer computes.
    fn default() -> Self {
        Self { packing: isa().packing(), head: None, kv: KvType::F32, sketch: HeadSketch::Off }
    }
}

/// The weights of one layer.
pub(crate) struct Layer {
    /// `(D,)`, before attention.
    pub(crate) input_norm: Norm,
    /// `(H * d, D)`
    pub(crate) q: Projected,
    /// `(K * d, D)`
    pub(crate) k: Projected,
    /// `(K * d, D)`
    pub(crate) v: Projected,
    /// `(H * d,)`, before the output projection.
    pub(crate) attn_sub_norm: Option<Norm>,
    /// `(D, H * d)`
    pub(crate) o: Projected,
    /// `(D,)`, before the feed-forward part.
    pub(crate) post_attention_norm: Norm,
    /// `(F, D)`
    pub(crate) gate: Projected,
    /// `(F, D)`
    pub(crate) up: Projected,
    /// `(F,)`, before the down projection.
    pub(crate) ffn_sub_norm: Option<Norm>,
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
    pub(crate) final_norm: Norm,
    /// `(V, D)`; `None` when the head is the embedding.
    pub(crate) head: Option<DenseMatrix>,
    /// Of the head, or of the embedding where that is the head.
    pub(crate) sketch: Option<TwoStageHead>,
    /// Rotary frequencies, `(d/2,)`. No table of positions: a file may claim any number of them.
    pub(crate) inv_freq: Vec<f32>,
    /// How sequences store the keys and values of a head.
    pub(crate) kv: KvLayout,
}

impl Model {
    /// Loads a model of any format that `trine-format` reads; masters are ternarized.
    ///
    /// # Errors
    /// Missing tensors, shapes that do not fit the configuration, weights that are not finite, a head
    /// that cannot have the sketch that is asked for.
    pub fn load(file: &ModelFile) -> Result<Self, RuntimeError> {
        Self::load_with(file, &LoadOptions::default())
    }

    /// [`Self::load`], with a say in how the model lies in memory.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_with(file: &ModelFile, options: &LoadOptions) -> Result<Self, RuntimeError> {
        let config = file.config().clone();
        let head_dim = config.head_dim;
        let kv = KvLayout::new(options.kv, head_dim)
            .ok_or(RuntimeError::HeadDim { head_dim, limit: KvLayout::MAX_HEAD_DIM })?;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let matrix = |name| -> Result<DenseMatrix, RuntimeError> {
            let tensor = file.dense(name)?;
            let dtype = options.head.unwrap_or(tensor.dtype);
            let release = |bytes| file.release_part(name, bytes);
            let matrix = DenseMatrix::new(&tensor, vocab, hidden, dtype, release)?;
            file.release(name);
            Ok(matrix)
        };
        // First, as conversion needs memory that the layers then use.
        let embed = matrix(names::EMBED)?;
        let head = match config.tie_word_embeddings {
            true => None,
            false => Some(matrix(names::HEAD)?),
        };
        let sketch = sketch::make(head.as_ref().unwrap_or(&embed), options.sketch)?;
        let mut projections = projections(file, options)?.into_iter();
        let layers = (0..config.num_hidden_layers)
            .map(|layer| load_layer(file, layer, projections.by_ref()))
            .collect::<Result<_, RuntimeError>>()?;
        let final_norm = norm(file, names::FINAL_NORM, config.rms_norm_eps)?;
        let inv_freq = config.rope_inv_freq();
        file.release_all();
        Ok(Self { config, embed, layers, final_norm, head, sketch, inv_freq, kv })
    }

    /// What the network looks like.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(crate) fn gate(&self) -> Gate {
        match self.config.hidden_act {
            HiddenAct::Relu2 => Gate::Relu2,
            HiddenAct::Silu => Gate::Silu,
        }
    }
}

fn norm(file: &ModelFile, name: &str, eps: f32) -> Result<Norm, RuntimeError> {
    let tensor = file.dense(name)?;
    let weight = tensor.to_f32();
    check_finite(name, &weight)?;
    Ok(Norm { weight, eps })
}

/// The weights of all projections, layer after layer in the order of [`Projection::ALL`].
fn projections(file: &ModelFile, options: &LoadOptions) -> Result<Vec<Linear>, RuntimeError> {
    let config = file.config();
    let all: Vec<_> = (0..config.num_hidden_layers)
        .flat_map(|layer| Projection::ALL.map(|p| (layer, p)))
        .collect();
    let shapes: Vec<_> = all.iter().map(|&(_, p)| config.projection_shape(p)).collect();
    if config.quantization == Quantization::None {
        let dense = |(&(layer, p), (rows, cols))| match file.projection(layer, p)? {
            Weight::Dense(tensor) => {
                let name = names::projection(layer, p);
                let release = |bytes| file.release_part(&name, bytes);
                let matrix = DenseMatrix::new(&tensor, rows, cols, tensor.dtype, release);
                file.release(&name);
                Ok(Linear::Dense(matrix?))
            }
            Weight::Ternary(matrix) => Ok(Linear::Ternary(PackedMatrix::from(&matrix))),
        };
        // All are loaded before the first error is looked for, so that it is always the same one.
        let loaded: Vec<_> = all.par_iter().zip(shapes).map(dense).collect();
        return loaded.into_iter().collect();
    }
    let ternary = |i: usize| -> Result<TernaryMatrix, RuntimeError> {
        let (layer, p) = all[i];
        let matrix = match file.projection(layer, p)? {
            Weight::Ternary(matrix) => matrix,
            Weight::Dense(tensor) => {
                return Err(RuntimeError::Full { tensor: tensor.name });
            }
        };
        // It has been copied: the file's own bytes need not stay in memory beside.
        file.release(&names::projection(layer, p));
        Ok(matrix)
    };
    let packed = PackedMatrix::pack_all(&shapes, options.packing, ternary)?;
    Ok(packed.into_iter().map(Linear::Ternary).collect())
}

/// A layer, of which `linears` gives the projections in the order of [`Projection::ALL`].
fn load_layer(
    file: &ModelFile,
    layer: usize,
    linears: &mut impl Iterator<Item = Linear>,
) -> Result<Layer, RuntimeError> {
    let config = file.config();
    let mut projected = |p| -> Result<Projected, RuntimeError> {
        let norm = match config.projection_norm_eps {
            None => None,
            Some(eps) => Some(norm(file, &names::projection_norm(layer, p), eps)?),
        };
        let linear = linears.next().expect("one for each projection");
        Ok(Projected { linear, norm, place: (layer, p) })
    };
    let norm = |name: String| norm(file, &name, config.rms_norm_eps);
    let sub_norm = |name: String| config.sub_norms.then(|| norm(name)).transpose();
    let [q, k, v, o, gate, up, down] = Projection::ALL.map(&mut projected);
    Ok(Layer {
        input_norm: norm(names::input_norm(layer))?,
        q: q?,
        k: k?,
        v: v?,
        attn_sub_norm: sub_norm(names::attn_sub_norm(layer))?,
        o: o?,
        post_attention_norm: norm(names::post_attention_norm(layer))?,
        gate: gate?,
        up: up?,
        ffn_sub_norm: sub_norm(names::ffn_sub_norm(layer))?,
        down: down?,
    })
}
