//! What the processes of a run do together: see [`crate::parallel`]. Of one process alone, all of it is nothing.

use std::path::Path;

use trine_data::Batch;

use super::Trainer;
use crate::checkpoint::{self, Found};
use crate::config::{Objective, require};
use crate::fused::Engine;
use crate::ops::view;
use crate::optimizer::Gradients;
use crate::parallel::{Group, share};
use crate::{Bitnet, RunConfig, TrainError};

/// What the batch of a step holds, over all processes.
#[derive(Clone, Copy)]
pub(super) struct Totals {
    /// Tokens that are to be predicted.
    pub(super) learned: usize,
    /// Tokens of the inputs.
    pub(super) tokens: u64,
}

/// Refuses what several processes do not do.
pub(super) fn check(config: &RunConfig, group: &dyn Group) -> Result<(), TrainError> {
    let size = group.size();
    if size == 1 {
        return Ok(());
    }
    let train = &config.train;
    let together = format!("as {size} processes train together");
    let no = format!("false, {together}");
    require(!train.update_in_backward, "train.update_in_backward", &no, true)?;
    let enough = format!("at least {size}, {together}");
    require(train.batch_size >= size, "train.batch_size", &enough, train.batch_size)?;
    if let Some(finetune) = &config.finetune {
        let others = format!("sft or text, {together}");
        require(finetune.objective != Objective::Dpo, "finetune.objective", &others, "dpo")?;
        let none = format!("no teacher, {together}");
        require(finetune.distill.is_none(), "finetune.distill", &none, "one")?;
    }
    Ok(())
}

/// The checkpoint that all processes go on from: what the first one has found.
pub(super) fn latest_whole(
    group: &dyn Group,
    run_dir: &Path,
    find: impl FnOnce() -> Result<Option<Found>, TrainError>,
) -> Result<Option<Found>, TrainError> {
    let found = if group.leads() { find()? } else { None };
    let step = match &found {
        Some(found) => checkpoint::read_state(&found.path)?.step as u64 + 1,
        None => 0,
    };
    let mut told = step.to_le_bytes();
    group.broadcast(&mut told)?;
    Ok(match u64::from_le_bytes(told) {
        _ if group.leads() => found,
        0 => None,
        step => {
            let path = checkpoint::path_of_step(run_dir, step as usize - 1);
            Some(Found { path, damaged: Vec::new() })
        }
    })
}

/// The configuration of a process of which another one watches the run.
pub(super) fn unwatched(config: &RunConfig) -> RunConfig {
    let mut config = config.clone();
    (config.diagnostics.every, config.diagnostics.tensorboard) = (0, false);
    config.samples.every = 0;
    config
}

impl Trainer {
    /// The processes that train this run.
    pub fn group(&self) -> &dyn Group {
        &*self.group
    }

    /// Counts what the batch of a step holds; `parts` are this process's.
    pub(super) fn totals(&self, parts: &[Batch]) -> Result<Totals, TrainError> {
        let learned: usize = parts.iter().map(Batch::learned).sum();
        let tokens: usize = parts.iter().map(|batch| batch.inputs.len()).sum();
        // Whole numbers are exact in f64 up to 2^53.
        let mut sums = [learned as f64, tokens as f64];
        self.group.sum_f64(&mut sums)?;
        Ok(Totals { learned: sums[0] as usize, tokens: sums[1] as u64 })
    }

    /// The first of a step's sequences that are this process's, and how many.
    pub(super) fn own_sequences(&self, step: usize) -> (u128, usize) {
        let first = self.plan.before(step) + self.state.skipped_sequences;
        let own = share(self.plan.size(step), self.group.rank(), self.group.size());
        (u128::from(first) + own.start as u128, own.len())
    }

    /// As [`Self::forward_backward`], of the parts of all processes; the gradients of a layer are summed while
    /// those of the one below are computed.
    pub(super) fn forward_backward_together(
        &mut self,
        parts: &[Batch],
        totals: Totals,
    ) -> Result<(f64, Gradients), TrainError> {
        let parts: Vec<&Batch> = parts.iter().filter(|batch| batch.learned() > 0).collect();
        let weight = self.weight(totals) as f32;
        let (model, engine, group) = (&self.model, &mut self.engine, &*self.group);
        let (loss, gradients) = match parts[..] {
            [] => (0.0, self.sums.nothing(group, model.trained())?),
            [batch] if Engine::fits(model) && model.adapters().is_none() => {
                let made = self.sums.by_layer(group, model.params(), |stream| {
                    let put = |part: &Gradients| stream.put(part);
                    engine.gradients_by_layer(model, batch, weight, |_| Ok(true), put)
                });
                let (loss, gradients) = made?;
                let share = batch.learned() as f64 / totals.learned as f64;
                (share * f64::from(loss), gradients)
            }
            _ => {
                let (loss, _, gradients) = self.forward_backward(&parts, totals)?;
                self.sums.whole(&*self.group, &gradients)?;
                (loss, gradients)
            }
        };
        let mut loss = [loss];
        self.group.sum_f64(&mut loss)?;
        Ok((loss[0], gradients))
    }

    /// Whether any process wants it.
    pub(super) fn any(&self, wanted: bool) -> Result<bool, TrainError> {
        let mut wanting = [f64::from(u8::from(wanted))];
        self.group.sum_f64(&mut wanting)?;
        Ok(wanting[0] > 0.0)
    }

    /// Makes sure that all processes hold the same parameters, to the bit.
    pub(super) fn check_alike(&self) -> Result<(), TrainError> {
        let (size, step) = (self.group.size(), self.state.step);
        if size == 1 {
            return Ok(());
        }
        let own = fingerprint(&self.model)?;
        let mut of_first = own;
        self.group.broadcast(&mut of_first)?;
        let mut differing = [f64::from(u8::from(own != of_first))];
        self.group.sum_f64(&mut differing)?;
        match differing[0] as usize {
            0 => Ok(()),
            differing => Err(TrainError::Apart { step, differing, size }),
        }
    }
}

/// Tells apart models whose trained parameters differ in a bit.
fn fingerprint(model: &Bitnet) -> Result<[u8; 32], TrainError> {
    let mut hasher = blake3::Hasher::new();
    for (name, var) in model.trained().iter() {
        hasher.update(name.as_bytes());
        hasher.update(bytemuck::cast_slice::<f32, u8>(&view(var)?));
    }
    Ok(hasher.finalize().into())
}
