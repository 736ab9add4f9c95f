//! What came of an evaluation, for programs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value, json};
use trine_eval::{
    Data, Difference, EvalError, Metric, Record, Score, Settings, Store, Summary, Task, Work,
    paired, paired_scores,
};

use super::text::TextResults;
use crate::output::{self, note};

/// Everything about one model.
pub(super) struct ModelResults {
    path: PathBuf,
    adapter: Option<PathBuf>,
    pub(super) texts: Vec<TextResults>,
    pub(super) tasks: Vec<TaskResults>,
    /// How fast it was scored, if that was measured.
    pub(super) speed: Option<Value>,
}

/// A model on a task.
pub(super) struct TaskResults {
    pub(super) name: String,
    pub(super) version: u32,
    harness: Option<String>,
    pub(super) shots: usize,
    /// Prompts went through the chat template of the model.
    pub(super) chat: bool,
    data: PathBuf,
    kept: Option<PathBuf>,
    /// Items that were known before.
    known: usize,
    records: Vec<Record>,
    pub(super) summary: Summary,
}

impl ModelResults {
    pub(super) fn new(path: &Path, adapter: Option<&Path>) -> Self {
        let (path, adapter) = (path.to_owned(), adapter.map(Path::to_owned));
        Self { path, adapter, texts: Vec::new(), tasks: Vec::new(), speed: None }
    }

    /// What it is called in tables.
    pub(super) fn name(&self) -> String {
        let adapter = self.adapter.iter().map(|dir| format!(" + {}", dir.display()));
        self.path.display().to_string() + &adapter.collect::<String>()
    }
}

impl TaskResults {
    pub(super) fn new(
        task: &Task,
        data: &Data,
        settings: &Settings,
        store: &Store,
        known: usize,
    ) -> Self {
        let records = store.first(settings.items(data));
        Self {
            name: task.name().to_owned(),
            version: task.version(),
            harness: task.harness().map(str::to_owned),
            shots: settings.shots(task),
            chat: false,
            data: data.path.clone(),
            kept: store.path().map(Path::to_owned),
            known,
            summary: Summary::of(&records),
            records: records.into_iter().cloned().collect(),
        }
    }

    /// Says how fast it went.
    pub(super) fn note(&self, time: Duration, before: Work, after: Work) {
        let items = self.summary.items - self.known;
        let speed = items as f64 / time.as_secs_f64().max(1e-9);
        let computed = (after.computed - before.computed) as u64;
        let alone = (after.alone - before.alone) as u64;
        let known = match self.known {
            0 => String::new(),
            known => format!(", {known} known before"),
        };
        let work = match items {
            0 => String::new(),
            _ => format!(
                ": {speed:.1} items/s, {} tokens computed for {}",
                output::count(computed),
                output::count(alone)
            ),
        };
        note!("[{}: {items} items in {:.1} s{known}{work}]", self.name, time.as_secs_f64());
    }

    /// The score that stands for the task: `acc_norm` where it has one, of instructions the strict one
    /// by instruction.
    pub(super) fn headline(&self) -> Option<&str> {
        let scores = &self.summary.scores;
        let called = |name: &str| scores.iter().find(|score| score.metric == name);
        let found = called("acc_norm").or_else(|| called("inst_level_strict_acc"));
        // No perplexity, as long as there is something else.
        let found = found.or_else(|| called("bits_per_byte"));
        let found = found.or_else(|| scores.iter().find(|score| Metric::is_share(&score.metric)));
        let found = found.or_else(|| scores.first());
        found.map(|score| &score.metric[..])
    }
}

/// Two models on the items of a task that both were scored on.
pub(super) struct Compared {
    pub(super) metric: String,
    pub(super) items: usize,
    pub(super) difference: Difference,
}

/// Compares by every metric.
pub(super) fn compare(
    a: &TaskResults,
    b: &TaskResults,
    seed: u64,
) -> Result<Vec<Compared>, EvalError> {
    let records = |task: &TaskResults| -> Vec<Record> { task.records.clone() };
    let (first, second) = (records(a), records(b));
    let (first, second): (Vec<_>, Vec<_>) = (first.iter().collect(), second.iter().collect());
    let mut all = Vec::new();
    for Score { metric, .. } in &a.summary.scores {
        let (x, y) = paired_scores(&first, &second, metric);
        if x.is_empty() {
            return Err(EvalError::NothingInCommon { task: a.name.clone() });
        }
        let difference = paired(&x, &y, seed);
        all.push(Compared { metric: metric.clone(), items: x.len(), difference });
    }
    Ok(all)
}

/// All results as one object.
pub(super) fn json(models: &[ModelResults], seed: u64) -> anyhow::Result<Value> {
    let mut result = json!({ "models": models.iter().map(model).collect::<Vec<_>>() });
    if let [a, b] = models {
        let mut tasks = Map::new();
        for (a, b) in a.tasks.iter().zip(&b.tasks) {
            let metrics = compare(a, b, seed)?.into_iter().map(
                |Compared { metric, items, difference: d }| {
                    let value = json!({
                        "items": items, "difference": d.mean, "stderr": d.stderr,
                        "interval_95": [d.interval.0, d.interval.1], "p": d.p,
                    });
                    (metric, value)
                },
            );
            tasks.insert(a.name.clone(), Value::Object(metrics.collect()));
        }
        result["comparison"] = Value::Object(tasks);
    }
    Ok(result)
}

fn model(model: &ModelResults) -> Value {
    let tasks: Map<_, _> = model.tasks.iter().map(|t| (t.name.clone(), task(t))).collect();
    let texts = model.texts.iter().map(|TextResults { path, found, windows }| {
        json!({
            "text": path,
            "bits_per_byte": found.bits_per_byte(),
            "token_perplexity": found.token(),
            "word_perplexity": found.word(),
            "byte_perplexity": found.byte(),
            "log_likelihood": found.log_likelihood,
            "tokens": found.tokens,
            "words": found.size.words,
            "bytes": found.size.bytes,
            "window": windows.window,
            "stride": windows.stride,
        })
    });
    let mut result = json!({
        "model": model.path,
        "adapter": model.adapter,
        "tasks": tasks,
        "texts": texts.collect::<Vec<_>>(),
    });
    if let Some(speed) = &model.speed {
        result["speed"] = speed.clone();
    }
    result
}

fn task(task: &TaskResults) -> Value {
    let summary = &task.summary;
    let group = |(name, (items, scores)): (&String, &(usize, Vec<Score>))| {
        (name.clone(), json!({ "items": items, "metrics": metrics(scores) }))
    };
    json!({
        "version": task.version,
        "lm_eval_task": task.harness,
        "shots": task.shots,
        "chat_template": task.chat,
        "data": task.data,
        "items": summary.items,
        "scored": summary.scored,
        "skipped": summary.skipped,
        "cut": summary.cut,
        "chance": summary.chance,
        "metrics": metrics(&summary.scores),
        "groups": summary.groups.iter().map(group).collect::<Map<_, _>>(),
        "results": task.kept,
    })
}

/// A task on the checkpoint of a step, as `trine report` reads it.
pub(super) fn line(task: &TaskResults, step: u64) -> Value {
    let summary = &task.summary;
    json!({
        "step": step, "task": task.name, "version": task.version, "shots": task.shots,
        "items": summary.items, "scored": summary.scored, "chance": summary.chance,
        "headline": task.headline(), "metrics": metrics(&summary.scores),
    })
}

fn metrics(scores: &[Score]) -> Map<String, Value> {
    let value = |score: &Score| json!({ "value": score.value, "stderr": score.stderr });
    scores.iter().map(|score| (score.metric.clone(), value(score))).collect()
}
