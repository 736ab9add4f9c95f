//! What a model says of rows in short: its likeliest ids, and what all others have together.
//!
//! The divergence from such a teacher is that of the distributions in which all other ids are one. It is
//! never more than the divergence of the whole distributions, and equal to it when no id is left out; it
//! asks nothing of how the others share what is theirs.

use trine_kernels::{nn, parallel};

/// The likeliest ids of rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Likeliest {
    /// Ids of a row.
    pub count: usize,
    /// `(n, count)`, the likeliest first.
    pub ids: Vec<u32>,
    /// Their probabilities, `(n, count)`.
    pub probabilities: Vec<f32>,
    /// The probability of all other ids together, `(n,)`.
    pub rest: Vec<f32>,
}

impl Likeliest {
    /// No rows yet, of `count` ids each.
    pub fn new(count: usize) -> Self {
        Self { count, ids: Vec::new(), probabilities: Vec::new(), rest: Vec::new() }
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.rest.len()
    }

    /// Adds some rows of another one of as many ids.
    pub fn extend(&mut self, other: &Self, rows: std::ops::Range<usize>) {
        debug_assert_eq!(self.count, other.count);
        let ids = rows.start * self.count..rows.end * self.count;
        self.ids.extend_from_slice(&other.ids[ids.clone()]);
        self.probabilities.extend_from_slice(&other.probabilities[ids]);
        self.rest.extend_from_slice(&other.rest[rows]);
    }

    /// Adds the softmax of `logits` `(n, V)`, which are spent, `count` being at most V.
    pub(super) fn push(&mut self, logits: &mut [f32], vocab: usize) {
        let count = self.count;
        let rows = logits.len() / vocab;
        let mut found = vec![(Vec::new(), 0.0); rows];
        let mut work: Vec<_> = logits.chunks_exact_mut(vocab).zip(&mut found).collect();
        parallel::for_each(&mut work, |_, (logits, found)| **found = likeliest(logits, count));
        for (ids, rest) in found {
            self.ids.extend(ids.iter().map(|(id, _)| *id));
            self.probabilities.extend(ids.iter().map(|(_, p)| *p));
            self.rest.push(rest);
        }
    }

    /// Turns the exponentials of a student's logits, `(V,)`, whose sum is `sum`, into the gradient of the
    /// divergence from row `row` by these logits, and returns the divergence in nats.
    pub(super) fn slope(&self, row: usize, exps: &mut [f32], sum: f32) -> f32 {
        let at = row * self.count..(row + 1) * self.count;
        let taught = || self.ids[at.clone()].iter().zip(&self.probabilities[at.clone()]);
        let own: Vec<f32> =
            taught().map(|(id, _)| std::mem::take(&mut exps[*id as usize]) / sum).collect();
        // Not one less the others, which would leave nothing but rounding of a small rest.
        let others: f64 = exps.iter().map(|e| f64::from(*e)).sum();
        let p_rest = ((others / f64::from(sum)) as f32).max(f32::MIN_POSITIVE);
        let q_rest = self.rest[row];
        let term = |q: f32, p: f32| match q > 0.0 {
            true => f64::from(q) * f64::from((q / p.max(f32::MIN_POSITIVE)).ln()),
            false => 0.0,
        };
        let terms = taught().zip(&own).map(|((_, q), p)| term(*q, *p));
        let divergence = terms.sum::<f64>() + term(q_rest, p_rest);
        let factor = (1.0 - q_rest / p_rest) / sum;
        exps.iter_mut().for_each(|e| *e *= factor);
        for ((id, q), p) in taught().zip(&own) {
            exps[*id as usize] = p - q;
        }
        divergence as f32
    }
}

/// The likeliest ids of a row of logits, with their probabilities, and what is left for the others.
fn likeliest(logits: &mut [f32], count: usize) -> (Vec<(u32, f32)>, f32) {
    let (_, sum) = nn::exp_sum_in_place(logits);
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let mut rest = 0.0;
    if count < all.len() {
        all.select_nth_unstable_by(count, order);
        rest = all[count..].iter().map(|(_, e)| f64::from(*e)).sum();
        all.truncate(count);
    }
    all.sort_unstable_by(order);
    all.iter_mut().for_each(|(_, e)| *e /= sum);
    (all, (rest / f64::from(sum)) as f32)
}
