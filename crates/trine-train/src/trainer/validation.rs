//! What a run says of text that it does not learn from.

use serde_json::json;
use trine_data::{Batch, DataError, Shard, eval_windows};

use super::{Observer, Trainer, preferences, tensors};
use crate::TrainError;
use crate::card::Card;
use crate::fused::Engine;

impl Trainer {
    /// Validates, and says whether the result is worth a checkpoint.
    pub(super) fn validated(&mut self, observer: &mut dyn Observer) -> Result<bool, TrainError> {
        let step = self.state.step;
        let mut line = json!({ "step": step });
        let (loss, sources) = match preferences::beta(self.config.finetune.as_ref()) {
            Some(beta) => {
                let found = self.validate_preferences(beta)?;
                line["val_accuracy"] = found.accuracy.into();
                line["val_margin"] = found.margin.into();
                (found.loss as f32, Vec::new())
            }
            None => self.validate_sources()?,
        };
        self.state.validation = Some((step, loss));
        line["val_loss"] = loss.into();
        if sources.len() > 1 {
            line["val_losses"] = json!(sources);
        }
        self.log(&line)?;
        observer.on_validation(step, loss);
        let better = self.state.best.is_none_or(|(_, best)| loss < best);
        if better {
            self.state.best = Some((step, loss));
        }
        Ok(better && self.config.train.keep_best)
    }

    /// The held-out text in windows that do not overlap, as [`Self::validate`] reads it: that of
    /// one source after the other.
    ///
    /// # Errors
    /// A held-out text that is shorter than one window.
    pub fn validation_batches(
        &self,
    ) -> Result<impl Iterator<Item = Result<Batch, DataError>> + '_, TrainError> {
        let sources: Result<Vec<_>, _> =
            self.val.iter().map(|val| self.validation_batches_of(val)).collect();
        Ok(sources?.into_iter().flatten())
    }

    fn validation_batches_of<'a>(
        &'a self,
        val: &'a Shard,
    ) -> Result<impl Iterator<Item = Result<Batch, DataError>> + 'a, TrainError> {
        let (seq_len, batch) = (self.config.data.seq_len, self.config.train.batch_size);
        // A row may hold two sequences.
        let sequences = val.row().map_or(1, |row| row / (seq_len + 1));
        let limit = match self.config.train.eval_tokens {
            0 => usize::MAX,
            // Sources have equal parts of a validation.
            tokens => (tokens / (sequences * seq_len * batch) / self.val.len()).max(1),
        };
        Ok(eval_windows(val, batch, seq_len, self.boundaries)?.take(limit))
    }

    /// Mean cross entropy in nats over the held-out text.
    ///
    /// # Errors
    /// Ids outside the vocabulary.
    pub fn validate(&mut self) -> Result<f32, TrainError> {
        Ok(self.validate_sources()?.0)
    }

    /// As [`Self::validate`], and the mean of each source, in their order.
    ///
    /// # Errors
    /// Ids outside the vocabulary.
    pub fn validate_sources(&mut self) -> Result<(f32, Vec<f32>), TrainError> {
        // Options are resolved already.
        let unused = Engine::new(self.engine.options(), true);
        let mut engine = std::mem::replace(&mut self.engine, unused);
        let mut card = self.card.take();
        let losses = self.losses(&mut engine, card.as_mut());
        (self.engine, self.card) = (engine, card);
        losses
    }

    fn losses(
        &self,
        engine: &mut Engine,
        mut card: Option<&mut Card>,
    ) -> Result<(f32, Vec<f32>), TrainError> {
        let (mut total, mut tokens, mut means) = (0.0, 0.0, Vec::new());
        for val in &self.val {
            let (mut sum, mut count) = (0.0, 0);
            // Each process has one in `size` batches.
            let (rank, size) = (self.group.rank(), self.group.size());
            for batch in self.validation_batches_of(val)?.skip(rank).step_by(size) {
                let batch = batch?;
                let loss = if let Some(card) = &mut card {
                    card.evaluate(&batch)?
                } else if Engine::fits(&self.model) {
                    engine.evaluate(&self.model, &batch)?
                } else {
                    let (inputs, targets) = tensors(&batch)?;
                    let starts = batch.starts.as_deref();
                    self.model.evaluate(&inputs, &targets, starts)?.to_scalar::<f32>()?
                };
                sum += f64::from(loss) * batch.learned() as f64;
                count += batch.learned();
            }
            let mut sums = [sum, count as f64];
            self.group.sum_f64(&mut sums)?;
            let [sum, count] = sums;
            (total, tokens) = (total + sum, tokens + count);
            means.push((sum / count) as f32);
        }
        Ok(((total / tokens) as f32, means))
    }
}
