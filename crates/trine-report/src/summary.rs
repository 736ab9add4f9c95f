//! A run in a few numbers, and where runs were configured otherwise.

use serde_json::{Value, json};

use crate::{Evaluation, Run};

/// A run in a few numbers; what was not logged is none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Name of the run.
    pub name: String,
    /// Number of scalar parameters.
    pub parameters: Option<f64>,
    /// Tokens trained on.
    pub tokens: Option<f64>,
    /// Updates made.
    pub step: u64,
    /// Updates of the whole run.
    pub steps: Option<u64>,
    /// Mean training loss in nats of the last updates: a twentieth of them, at most 50.
    pub train_loss: Option<f64>,
    /// The last validation loss in nats.
    pub val_loss: Option<f64>,
    /// The lowest validation loss in nats.
    pub best_val_loss: Option<f64>,
    /// Median speed of an update.
    pub tokens_per_second: Option<f64>,
    /// Share of trits that are 0, at the last collection.
    pub zero: Option<f64>,
    /// Share of trits that one update flipped, at the last collection.
    pub flips_by_update: Option<f64>,
    /// Spikes, skipped updates, rewinds.
    pub events: usize,
}

impl Summary {
    /// Of a run as far as it has come.
    pub fn of(run: &Run) -> Self {
        let losses: Vec<f64> = run.updates.iter().filter_map(|update| update.loss).collect();
        let last = &losses[losses.len() - (losses.len() / 20).clamp(1, 50).min(losses.len())..];
        let mut speeds: Vec<f64> =
            run.updates.iter().filter_map(|update| update.tokens_per_second).collect();
        speeds.sort_by(f64::total_cmp);
        let collected = |measure: &str| run.collections.last()?.all.get(measure).copied();
        Self {
            name: run.name.clone(),
            parameters: run.about.get("parameters").and_then(Value::as_f64),
            tokens: run.updates.last().and_then(|update| update.tokens),
            step: run.step(),
            steps: run.steps(),
            train_loss: (!last.is_empty()).then(|| last.iter().sum::<f64>() / last.len() as f64),
            val_loss: run.validations.last().map(|(_, loss)| *loss),
            best_val_loss: run.validations.iter().map(|(_, loss)| *loss).reduce(f64::min),
            tokens_per_second: speeds.get(speeds.len() / 2).copied(),
            zero: collected("zero"),
            flips_by_update: collected("flips_by_update"),
            events: run.events.len(),
        }
    }
}

/// The keys in which configurations differ, but for the name, with the value of every run; none
/// where a run's configuration lacks the key.
pub fn differences(runs: &[Run]) -> Vec<(&str, Vec<Option<&str>>)> {
    let keys: std::collections::BTreeSet<&str> =
        runs.iter().flat_map(|run| run.config.keys().map(String::as_str)).collect();
    let values = |key| runs.iter().map(|run| run.config.get(key).map(String::as_str)).collect();
    let all = keys.into_iter().map(|key| (key, values(key)));
    let differs = |values: &[Option<&str>]| values.windows(2).any(|pair| pair[0] != pair[1]);
    all.filter(|(key, values): &(&str, Vec<_>)| *key != "name" && differs(values)).collect()
}

/// Summaries and differing keys for programs: an array, one object a run.
pub fn to_json(runs: &[Run]) -> Value {
    let differences = differences(runs);
    let object = |(i, run): (usize, &Run)| {
        let summary = Summary::of(run);
        let differing: serde_json::Map<String, Value> = differences
            .iter()
            .map(|(key, values)| ((*key).to_owned(), values[i].map_or(Value::Null, Value::from)))
            .collect();
        json!({
            "name": summary.name,
            "path": run.path.display().to_string(),
            "parameters": run.about.get("parameters"),
            "tokens": summary.tokens.map(|tokens| tokens as u64),
            "step": summary.step,
            "steps": summary.steps,
            "train_loss": summary.train_loss,
            "val_loss": summary.val_loss,
            "best_val_loss": summary.best_val_loss,
            "tokens_per_second": summary.tokens_per_second,
            "zero": summary.zero,
            "flips_by_update": summary.flips_by_update,
            "events": summary.events,
            "evaluations": run.evaluations.iter().map(evaluation).collect::<Vec<_>>(),
            "damaged_lines": run.damaged_lines,
            "differing": differing,
        })
    };
    runs.iter().enumerate().map(object).collect()
}

fn evaluation(one: &Evaluation) -> Value {
    let score = |(name, (value, stderr)): (&String, &(f64, Option<f64>))| {
        (name.clone(), json!({ "value": value, "stderr": stderr }))
    };
    json!({
        "step": one.step, "task": one.task, "shots": one.shots, "scored": one.items,
        "chance": one.chance,
        "metrics": one.scores.iter().map(score).collect::<serde_json::Map<_, _>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::Update;

    fn run(losses: &[f64], rate: &str) -> Run {
        let update = |(i, loss): (usize, &f64)| Update {
            step: i as u64 + 1,
            loss: Some(*loss),
            tokens_per_second: Some(100.0 * (i + 1) as f64),
            ..Update::default()
        };
        let config = [("name", rate), ("rate", rate), ("seed", "1")];
        Run {
            config: config.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
            updates: losses.iter().enumerate().map(update).collect(),
            validations: vec![(1, 3.0), (2, 1.5), (3, 2.0)],
            ..Run::default()
        }
    }

    #[test]
    fn numbers_are_of_the_end_and_of_the_best() {
        let mut losses = vec![8.0; 38];
        losses.extend([2.0, 1.0]);
        let summary = Summary::of(&run(&losses, "1"));
        assert_eq!(summary.train_loss, Some(1.5));
        assert_eq!((summary.val_loss, summary.best_val_loss), (Some(2.0), Some(1.5)));
        assert_eq!(summary.tokens_per_second, Some(2100.0));
        let nothing = Summary::of(&Run::default());
        assert_eq!((nothing.train_loss, nothing.tokens_per_second), (None, None));
    }

    #[test]
    fn only_keys_that_differ_are_shown() {
        let mut runs = [run(&[1.0], "1"), run(&[1.0], "2")];
        assert_eq!(differences(&runs), [("rate", vec![Some("1"), Some("2")])]);
        assert!(differences(&runs[..1]).is_empty());
        runs[0].config.insert("new".to_owned(), "x".to_owned());
        assert_eq!(differences(&runs)[0], ("new", vec![Some("x"), None]));
        assert_eq!(to_json(&runs)[1]["differing"]["new"], Value::Null);
    }
}
