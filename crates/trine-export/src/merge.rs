//! Adapters merged into the weights beside which they were trained, and what that costs.
//!
//! In full precision `W + (alpha / r) B A` is the adapted weight itself. A ternary weight plus that sum is
//! no ternary weight: it is rounded again, and a trit turns only where the sum crosses the middle between
//! two. Masters lie anywhere between, so a small change is kept on the average, in noise that is larger
//! than it; of stored trits a small change turns none. So every merge is measured ([`MergeCost`]) against what
//! a model with the adapter beside it computes: ternary weights plus the exact product.
//!
//! Masters, where a model has them, get the product added and are ternarized by the definition, scale and
//! all. Stored trits keep their scale: the mean of their magnitudes is smaller than it, by the share of
//! zeros, and an adapter of zeros would change the model.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;
use trine_format::names::{Part, TensorId};
use trine_format::peft::Lora;
use trine_format::{
    BoxError, DenseTensor, Dtype, ModelFile, Projection, Quantization, TensorSource, names,
};
use trine_ternary::{TernaryMatrix, ternarize};

use crate::ExportError;

/// What merging did to some matrices, beside what the adapter would have done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MergeCost {
    /// Weights.
    pub weights: u64,
    /// Trits that are others than before.
    pub changed: u64,
    /// Squared norms: of the weights with the exact product, of that product, and of what the merged
    /// weights differ from the first.
    exact: f64,
    wanted: f64,
    error: f64,
    /// The product of the change that was wanted with that which was made.
    along: f64,
}

impl MergeCost {
    /// Norm of the adapter's own change, relative to that of the adapted weights.
    pub fn adapter_change(&self) -> f64 {
        ratio(self.wanted, self.exact).sqrt()
    }

    /// Norm of the difference between merged and adapted weights, relative to that of the adapted ones.
    /// Where it is not below [`Self::adapter_change`], the merged weights are no nearer to the adapted
    /// ones than those without any adapter.
    pub fn error(&self) -> f64 {
        ratio(self.error, self.exact).sqrt()
    }

    /// How much of the adapter's change was made, along its direction: 1 is all of it, 0 nothing.
    pub fn kept(&self) -> f64 {
        ratio(self.along, self.wanted)
    }

    fn and(self, other: Self) -> Self {
        Self {
            weights: self.weights + other.weights,
            changed: self.changed + other.changed,
            exact: self.exact + other.exact,
            wanted: self.wanted + other.wanted,
            error: self.error + other.error,
            along: self.along + other.along,
        }
    }
}

fn ratio(a: f64, b: f64) -> f64 {
    if b == 0.0 { 0.0 } else { a / b }
}

/// Costs by layer and projection.
type Costs = BTreeMap<(usize, Projection), MergeCost>;

/// What a merge has cost so far: of the tensors that were read.
#[derive(Clone, Default)]
pub struct MergeCosts(Arc<Mutex<Costs>>);

impl MergeCosts {
    /// Of every kind of projection that was merged, over all layers.
    pub fn by_projection(&self) -> Vec<(Projection, MergeCost)> {
        let costs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |p: Projection| {
            let costs = costs.iter().filter(|((_, other), _)| *other == p).map(|(_, cost)| *cost);
            costs.reduce(MergeCost::and).map(|cost| (p, cost))
        };
        Projection::ALL.into_iter().filter_map(of).collect()
    }
}

/// The model with the adapter merged into its weights, and what that costs; both are computed when a
/// weight is read, as by [`convert`](crate::convert).
///
/// # Errors
/// An adapter whose matrices are not of the model's shapes, or a model with norms before its projections,
/// of which adapters would read the input before or after.
pub fn merge(source: ModelFile, lora: Lora) -> Result<(ModelFile, MergeCosts), ExportError> {
    let (path, config) = (source.path().to_owned(), source.config().clone());
    let refused = |what: String| ExportError::Adapter { path: path.clone(), what };
    if config.projection_norm_eps.is_some() {
        return Err(refused("expected projections without norms of their own".to_owned()));
    }
    for ((layer, p), [a, b]) in &lora.matrices {
        let (out, inp) = config.projection_shape(*p);
        let lengths = [lora.rank.checked_mul(inp), lora.rank.checked_mul(out)];
        if lengths != [a, b].map(|matrix| Some(matrix.len())) || *layer >= config.num_hidden_layers
        {
            let [name, _] = names::adapter(*layer, *p);
            return Err(refused(format!(
                "{name} and its pair do not fit the model's ({out}, {inp})"
            )));
        }
    }
    let tokenizer = source.tokenizer().cloned();
    let costs = MergeCosts::default();
    let merged = Merged { source, lora, costs: costs.clone() };
    let file = ModelFile::imported(&path, config.clone(), Box::new(merged));
    let file = match tokenizer {
        Some(files) => file.with_tokenizer(files, config.bos_token_id, config.eos_token_ids)?,
        None => file,
    };
    Ok((file, costs))
}

/// A model with an adapter merged into it.
struct Merged {
    source: ModelFile,
    lora: Lora,
    costs: MergeCosts,
}

impl Merged {
    /// Adds `(alpha / r) B A` to `weights` `(out, in)`, each element summed in the order of ranks first.
    fn add(&self, weights: &mut [f32], inp: usize, [a, b]: &[Vec<f32>; 2]) {
        let (rank, scale) = (self.lora.rank, (self.lora.alpha / self.lora.rank as f64) as f32);
        let rows = weights.par_chunks_exact_mut(inp).zip(b.par_chunks_exact(rank));
        rows.for_each(|(row, b)| {
            let mut sums = vec![0.0; inp];
            for (b, a) in b.iter().zip(a.chunks_exact(inp)) {
                let b = b * scale;
                sums.iter_mut().zip(a).for_each(|(sum, a)| *sum += b * a);
            }
            row.iter_mut().zip(&sums).for_each(|(w, sum)| *w += sum);
        });
    }

    /// Takes down what making `merged` of `base` cost, both ternary.
    fn record(
        &self,
        (layer, p): (usize, Projection),
        base: &TernaryMatrix,
        merged: &TernaryMatrix,
        pair: &[Vec<f32>; 2],
    ) {
        let mut wanted = vec![0.0; base.rows() * base.cols()];
        self.add(&mut wanted, base.cols(), pair);
        let cols = base.cols();
        let row = |(r, wanted): (usize, &[f32])| {
            let (mut before, mut after) = (vec![0; cols], vec![0; cols]);
            base.unpack_row(r, &mut before);
            merged.unpack_row(r, &mut after);
            let mut cost = MergeCost { weights: cols as u64, ..MergeCost::default() };
            for ((before, after), wanted) in before.iter().zip(&after).zip(wanted) {
                cost.changed += u64::from(before != after);
                let weight =
                    |trit: i8, matrix: &TernaryMatrix| f64::from(trit) * f64::from(matrix.scale());
                let (before, after) = (weight(*before, base), weight(*after, merged));
                let wanted = f64::from(*wanted);
                cost.exact += (before + wanted).powi(2);
                cost.wanted += wanted.powi(2);
                cost.error += (after - before - wanted).powi(2);
                cost.along += (after - before) * wanted;
            }
            cost
        };
        // Sums of rows in the order of rows, so that a report is the same on any number of threads.
        let costs: Vec<_> = wanted.par_chunks_exact(cols.max(1)).enumerate().map(row).collect();
        let cost = costs.into_iter().fold(MergeCost::default(), MergeCost::and);
        self.costs.0.lock().unwrap_or_else(PoisonError::into_inner).insert((layer, p), cost);
    }

    /// Masters, or full-precision weights, with the product added: `(out, in)` in f32.
    fn merged(
        &self,
        layer: usize,
        p: Projection,
        pair: &[Vec<f32>; 2],
    ) -> Result<DenseTensor<'static>, BoxError> {
        let name = names::projection(layer, p);
        let base = self.source.dense(&name)?;
        let mut weights = base.to_f32();
        let (out, inp) = self.source.config().projection_shape(p);
        self.add(&mut weights, inp, pair);
        let data = weights.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>().into();
        let tensor = DenseTensor { name, dtype: Dtype::F32, shape: vec![out, inp], data };
        if self.source.config().quantization == Quantization::Online {
            self.record((layer, p), &base.ternarize()?, &tensor.ternarize()?, pair);
        }
        Ok(tensor)
    }
}

impl TensorSource for Merged {
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        if let Some(TensorId::Layer(layer, Part::Projection(p))) = TensorId::from_canonical(name)
            && let Some(pair) = self.lora.matrices.get(&(layer, p))
            && self.source.config().quantization != Quantization::Offline
        {
            return self.merged(layer, p, pair);
        }
        Ok(self.source.dense(name)?)
    }

    fn projection(&self, layer: usize, p: Projection) -> Result<TernaryMatrix, BoxError> {
        let Some(pair) = self.lora.matrices.get(&(layer, p)) else {
            return TensorSource::projection(&self.source, layer, p);
        };
        if self.source.config().quantization != Quantization::Offline {
            return Ok(self.merged(layer, p, pair)?.ternarize()?);
        }
        let base = TensorSource::projection(&self.source, layer, p)?;
        let (rows, cols, scale) = (base.rows(), base.cols(), base.scale());
        let mut weights = base.dequantize();
        self.add(&mut weights, cols, pair);
        // A matrix of zeros has no scale that the sum could be rounded with.
        let merged = if scale == 0.0 {
            TernaryMatrix::from_weights(&weights, rows, cols)?
        } else {
            let mut trits = vec![0; weights.len()];
            ternarize(&weights, scale, &mut trits)?;
            TernaryMatrix::from_trits(&trits, rows, cols, scale)?
        };
        self.record((layer, p), &base, &merged, pair);
        Ok(merged)
    }

    fn release(&self, name: &str) {
        self.source.release(name);
    }
}
