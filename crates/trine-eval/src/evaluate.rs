//! A task, item by item: ask, score, keep.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use trine_tokenizer::{Tokenizer, TokenizerError};

use crate::encode::{encode, encode_pair};
use crate::model::{Item, LanguageModel, Likelihood};
use crate::store::rounded;
use crate::task::{Generation, Request};
use crate::{Data, EvalError, Record, Store, Task, answer, metrics};

/// Items that are asked about together, and then kept.
const TOGETHER: usize = 32;

/// What to do with an item that is longer than the context of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooLong {
    /// It is not scored, and counted.
    Skip,
    /// Its beginning is cut off, as lm-evaluation-harness does; it is scored, and counted.
    Cut,
}

impl TooLong {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Skip => "skip",
            Self::Cut => "cut",
        }
    }
}

/// Choices of an evaluation.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Answered examples before each question; those of the task where `None`.
    pub shots: Option<usize>,
    /// Only the first so many items.
    pub limit: Option<usize>,
    /// Items that are longer than the context.
    pub too_long: TooLong,
}

impl Settings {
    /// Examples that `task` is asked with.
    pub fn shots(&self, task: &Task) -> usize {
        self.shots.unwrap_or(task.shots())
    }

    /// Items of `data` that are asked about.
    pub fn items(&self, data: &Data) -> usize {
        self.limit.map_or(data.items.len(), |limit| limit.min(data.items.len()))
    }

    /// All that scores depend on, but for the model, of which `model` says what there is to say.
    pub fn conditions(
        &self,
        task: &Task,
        data: &Data,
        tokenizer: &Tokenizer,
        model: Value,
    ) -> Value {
        json!({
            "task": task.name(),
            "version": task.version(),
            "task_hash": blake3::hash(task.toml().as_bytes()).to_hex().to_string(),
            "data_hash": data.hash,
            "tokenizer_hash": blake3::hash(tokenizer.json().as_bytes()).to_hex().to_string(),
            "shots": self.shots(task),
            "too_long": self.too_long.name(),
            "model": model,
        })
    }
}

/// What an evaluation works with.
pub struct Evaluation<'a> {
    /// The task.
    pub task: &'a Task,
    /// Its items.
    pub data: &'a Data,
    /// Of the model.
    pub tokenizer: &'a Tokenizer,
    /// Ids at which a text ends.
    pub stop_ids: &'a [u32],
    /// Choices.
    pub settings: Settings,
}

/// An item, ready for the model, or why it is not.
enum Prepared {
    Options { item: Item, chars: Vec<usize>, gold: Vec<usize>, choice: bool },
    Prompt { ids: Vec<u32>, targets: Vec<String> },
    Skipped(&'static str),
}

impl Evaluation<'_> {
    /// Asks about the items that `store` does not know. `on_items` is called with the number of items
    /// that are known then.
    ///
    /// # Errors
    /// Those of the task, the tokenizer, the model and the store; what was scored before is kept.
    pub fn run(
        &self,
        model: &mut dyn LanguageModel,
        store: &mut Store,
        on_items: &mut dyn FnMut(usize),
    ) -> Result<(), EvalError> {
        let items = 0..self.settings.items(self.data);
        let missing: Vec<usize> = items.clone().filter(|item| !store.has(*item)).collect();
        let mut known = items.len() - missing.len();
        on_items(known);
        for part in missing.chunks(TOGETHER) {
            let records = self.records(part, model)?;
            store.add(records)?;
            known += part.len();
            on_items(known);
        }
        Ok(())
    }

    fn records(
        &self,
        indices: &[usize],
        model: &mut dyn LanguageModel,
    ) -> Result<Vec<Record>, EvalError> {
        let mut records = Vec::new();
        let (mut items, mut prompts) = (Vec::new(), Vec::new());
        let (mut asked, mut continued) = (Vec::new(), Vec::new());
        for &index in indices {
            let group = self.task.group(&self.data.items[index]);
            let mut record = Record { item: index, group, ..Record::default() };
            match self.prepare(index, model.limit(), &mut record.cut)? {
                Prepared::Skipped(why) => record.skipped = Some(why.to_owned()),
                Prepared::Options { item, chars, gold, choice } => {
                    items.push(item);
                    asked.push((records.len(), chars, gold, choice));
                }
                Prepared::Prompt { ids, targets } => {
                    prompts.push(ids);
                    continued.push((records.len(), targets));
                }
            }
            records.push(record);
        }
        for ((at, chars, gold, choice), scores) in asked.into_iter().zip(model.score(&items)?) {
            self.judge(&mut records[at], &scores, &chars, gold, choice)?;
        }
        if let Some(generation) = self.task.generation().filter(|_| !prompts.is_empty()) {
            let texts = self.generate(&prompts, generation, model)?;
            for ((at, targets), text) in continued.into_iter().zip(texts) {
                judge_text(&mut records[at], text, &targets, generation);
            }
        }
        Ok(records)
    }

    /// The ids of an item, cut where that is wanted.
    fn prepare(&self, index: usize, limit: usize, cut: &mut usize) -> Result<Prepared, EvalError> {
        let (doc, shots) = (&self.data.items[index], self.settings.shots(self.task));
        let request = self.task.request(index, doc, &self.data.shots, shots)?;
        let (options, chars, gold, choice) = match request {
            Request::Choice { options, chars, gold } => (options, chars, gold, true),
            Request::Continuation(prompt, target) => {
                (vec![(prompt, target)], vec![], vec![], false)
            }
            Request::Generation { prompt, targets } => {
                let mut ids = match encode(self.tokenizer, &prompt) {
                    Err(TokenizerError::Inexpressible { .. }) => return Ok(INEXPRESSIBLE),
                    ids => ids?,
                };
                if ids.is_empty() {
                    return Ok(Prepared::Skipped("no tokens"));
                }
                let most = self.task.generation().map_or(1, |generation| generation.max_tokens);
                let room = limit.saturating_sub(most);
                if ids.len() > room {
                    if self.settings.too_long == TooLong::Skip || room == 0 {
                        return Ok(TOO_LONG);
                    }
                    *cut = ids.len() - room;
                    ids.drain(..*cut);
                }
                return Ok(Prepared::Prompt { ids, targets });
            }
        };
        let mut item = Item { options: Vec::new() };
        for (context, continuation) in &options {
            let option = match encode_pair(self.tokenizer, context, continuation) {
                Err(TokenizerError::Inexpressible { .. }) => return Ok(INEXPRESSIBLE),
                option => option?,
            };
            let Some(mut option) = option else { return Ok(Prepared::Skipped("no tokens")) };
            if option.positions() > limit {
                // One id of the context has to stay.
                if self.settings.too_long == TooLong::Skip || option.ids.len() > limit {
                    return Ok(TOO_LONG);
                }
                let over = option.positions() - limit;
                option.context.drain(..over);
                *cut = over.max(*cut);
            }
            item.options.push(option);
        }
        Ok(Prepared::Options { item, chars, gold, choice })
    }

    /// Likelihoods into a record.
    fn judge(
        &self,
        record: &mut Record,
        scores: &[Likelihood],
        chars: &[usize],
        gold: Vec<usize>,
        choice: bool,
    ) -> Result<(), EvalError> {
        if let Some(found) = scores.iter().map(|score| score.log).find(|log| !log.is_finite()) {
            let (task, item) = (self.task.name().to_owned(), record.item);
            return Err(EvalError::NotFinite { task, item, found });
        }
        record.log_likelihoods = scores.iter().map(|score| rounded(score.log)).collect();
        record.greedy = scores.iter().map(|score| score.greedy).collect();
        let wanted = self.task.metrics();
        let logs = &record.log_likelihoods;
        let found: Vec<(&str, f64)> = match choice {
            true => metrics::choice(wanted, logs, chars, &gold),
            false => {
                let greedy = f64::from(u8::from(record.greedy[0]));
                let score = |name| if name == "perplexity" { logs[0] } else { greedy };
                wanted.iter().map(|metric| (metric.name(), score(metric.name()))).collect()
            }
        };
        record.scores = found.into_iter().map(|(name, n)| (name.to_owned(), rounded(n))).collect();
        record.chance = choice.then(|| rounded(metrics::chance(logs.len(), &gold)));
        record.gold = gold;
        Ok(())
    }

    /// What the model writes after each prompt, up to where a text of the task ends it.
    fn generate(
        &self,
        prompts: &[Vec<u32>],
        generation: &Generation,
        model: &mut dyn LanguageModel,
    ) -> Result<Vec<String>, EvalError> {
        let mut done = |_: usize, ids: &[u32]| {
            if ids.last().is_some_and(|id| self.stop_ids.contains(id)) {
                return Ok(true);
            }
            let text = self.tokenizer.decode(ids, true)?;
            Ok(generation.until.iter().any(|stop| !stop.is_empty() && text.contains(&stop[..])))
        };
        let ids = model.generate(prompts, generation.max_tokens, &mut done)?;
        let text = |mut ids: Vec<u32>| {
            if ids.last().is_some_and(|id| self.stop_ids.contains(id)) {
                ids.pop();
            }
            let text = self.tokenizer.decode(&ids, true)?;
            Ok(answer::until(&text, &generation.until).to_owned())
        };
        ids.into_iter().map(text).collect()
    }
}

const TOO_LONG: Prepared = Prepared::Skipped("longer than the context");
const INEXPRESSIBLE: Prepared = Prepared::Skipped("a character that the tokenizer does not have");

/// A text into a record.
fn judge_text(record: &mut Record, text: String, targets: &[String], generation: &Generation) {
    for (name, answer) in answer::extract(&text, generation) {
        let right = answer::is_one_of(&answer, targets, generation);
        let metric = match name.is_empty() {
            true => "exact_match".to_owned(),
            false => format!("exact_match,{name}"),
        };
        record.scores.insert(metric, f64::from(u8::from(right)));
        record.extracted.insert(name, answer);
    }
    record.text = Some(text);
}

/// A score of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Name of the metric, as lm-evaluation-harness has it.
    pub metric: String,
    /// The mean of the items; of `perplexity`, `exp` of the mean loss.
    pub value: f64,
    /// Its standard error; of `perplexity`, that of the mean loss times the value.
    pub stderr: Option<f64>,
}

/// What came of a task.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Items that were asked about.
    pub items: usize,
    /// Items that have a score.
    pub scored: usize,
    /// Items that have none, by reason.
    pub skipped: BTreeMap<String, usize>,
    /// Items of which the beginning was cut off.
    pub cut: usize,
    /// What a model that knows nothing scores (`acc`, `acc_norm`).
    pub chance: Option<f64>,
    /// By metric.
    pub scores: Vec<Score>,
    /// Of each group of items: how many, and their scores.
    pub groups: BTreeMap<String, (usize, Vec<Score>)>,
}

impl Summary {
    /// Of these records.
    pub fn of(records: &[&Record]) -> Self {
        let mut summary = Self { items: records.len(), ..Self::default() };
        let scored: Vec<&Record> =
            records.iter().filter(|record| !record.scores.is_empty()).copied().collect();
        summary.scored = scored.len();
        summary.cut = records.iter().filter(|record| record.cut > 0).count();
        for why in records.iter().filter_map(|record| record.skipped.as_ref()) {
            *summary.skipped.entry(why.clone()).or_default() += 1;
        }
        let chances: Vec<f64> = scored.iter().filter_map(|record| record.chance).collect();
        if !chances.is_empty() {
            summary.chance = Some(crate::statistics::mean(&chances).0);
        }
        summary.scores = scores(&scored);
        let mut groups: BTreeMap<String, Vec<&Record>> = BTreeMap::new();
        for record in scored {
            if let Some(group) = &record.group {
                groups.entry(group.clone()).or_default().push(record);
            }
        }
        let of =
            |(name, records): (String, Vec<&Record>)| (name, (records.len(), scores(&records)));
        summary.groups = groups.into_iter().map(of).collect();
        summary
    }
}

/// The scores of records that have some.
fn scores(records: &[&Record]) -> Vec<Score> {
    let Some(first) = records.first() else { return Vec::new() };
    let of = |metric: &String| {
        let items: Vec<f64> =
            records.iter().filter_map(|record| record.scores.get(metric)).copied().collect();
        let (mean, stderr) = crate::statistics::mean(&items);
        let (value, stderr) = match metric == "perplexity" {
            true => ((-mean).exp(), stderr.map(|error| error * (-mean).exp())),
            false => (mean, stderr),
        };
        Score { metric: metric.clone(), value, stderr }
    };
    first.scores.keys().map(of).collect()
}

/// The scores by `metric` of the items that both models were scored on, in pairs.
pub fn paired_scores(first: &[&Record], second: &[&Record], metric: &str) -> (Vec<f64>, Vec<f64>) {
    let scores: BTreeMap<usize, f64> = second
        .iter()
        .filter_map(|record| Some((record.item, *record.scores.get(metric)?)))
        .collect();
    let pair = |record: &&Record| Some((*record.scores.get(metric)?, *scores.get(&record.item)?));
    first.iter().filter_map(pair).unzip()
}
