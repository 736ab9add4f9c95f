//! Steps and validations of preferences: see [`preference`].

use trine_data::Batch;

use super::Trainer;
use crate::TrainError;
use crate::config::{FinetuneConfig, Objective};
use crate::optimizer::{self, Gradients};
use crate::preference::{self, Preferences};

/// How strongly a run holds to the model that it began with, if preferences are what it learns.
pub(super) fn beta(finetune: Option<&FinetuneConfig>) -> Option<f64> {
    finetune.filter(|f| f.objective == Objective::Dpo).map(|f| f.beta)
}

impl Trainer {
    /// What the preferences of a step say, and the gradients of their mean loss.
    pub(super) fn preference_step(
        &mut self,
        parts: &[Batch],
        beta: f64,
    ) -> Result<(Preferences, Gradients), TrainError> {
        let pairs: usize = parts.iter().map(|batch| batch.batch / 2).sum();
        let (mut total, mut sum) = (Preferences::default(), Gradients::new());
        for batch in parts {
            let reference = self.reference_of(batch)?;
            let mut found = Preferences::default();
            let gradients = self.engine.sequence_gradients(&self.model, batch, |now| {
                found = Preferences::of(now, &reference, beta);
                let weights = preference::weights(now, &reference, beta);
                weights.into_iter().map(|weight| weight / pairs as f64).collect()
            })?;
            total = total.plus(found, (batch.batch / 2) as f64 / pairs as f64);
            if parts.len() == 1 {
                return Ok((total, gradients));
            }
            optimizer::accumulate(&mut sum, gradients, 1.0)?;
        }
        Ok((total, sum))
    }

    /// What the held-out preferences say.
    pub(super) fn validate_preferences(&mut self, beta: f64) -> Result<Preferences, TrainError> {
        let (mut total, mut pairs) = (Preferences::default(), 0.0);
        let batches: Result<Vec<_>, _> = self.validation_batches()?.collect();
        for batch in batches? {
            let reference = self.reference_of(&batch)?;
            let now = self.engine.log_probabilities(&self.model, &batch, true)?;
            let n = (batch.batch / 2) as f64;
            total = total.plus(Preferences::of(&now, &reference, beta), n);
            pairs += n;
        }
        Ok(Preferences::default().plus(total, 1.0 / pairs))
    }

    /// Log-probabilities of sequences by the model that the run began with: the one in training without
    /// its adapters, or a packed one beside it.
    fn reference_of(&mut self, batch: &Batch) -> Result<Vec<f64>, TrainError> {
        Ok(match &self.reference {
            None => self.engine.log_probabilities(&self.model, batch, false)?,
            Some(reference) => self.engine.log_probabilities(reference, batch, true)?,
        })
    }
}
