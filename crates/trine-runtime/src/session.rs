//! One sequence on a model, for those who need no more.

use std::sync::Arc;

use crate::forward::{Logits, Step};
use crate::outputs::Outputs;
use crate::sequence::Sequence;
use crate::{Adapter, Model, RuntimeError};

/// One sequence on a model: what it has seen is in its cache.
pub struct Session<'m> {
    model: &'m Model,
    sequence: Sequence,
    /// Of the last pass.
    outputs: Outputs,
}

impl<'m> Session<'m> {
    /// An empty sequence.
    pub fn new(model: &'m Model) -> Self {
        Self::with_adapter(model, None)
    }

    /// An empty sequence beside an adapter, if there is one; an adapter of another model is refused with
    /// the first ids.
    pub fn with_adapter(model: &'m Model, adapter: Option<Arc<Adapter>>) -> Self {
        Self {
            model,
            sequence: Sequence::with_adapter(model, adapter),
            outputs: Outputs::default(),
        }
    }

    /// Number of positions seen.
    pub fn position(&self) -> usize {
        self.sequence.positions()
    }

    /// Most positions that the model can hold.
    pub fn limit(&self) -> usize {
        self.model.config.max_position_embeddings
    }

    /// Forgets all but the first `positions` positions.
    pub fn truncate(&mut self, positions: usize) {
        self.sequence.truncate(positions);
    }

    /// Appends `ids` to the sequence and returns the logits `(V,)` after the last of them.
    ///
    /// # Errors
    /// No ids, an id outside the vocabulary, a full context; the sequence is then as before.
    pub fn prefill(&mut self, ids: &[u32]) -> Result<Vec<f32>, RuntimeError> {
        self.logits(ids, Logits::Last)
    }

    /// Appends one id and returns the logits `(V,)` after it.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn decode(&mut self, id: u32) -> Result<Vec<f32>, RuntimeError> {
        self.prefill(&[id])
    }

    /// Appends `ids` and returns the logits `(T, V)` after each of them.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn logits_of_all(&mut self, ids: &[u32]) -> Result<Vec<f32>, RuntimeError> {
        self.logits(ids, Logits::All)
    }

    /// Appends `ids`; what was asked for are then [`Self::outputs`].
    pub(crate) fn append(&mut self, ids: &[u32], logits: Logits) -> Result<(), RuntimeError> {
        let sequence = &mut self.sequence;
        self.model.step_into(&mut [Step { sequence, ids, logits }], &mut self.outputs)
    }

    /// What the last [`Self::append`] asked for.
    pub(crate) fn outputs(&self) -> &[f32] {
        &self.outputs[0]
    }

    fn logits(&mut self, ids: &[u32], logits: Logits) -> Result<Vec<f32>, RuntimeError> {
        self.append(ids, logits)?;
        Ok(std::mem::take(&mut self.outputs).into_logits())
    }
}
