//! The end of a network that learns from another one: cross entropy, and the divergence from what a
//! teacher says (Hinton et al. 2015, arXiv 1503.02531; BitDistill, arXiv 2510.13998, section 3.3).
//!
//! ```text
//! loss = ce CE(z, y) + kl T^2 KL(softmax(t / T) || softmax(z / T))
//! ```
//!
//! with logits `z` of the student and `t` of the teacher. `T^2` keeps the size of gradients when the
//! temperature changes. Logits of both exist for some rows at a time. What a teacher says may also be
//! known already, as the [`Likeliest`] ids of every row. Besides, a layer may learn [`Relations`].

use candle_core::Result;
use trine_data::Batch;
use trine_format::names;
use trine_kernels::gemm::{Matrix, Store};
use trine_kernels::{nn, parallel};

use super::head::{Targets, head_name, norm, norm_backward, normed_rows};
use super::learned::{Learned, gather};
use super::products::Products;
use super::relations::States;
use super::{Buffer, Engine, Found, Likeliest, Pass, Relations};
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
    /// What the relations of tokens to each other count for, if anything.
    pub relations: Option<Relations>,
}

/// How far a student is from its teacher, in nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergences {
    /// Mean over the tokens that are to be predicted.
    pub tokens: f32,
    /// Of [`Relations`], where these are learned.
    pub relations: Option<f32>,
}

impl Divergences {
    pub(crate) fn scaled(self, by: f32) -> Self {
        Self { tokens: by * self.tokens, relations: self.relations.map(|r| by * r) }
    }

    /// The sum with others of the same kind, if there are any.
    pub(crate) fn plus(self, other: Option<Self>) -> Self {
        let Some(other) = other else { return self };
        let relations = self.relations.zip(other.relations).map(|(a, b)| a + b);
        Self { tokens: self.tokens + other.tokens, relations }
    }
}

/// Who says what a teacher says.
pub enum Says<'a> {
    /// The teacher, everything.
    Teacher(&'a mut Teacher),
    /// Of each target that is to be predicted, in their order, at the temperature of the distillation.
    Likeliest(&'a Likeliest),
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

    /// What it says of the targets of a batch that are to be predicted: their `count` likeliest ids, with
    /// logits divided by `temperature`.
    ///
    /// # Errors
    /// As [`Engine::gradients`], and more ids than there are.
    pub fn likeliest(
        &mut self,
        batch: &Batch,
        temperature: f32,
        count: usize,
    ) -> Result<Likeliest> {
        self.look(batch, &Learned::of(batch)?)?;
        let config = self.model.config();
        let (vocab, width) = (config.vocab_size, config.hidden_size);
        if count > vocab {
            candle_core::bail!("{count} likeliest ids of a vocabulary of {vocab}");
        }
        let (mut normed, mut logits) = (Buffer::default(), Buffer::default());
        let mut found = Likeliest::new(count);
        for x in self.rows.chunks(chunk_rows(vocab) * width) {
            let to = [&mut normed, &mut logits];
            Chunk::logits(&self.model, &mut self.engine.products, x, to)?;
            logits.iter_mut().for_each(|logit| *logit /= temperature);
            found.push(&mut logits, vocab);
        }
        Ok(found)
    }

    /// Runs the layers over a batch and keeps what predicts something.
    fn look(&mut self, batch: &Batch, rows: &Learned<'_>) -> Result<()> {
        self.engine.forward(&self.model, batch, Pass::Evaluation)?;
        let config = self.model.config();
        let at: Vec<usize> = rows.positions().collect();
        let x = &self.engine.inputs[config.num_hidden_layers % 2];
        gather(&at, config.hidden_size, x, &mut self.rows);
        Ok(())
    }
}

impl Says<'_> {
    /// Prepares for the end of the student; returns the states that its relations are learned from.
    pub(super) fn look(
        &mut self,
        student: &Bitnet,
        batch: &Batch,
        rows: &Learned<'_>,
        options: Distillation,
    ) -> Result<Option<States>> {
        let teacher = match self {
            Self::Teacher(teacher) => teacher,
            Self::Likeliest(known) => {
                let (found, expected) = (known.rows(), rows.ids.len());
                if found != expected {
                    candle_core::bail!("a teacher that knows {found} tokens, expected {expected}");
                }
                if options.relations.is_some() {
                    candle_core::bail!("relations are learned from the teacher itself");
                }
                return Ok(None);
            }
        };
        let (found, expected) = (teacher.model.config().vocab_size, student.config().vocab_size);
        if found != expected {
            candle_core::bail!("a teacher of {found} ids, expected {expected}");
        }
        let watched = options.relations.map(|relations| relations.teacher_layer);
        teacher.engine.watched = watched.map(|layer| (layer, States::default()));
        teacher.look(batch, rows)?;
        Ok(teacher.engine.watched.take().map(|(_, states)| states))
    }
}

/// Rows whose logits exist at a time.
fn chunk_rows(vocab: usize) -> usize {
    (LOGITS / vocab).max(16)
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
        mut says: Says<'_>,
        options: Distillation,
        x: &mut [f32],
        targets: Targets<'_>,
        found: &mut Found<'_>,
    ) -> Result<Vec<[f32; 2]>> {
        let (width, vocab) = (model.config().hidden_size, model.config().vocab_size);
        let (name, eps) = (head_name(model), model.config().rms_norm_eps);
        let rows = chunk_rows(vocab);
        let (mut dnorm, mut losses) = (vec![0.0; width], Vec::new());
        let chunks = x.chunks_mut(rows * width).zip(targets.chunks(rows));
        for (chunk, (x, targets)) in chunks.enumerate() {
            let n = targets.ids.len();
            let Self { normed, dnormed, logits, taught } = self;
            let taught = match &mut says {
                Says::Likeliest(known) => Taught::Likeliest(known, chunk * rows),
                Says::Teacher(Teacher { model, engine, rows: taught_x }) => {
                    let width = model.config().hidden_size;
                    let taught_x = &taught_x[chunk * rows * width..][..n * width];
                    let to = [&mut *normed, &mut *taught];
                    Self::logits(model, &mut engine.products, taught_x, to)?;
                    Taught::Logits(taught)
                }
            };
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

/// What is said of a chunk of rows.
enum Taught<'a> {
    /// Logits `(n, V)`, which are spent.
    Logits(&'a mut [f32]),
    /// Rows of these, from one on.
    Likeliest(&'a Likeliest, usize),
}

/// Cross entropies and divergences of logits `(n, V)`, which become gradients.
fn slopes(
    logits: &mut [f32],
    taught: Taught<'_>,
    vocab: usize,
    options: Distillation,
    targets: Targets<'_>,
) -> Vec<[f32; 2]> {
    struct Row<'a> {
        logits: &'a mut [f32],
        /// Of the teacher, where it has some.
        taught: &'a mut [f32],
        losses: [f32; 2],
    }
    let Distillation { temperature, cross_entropy, divergence, .. } = options;
    let (taught, known) = match taught {
        Taught::Logits(taught) => (taught, None),
        Taught::Likeliest(known, first) => (&mut [][..], Some((known, first))),
    };
    let rows = logits.chunks_exact_mut(vocab);
    let mut taught = taught.chunks_exact_mut(vocab);
    let mut rows: Vec<_> = rows
        .map(|logits| Row { logits, taught: taught.next().unwrap_or_default(), losses: [0.0; 2] })
        .collect();
    parallel::for_each(&mut rows, |at, Row { logits, taught, losses }| {
        let (target, weight) = (targets.ids[at] as usize, targets.weights[at]);
        let mut soft: Vec<f32> = logits.iter().map(|z| z / temperature).collect();
        let kl = match known {
            None => {
                taught.iter_mut().for_each(|t| *t /= temperature);
                slope(&mut soft, taught)
            }
            Some((known, first)) => {
                let (_, sum) = nn::exp_sum_in_place(&mut soft);
                known.slope(first + at, &mut soft, sum)
            }
        };
        let logit = logits[target];
        let (max, exps) = nn::exp_sum_in_place(logits);
        *losses = [exps.ln() + max - logit, kl];
        let (hard, soften) = (weight * cross_entropy, weight * divergence * temperature);
        for (z, slope) in logits.iter_mut().zip(&soft) {
            *z = hard * *z / exps + soften * slope;
        }
        logits[target] -= hard;
    });
    rows.into_iter().map(|row| row.losses).collect()
}

/// The divergence in nats of softmax(`own`) from softmax(`taught`); `own` becomes its gradient, and `taught`
/// is spent.
pub(super) fn slope(own: &mut [f32], taught: &mut [f32]) -> f32 {
    // KL = sum q (ln q - ln p), with logarithms from the logits themselves.
    let (z, t) = (own.to_vec(), taught.to_vec());
    let (z_max, z_sum) = nn::exp_sum_in_place(own);
    let (t_max, t_sum) = nn::exp_sum_in_place(taught);
    let shift = (z_sum.ln() + z_max) - (t_sum.ln() + t_max);
    let terms = taught.iter().zip(t.iter().zip(&z));
    let sum: f64 = terms.map(|(q, (t, z))| f64::from(*q) * f64::from(t - z)).sum();
    for (p, q) in own.iter_mut().zip(&*taught) {
        *p = *p / z_sum - q / t_sum;
    }
    sum as f32 / t_sum + shift
}
