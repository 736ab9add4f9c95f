//! One step: a batch in parts, a judgement, then an update, or what the policy for spikes says.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::{Value, json};
use trine_data::Batch;

use super::together::Totals;
use super::{Observer, StepReport, Trainer, preferences, tensors};
use crate::checkpoint::{self, TrainerState};
use crate::config::{Reduction, SpikePolicy};
use crate::fused::{Divergences, Engine};
use crate::optimizer::{self, Gradients};
use crate::schedule::{self, Rates};
use crate::stability::{self, Action, Anomaly};
use crate::{Bitnet, TrainError};

/// The mean loss of a batch, and the gradients of the sum of its tokens' losses times `weight`, by Candle's
/// graph, which computes any network.
fn by_graph(model: &Bitnet, batch: &Batch, weight: f64) -> Result<(f32, Gradients), TrainError> {
    let (inputs, targets) = tensors(batch)?;
    let loss = model.loss_within(&inputs, &targets, batch.starts.as_deref())?;
    let weighted = (&loss * (weight * batch.learned() as f64))?;
    let gradients = optimizer::collect(model.trained(), &mut weighted.backward()?)?;
    Ok((loss.to_scalar()?, gradients))
}

/// An update that was made.
struct Update {
    begin: Instant,
    loss: f32,
    grad_norm: f64,
    rates: Rates,
    /// What else there is to log.
    besides: Value,
}

impl Trainer {
    /// Makes one step. `false` when the run went back instead.
    pub(super) fn step(&mut self, observer: &mut dyn Observer) -> Result<bool, TrainError> {
        let begin = Instant::now();
        let step = self.state.step;
        let parts = self.parts(step)?;
        let totals = self.totals(&parts)?;
        if self.card.is_some() {
            return self.step_on_card(begin, &parts, totals, observer);
        }
        if self.config.train.update_in_backward {
            return self.step_in_backward(begin, &parts, totals, observer);
        }
        let beta = preferences::beta(self.config.finetune.as_ref());
        let (loss, besides, gradients) = match beta {
            Some(beta) => {
                let (found, gradients) = self.preference_step(&parts, beta)?;
                let besides = json!({ "accuracy": found.accuracy, "margin": found.margin });
                (found.loss as f32, besides, gradients)
            }
            None if self.group.size() > 1 => {
                let (loss, gradients) = self.forward_backward_together(&parts, totals)?;
                (loss as f32, json!({}), gradients)
            }
            None => {
                let parts: Vec<&Batch> = parts.iter().collect();
                let (loss, divergences, gradients) = self.forward_backward(&parts, totals)?;
                let mut besides = json!({});
                if let Some(Divergences { tokens, relations }) = divergences {
                    besides["divergence"] = json!(tokens);
                    if let Some(relations) = relations {
                        besides["relations_divergence"] = json!(relations);
                    }
                }
                (loss as f32, besides, gradients)
            }
        };
        let grad_norm = optimizer::global_norm(&gradients)?;
        let train = &self.config.train;
        if let Some(what) = stability::judge(&self.state.recent_losses, loss, grad_norm, train) {
            return self.anomaly(loss, what, &optimizer::norms(&gradients)?, observer);
        }
        let rates = self.rates();
        observer.before_update(step + 1, &self.model, &gradients);
        self.watch.before_update(step + 1, self.model.params(), &gradients)?;
        self.optimizer.update(self.model.trained(), &gradients, grad_norm, rates)?;
        self.made(Update { begin, loss, grad_norm, rates, besides }, totals, observer)?;
        Ok(true)
    }

    /// A step whose gradients exist one layer at a time: see `train.update_in_backward`.
    fn step_in_backward(
        &mut self,
        begin: Instant,
        parts: &[Batch],
        totals: Totals,
        observer: &mut dyn Observer,
    ) -> Result<bool, TrainError> {
        let (step, rates) = (self.state.step + 1, self.rates());
        let (weight, none) = (self.weight(totals), Gradients::new());
        let [batch] = parts else { unreachable!("checked with the configuration") };
        observer.before_update(step, &self.model, &none);
        self.watch.before_update(step, self.model.params(), &none)?;
        let (state, train) = (&self.state, &self.config.train);
        let (model, optimizer) = (&self.model, &mut self.optimizer);
        let (mut spike, mut squares, mut begun) = (None, 0.0, false);
        let loss = self.engine.gradients_by_layer(
            model,
            batch,
            weight as f32,
            |loss| {
                spike = stability::judge(&state.recent_losses, loss, 0.0, train);
                Ok(spike.is_none())
            },
            |part| {
                let norm = optimizer::global_norm(part)?;
                if !norm.is_finite() {
                    let of = part.keys().next().map_or("", String::as_str);
                    let what = format!("the gradient of {of} and those beside it have norm {norm}");
                    return Err(TrainError::Diverged { step, what });
                }
                squares += norm * norm;
                if !std::mem::replace(&mut begun, true) {
                    optimizer.begin();
                }
                optimizer.part(model.params(), part, 1.0, rates)
            },
        )?;
        if let Some(what) = spike {
            return self.anomaly(loss, what, &BTreeMap::new(), observer);
        }
        let besides = json!({});
        let grad_norm = squares.sqrt();
        self.made(Update { begin, loss, grad_norm, rates, besides }, totals, observer)?;
        Ok(true)
    }

    /// A step that a device computes: what is looked at on the way is fetched for it.
    fn step_on_card(
        &mut self,
        begin: Instant,
        parts: &[Batch],
        totals: Totals,
        observer: &mut dyn Observer,
    ) -> Result<bool, TrainError> {
        let (step, steps) = (self.state.step + 1, self.config.train.steps);
        let (weight, rates, is_due) =
            (self.weight(totals), self.rates(), self.watch.is_due(step, steps));
        let Some(card) = &mut self.card else { unreachable!("asked about by the caller") };
        let loss =
            (card.forward_backward(&self.model, parts, weight)? / totals.learned as f64) as f32;
        let norms = card.norms()?;
        let grad_norm = norms.values().map(|norm| norm * norm).sum::<f64>().sqrt();
        let train = &self.config.train;
        if let Some(what) = stability::judge(&self.state.recent_losses, loss, grad_norm, train) {
            return self.anomaly(loss, what, &norms, observer);
        }
        let mut gradients = Gradients::new();
        if is_due {
            card.fetch(&mut self.model)?;
            gradients = card.gradients(&self.model)?;
        }
        observer.before_update(step, &self.model, &gradients);
        self.watch.before_update(step, self.model.params(), &gradients)?;
        card.update(&mut self.optimizer, grad_norm, rates)?;
        if is_due {
            card.fetch(&mut self.model)?;
        }
        let besides = json!({});
        self.made(Update { begin, loss, grad_norm, rates, besides }, totals, observer)?;
        Ok(true)
    }

    /// The rates of the step that is to be made.
    fn rates(&self) -> Rates {
        let (step, steps) = (self.state.step, self.config.train.steps);
        schedule::rates(&self.config.optimizer, &self.config.schedule, step, steps)
    }

    /// What the loss of each token of a step counts for.
    pub(super) fn weight(&self, totals: Totals) -> f64 {
        match self.config.finetune.as_ref().map_or(Reduction::Mean, |f| f.loss) {
            Reduction::Mean => 1.0 / totals.learned as f64,
            Reduction::Sum => 1.0,
        }
    }

    /// Says, and remembers, that an update was made.
    fn made(
        &mut self,
        update: Update,
        totals: Totals,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let Update { begin, loss, grad_norm, rates, besides } = update;
        let (step, steps) = (self.state.step, self.config.train.steps);
        let tokens = totals.tokens;
        observer.after_update(step + 1, &self.model);
        let batch_size = self.plan.size(step);
        self.state.step += 1;
        self.model.set_step(self.state.step);
        self.state.updates = self.optimizer.updates();
        self.state.tokens += tokens;
        self.state.skips = 0;
        self.remember(loss);
        let report = StepReport {
            step: self.state.step,
            steps,
            loss,
            learning_rate: rates.learning_rate,
            grad_norm,
            batch_size,
            tokens: self.state.tokens,
            tokens_per_second: tokens as f64 / begin.elapsed().as_secs_f64(),
        };
        let mut line = json!({
            "step": report.step,
            "loss": report.loss,
            "learning_rate": report.learning_rate,
            "grad_norm": report.grad_norm,
            "batch_size": report.batch_size,
            "tokens": report.tokens,
            "tokens_per_second": report.tokens_per_second.round(),
        });
        if let (Some(line), Value::Object(besides)) = (line.as_object_mut(), besides) {
            line.extend(besides);
        }
        self.log(&line)?;
        observer.on_step(&report);
        self.look(observer)
    }

    /// Diagnostics and samples, where it is time for them.
    fn look(&mut self, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let (step, steps) = (self.state.step, self.config.train.steps);
        let found = self.watch.after_update(step, steps, &self.model)?;
        for line in found.lines(step) {
            self.log(&line)?;
        }
        if let Some(diagnostics) = &found.diagnostics {
            observer.on_diagnostics(step, diagnostics);
        }
        if let Some(samples) = &found.samples {
            observer.on_samples(step, samples);
        }
        Ok(())
    }

    /// The parts of a step's batch, of which this process has its share.
    fn parts(&self, step: usize) -> Result<Vec<Batch>, TrainError> {
        let (mut first, own) = self.own_sequences(step);
        let mut parts = Vec::new();
        for part in self.plan.parts_of(own) {
            parts.push(self.batches.sequences(first, part)?);
            first += part as u128;
        }
        Ok(parts)
    }

    /// Of the tokens of a step's batch that are to be predicted: the mean loss in nats, how far they are from
    /// a teacher where there is one, and the gradients that `finetune.loss` asks for. Where `parts` are not
    /// all of the batch, what they contribute to these.
    pub(super) fn forward_backward(
        &mut self,
        parts: &[&Batch],
        totals: Totals,
    ) -> Result<(f64, Option<Divergences>, Gradients), TrainError> {
        let weight = self.weight(totals);
        let (mut total, mut diverged, mut sum) = (0.0, None, Gradients::new());
        for batch in parts {
            let (model, engine) = (&self.model, &mut self.engine);
            let (loss, divergences, gradients) = match &mut self.teaching {
                Some(teaching) => {
                    let (loss, far, found) =
                        teaching.gradients(engine, model, batch, weight as f32)?;
                    (loss, Some(far), found)
                }
                None => {
                    let (loss, found) = match Engine::fits(model) {
                        true => engine.weighted_gradients(model, batch, weight as f32)?,
                        false => by_graph(model, batch, weight)?,
                    };
                    (loss, None, found)
                }
            };
            let share = batch.learned() as f64 / totals.learned as f64;
            total += share * f64::from(loss);
            if let Some(far) = divergences {
                diverged = Some(far.scaled(share as f32).plus(diverged));
            }
            if parts.len() == 1 {
                sum = gradients;
            } else {
                optimizer::accumulate(&mut sum, gradients, 1.0)?;
            }
        }
        Ok((total, diverged, sum))
    }

    fn remember(&mut self, loss: f32) {
        let window = self.config.train.spike_window;
        stability::remember(&mut self.state.recent_losses, loss, window);
    }

    /// Does with a batch that must not be learned from what `train.on_spike` says.
    fn anomaly(
        &mut self,
        loss: f32,
        what: String,
        norms: &BTreeMap<String, f64>,
        observer: &mut dyn Observer,
    ) -> Result<bool, TrainError> {
        let (parameter, norm) = stability::culprit(&self.model, norms);
        let what = match norms.is_empty() {
            true => what,
            false => format!("{what}; the gradient of {parameter} has a norm of {norm:.3e}"),
        };
        let (step, limit) = (self.state.step + 1, self.config.train.spike_limit);
        let diverged = |what: String| Err(TrainError::Diverged { step, what });
        let action = match self.config.train.on_spike {
            SpikePolicy::Stop => return diverged(what),
            SpikePolicy::Skip if self.state.skips >= limit => {
                return diverged(format!("{what}, after {limit} batches skipped in a row"));
            }
            SpikePolicy::Rewind if self.state.rewinds >= limit => {
                return diverged(format!("{what}, after {limit} rewinds to the last checkpoint"));
            }
            SpikePolicy::Skip => {
                self.state.step = step;
                self.model.set_step(step);
                self.state.skips += 1;
                self.remember(loss);
                self.log(&json!({
                    "step": step, "event": "skip", "what": what, "parameter": parameter,
                }))?;
                Action::Skipped
            }
            SpikePolicy::Rewind => {
                let to = self.rewind()?;
                self.log(&json!({
                    "step": to, "event": "rewind", "from": step, "what": what,
                    "parameter": parameter,
                }))?;
                Action::Rewound { to }
            }
        };
        observer.on_anomaly(&Anomaly { step, loss, what, parameter, action });
        Ok(action == Action::Skipped)
    }

    /// Goes back to the last checkpoint and moves the data beyond the batch that is at fault.
    /// Returns the checkpoint's step.
    fn rewind(&mut self) -> Result<usize, TrainError> {
        let (model, optimizer, state) = match &self.last_checkpoint {
            Some(path) => {
                checkpoint::verify(path)?;
                self.start.load(&self.config, path)?
            }
            None => {
                let (model, optimizer) = self.start.fresh(&self.config)?;
                (model, optimizer, TrainerState::default())
            }
        };
        let next = self.plan.before(self.state.step + 1) + self.state.skipped_sequences;
        let rewinds = self.state.rewinds + 1;
        if let Some(card) = &mut self.card {
            card.put(&model, &optimizer)?;
        }
        (self.model, self.optimizer, self.state) = (model, optimizer, state);
        self.state.skipped_sequences = next - self.plan.before(self.state.step);
        self.state.rewinds = rewinds;
        self.metrics.forget(self.state.step, |_| false)?;
        Ok(self.state.step)
    }
}
