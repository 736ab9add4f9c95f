//! Low-rank adapters (LoRA, arXiv 2106.09685) beside the projections of a model, which stay as they are.
//!
//! A projection then computes `y = W x + (alpha / r) B A x`, where `x` is its input before it is rounded
//! to int8: the layer that the package `peft` wraps, and what the trainer trains. An adapter is made for
//! the shape of a model and belongs to a [`Sequence`](crate::Sequence), whose keys and values depend on
//! it; rows of a pass may have different ones, or none.
//!
//! A row without an adapter computes the bits that it computes in a model without adapters, whoever goes
//! through beside it: what adapters add is added after the products of all rows.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use trine_format::peft::Lora;
use trine_format::{ModelConfig, Projection, names};
use trine_kernels::{LowRank, LowRankProduct, LowRankType, low_rank_add};

use crate::dense::check_finite;
use crate::{Model, RuntimeError};

/// Projections of a layer.
const PROJECTIONS: usize = Projection::ALL.len();

/// An adapter ready to run. It changes no more, and many sequences share it.
pub struct Adapter {
    rank: usize,
    /// What it was made for: outputs and inputs of the projections of a layer.
    shapes: [(usize, usize); PROJECTIONS],
    /// Of every layer, in the order of [`Projection::ALL`].
    layers: Vec<[Option<LowRank>; PROJECTIONS]>,
}

impl Adapter {
    /// An adapter for `model`, its numbers held as `dtype` says: in f32 they are the file's, and halves
    /// are read in half the time.
    ///
    /// # Errors
    /// A model with a norm before every projection, a matrix of another shape, numbers that are not finite.
    pub fn new(model: &Model, lora: &Lora, dtype: LowRankType) -> Result<Self, RuntimeError> {
        let config = model.config();
        if config.projection_norm_eps.is_some() {
            return Err(RuntimeError::AdapterOfNorms);
        }
        let mut layers: Vec<[Option<LowRank>; PROJECTIONS]> = Vec::new();
        layers.resize_with(config.num_hidden_layers, Default::default);
        let scale = (lora.alpha / lora.rank as f64) as f32;
        for ((layer, p), [a, b]) in &lora.matrices {
            let names = names::adapter(*layer, *p);
            let (out, inp) = config.projection_shape(*p);
            for (name, matrix, shape) in
                [(&names[0], a, [lora.rank, inp]), (&names[1], b, [out, lora.rank])]
            {
                let fits = Some(matrix.len()) == shape[0].checked_mul(shape[1]);
                if !fits || *layer >= layers.len() {
                    let (tensor, found) = (name.clone(), matrix.len());
                    return Err(RuntimeError::AdapterShape { tensor, shape, found });
                }
                check_finite(name, matrix)?;
            }
            let b: Vec<f32> = b.iter().map(|b| b * scale).collect();
            check_finite(&names[1], &b)?;
            layers[*layer][*p as usize] = Some(LowRank::new(dtype, [out, inp, lora.rank], a, &b));
        }
        Ok(Self { rank: lora.rank, shapes: shapes(config), layers })
    }

    /// Rank of its matrices.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Bytes that its numbers take.
    pub fn bytes(&self) -> usize {
        self.layers.iter().flatten().flatten().map(LowRank::bytes).sum()
    }

    /// Whether it was made for a model of this shape.
    pub(crate) fn fits(&self, config: &ModelConfig) -> bool {
        let layers = self.layers.len() == config.num_hidden_layers;
        layers && config.projection_norm_eps.is_none() && self.shapes == shapes(config)
    }
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Adapter {{ rank: {}, bytes: {} }}", self.rank, self.bytes())
    }
}

fn shapes(config: &ModelConfig) -> [(usize, usize); PROJECTIONS] {
    Projection::ALL.map(|p| config.projection_shape(p))
}

/// Whether both are the same adapter, or none.
pub(crate) fn same(a: Option<&Arc<Adapter>>, b: Option<&Arc<Adapter>>) -> bool {
    a.map(Arc::as_ptr) == b.map(Arc::as_ptr)
}

/// Rows of a pass that have an adapter.
pub(crate) struct Adapted {
    pub(crate) adapter: Arc<Adapter>,
    pub(crate) rows: Range<usize>,
}

/// Which projection of which layer.
pub(crate) type Place = (usize, Projection);

/// Whether any of these rows has something to add to a projection.
pub(crate) fn adapts(adapted: &[Adapted], (layer, p): Place) -> bool {
    adapted.iter().any(|rows| rows.adapter.layers[layer][p as usize].is_some())
}

/// Adds to outputs `(T, out)` of projections with the same input `(T, in)` what adapters make of it.
pub(crate) fn adapt<'a>(
    adapted: &[Adapted],
    x: &[f32],
    tokens: usize,
    outs: impl IntoIterator<Item = (Place, &'a mut [f32])>,
) {
    let cols = x.len() / tokens;
    let mut products = Vec::new();
    for ((layer, p), mut out) in outs {
        let width = out.len() / tokens;
        // Rows that lie one after another.
        let mut at = 0;
        for Adapted { adapter, rows } in adapted {
            let Some(pair) = &adapter.layers[layer][p as usize] else { continue };
            let x = &x[rows.start * cols..rows.end * cols];
            let rest = out.split_at_mut((rows.start - at) * width).1;
            let (mine, rest) = rest.split_at_mut(rows.len() * width);
            products.push(LowRankProduct { pair, x, out: mine });
            (out, at) = (rest, rows.end);
        }
    }
    low_rank_add(&mut products);
}
