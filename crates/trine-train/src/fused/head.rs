//! Final norm, head and cross entropy, some rows and some of the vocabulary at a time.
//!
//! The logits of all rows would be the largest buffer of a step: a vocabulary is wider than any layer.
//! So some rows go through norm, head and loss and back again before the next do. And a head that is laid
//! out for products, twice, would be as large as itself: a large one is laid out block by block, each of
//! some ids.
//!
//! A block's logits become exponentials over their own largest; what these are to be multiplied by, so that
//! they are the softmax over all blocks, is known at the end and goes into the products. The targets'
//! own terms, which are exact, are added beside them.

use candle_core::{Device, Result, Tensor};
use trine_format::names;
use trine_kernels::bf16::{Left, Right, multiply};
use trine_kernels::gemm::{Matrix, Store, matmul};
use trine_kernels::{nn, parallel};

use super::products::Products;
use super::{Buffer, Found};
use crate::Bitnet;
use crate::ops::view;

/// Logits that exist at a time, where that is enough for [`LEAST_ROWS`].
const LOGITS: usize = 1 << 20;

/// Fewest rows at a time where the head is laid out anew for them.
pub(crate) const LEAST_ROWS: usize = 512;

/// See [`Head::block`].
pub(crate) const BLOCK: usize = 8 << 20;

/// Rows whose norms' weight gradients are summed together.
const NORM_ROWS: usize = 32;

/// The end of the network, and the memory that it needs.
pub(super) struct Head {
    /// Elements of the head that are laid out together.
    pub(super) block: usize,
    /// Gradients, and rows after the norm, as a left and as a right side.
    left: Left,
    normed_left: Left,
    normed_right: Right,
    /// A block of the head, as columns and as lines.
    columns: Right,
    lines: Right,
    /// A matrix `(n, ids)` for each block.
    logits: Buffer,
    /// What a row's gradient in a block is multiplied by, `(blocks, n)`.
    scales: Vec<f32>,
    /// `(n, D)`
    normed: Buffer,
    dnormed: Buffer,
}

impl Default for Head {
    fn default() -> Self {
        Self {
            block: BLOCK,
            left: Left::default(),
            normed_left: Left::default(),
            normed_right: Right::default(),
            columns: Right::default(),
            lines: Right::default(),
            logits: Buffer::default(),
            scales: Vec::new(),
            normed: Buffer::default(),
            dnormed: Buffer::default(),
        }
    }
}

/// What rows are to predict, and what their losses count for.
#[derive(Clone, Copy)]
pub(super) struct Targets<'a> {
    /// `(n,)`
    pub(super) ids: &'a [u32],
    /// `(n,)`
    pub(super) weights: &'a [f32],
}

impl<'a> Targets<'a> {
    pub(super) fn chunks(self, rows: usize) -> impl Iterator<Item = Targets<'a>> {
        let chunks = self.ids.chunks(rows).zip(self.weights.chunks(rows));
        chunks.map(|(ids, weights)| Targets { ids, weights })
    }
}

/// How rows and vocabulary are divided.
#[derive(Clone, Copy)]
struct Division {
    vocab: usize,
    width: usize,
    /// Ids of a block; the last may have fewer.
    ids: usize,
    /// Rows at a time.
    rows: usize,
}

impl Division {
    fn new(model: &Bitnet, rows: usize, block: usize) -> Self {
        let (vocab, width) = (model.config().vocab_size, model.config().hidden_size);
        let ids = (block / width).max(1).next_multiple_of(64).min(vocab);
        let least = if ids < vocab { LEAST_ROWS } else { 16 };
        let rows = (LOGITS / vocab).clamp(least, rows.max(least));
        Self { vocab, width, ids, rows }
    }

    /// The first id of each block, and how many there are.
    fn blocks(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.vocab).step_by(self.ids).map(move |at| (at, self.ids.min(self.vocab - at)))
    }

    fn is_whole(self) -> bool {
        self.ids == self.vocab
    }
}

pub(super) fn head_name(model: &Bitnet) -> &'static str {
    if model.config().tie_word_embeddings { names::EMBED } else { names::HEAD }
}

impl Head {
    /// The losses of `x` `(n, D)`, which becomes the gradient of the sum of each times its weight.
    pub(super) fn backward(
        &mut self,
        model: &Bitnet,
        products: &Products,
        x: &mut [f32],
        targets: Targets<'_>,
        found: &mut Found<'_>,
    ) -> Result<Vec<f32>> {
        let (head, norm) = (model.params().get(head_name(model))?.detach(), norm(model)?);
        let (bf16, eps) = (products.is_bf16(), model.config().rms_norm_eps);
        let division = Division::new(model, targets.ids.len(), self.block);
        let (width, learns) = (division.width, found.wants(head_name(model)));
        let mut dnorm = vec![0.0; width];
        let mut losses = Vec::with_capacity(targets.ids.len());
        let chunks = x.chunks_mut(division.rows * width).zip(targets.chunks(division.rows));
        for (chunk, (x, Targets { ids: targets, weights })) in chunks.enumerate() {
            let n = targets.len();
            normed_rows(x, &norm, eps, &mut self.normed);
            let fresh = chunk == 0 || !division.is_whole();
            self.logits(division, &head, n, bf16, fresh)?;
            losses.extend(slopes(division, &mut self.logits, targets, weights, &mut self.scales));
            let Self { left, normed_right, lines, logits, scales, normed, dnormed, .. } = self;
            dnormed.resize(n * width);
            if bf16 && learns {
                normed_right.fill_rows(normed, n, width);
            }
            for (b, (at, ids)) in division.blocks().enumerate() {
                let logits = &mut logits[n * at..][..n * ids];
                let scales = &scales[b * n..][..n];
                let add = if b == 0 { Store::Set } else { Store::Add };
                if bf16 {
                    if fresh {
                        lines.fill_rows(&view(&head.narrow(0, at, ids)?)?, ids, width);
                    }
                    left.fill_scaled_rows(logits, n, ids, |row| scales[row]);
                    multiply(left, lines.all(), 1.0, add, dnormed);
                } else {
                    parallel::for_each_chunk(logits, ids, |row, logits| {
                        logits.iter_mut().for_each(|logit| *logit *= scales[row]);
                    });
                    let block = head.narrow(0, at, ids)?;
                    let block = view(&block)?;
                    let (dlogits, block) = (Matrix::plain(logits), Matrix::plain(&block));
                    matmul([n, ids, width], dlogits, block, add, dnormed);
                }
                found.write(head_name(model), |dhead| {
                    let dhead = &mut dhead[at * width..][..ids * width];
                    let add = if chunk == 0 { Store::Set } else { Store::Add };
                    if bf16 {
                        left.fill_scaled_columns(logits, n, ids, |row| scales[row]);
                        multiply(left, normed_right.all(), 1.0, add, dhead);
                    } else {
                        let (dlogits, normed) = (Matrix::turned(logits), Matrix::plain(normed));
                        matmul([ids, n, width], dlogits, normed, add, dhead);
                    }
                })?;
            }
            let minus = |to: &mut [f32], weight: f32, x: &[f32]| {
                to.iter_mut().zip(x).for_each(|(to, x)| *to -= weight * x);
            };
            let ids = Tensor::from_slice(targets, n, &Device::Cpu)?;
            let of_targets = head.index_select(&ids, 0)?;
            let of_targets = view(&of_targets)?;
            let of_targets: &[f32] = &of_targets;
            parallel::for_each_chunk(dnormed, width, |row, to| {
                minus(to, weights[row], &of_targets[row * width..][..width]);
            });
            found.write(head_name(model), |dhead| {
                let rows = targets.iter().zip(weights).zip(normed.chunks_exact(width));
                for ((id, weight), normed) in rows {
                    minus(&mut dhead[*id as usize * width..][..width], *weight, normed);
                }
            })?;
            let part = norm_backward(x, &norm, eps, dnormed, None);
            dnorm.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        found.write(names::FINAL_NORM, |to| to.copy_from_slice(&dnorm))?;
        Ok(losses)
    }

    /// The losses of `x` `(n, D)`, with the head in f32.
    pub(super) fn evaluate(
        &mut self,
        model: &Bitnet,
        x: &[f32],
        targets: &[u32],
    ) -> Result<Vec<f32>> {
        let (head, norm) = (model.params().get(head_name(model))?.detach(), norm(model)?);
        let division = Division::new(model, targets.len(), self.block);
        let mut losses = Vec::with_capacity(targets.len());
        let chunks = x.chunks(division.rows * division.width).zip(targets.chunks(division.rows));
        for (x, targets) in chunks {
            normed_rows(x, &norm, model.config().rms_norm_eps, &mut self.normed);
            self.logits(division, &head, targets.len(), false, true)?;
            let weights = vec![1.0; targets.len()];
            losses.extend(slopes(division, &mut self.logits, targets, &weights, &mut self.scales));
        }
        Ok(losses)
    }

    /// Logits of the `n` rows that are in `normed`; without `fresh`, the columns are those of before.
    fn logits(
        &mut self,
        division: Division,
        head: &Tensor,
        n: usize,
        bf16: bool,
        fresh: bool,
    ) -> Result<()> {
        let width = division.width;
        self.logits.resize(n * division.vocab);
        if bf16 {
            self.normed_left.fill_rows(&self.normed, n, width);
        }
        for (at, ids) in division.blocks() {
            let block = head.narrow(0, at, ids)?;
            let logits = &mut self.logits[n * at..][..n * ids];
            if bf16 {
                if fresh {
                    self.columns.fill_columns(&view(&block)?, ids, width);
                }
                multiply(&self.normed_left, self.columns.all(), 1.0, Store::Set, logits);
            } else {
                let block = view(&block)?;
                let (normed, block) = (Matrix::plain(&self.normed), Matrix::turned(&block));
                matmul([n, width, ids], normed, block, Store::Set, logits);
            }
        }
        Ok(())
    }
}

pub(super) fn norm(model: &Bitnet) -> Result<impl std::ops::Deref<Target = [f32]> + '_> {
    view(model.params().get(names::FINAL_NORM)?)
}

pub(super) fn normed_rows(x: &[f32], weight: &[f32], eps: f32, normed: &mut Buffer) {
    normed.resize(x.len());
    parallel::for_each_chunk(normed, weight.len(), |row, out| {
        nn::rms_norm(&x[row * weight.len()..][..weight.len()], weight, eps, out);
    });
}

/// The losses of `logits`, a matrix `(n, ids)` for each block. They become their gradients times
/// the weight of the row, but for a scale `(blocks, n)` of every row and the targets' own terms.
fn slopes(
    division: Division,
    logits: &mut [f32],
    targets: &[u32],
    weights: &[f32],
    scales: &mut Vec<f32>,
) -> Vec<f32> {
    /// A row, in every block.
    struct Row<'a> {
        target: usize,
        blocks: Vec<(&'a mut [f32], f32)>,
        loss: f32,
    }
    let n = targets.len();
    let row = |target: &u32| Row { target: *target as usize, blocks: Vec::new(), loss: 0.0 };
    let mut rows: Vec<_> = targets.iter().map(row).collect();
    let mut rest = logits;
    for (_, ids) in division.blocks() {
        let block = rest.split_off_mut(..n * ids).expect("a matrix for each block");
        for (row, logits) in rows.iter_mut().zip(block.chunks_exact_mut(ids)) {
            row.blocks.push((logits, 0.0));
        }
    }
    parallel::for_each(&mut rows, |at, row| {
        let logit = row.blocks[row.target / division.ids].0[row.target % division.ids];
        let sums: Vec<_> =
            row.blocks.iter_mut().map(|(logits, _)| nn::exp_sum_in_place(logits)).collect();
        let max = sums.iter().fold(f32::NEG_INFINITY, |max, (largest, _)| max.max(*largest));
        let share = |largest: f32| nn::exp(largest - max);
        let sum = sums.iter().map(|(largest, sum)| sum * share(*largest)).sum::<f32>();
        row.loss = sum.ln() + max - logit;
        for ((_, scale), (largest, _)) in row.blocks.iter_mut().zip(&sums) {
            *scale = weights[at] * share(*largest) / sum;
        }
    });
    scales.clear();
    let blocks = rows.first().map_or(0, |row| row.blocks.len());
    (0..blocks).for_each(|b| scales.extend(rows.iter().map(|row| row.blocks[b].1)));
    rows.iter().map(|row| row.loss).collect()
}

/// The backward pass of a norm over rows: `x` `(n, D)` becomes its gradient, plus `rest` if there is
/// one. Returns that of the weights.
///
/// Rows are summed in groups of a fixed size, and groups in order: the same bits for any number of
/// threads.
pub(super) fn norm_backward(
    x: &mut [f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    rest: Option<&[f32]>,
) -> Vec<f32> {
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
    let mut dw = vec![0.0; width];
    for (_, part) in work {
        dw.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    dw
}
