//! From the records of items to the scores of a task, with their errors.

use std::collections::BTreeMap;

use crate::statistics::{mean, ratio};
use crate::store::Record;

/// A score of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Name of the metric, as lm-evaluation-harness has it.
    pub metric: String,
    /// The mean of the items, or of their instructions; of `perplexity`, `exp` of the mean loss.
    pub value: f64,
    /// Its standard error: of instructions, with those of an item as one cluster; of `perplexity`, that
    /// of the mean loss times the value.
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
            summary.chance = Some(mean(&chances).0);
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
        let (mean, stderr) = mean(&items);
        let (value, stderr) = match metric == "perplexity" {
            true => ((-mean).exp(), stderr.map(|error| error * (-mean).exp())),
            false => (mean, stderr),
        };
        Score { metric: metric.clone(), value, stderr }
    };
    let of_parts = |metric: &String| {
        let parts = records.iter().filter_map(|record| counts(record, metric));
        let (followed, all): (Vec<f64>, Vec<f64>) = parts.unzip();
        let (value, stderr) = ratio(&followed, &all);
        Score { metric: metric.clone(), value, stderr }
    };
    first.scores.keys().map(of).chain(first.followed.keys().map(of_parts)).collect()
}

/// Of an item: how many of its instructions were followed, and how many it has.
fn counts(record: &Record, metric: &str) -> Option<(f64, f64)> {
    let all = record.followed.get(metric)?;
    Some((all.iter().filter(|followed| **followed).count() as f64, all.len() as f64))
}

/// The scores by `metric` of the items that both models were scored on, in pairs.
///
/// Where the metric is a mean over instructions, an item stands for all of its own: their number that
/// was followed, over the instructions an item has on average. So the mean of these scores is that of
/// the instructions.
pub fn paired_scores(first: &[&Record], second: &[&Record], metric: &str) -> (Vec<f64>, Vec<f64>) {
    let others: BTreeMap<usize, &Record> =
        second.iter().map(|record| (record.item, *record)).collect();
    let pairs: Vec<(&Record, &Record)> =
        first.iter().filter_map(|record| Some((*record, *others.get(&record.item)?))).collect();
    let plain =
        |(a, b): &(&Record, &Record)| Some((*a.scores.get(metric)?, *b.scores.get(metric)?));
    let (x, y): (Vec<f64>, Vec<f64>) = pairs.iter().filter_map(plain).unzip();
    if !x.is_empty() {
        return (x, y);
    }
    let parts = |(a, b): &(&Record, &Record)| Some((counts(a, metric)?, counts(b, metric)?));
    let parts: Vec<_> = pairs.iter().filter_map(parts).collect();
    let mean = parts.iter().map(|((_, all), _)| all).sum::<f64>() / parts.len() as f64;
    parts.into_iter().map(|((a, _), (b, _))| (a / mean, b / mean)).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(item: usize, followed: &[bool]) -> Record {
        let followed = BTreeMap::from([("inst".to_owned(), followed.to_vec())]);
        let scores = BTreeMap::from([("prompt".to_owned(), 0.0)]);
        Record { item, followed, scores, ..Record::default() }
    }

    #[test]
    fn instructions_are_counted_one_by_one() {
        let records = [record(0, &[true]), record(1, &[false, false, true]), record(2, &[true])];
        let records: Vec<&Record> = records.iter().collect();
        let summary = Summary::of(&records);
        assert_eq!(summary.scored, 3);
        let score = &summary.scores[1];
        // Three of five, where the mean of the items' shares would be seven ninths.
        assert!(score.metric == "inst" && (score.value - 0.6).abs() < 1e-12);
        // Residuals of the clusters: 0.4, -0.8, 0.4.
        let expected = (0.96f64 * 3.0 / 2.0).sqrt() / 5.0;
        assert!((score.stderr.unwrap() - expected).abs() < 1e-12);
    }

    #[test]
    fn pairs_differ_as_their_scores_do() {
        let a = [record(0, &[true]), record(1, &[false, false, true]), record(3, &[true])];
        let b = [record(1, &[true, false, true]), record(0, &[false]), record(4, &[true])];
        let (a, b): (Vec<&Record>, Vec<&Record>) = (a.iter().collect(), b.iter().collect());
        let (x, y) = paired_scores(&a, &b, "inst");
        assert_eq!((x.clone(), y.clone()), (vec![0.5, 0.5], vec![0.0, 1.0]));
        let of = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
        assert_eq!((of(&x), of(&y)), (2.0 / 4.0, 2.0 / 4.0));
        assert_eq!(paired_scores(&a, &b, "prompt"), (vec![0.0; 2], vec![0.0; 2]));
    }
}
