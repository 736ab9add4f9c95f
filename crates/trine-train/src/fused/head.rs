//! Final norm, head and cross entropy, some rows at a time.
//!
//! The logits of all rows would be the largest buffer of a step: a vocabulary is wider than any layer.
//! So some rows go through norm, head and loss and back again before the next do.

use candle_core::Result;
use trine_format::names;
use trine_kernels::bf16::{Left, Right, multiply};
use trine_kernels::gemm::{Matrix, Store, matmul};
use trine_kernels::{nn, parallel};

use super::Found;
use super::products::Products;
use crate::Bitnet;
use crate::ops::view;

/// Logits that exist at a time.
const LOGITS: usize = 4 << 20;

/// Rows whose norms' weight gradients are summed together.
const NORM_ROWS: usize = 32;

/// The end of the network.
pub(super) struct Head<'a> {
    model: &'a Bitnet,
    products: &'a mut Products,
}

/// Rows that go through together.
fn chunk_rows(rows: usize, vocab: usize) -> usize {
    (LOGITS / vocab).clamp(16, rows.max(16))
}

fn head_name(model: &Bitnet) -> &'static str {
    if model.config().tie_word_embeddings { names::EMBED } else { names::HEAD }
}

impl<'a> Head<'a> {
    pub(super) fn new(model: &'a Bitnet, products: &'a mut Products) -> Self {
        Self { model, products }
    }

    /// The mean loss of `x` `(M, D)`, which becomes its gradient.
    pub(super) fn backward(self, x: &mut [f32], targets: &[u32], found: &mut Found) -> Result<f32> {
        let config = self.model.config();
        let (width, vocab, eps) = (config.hidden_size, config.vocab_size, config.rms_norm_eps);
        let (head, norm) =
            (view(self.model.params().get(head_name(self.model))?)?, norm(self.model)?);
        let (head, norm): (&[f32], &[f32]) = (&head, &norm);
        let bf16 = self.products.is_bf16();
        let rows = targets.len();
        let factor = 1.0 / rows as f32;
        let chunk = chunk_rows(rows, vocab);
        let (mut left, mut normed_right) = (Left::default(), Right::default());
        let (mut columns, mut lines) = (Right::default(), Right::default());
        if bf16 {
            columns.fill_columns(head, vocab, width);
            lines.fill_rows(head, vocab, width);
        }
        let mut dhead = vec![0.0; vocab * width];
        let mut dnorm = vec![0.0; width];
        let mut logits = vec![0.0; chunk.min(rows) * vocab];
        let mut total = 0.0;
        for (x, targets) in x.chunks_mut(chunk * width).zip(targets.chunks(chunk)) {
            let n = targets.len();
            let logits = &mut logits[..n * vocab];
            let normed = normed_rows(x, norm, eps);
            if bf16 {
                left.fill_rows(&normed, n, width);
                multiply(&left, columns.all(), 1.0, Store::Set, logits);
            } else {
                matmul(
                    [n, width, vocab],
                    Matrix::plain(&normed),
                    Matrix::turned(head),
                    Store::Set,
                    logits,
                );
            }
            total += losses(logits, targets, vocab, Some(factor));
            let mut dnormed = vec![0.0; n * width];
            if bf16 {
                left.fill_rows(logits, n, vocab);
                multiply(&left, lines.all(), 1.0, Store::Set, &mut dnormed);
                left.fill_columns(logits, n, vocab, &vec![1.0; n]);
                normed_right.fill_rows(&normed, n, width);
                multiply(&left, normed_right.all(), 1.0, Store::Add, &mut dhead);
            } else {
                matmul(
                    [n, vocab, width],
                    Matrix::plain(logits),
                    Matrix::plain(head),
                    Store::Set,
                    &mut dnormed,
                );
                let (dlogits, normed) = (Matrix::turned(logits), Matrix::plain(&normed));
                matmul([vocab, n, width], dlogits, normed, Store::Add, &mut dhead);
            }
            norm_backward(x, norm, eps, &dnormed, None, &mut dnorm);
        }
        found.insert(head_name(self.model).to_owned(), dhead);
        found.insert(names::FINAL_NORM.to_owned(), dnorm);
        Ok((total / rows as f64) as f32)
    }
}

/// The mean loss of `x` `(M, D)`, with the head in f32.
pub(super) fn evaluate(model: &Bitnet, x: &[f32], targets: &[u32]) -> Result<f32> {
    let config = model.config();
    let (width, vocab) = (config.hidden_size, config.vocab_size);
    let (head, norm) = (view(model.params().get(head_name(model))?)?, norm(model)?);
    let (head, norm): (&[f32], &[f32]) = (&head, &norm);
    let chunk = chunk_rows(targets.len(), vocab);
    let mut logits = vec![0.0; chunk.min(targets.len()) * vocab];
    let mut total = 0.0;
    for (x, targets) in x.chunks(chunk * width).zip(targets.chunks(chunk)) {
        let n = targets.len();
        let normed = normed_rows(x, norm, config.rms_norm_eps);
        let logits = &mut logits[..n * vocab];
        matmul([n, width, vocab], Matrix::plain(&normed), Matrix::turned(head), Store::Set, logits);
        total += losses(logits, targets, vocab, None);
    }
    Ok((total / targets.len() as f64) as f32)
}

fn norm(model: &Bitnet) -> Result<impl std::ops::Deref<Target = [f32]> + '_> {
    view(model.params().get(names::FINAL_NORM)?)
}

fn normed_rows(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut normed = vec![0.0; x.len()];
    parallel::for_each_chunk(&mut normed, weight.len(), |row, out| {
        nn::rms_norm(&x[row * weight.len()..][..weight.len()], weight, eps, out);
    });
    normed
}

/// The sum of the losses of `logits` `(n, V)`; with a factor, logits become its gradient times that.
fn losses(logits: &mut [f32], targets: &[u32], vocab: usize, factor: Option<f32>) -> f64 {
    let mut work: Vec<_> = logits.chunks_mut(vocab).zip(targets).map(|row| (row, 0.0)).collect();
    parallel::for_each(&mut work, |_, ((row, target), loss)| {
        let (max, sum) = nn::exp_sum(row);
        *loss = sum.ln() + max - row[**target as usize];
        if let Some(factor) = factor {
            let copy = row.to_vec();
            nn::softmax_gradient(&copy, (max, sum), factor, row);
            row[**target as usize] -= factor;
        }
    });
    work.iter().map(|(_, loss)| f64::from(*loss)).sum()
}

/// The backward pass of a norm over rows: `x` `(n, D)` becomes its gradient, plus `rest` if there is
/// one, and that of the weights is added to `dw`.
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
    for (_, part) in work {
        dw.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
}
