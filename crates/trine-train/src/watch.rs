//! What a run writes beside its losses: diagnostics, samples, TensorBoard event files.

use std::path::Path;

use serde_json::{Value, json};
use trine_data::{Shard, eval_windows};
use trine_tokenizer::Tokenizer;

use crate::diagnostics::{Collector, Diagnostics};
use crate::optimizer::Gradients;
use crate::samples::{Sample, Sampler};
use crate::tensorboard::EventWriter;
use crate::{Bitnet, Params, RunConfig, TrainError};

/// Watches a run from inside: the [`Trainer`](crate::Trainer) calls it around every update.
pub(crate) struct Watch {
    collector: Collector,
    sampler: Sampler,
    events: Option<EventWriter>,
}

/// What was found after an update.
#[derive(Default)]
pub(crate) struct Found {
    pub(crate) diagnostics: Option<Diagnostics>,
    pub(crate) samples: Option<Vec<Sample>>,
}

impl Watch {
    /// As the configuration says. Activations are measured on the beginning of `val`.
    pub(crate) fn new(
        config: &RunConfig,
        model: &Bitnet,
        tokenizer: Tokenizer,
        val: &Shard,
    ) -> Result<Self, TrainError> {
        let probe = eval_windows(val, 1, config.data.seq_len, None)?.next().transpose()?;
        let probe = probe.map(|batch| batch.inputs).unwrap_or_default();
        let positions = model.config().max_position_embeddings;
        // Trits that stay as they are have nothing to watch.
        let every = if model.adapters().is_some() { 0 } else { config.diagnostics.every };
        Ok(Self {
            collector: Collector::new(every, model, &probe)?,
            sampler: Sampler::new(config.samples.clone(), tokenizer, positions, config.seed)?,
            events: None,
        })
    }

    /// Begins an event file where the configuration wants one; the next step is `next_step`.
    pub(crate) fn begin(
        &mut self,
        config: &RunConfig,
        run_dir: &Path,
        next_step: usize,
    ) -> Result<(), TrainError> {
        if config.diagnostics.tensorboard && self.events.is_none() {
            self.events = Some(EventWriter::create(&run_dir.join("tensorboard"), next_step)?);
        }
        Ok(())
    }

    /// Whether it looks at the model around the update that makes `step` of `steps`.
    pub(crate) fn is_due(&self, step: usize, steps: usize) -> bool {
        self.collector.is_due(step) || self.sampler.is_due(step, steps)
    }

    /// To be called before the update that makes `step`.
    pub(crate) fn before_update(
        &mut self,
        step: usize,
        params: &Params,
        gradients: &Gradients,
    ) -> Result<(), TrainError> {
        self.collector.before_update(step, params, gradients)
    }

    /// To be called after the update that made `step` of `steps`.
    pub(crate) fn after_update(
        &mut self,
        step: usize,
        steps: usize,
        model: &Bitnet,
    ) -> Result<Found, TrainError> {
        Ok(Found {
            diagnostics: self.collector.after_update(step, model)?,
            samples: match self.sampler.is_due(step, steps) {
                true => Some(self.sampler.write(model)?),
                false => None,
            },
        })
    }

    /// Sees every line of `metrics.jsonl`.
    pub(crate) fn log(&mut self, line: &Value) -> Result<(), TrainError> {
        self.events.as_mut().map_or(Ok(()), |events| events.log(line))
    }
}

impl Found {
    /// The lines of `metrics.jsonl` that say it.
    pub(crate) fn lines(&self, step: usize) -> Vec<Value> {
        let diagnostics = self.diagnostics.as_ref();
        let samples = self.samples.as_ref();
        let lines = [
            diagnostics.map(|found| json!({ "step": step, "diagnostics": found })),
            samples.map(|written| json!({ "step": step, "samples": written })),
        ];
        lines.into_iter().flatten().collect()
    }
}
