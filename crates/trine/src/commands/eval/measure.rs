//! `trine eval --measure`: how much what texts share saves, beside the same texts one by one.
//!
//! Both ways take turns on a few items each, and so do prompts of random ids, whose speed is the most
//! that one can hope for. So all three saw the same machine.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use trine_eval::{
    EvalError, Item, LanguageModel, Likelihood, OneByOne, RuntimeModel, Work, Writing,
};
use trine_runtime::{Model, RuntimeError, Session};

use crate::output::note;

/// Ids of a prompt, at most.
const PROMPT: usize = 512;

/// A model that is scored both ways. It writes as the runtime does.
pub(super) struct Measured<'m, F> {
    model: &'m Model,
    shared: RuntimeModel<'m>,
    plain: OneByOne<F>,
    items: usize,
    times: [Duration; 3],
    prompt_tokens: usize,
}

impl<'m, F> Measured<'m, F>
where
    F: FnMut(&[u32]) -> Result<Vec<f32>, RuntimeError>,
{
    pub(super) fn new(model: &'m Model, shared: RuntimeModel<'m>, plain: OneByOne<F>) -> Self {
        Self { model, shared, plain, items: 0, times: [Duration::ZERO; 3], prompt_tokens: 0 }
    }

    /// Prompts for about a quarter of what scoring took.
    fn prompts(&mut self, quarter: Duration) -> Result<(), EvalError> {
        let config = self.model.config();
        let vocab = config.vocab_size as u32;
        let ids: Vec<u32> = (0..PROMPT.min(config.max_position_embeddings) as u32)
            .map(|i| i.wrapping_mul(2_654_435_761) % vocab)
            .collect();
        let begin = Instant::now();
        while begin.elapsed() < quarter {
            Session::new(self.model).prefill(&ids)?;
            self.prompt_tokens += ids.len();
        }
        self.times[2] += begin.elapsed();
        Ok(())
    }

    /// What came of it, for programs; nothing where no item was scored.
    pub(super) fn results(&self) -> Option<Value> {
        let [shared, plain, prompts] = self.times.map(|time| time.as_secs_f64());
        let computed = self.shared.work().computed as f64;
        let (work, prefill) = (self.shared.work(), self.prompt_tokens as f64 / prompts);
        (self.items > 0).then(|| {
            json!({
                "items": self.items,
                "items_per_second": self.items as f64 / shared,
                "one_by_one_items_per_second": self.items as f64 / plain,
                "times_one_by_one": plain / shared,
                "tokens": work.computed,
                "one_by_one_tokens": work.alone,
                "tokens_per_second": computed / shared,
                "prefill_tokens_per_second": prefill,
                "share_of_prefill": computed / shared / prefill,
            })
        })
    }

    /// Says it.
    pub(super) fn note(&self) {
        let Some(results) = self.results() else { return };
        let number = |key: &str| results[key].as_f64().unwrap_or(f64::NAN);
        note!(
            "[{} items, shared and one by one in turns: {:.1} and {:.1} items/s, {:.2} times; \
             {:.0} tok/s computed, {:.0} % of the {:.0} of a prompt]",
            self.items,
            number("items_per_second"),
            number("one_by_one_items_per_second"),
            number("times_one_by_one"),
            number("tokens_per_second"),
            100.0 * number("share_of_prefill"),
            number("prefill_tokens_per_second"),
        );
    }
}

impl<F> LanguageModel for Measured<'_, F>
where
    F: FnMut(&[u32]) -> Result<Vec<f32>, RuntimeError>,
{
    fn limit(&self) -> usize {
        self.shared.limit()
    }

    fn score(&mut self, items: &[Item]) -> Result<Vec<Vec<Likelihood>>, EvalError> {
        let begin = Instant::now();
        let found = self.shared.score(items)?;
        let shared = begin.elapsed();
        let begin = Instant::now();
        let plain = self.plain.score(items)?;
        self.times[0] += shared;
        self.times[1] += begin.elapsed();
        self.items += items.len();
        if found != plain {
            let source = "scores differ from those of texts one by one: a fault of trine's".into();
            return Err(EvalError::Elsewhere { source });
        }
        self.prompts(shared / 4)?;
        Ok(found)
    }

    fn write(
        &mut self,
        prompts: &[Vec<u32>],
        writing: &Writing<'_>,
    ) -> Result<Vec<String>, EvalError> {
        self.shared.write(prompts, writing)
    }

    fn work(&self) -> Work {
        self.shared.work()
    }
}
