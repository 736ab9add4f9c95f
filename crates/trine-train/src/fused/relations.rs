//! Learning from how a teacher relates tokens to each other (MiniLMv2, arXiv 2012.15828, section 3; for
//! ternary students BitDistill, arXiv 2510.13998, section 3.3).
//!
//! The queries of one layer, split into relation heads of width `d`, relate a token to every token that
//! attention lets it see; and so do keys and values:
//!
//! ```text
//! R = softmax(A A^T / sqrt(d))      for A the queries, the keys, the values of a head, (T, d)
//! loss = sum over the three of the mean over heads and tokens of KL(R of the teacher || R of the student)
//! ```
//!
//! Queries and keys are taken before positions are rotated into them. Student and teacher may differ in
//! width and in depth; what they have in common is the number of relation heads.

use trine_kernels::gemm::{Matrix, Store, matmul};
use trine_kernels::parallel::{self, Strip};

use super::distill::slope;
use super::{Buffer, Extent};

/// What the relations of tokens count for, and where they are taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Relations {
    /// Factor of their divergence.
    pub factor: f32,
    /// The layer of the student, from 0.
    pub layer: usize,
    /// That of the teacher.
    pub teacher_layer: usize,
    /// Relation heads: a divisor of the widths of queries and of keys, of student and teacher.
    pub heads: usize,
}

/// Queries, keys and values of a layer, `(M, width)` each, without positions.
pub(super) type States = [Buffer; 3];

/// What one layer is to learn in a step.
pub(super) struct Lesson<'a> {
    pub(super) relations: Relations,
    /// The states of the teacher.
    pub(super) taught: &'a States,
    /// What the loss of a batch counts for, besides its factor.
    pub(super) weight: f32,
    /// The loss in nats, once it is known.
    pub(super) divergence: f32,
}

impl Lesson<'_> {
    /// Adds the gradients of the states to `gradients`, and sets [`Self::divergence`].
    pub(super) fn learn(
        &mut self,
        extent: Extent<'_>,
        states: &States,
        gradients: [&mut Buffer; 3],
    ) {
        let heads = self.relations.heads;
        let share = 1.0 / (heads * extent.rows()) as f32;
        let weight = self.weight * self.relations.factor * share;
        let mut sum = 0.0;
        for ((own, taught), to) in states.iter().zip(self.taught).zip(gradients) {
            sum += relate(extent, heads, weight, [own, taught], to);
        }
        self.divergence = (sum * f64::from(share)) as f32;
    }
}

/// Adds the gradients of `own` to `to`, both `(M, W)`; returns the sum of the divergences of all heads and
/// tokens from those of `taught`, `(M, W')`.
fn relate(
    extent: Extent<'_>,
    heads: usize,
    weight: f32,
    [own, taught]: [&[f32]; 2],
    to: &mut [f32],
) -> f64 {
    let (tokens, rows) = (extent.tokens, extent.rows());
    let [width, taught_width] = [own, taught].map(|x| x.len() / rows / heads);
    let strips = parallel::strips(to, heads * width, tokens, width);
    let mut work: Vec<(Strip<'_, f32>, f64)> = strips.into_iter().map(|s| (s, 0.0)).collect();
    parallel::for_each(&mut work, |i, (to, sum)| {
        let (sequence, head) = (i / heads, i % heads);
        let first = sequence * tokens;
        let starts = extent.starts.map(|starts| &starts[first..][..tokens]);
        let own = gathered(own, heads * width, first..first + tokens, head * width, width);
        let mut slopes = scores(&own, tokens, width);
        let of_teacher = gathered(
            taught,
            heads * taught_width,
            first..first + tokens,
            head * taught_width,
            taught_width,
        );
        let mut of_teacher = scores(&of_teacher, tokens, taught_width);
        let pairs = slopes.chunks_exact_mut(tokens).zip(of_teacher.chunks_exact_mut(tokens));
        for (t, (own, taught)) in pairs.enumerate() {
            let seen = starts.map_or(0, |starts| starts[t] as usize)..t + 1;
            *sum += f64::from(slope(&mut own[seen.clone()], &mut taught[seen.clone()]));
            own[..seen.start].fill(0.0);
            own[seen.end..].fill(0.0);
        }
        // dA = (dS + dS^T) A / sqrt(d).
        let factor = weight / (width as f32).sqrt();
        let mut gradient = vec![0.0; tokens * width];
        let (plain, turned) = (Matrix::plain(&slopes), Matrix::turned(&slopes));
        for (slopes, store) in [(plain, Store::Set), (turned, Store::Add)] {
            matmul([tokens, tokens, width], slopes, Matrix::plain(&own), store, &mut gradient);
        }
        for (t, gradient) in gradient.chunks_exact(width).enumerate() {
            to.row_mut(t).iter_mut().zip(gradient).for_each(|(to, g)| *to += factor * g);
        }
    });
    work.iter().map(|(_, sum)| sum).sum()
}

/// Some columns of some rows of `x`, whose rows are `stride` wide.
fn gathered(
    x: &[f32],
    stride: usize,
    rows: std::ops::Range<usize>,
    first: usize,
    width: usize,
) -> Vec<f32> {
    rows.flat_map(|row| &x[row * stride + first..][..width]).copied().collect()
}

/// `A A^T / sqrt(d)` of `A` `(T, d)`.
fn scores(a: &[f32], tokens: usize, width: usize) -> Vec<f32> {
    let mut scores = vec![0.0; tokens * tokens];
    let (left, right) = (Matrix::plain(a), Matrix::turned(a));
    matmul([tokens, width, tokens], left, right, Store::Set, &mut scores);
    let scale = 1.0 / (width as f32).sqrt();
    scores.iter_mut().for_each(|s| *s *= scale);
    scores
}
