//! A checkpoint on a GPU: `trine eval --device cuda`.

use anyhow::Context;
use trine_cuda::{CudaError, Engine};
use trine_data::{Batch, IGNORED};
use trine_eval::{Continuation, EvalError, Item, LanguageModel, Likelihood, Work, Writing};
use trine_format::ModelFile;
use trine_train::card;
use trine_train::config::DeviceConfig;

/// Positions of a pass, padding among them.
const POSITIONS: usize = 1 << 14;

/// A model on a device, everything in f32.
pub(super) struct CardModel {
    engine: Engine,
    limit: usize,
    work: Work,
}

impl CardModel {
    /// The model in a file that has masters.
    pub(super) fn open(file: &ModelFile, device: DeviceConfig) -> anyhow::Result<Self> {
        let device = card::open(device)?.context("--device: expected another one than the CPU")?;
        let engine = card::load(device, file)?;
        Ok(Self { engine, limit: file.config().max_position_embeddings, work: Work::default() })
    }

    /// The likelihoods of continuations, which go through the model together.
    fn likelihoods(&mut self, of: &[&Continuation]) -> Result<Vec<Likelihood>, EvalError> {
        let seq_len = of.iter().map(|option| option.positions()).max().unwrap_or(1);
        let mut batch = Batch {
            inputs: Vec::new(),
            targets: Vec::new(),
            starts: None,
            batch: of.len(),
            seq_len,
        };
        for (row, option) in of.iter().enumerate() {
            let input = option.input();
            batch.targets.extend(vec![IGNORED; option.context.len() - 1]);
            batch.targets.extend(&option.ids);
            // Nothing sees what follows it.
            batch.inputs.extend(&input);
            batch.inputs.resize((row + 1) * seq_len, 0);
            batch.targets.resize((row + 1) * seq_len, IGNORED);
        }
        self.work.computed += batch.inputs.len();
        self.work.alone += of.iter().map(|option| option.positions()).sum::<usize>();
        let mut scores = self.engine.score(&batch).map_err(refused)?.into_iter();
        let likelihood = |option: &&Continuation| {
            let scores = scores.by_ref().take(option.ids.len());
            scores.fold(Likelihood { log: 0.0, greedy: true }, |sum, (loss, margin)| Likelihood {
                log: sum.log - f64::from(loss),
                greedy: sum.greedy && margin == 0.0,
            })
        };
        Ok(of.iter().map(likelihood).collect())
    }
}

impl LanguageModel for CardModel {
    fn limit(&self) -> usize {
        self.limit
    }

    fn score(&mut self, items: &[Item]) -> Result<Vec<Vec<Likelihood>>, EvalError> {
        let mut options: Vec<_> = items.iter().flat_map(|item| &item.options).enumerate().collect();
        // Those of about one length go together.
        options.sort_by_key(|(_, option)| option.positions());
        let mut found = vec![Likelihood { log: 0.0, greedy: true }; options.len()];
        let mut rest = &options[..];
        while let Some(longest) = rest.last() {
            let together = (POSITIONS / longest.1.positions()).clamp(1, rest.len());
            let (before, now) = rest.split_at(rest.len() - together);
            let of: Vec<_> = now.iter().map(|(_, option)| *option).collect();
            for ((at, _), likelihood) in now.iter().zip(self.likelihoods(&of)?) {
                found[*at] = likelihood;
            }
            rest = before;
        }
        let mut found = found.into_iter();
        Ok(items.iter().map(|item| found.by_ref().take(item.options.len()).collect()).collect())
    }

    fn write(
        &mut self,
        _prompts: &[Vec<u32>],
        _writing: &Writing<'_>,
    ) -> Result<Vec<String>, EvalError> {
        let source = "a task for which the model writes: it is evaluated without --device".into();
        Err(EvalError::Elsewhere { source })
    }

    fn work(&self) -> Work {
        self.work
    }
}

fn refused(e: CudaError) -> EvalError {
    EvalError::Logits { source: e.into() }
}
