//! A task, item by item: ask, score, keep.

use rayon::prelude::*;
use serde_json::{Value, json};
use trine_tokenizer::{ChatTemplate, Message, Tokenizer, TokenizerError};

use crate::encode::{encode, encode_pair, prefix_id};
use crate::model::{Item, LanguageModel, Likelihood};
use crate::perplexity::{Size, Windows, windows};
use crate::store::rounded;
use crate::task::{Expected, Generation, Kind, Metric, Request};
use crate::writing::Writing;
use crate::{
    Data, EvalError, Instruction, Outcome, Record, Sandbox, Store, Task, answer, math, metrics,
};

/// Items that are asked about together, and then kept; a document is enough by itself.
const TOGETHER: usize = 64;

/// What to do with an item that is longer than the context of the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TooLong {
    /// It is not scored, and counted.
    #[default]
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
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Answered examples before each question; those of the task where `None`.
    pub shots: Option<usize>,
    /// Only the first so many items.
    pub limit: Option<usize>,
    /// Items that are longer than the context.
    pub too_long: TooLong,
    /// The window of documents, in tokens; the whole context where `None`.
    pub window: Option<usize>,
    /// By how many tokens it moves on; the whole window where `None`.
    pub stride: Option<usize>,
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

    /// All that scores depend on, but for the model, of which `model` says what there is to say;
    /// `template` is the text of the chat template that prompts go through, `sandbox` where programs
    /// run.
    pub fn conditions(
        &self,
        task: &Task,
        data: &Data,
        tokenizer: &Tokenizer,
        template: Option<&str>,
        sandbox: Option<&Sandbox>,
        model: Value,
    ) -> Value {
        let mut conditions = json!({
            "task": task.name(),
            "version": task.version(),
            "task_hash": blake3::hash(task.toml().as_bytes()).to_hex().to_string(),
            "data_hash": data.hash,
            "tokenizer_hash": blake3::hash(tokenizer.json().as_bytes()).to_hex().to_string(),
            "shots": self.shots(task),
            "too_long": self.too_long.name(),
            "model": model,
        });
        // Only where they matter, so that results without keep their names.
        if task.kind() == Kind::Document {
            conditions["windows"] = json!([self.window, self.stride]);
        }
        if let Some(sandbox) = sandbox.filter(|_| task.runs_programs()) {
            conditions["python"] = json!(sandbox.version());
        }
        if let Some(template) = template {
            let hash = blake3::hash(template.as_bytes()).to_hex().to_string();
            conditions["chat_template_hash"] = json!(hash);
        }
        conditions
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
    /// What the prompts of tasks that generate go through, as what a user says.
    pub template: Option<&'a ChatTemplate>,
    /// Where programs that the model wrote are run, if they may be.
    pub sandbox: Option<&'a Sandbox>,
    /// Choices.
    pub settings: Settings,
}

/// An item, ready for the model, or why it is not.
enum Prepared {
    Options { item: Item, chars: Vec<usize>, gold: Vec<usize>, choice: bool },
    Document { windows: Vec<Item>, size: Size },
    Prompt { ids: Vec<u32>, expected: Expected },
    Skipped(&'static str),
}

impl Evaluation<'_> {
    /// Asks about the items that `store` does not know. `on_items` is called with the number of items
    /// that are known then.
    ///
    /// # Errors
    /// Those of the task, the tokenizer, the model and the store, and a task that runs programs where
    /// there is no sandbox; what was scored before is kept.
    pub fn run(
        &self,
        model: &mut dyn LanguageModel,
        store: &mut Store,
        on_items: &mut dyn FnMut(usize),
    ) -> Result<(), EvalError> {
        if self.task.runs_programs() && self.sandbox.is_none() {
            return Err(EvalError::CodeExecution { task: self.task.name().to_owned() });
        }
        let items = 0..self.settings.items(self.data);
        let missing: Vec<usize> = items.clone().filter(|item| !store.has(*item)).collect();
        let mut known = items.len() - missing.len();
        on_items(known);
        let together = if self.task.kind() == Kind::Document { 1 } else { TOGETHER };
        for part in missing.chunks(together) {
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
        let (mut asked, mut read, mut continued) = (Vec::new(), Vec::new(), Vec::new());
        for &index in indices {
            let group = self.task.group(&self.data.items[index]);
            let mut record = Record { item: index, group, ..Record::default() };
            match self.prepare(index, model.limit(), &mut record.cut)? {
                Prepared::Skipped(why) => record.skipped = Some(why.to_owned()),
                Prepared::Options { item, chars, gold, choice } => {
                    items.push(item);
                    asked.push((records.len(), chars, gold, choice));
                }
                Prepared::Document { windows, size } => {
                    read.push((records.len(), windows.len(), size));
                    items.extend(windows);
                }
                Prepared::Prompt { ids, expected } => {
                    prompts.push(ids);
                    continued.push((records.len(), expected));
                }
            }
            records.push(record);
        }
        let mut scores = model.score(&items)?.into_iter();
        for ((at, chars, gold, choice), scores) in asked.into_iter().zip(scores.by_ref()) {
            self.judge(&mut records[at], &scores, &chars, gold, choice)?;
        }
        for (at, windows, size) in read {
            let scores: Vec<Likelihood> = scores.by_ref().take(windows).flatten().collect();
            self.judge_document(&mut records[at], &scores, size)?;
        }
        if let Some(generation) = self.task.generation().filter(|_| !prompts.is_empty()) {
            let writing = Writing {
                tokenizer: self.tokenizer,
                max_tokens: generation.max_tokens,
                until: &generation.until,
                stop_ids: self.stop_ids,
            };
            let texts = model.write(&prompts, &writing)?;
            let outcomes = self.outcomes(&records, &continued, &texts)?;
            for (((at, expected), text), outcome) in continued.into_iter().zip(texts).zip(outcomes)
            {
                let record = &mut records[at];
                if self.task.metrics().contains(&Metric::Equivalent) {
                    judge_value(record, &text, &expected, generation);
                }
                judge_text(record, text, &expected, outcome, generation);
            }
        }
        Ok(records)
    }

    /// What becomes of the programs that texts are parts of: nothing of a text that is none.
    fn outcomes(
        &self,
        records: &[Record],
        continued: &[(usize, Expected)],
        texts: &[String],
    ) -> Result<Vec<Option<Outcome>>, EvalError> {
        let run = |((at, expected), text): (&(usize, Expected), &String)| {
            let Some(sandbox) = self.sandbox.filter(|_| *expected == Expected::Program) else {
                return Ok(None);
            };
            let item = records[*at].item;
            let program = self.task.program(item, &self.data.items[item], text)?;
            sandbox.run(&program).map(Some)
        };
        continued.par_iter().zip(texts).map(run).collect()
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
            Request::Document(text, size) => return self.prepare_document(&text, size, limit),
            Request::Generation { prompt, expected } => {
                let ids = match self.template {
                    Some(template) => {
                        template.prompt(self.tokenizer, &[Message::new("user", prompt)])
                    }
                    None => encode(self.tokenizer, &prompt),
                };
                let mut ids = match ids {
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
                        return Ok(if ids.len() < limit { NO_ROOM } else { TOO_LONG });
                    }
                    *cut = ids.len() - room;
                    ids.drain(..*cut);
                }
                return Ok(Prepared::Prompt { ids, expected });
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

    /// The windows over a document.
    ///
    /// As in lm-evaluation-harness, the token that begins a text is given, and what the tokenizer puts
    /// before a text is predicted after it.
    fn prepare_document(
        &self,
        text: &str,
        size: Size,
        limit: usize,
    ) -> Result<Prepared, EvalError> {
        let mut ids: Vec<u32> = prefix_id(self.tokenizer).into_iter().collect();
        match encode(self.tokenizer, text) {
            Err(TokenizerError::Inexpressible { .. }) => return Ok(INEXPRESSIBLE),
            text => ids.extend(text?),
        }
        if ids.len() < 2 {
            return Ok(Prepared::Skipped("no tokens"));
        }
        let window = self.settings.window.unwrap_or(limit);
        let stride = self.settings.stride.unwrap_or(window);
        let windows = windows(&ids, Windows { window, stride }, limit)?;
        Ok(Prepared::Document { windows, size })
    }

    /// The likelihoods of a document's windows into a record.
    fn judge_document(
        &self,
        record: &mut Record,
        scores: &[Likelihood],
        size: Size,
    ) -> Result<(), EvalError> {
        self.check(record, scores)?;
        let log = rounded(scores.iter().map(|score| score.log).sum());
        record.log_likelihoods = vec![log];
        for metric in self.task.metrics() {
            let units = if *metric == Metric::WordPerplexity { size.words } else { size.bytes };
            record.units.insert(metric.name().to_owned(), units);
            record.scores.insert(metric.name().to_owned(), log);
        }
        Ok(())
    }

    /// Refuses likelihoods that are no numbers.
    fn check(&self, record: &Record, scores: &[Likelihood]) -> Result<(), EvalError> {
        match scores.iter().map(|score| score.log).find(|log| !log.is_finite()) {
            None => Ok(()),
            Some(found) => {
                let (task, item) = (self.task.name().to_owned(), record.item);
                Err(EvalError::NotFinite { task, item, found })
            }
        }
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
        self.check(record, scores)?;
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
}

const TOO_LONG: Prepared = Prepared::Skipped("longer than the context");
const NO_ROOM: Prepared = Prepared::Skipped("no room in the context for the longest answer");
const INEXPRESSIBLE: Prepared = Prepared::Skipped("a character that the tokenizer does not have");

/// A text into a record.
fn judge_text(
    record: &mut Record,
    text: String,
    expected: &Expected,
    outcome: Option<Outcome>,
    generation: &Generation,
) {
    match expected {
        Expected::Program => {
            let passed = outcome == Some(Outcome::Passed);
            record.scores.insert("pass@1".to_owned(), f64::from(u8::from(passed)));
            record.execution = Some(match outcome {
                Some(Outcome::Failed(how)) => how,
                _ => "passed".to_owned(),
            });
        }
        Expected::Targets(targets) => judge_answer(record, &text, targets, generation),
        Expected::Instructions(instructions) => judge_obedience(record, &text, instructions),
    }
    record.text = Some(text);
}

/// Whether the answer in a text is one that is right.
fn judge_answer(record: &mut Record, text: &str, targets: &[String], generation: &Generation) {
    for (name, answer) in answer::extract(text, generation) {
        let right = answer::is_one_of(&answer, targets, generation);
        let metric = match name.is_empty() {
            true => "exact_match".to_owned(),
            false => format!("exact_match,{name}"),
        };
        record.scores.insert(metric, f64::from(u8::from(right)));
        record.extracted.insert(name, answer);
    }
}

/// Whether the answer in a text is one that is right, however it is written.
fn judge_value(record: &mut Record, text: &str, expected: &Expected, generation: &Generation) {
    let Expected::Targets(targets) = expected else { return };
    let right = answer::extract(text, generation)
        .iter()
        .any(|(_, answer)| targets.iter().any(|target| math::is_equivalent(answer, target)));
    record.scores.insert(Metric::Equivalent.name().to_owned(), f64::from(u8::from(right)));
}

/// Which instructions a text follows.
fn judge_obedience(record: &mut Record, text: &str, instructions: &[Instruction]) {
    let strictly: Vec<bool> = instructions.iter().map(|one| one.followed(text)).collect();
    let loosely: Vec<bool> = instructions.iter().map(|one| one.followed_loosely(text)).collect();
    for (how, followed) in [("strict", strictly), ("loose", loosely)] {
        let all = f64::from(u8::from(!followed.contains(&false)));
        record.scores.insert(format!("prompt_level_{how}_acc"), all);
        record.followed.insert(format!("inst_level_{how}_acc"), followed);
    }
}
