//! What a pass returns, in memory that serves pass after pass.

use std::ops::{Index, Range};

/// Floats that are kept for a later pass although this one needs fewer: 32 rows of 128 K logits.
const KEPT: usize = 1 << 22;

/// What [`Model::step_into`](crate::Model::step_into) returns: of every step its logits or hidden states, as
/// [`Logits`](crate::Logits) says, none where it asked for none.
///
/// Memory is used again by the next pass: a row of the logits of a large vocabulary is half a megabyte, which
/// the system would give, clear and take back for every token.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    /// Of all steps that asked for logits, one after another.
    logits: Vec<f32>,
    hidden: Vec<f32>,
    steps: Vec<Part>,
    /// Logits of the steps whose logits have been taken up.
    filled: usize,
}

/// Where the outputs of a step are.
#[derive(Clone, Debug)]
enum Part {
    Logits(Range<usize>),
    Hidden(Range<usize>),
}

impl Outputs {
    /// Number of steps.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether there are no steps.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// The outputs of each step.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        (0..self.len()).map(|step| &self[step])
    }

    /// Forgets what there is, and makes room for so many `logits` of each step, or for hidden states where
    /// there is `None`.
    pub(crate) fn begin(&mut self, logits: impl Iterator<Item = Option<usize>>) {
        self.steps.clear();
        self.hidden.clear();
        self.filled = 0;
        let mut at = 0;
        for len in logits {
            self.steps.push(match len {
                Some(len) => Part::Logits(at..at + len),
                None => Part::Hidden(0..0),
            });
            at += len.unwrap_or(0);
        }
        if self.logits.capacity() > KEPT.max(at) {
            self.logits = Vec::new();
        }
        // All of them are written: only what is new has to be cleared.
        self.logits.resize(at, 0.0);
    }

    /// The next `len` logits, to be written.
    pub(crate) fn next_logits(&mut self, len: usize) -> &mut [f32] {
        let from = self.filled;
        self.filled += len;
        &mut self.logits[from..self.filled]
    }

    /// Appends hidden states of a step; those of the steps before it are there.
    pub(crate) fn push_hidden(&mut self, step: usize, hidden: &[f32]) {
        let from = self.hidden.len();
        self.hidden.extend_from_slice(hidden);
        if let Part::Hidden(part) = &mut self.steps[step] {
            *part = if part.end > 0 { part.start } else { from }..self.hidden.len();
        }
    }

    /// The logits of all steps, without a copy.
    pub(crate) fn into_logits(self) -> Vec<f32> {
        self.logits
    }
}

impl Index<usize> for Outputs {
    type Output = [f32];

    /// The outputs of a step.
    ///
    /// # Panics
    /// When there was no such step.
    fn index(&self, step: usize) -> &[f32] {
        match &self.steps[step] {
            Part::Logits(part) => &self.logits[part.clone()],
            Part::Hidden(part) => &self.hidden[part.clone()],
        }
    }
}
