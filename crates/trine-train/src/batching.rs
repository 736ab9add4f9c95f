//! How many sequences each step takes: a pure function of the step, so that a resumed run knows how
//! far the data is without having counted.

use crate::config::TrainConfig;

/// The sizes of the batches of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchPlan {
    /// Sequences of a full batch.
    size: usize,
    /// Sequences of the first batch.
    start: usize,
    /// Steps in which the batch grows.
    warmup: usize,
    /// Most sequences that go through the model at once.
    part: usize,
}

impl BatchPlan {
    /// The plan of `[train]`.
    pub fn new(train: &TrainConfig) -> Self {
        Self {
            size: train.batch_size,
            start: train.batch_start.min(train.batch_size),
            warmup: train.batch_warmup_steps,
            part: train.batch_size.div_ceil(train.accumulate),
        }
    }

    /// Sequences of a step's batch.
    pub fn size(&self, step: usize) -> usize {
        if step >= self.warmup {
            return self.size;
        }
        let grown = (self.size - self.start) as u128 * step as u128 / self.warmup as u128;
        self.start + grown as usize
    }

    /// Sequences that all steps before `step` take together.
    pub fn before(&self, step: usize) -> u64 {
        let growing: u64 = (0..step.min(self.warmup)).map(|step| self.size(step) as u64).sum();
        growing + step.saturating_sub(self.warmup) as u64 * self.size as u64
    }

    /// The sizes of the parts in which a step's batch goes through the model. They differ by one
    /// sequence at most.
    pub fn parts(&self, step: usize) -> impl Iterator<Item = usize> + use<> {
        self.parts_of(self.size(step))
    }

    /// The sizes of the parts in which so many sequences go through the model.
    pub fn parts_of(&self, size: usize) -> impl Iterator<Item = usize> + use<> {
        let parts = size.div_ceil(self.part);
        (0..parts).map(move |i| (i + 1) * size / parts - i * size / parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(batch_size: usize, accumulate: usize, warmup: usize, start: usize) -> BatchPlan {
        BatchPlan::new(&TrainConfig {
            batch_size,
            accumulate,
            batch_warmup_steps: warmup,
            batch_start: start,
            ..TrainConfig::default()
        })
    }

    #[test]
    fn batches_grow_evenly_and_what_came_before_is_their_sum() {
        let plan = plan(16, 1, 7, 2);
        assert_eq!((plan.size(0), plan.size(7), plan.size(100)), (2, 16, 16));
        let mut sum = 0;
        for step in 0..20 {
            assert_eq!(plan.before(step), sum);
            assert!(plan.size(step + 1) >= plan.size(step));
            sum += plan.size(step) as u64;
        }
    }

    #[test]
    fn parts_are_a_whole_batch_and_none_is_larger_than_its_share() {
        for (size, accumulate) in [(16, 4), (13, 4), (5, 5), (7, 1)] {
            let plan = plan(size, accumulate, 6, 1);
            for step in 0..8 {
                let parts: Vec<usize> = plan.parts(step).collect();
                assert_eq!(parts.iter().sum::<usize>(), plan.size(step));
                assert!(parts.iter().all(|n| (1..=size.div_ceil(accumulate)).contains(n)));
            }
        }
    }
}
