//! Final norm, head and cross entropy, some rows at a time.
//!
//! The logits of all rows would be the largest buffer of a step: a vocabulary is wider than any layer.
//! So some rows go through norm, head and loss and back again before the next do.

use candle_core::Result;
use trine_format::names;
use trine_kernels::bf16::{Left, Right, multiply};
use trine_kernels::gemm::{Matrix, Store, matmul};
use trine_kernels::{nn, parallel};

use super::products::Products;
use super::{Buffer, Found};
use crate::Bitnet;
use crate::ops::view;

/// Logits that exist at a time.
const LOGITS: usize = 1 << 20;

/// Rows whose norms' weight gradients are summed together.
const NORM_ROWS: usize = 32;

/// The end of the network, and the memory that it needs.
#[derive(Default)]
pub(super) struct Head {
    left: Left,
    /// Some rows, after the norm.
    rows: Right,
    /// The head, as columns and as lines.
    columns: Right,
    lines: Right,
    /// `(n, V)`, and what their gradients are multiplied by, `(n,)`.
    logits: Buffer,
    scales: Vec<f32>,
    /// `(n, D)`
    normed: Buffer,
    dnormed: Buffer,
}

/// Rows that go through together.
fn chunk_rows(rows: usize, vocab: usize) -> usize {
    (LOGITS / vocab).clamp(16, rows.max(16))
}

fn head_name(model: &Bitnet) -> &'static str {
    if model.config().tie_word_embeddings { names::EMBED } else { names::HEAD }
}

impl Head {
    /// The mean loss of `x` `(M, D)`, which becomes its gradient.
    pub(super) fn backward(
        &mut self,
        model: &Bitnet,
        products: &Products,
        x: &mut [f32],
        targets: &[u32],
        found: &mut Found<'_>,
    ) -> Result<f32> {
        let config = model.config();
        let (width, vocab, eps) = (config.hidden_size, config.vocab_size, config.rms_norm_eps);
        let (head, norm) = (view(model.params().get(head_name(model))?)?, norm(model)?);
        let (head, norm): (&[f32], &[f32]) = (&head, &norm);
        let bf16 = products.is_bf16();
        let factor = 1.0 / targets.len() as f32;
        let chunk = chunk_rows(targets.len(), vocab);
        let Self { left, rows, columns, lines, logits, scales, normed, dnormed } = self;
        if bf16 {
            columns.fill_columns(head, vocab, width);
            lines.fill_rows(head, vocab, width);
        }
        let mut dnorm = vec![0.0; width];
        let mut total = 0.0;
        let chunks = x.chunks_mut(chunk * width).zip(targets.chunks(chunk));
        for (i, (x, targets)) in chunks.enumerate() {
            let n = targets.len();
            let store = if i == 0 { Store::Set } else { Store::Add };
            logits.resize(n * vocab);
            normed_rows(x, norm, eps, normed);
            dnormed.resize(n * width);
            if bf16 {
                left.fill_rows(normed, n, width);
                multiply(left, columns.all(), 1.0, Store::Set, logits);
            } else {
                let (normed, head) = (Matrix::plain(normed), Matrix::turned(head));
                matmul([n, width, vocab], normed, head, Store::Set, logits);
            }
            total += slopes(logits, targets, factor, scales);
            if bf16 {
                left.fill_scaled_rows(logits, n, vocab, |row| scales[row]);
                multiply(left, lines.all(), 1.0, Store::Set, dnormed);
                left.fill_scaled_columns(logits, n, vocab, |row| scales[row]);
                rows.fill_rows(normed, n, width);
                found.write(head_name(model), |dhead| {
                    multiply(left, rows.all(), 1.0, store, dhead);
                })?;
            } else {
                parallel::for_each_chunk(logits, vocab, |row, logits| {
                    logits.iter_mut().for_each(|logit| *logit *= scales[row]);
                });
                let (dlogits, head) = (Matrix::plain(logits), Matrix::plain(head));
                matmul([n, vocab, width], dlogits, head, Store::Set, dnormed);
                let (dlogits, normed) = (Matrix::turned(logits), Matrix::plain(normed));
                found.write(head_name(model), |dhead| {
                    matmul([vocab, n, width], dlogits, normed, store, dhead);
                })?;
            }
            let mut part = vec![0.0; width];
            norm_backward(x, norm, eps, dnormed, None, &mut part);
            dnorm.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        found.write(names::FINAL_NORM, |to| to.copy_from_slice(&dnorm))?;
        Ok((total / targets.len() as f64) as f32)
    }

    /// The mean loss of `x` `(M, D)`, with the head in f32.
    pub(super) fn evaluate(&mut self, model: &Bitnet, x: &[f32], targets: &[u32]) -> Result<f32> {
        let config = model.config();
        let (width, vocab) = (config.hidden_size, config.vocab_size);
        let (head, norm) = (view(model.params().get(head_name(model))?)?, norm(model)?);
        let (head, norm): (&[f32], &[f32]) = (&head, &norm);
        let chunk = chunk_rows(targets.len(), vocab);
        let Self { logits, normed, .. } = self;
        let mut total = 0.0;
        for (x, targets) in x.chunks(chunk * width).zip(targets.chunks(chunk)) {
            let n = targets.len();
            normed_rows(x, norm, config.rms_norm_eps, normed);
            logits.resize(n * vocab);
            let (normed, head) = (Matrix::plain(normed), Matrix::turned(head));
            matmul([n, width, vocab], normed, head, Store::Set, logits);
            total += losses(logits, targets);
        }
        Ok((total / targets.len() as f64) as f32)
    }
}

fn norm(model: &Bitnet) -> Result<impl std::ops::Deref<Target = [f32]> + '_> {
    view(model.params().get(names::FINAL_NORM)?)
}

fn normed_rows(x: &[f32], weight: &[f32], eps: f32, normed: &mut Buffer) {
    normed.resize(x.len());
    parallel::for_each_chunk(normed, weight.len(), |row, out| {
        nn::rms_norm(&x[row * weight.len()..][..weight.len()], weight, eps, out);
    });
}

/// The sum of the losses of `logits` `(n, V)`.
fn losses(logits: &[f32], targets: &[u32]) -> f64 {
    let vocab = logits.len() / targets.len();
    let mut losses = vec![0.0; targets.len()];
    parallel::for_each(&mut losses, |i, loss| {
        let row = &logits[i * vocab..][..vocab];
        let (max, sum) = nn::exp_sum(row);
        *loss = sum.ln() + max - row[targets[i] as usize];
    });
    losses.into_iter().map(f64::from).sum()
}

/// The sum of the losses of `logits` `(n, V)`, which become their gradients times `factor`, but for a
/// scale `(n,)` that every row is still to be multiplied by.
fn slopes(logits: &mut [f32], targets: &[u32], factor: f32, scales: &mut Vec<f32>) -> f64 {
    let vocab = logits.len() / targets.len();
    scales.resize(targets.len(), 0.0);
    let rows = logits.chunks_exact_mut(vocab).zip(targets).zip(&mut *scales);
    let mut work: Vec<_> = rows.map(|row| (row, 0.0)).collect();
    parallel::for_each(&mut work, |_, (((row, target), scale), loss)| {
        let target = **target as usize;
        let logit = row[target];
        let (max, sum) = nn::exp_sum_in_place(row);
        *loss = sum.ln() + max - logit;
        row[target] -= sum;
        **scale = factor / sum;
    });
    work.iter().map(|(_, loss)| f64::from(*loss)).sum()
}

/// The backward pass of a norm over rows: `x` `(n, D)` becomes its gradient, plus `rest` if there is
/// one, and `dw` that of the weights.
///
/// Rows are summed in groups of a fixed size, and groups in order: the same bits for any number of
/// threads.
pub(super) fn norm_backward(
    x: &mut [f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    rest: Option<&[f32]>,
    dw: &mut [f32],
) {
    let width = weight.len();
    let group = NORM_ROWS * width;
    let mut work: Vec<_> = x.chunks_mut(group).map(|x| (x, vec![0.0; width])).collect();
    parallel::for_each(&mut work, |i, (x, dw)| {
        let mut dx = vec![0.0; width];
        for (r, x) in x.chunks_exact_mut(width).enumerate() {
            let at = i * group + r * width;
            nn::rms_norm_backward(x, weight, eps, &dy[at..][..width], &mut dx, dw);
            match rest {
                None => x.copy_from_slice(&dx),
                Some(rest) => {
                    let rest = &rest[at..][..width];
                    for ((x, dx), rest) in x.iter_mut().zip(&dx).zip(rest) {
                        *x = dx + rest;
                    }
                }
            }
        }
    });
    dw.fill(0.0);
    for (_, part) in work {
        dw.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
}
