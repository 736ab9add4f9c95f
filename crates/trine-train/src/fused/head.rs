//! Final norm, head and cross entropy, some rows and some of the vocabulary at a time.
//!
//! The logits of all rows would be the largest buffer of a step: a vocabulary is wider than any layer.
//! So some rows go through norm, head and loss and back again before the next do. And a head that is laid
//! out for products, twice, would be as large as itself: a large one is laid out block by block, each of
//! some ids.
//!
//! A block's logits become exponentials over their own largest; what these are to be multiplied by, so that
//! they are the softmax over all blocks, is known at the end and goes into the products. In bfloat16 these
//! exponentials are sides of products as soon as they are made, and no logits are kept. The targets'
//! own terms, which are exact, are added beside them.

use candle_core::{Device, Result, Tensor};
use trine_format::names;
use trine_kernels::bf16::{Left, Right, Scale, Softmax, exps, multiply};
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
    sides: Sides,
    /// A matrix `(n, ids)` for each block; in bfloat16, for one of them.
    logits: Buffer,
    /// What a row's gradient in a block is multiplied by, `(blocks, n)`.
    scales: Vec<f32>,
    /// `(n, D)`
    normed: Buffer,
    dnormed: Buffer,
}

/// Sides of products in bfloat16.
#[derive(Default)]
struct Sides {
    /// Rows after the norm, as a left and as a right side.
    normed_left: Left,
    normed_right: Right,
    /// A block of the head, as columns and as lines.
    columns: Right,
    lines: Right,
    /// The exponentials of each block, by rows and by ids.
    exps: Vec<[Left; 2]>,
}

impl Default for Head {
    fn default() -> Self {
        Self {
            block: BLOCK,
            sides: Sides::default(),
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

/// Some rows of a batch that go through the head together.
#[derive(Clone, Copy)]
struct Part<'a> {
    division: Division,
    /// `(V, D)`, and the name of its gradient.
    head: &'a Tensor,
    name: &'a str,
    targets: Targets<'a>,
    /// How many such parts came before.
    chunk: usize,
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
        let width = division.width;
        let mut dnorm = vec![0.0; width];
        let mut losses = Vec::with_capacity(targets.ids.len());
        let chunks = x.chunks_mut(division.rows * width).zip(targets.chunks(division.rows));
        for (chunk, (x, targets)) in chunks.enumerate() {
            normed_rows(x, &norm, eps, &mut self.normed);
            self.dnormed.resize(x.len());
            let part = Part { division, head: &head, name: head_name(model), targets, chunk };
            losses.extend(match bf16 {
                true => self.softmax_in_bf16(part, found)?,
                false => self.softmax_in_f32(part, found)?,
            });
            let Targets { ids: targets, weights } = targets;
            let (n, Self { normed, dnormed, .. }) = (targets.len(), &mut *self);
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
            self.logits_in_f32(division, &head, targets.len())?;
            let weights = vec![1.0; targets.len()];
            losses.extend(slopes(division, &mut self.logits, targets, &weights, &mut self.scales));
        }
        Ok(losses)
    }

    /// Losses of some rows, of which the softmax's part in the gradients is made.
    fn softmax_in_f32(&mut self, part: Part<'_>, found: &mut Found<'_>) -> Result<Vec<f32>> {
        let Part { division, head, name, targets, chunk } = part;
        let (n, width) = (targets.ids.len(), division.width);
        self.logits_in_f32(division, head, n)?;
        let Self { logits, scales, normed, dnormed, .. } = self;
        let losses = slopes(division, logits, targets.ids, targets.weights, scales);
        for (b, (at, ids)) in division.blocks().enumerate() {
            let logits = &mut logits[n * at..][..n * ids];
            let scales = &scales[b * n..][..n];
            parallel::for_each_chunk(logits, ids, |row, logits| {
                logits.iter_mut().for_each(|logit| *logit *= scales[row]);
            });
            let block = head.narrow(0, at, ids)?;
            let block = view(&block)?;
            let (dlogits, block) = (Matrix::plain(logits), Matrix::plain(&block));
            matmul([n, ids, width], dlogits, block, store(b), dnormed);
            found.write(name, |dhead| {
                let dhead = &mut dhead[at * width..][..ids * width];
                let (dlogits, normed) = (Matrix::turned(logits), Matrix::plain(normed));
                matmul([ids, n, width], dlogits, normed, store(chunk), dhead);
            })?;
        }
        Ok(losses)
    }

    /// As [`Self::softmax_in_f32`].
    fn softmax_in_bf16(&mut self, part: Part<'_>, found: &mut Found<'_>) -> Result<Vec<f32>> {
        let Part { division, head, name, targets, chunk } = part;
        let (n, width, learns) = (targets.ids.len(), division.width, found.wants(name));
        // A head that is one block is laid out once for all rows.
        let fresh = chunk == 0 || !division.is_whole();
        let Self { sides, logits, scales, normed, dnormed, .. } = self;
        let Sides { normed_left, normed_right, columns, lines, exps: all_exps } = sides;
        normed_left.fill_rows(normed, n, width);
        let mut of_targets = vec![f32::NAN; n];
        let mut softmaxes = Vec::new();
        for (b, (at, ids)) in division.blocks().enumerate() {
            if fresh {
                columns.fill_columns(&view(&head.narrow(0, at, ids)?)?, ids, width);
            }
            logits.resize(n * ids);
            multiply(normed_left, columns.all(), Scale::One, Store::Set, logits);
            for (row, target) in targets.ids.iter().enumerate() {
                if let Some(id) = (*target as usize).checked_sub(at).filter(|id| *id < ids) {
                    of_targets[row] = logits[row * ids + id];
                }
            }
            if all_exps.len() == b {
                all_exps.push(Default::default());
            }
            let [by_rows, by_ids] = &mut all_exps[b];
            let by_ids = learns.then_some(by_ids);
            softmaxes.extend(exps(logits, [n, ids], 1.0, |_| 0..ids, by_rows, by_ids));
        }
        let losses = join(&softmaxes, targets.weights, scales);
        for (b, (at, ids)) in division.blocks().enumerate() {
            let scales = &scales[b * n..][..n];
            if fresh {
                lines.fill_rows(&view(&head.narrow(0, at, ids)?)?, ids, width);
            }
            let [by_rows, by_ids] = &all_exps[b];
            multiply(by_rows, lines.all(), Scale::Rows(scales), store(b), dnormed);
            if learns {
                let row = |row: usize| &normed[row * width..][..width];
                normed_right.fill_each_row(n, width, row, |row| scales[row]);
            }
            found.write(name, |dhead| {
                let dhead = &mut dhead[at * width..][..ids * width];
                multiply(by_ids, normed_right.all(), Scale::One, store(chunk), dhead);
            })?;
        }
        Ok(losses.iter().zip(of_targets).map(|(loss, logit)| loss - logit).collect())
    }

    /// Logits of the `n` rows that are in `normed`.
    fn logits_in_f32(&mut self, division: Division, head: &Tensor, n: usize) -> Result<()> {
        self.logits.resize(n * division.vocab);
        for (at, ids) in division.blocks() {
            let block = head.narrow(0, at, ids)?;
            let block = view(&block)?;
            let (normed, block) = (Matrix::plain(&self.normed), Matrix::turned(&block));
            let logits = &mut self.logits[n * at..][..n * ids];
            matmul([n, division.width, ids], normed, block, Store::Set, logits);
        }
        Ok(())
    }
}

/// How the part of a sum is stored: the first takes the place of what was there.
fn store(part: usize) -> Store {
    if part == 0 { Store::Set } else { Store::Add }
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
        blocks: Vec<(&'a mut [f32], Softmax)>,
        logit: f32,
    }
    let n = targets.len();
    let row = |target: &u32| Row { target: *target as usize, blocks: Vec::new(), logit: 0.0 };
    let mut rows: Vec<_> = targets.iter().map(row).collect();
    let mut rest = logits;
    for (_, ids) in division.blocks() {
        let block = rest.split_off_mut(..n * ids).expect("a matrix for each block");
        for (row, logits) in rows.iter_mut().zip(block.chunks_exact_mut(ids)) {
            row.blocks.push((logits, Softmax::default()));
        }
    }
    parallel::for_each(&mut rows, |_, row| {
        row.logit = row.blocks[row.target / division.ids].0[row.target % division.ids];
        for (logits, softmax) in &mut row.blocks {
            let (largest, sum) = nn::exp_sum_in_place(logits);
            *softmax = Softmax { largest, sum };
        }
    });
    let blocks = division.blocks().count();
    let of_block = |b: usize| rows.iter().map(move |row| row.blocks[b].1);
    let softmaxes: Vec<_> = (0..blocks).flat_map(of_block).collect();
    let losses = join(&softmaxes, weights, scales);
    losses.iter().zip(&rows).map(|(loss, row)| loss - row.logit).collect()
}

/// The logarithms of what the softmaxes over all blocks are divided by, `(n,)`, from those of each,
/// `(blocks, n)`; and in `scales` the factors that turn exponentials over a block's largest into
/// gradients, times the weight of the row.
fn join(softmaxes: &[Softmax], weights: &[f32], scales: &mut Vec<f32>) -> Vec<f32> {
    let n = weights.len();
    let of_row = |row: usize| softmaxes.iter().skip(row).step_by(n);
    scales.clear();
    scales.resize(softmaxes.len(), 0.0);
    let logarithm = |(row, weight): (usize, &f32)| {
        let max = of_row(row).fold(f32::NEG_INFINITY, |max, softmax| max.max(softmax.largest));
        let share = |softmax: &Softmax| nn::exp(softmax.largest - max);
        let sum = of_row(row).map(|softmax| softmax.sum * share(softmax)).sum::<f32>();
        for (scale, softmax) in scales.iter_mut().skip(row).step_by(n).zip(of_row(row)) {
            *scale = weight * share(softmax) / sum;
        }
        sum.ln() + max
    };
    weights.iter().enumerate().map(logarithm).collect()
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
