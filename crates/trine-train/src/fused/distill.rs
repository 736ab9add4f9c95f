//! The end of a network that learns from another one: cross entropy, and the divergence from what a
//! teacher says (Hinton et al. 2015, arXiv 1503.02531; BitDistill, arXiv 2510.13998, section 3.3).
//!
//! ```text
//! loss = ce CE(z, y) + kl T^2 KL(softmax(t / T) || softmax(z / T))
//! ```
//!
//! with logits `z` of the student and `t` of the teacher. `T^2` keeps the size of gradients when the
//! temperature changes. Logits of both exist for some rows at a time.

use candle_core::Result;
use trine_data::Batch;
use trine_format::names;
use trine_kernels::gemm::{Matrix, Store};
use trine_kernels::{nn, parallel};

use super::head::{Targets, head_name, norm, norm_backward, normed_rows};
use super::learned::{Learned, gather};
use super::products::Products;
use super::{Buffer, Engine, Found, Pass};
use crate::Bitnet;
use crate::ops::view;

/// Logits of each model that exist at a time.
const LOGITS: usize = 1 << 22;

/// What the parts of the loss count for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distillation {
    /// Divides logits before the divergence is taken.
    pub temperature: f32,
    /// Factor of the cross entropy.
    pub cross_entropy: f32,
    /// Factor of the divergence.
    pub divergence: f32,
}

/// A model that another one learns from.
pub struct Teacher {
    model: Bitnet,
    engine: Engine,
    /// The rows that predict something, `(n, D)`.
    rows: Buffer,
}

impl Teacher {
    /// A model that stays as it is, and how it computes.
    pub fn new(model: Bitnet, engine: Engine) -> Self {
        Self { model, engine, rows: Buffer::default() }
    }

    /// Runs the layers over a batch and keeps what predicts something.
    pub(super) fn look(
        &mut self,
        student: &Bitnet,
        batch: &Batch,
        rows: &Learned<'_>,
    ) -> Result<()> {
        let (found, expected) = (self.model.config().vocab_size, student.config().vocab_size);
        if found != expected {
            candle_core::bail!("a teacher of {found} ids, expected {expected}");
        }
        self.engine.forward(&self.model, batch, Pass::Evaluation)?;
        let config = self.model.config();
        let at: Vec<usize> = rows.positions().collect();
        let x = &self.engine.inputs[config.num_hidden_layers % 2];
        gather(&at, config.hidden_size, x, &mut self.rows);
        Ok(())
    }
}

/// Buffers of a chunk of rows.
#[derive(Default)]
pub(super) struct Chunk {
    normed: Buffer,
    dnormed: Buffer,
    /// `(n, V)`, of the student, which become gradients, and of the teacher.
    logits: Buffer,
    taught: Buffer,
}

impl Chunk {
    /// Logits `(n, V)` of rows `x` `(n, D)`; the rows after the norm stay in [`Self::normed`].
    fn logits(
        model: &Bitnet,
        products: &mut Products,
        x: &[f32],
        to: [&mut Buffer; 2],
    ) -> Result<()> {
        let ([normed, logits], config) = (to, model.config());
        let (width, vocab) = (config.hidden_size, config.vocab_size);
        let n = x.len() / width;
        normed_rows(x, &norm(model)?, config.rms_norm_eps, normed);
        logits.resize(n * vocab);
        let head = view(model.params().get(head_name(model))?)?;
        let (rows, head) = (Matrix::plain(normed), Matrix::turned(&head));
        products.product([n, width, vocab], rows, head, Store::Set, logits);
        Ok(())
    }

    /// Cross entropies and divergences, in nats, of `x` `(n, D)`, which becomes the gradient of the sum of
    /// each row's loss times its weight.
    pub(super) fn backward(
        &mut self,
        model: &Bitnet,
        products: &mut Products,
        teacher: &mut Teacher,
        options: Distillation,
        x: &mut [f32],
        targets: Targets<'_>,
        found: &mut Found<'_>,
    ) -> Result<Vec<[f32; 2]>> {
        let (width, vocab) = (model.config().hidden_size, model.config().vocab_size);
        let (name, eps) = (head_name(model), model.config().rms_norm_eps);
        let teacher_width = teacher.model.config().hidden_size;
        let rows = (LOGITS / vocab).max(16);
        let (mut dnorm, mut losses) = (vec![0.0; width], Vec::new());
        let chunks = x.chunks_mut(rows * width).zip(teacher.rows.chunks(rows * teacher_width));
        for (chunk, ((x, taught_x), targets)) in chunks.zip(targets.chunks(rows)).enumerate() {
            let n = targets.ids.len();
            let Self { normed, dnormed, logits, taught } = self;
            let teacher_products = &mut teacher.engine.products;
            Self::logits(&teacher.model, teacher_products, taught_x, [&mut *normed, &mut *taught])?;
            Self::logits(model, products, x, [&mut *normed, &mut *logits])?;
            losses.extend(slopes(logits, taught, vocab, options, targets));
            dnormed.resize(n * width);
            {
                let head = view(model.params().get(name)?)?;
                let (dlogits, head) = (Matrix::plain(logits), Matrix::plain(&head));
                products.product([n, vocab, width], dlogits, head, Store::Set, dnormed);
            }
            let store = if chunk == 0 { Store::Set } else { Store::Add };
            found.write(name, |dhead| {
                let (dlogits, normed) = (Matrix::turned(logits), Matrix::plain(normed));
                products.product([vocab, n, width], dlogits, normed, store, dhead);
            })?;
            let part = norm_backward(x, &norm(model)?, eps, dnormed, None);
            dnorm.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        found.write(names::FINAL_NORM, |to| to.copy_from_slice(&dnorm))?;
        Ok(losses)
    }
}

/// Cross entropies and divergences of logits `(n, V)`, which become gradients; those of the teacher are
/// spent.
fn slopes(
    logits: &mut [f32],
    taught: &mut [f32],
    vocab: usize,
    options: Distillation,
    targets: Targets<'_>,
) -> Vec<[f32; 2]> {
    struct Row<'a> {
        logits: &'a mut [f32],
        taught: &'a mut [f32],
        losses: [f32; 2],
    }
    let Distillation { temperature, cross_entropy, divergence } = options;
    let rows = logits.chunks_exact_mut(vocab).zip(taught.chunks_exact_mut(vocab));
    let mut rows: Vec<_> =
        rows.map(|(logits, taught)| Row { logits, taught, losses: [0.0; 2] }).collect();
    parallel::for_each(&mut rows, |at, Row { logits, taught, losses }| {
        let (target, weight) = (targets.ids[at] as usize, targets.weights[at]);
        let mut soft: Vec<f32> = logits.iter().map(|z| z / temperature).collect();
        taught.iter_mut().for_each(|t| *t /= temperature);
        // KL = sum q (ln q - ln p), with logarithms from the logits themselves.
        let (z, t) = (soft.clone(), taught.to_vec());
        let (z_max, z_sum) = nn::exp_sum_in_place(&mut soft);
        let (t_max, t_sum) = nn::exp_sum_in_place(taught);
        let shift = (z_sum.ln() + z_max) - (t_sum.ln() + t_max);
        let terms = taught.iter().zip(t.iter().zip(&z));
        let sum: f64 = terms.map(|(q, (t, z))| f64::from(*q) * f64::from(t - z)).sum();
        let kl = sum as f32 / t_sum + shift;
        let logit = logits[target];
        let (max, exps) = nn::exp_sum_in_place(logits);
        *losses = [exps.ln() + max - logit, kl];
        let (hard, soften) = (weight * cross_entropy, weight * divergence * temperature);
        for ((z, p), q) in logits.iter_mut().zip(&soft).zip(&**taught) {
            *z = hard * *z / exps + soften * (p / z_sum - q / t_sum);
        }
        logits[target] -= hard;
    });
    rows.into_iter().map(|row| row.losses).collect()
}
