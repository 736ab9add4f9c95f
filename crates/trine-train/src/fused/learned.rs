//! The rows of a batch that predict something: the others do not go through the head.

use std::borrow::Cow;

use candle_core::Result;
use trine_data::{Batch, IGNORED};

use super::Buffer;

/// The targets of a batch that are to be predicted.
pub(super) struct Learned<'a> {
    pub(super) ids: Cow<'a, [u32]>,
    /// The rows that predict them, unless all do.
    pub(super) at: Option<Vec<usize>>,
}

impl<'a> Learned<'a> {
    pub(super) fn of(batch: &'a Batch) -> Result<Self> {
        let n = batch.learned();
        if n == 0 {
            candle_core::bail!("a batch in which nothing is to be predicted");
        }
        if n == batch.targets.len() {
            return Ok(Self { ids: Cow::Borrowed(&batch.targets), at: None });
        }
        let at = batch.targets.iter().enumerate().filter(|(_, id)| **id != IGNORED);
        let (at, ids): (Vec<_>, Vec<_>) = at.map(|(at, id)| (at, *id)).unzip();
        Ok(Self { ids: Cow::Owned(ids), at: Some(at) })
    }

    /// Where in the batch they are, `(n,)`.
    pub(super) fn positions(&self) -> Box<dyn Iterator<Item = usize> + '_> {
        match &self.at {
            None => Box::new(0..self.ids.len()),
            Some(at) => Box::new(at.iter().copied()),
        }
    }

    /// For each sequence, less the sum of its losses.
    pub(super) fn log_probabilities(&self, losses: &[f32], batch: &Batch) -> Vec<f64> {
        let mut sums = vec![0.0; batch.batch];
        for (at, loss) in self.positions().zip(losses) {
            sums[at / batch.seq_len] -= f64::from(*loss);
        }
        sums
    }
}

pub(super) fn mean(losses: impl ExactSizeIterator<Item = f32>) -> f32 {
    let n = losses.len() as f64;
    (losses.map(f64::from).sum::<f64>() / n) as f32
}

/// Some rows of `x` `(M, D)`, one after the other.
pub(super) fn gather(rows: &[usize], width: usize, x: &[f32], out: &mut Buffer) {
    out.resize(rows.len() * width);
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
        out.copy_from_slice(&x[row * width..][..width]);
    }
}

/// Puts such rows back; the others, which predict nothing, have no gradient.
pub(super) fn scatter(rows: &[usize], width: usize, from: &[f32], x: &mut [f32]) {
    x.fill(0.0);
    for (row, from) in rows.iter().zip(from.chunks_exact(width)) {
        x[row * width..][..width].copy_from_slice(from);
    }
}
