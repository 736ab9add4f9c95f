//! From the records of items to the scores of a task, with their errors.

use std::collections::BTreeMap;
use std::f64::consts::LN_2;

use crate::statistics::{mean, ratio};
use crate::store::Record;
use crate::task::Metric;

/// A score of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Name of the metric, as lm-evaluation-harness has it.
    pub metric: String,
    /// The mean of the items, or of their instructions; of `perplexity`, `exp` of the mean loss; of what
    /// is a loss for each word or byte, that of all items together, in bits or as `exp` of it.
    pub value: f64,
    /// Its standard error: of instructions, words and bytes, with those of an item as one cluster; of a
    /// perplexity, that of the loss times the value.
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
        if first.units.contains_key(metric) {
            return of_units(records, metric);
        }
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

/// A loss for each unit.
fn of_units(records: &[&Record], metric: &str) -> Score {
    let of =
        |record: &&Record| Some((-*record.scores.get(metric)?, *record.units.get(metric)? as f64));
    let (losses, units): (Vec<f64>, Vec<f64>) = records.iter().filter_map(of).unzip();
    let (loss, stderr) = ratio(&losses, &units);
    let (value, slope) = match metric == Metric::BitsPerByte.name() {
        true => (loss / LN_2, 1.0 / LN_2),
        false => (loss.exp(), loss.exp()),
    };
    Score { metric: metric.to_owned(), value, stderr: stderr.map(|error| error * slope) }
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
/// the instructions. So it is with words and bytes: the mean is the logarithm of the probability of one.
pub fn paired_scores(first: &[&Record], second: &[&Record], metric: &str) -> (Vec<f64>, Vec<f64>) {
    let others: BTreeMap<usize, &Record> =
        second.iter().map(|record| (record.item, *record)).collect();
    let pairs: Vec<(&Record, &Record)> =
        first.iter().filter_map(|record| Some((*record, *others.get(&record.item)?))).collect();
    let units = pairs.iter().filter_map(|(a, _)| a.units.get(metric)).map(|units| *units as f64);
    let units: Vec<f64> = units.collect();
    // Units of an item on average; where there are none, an item counts as one.
    let each = if units.is_empty() { 1.0 } else { units.iter().sum::<f64>() / units.len() as f64 };
    let plain = |(a, b): &(&Record, &Record)| {
        Some((*a.scores.get(metric)? / each, *b.scores.get(metric)? / each))
    };
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
    fn a_loss_for_each_unit_is_that_of_all_items_together() {
        let page = |item: usize, log: f64, words: usize| {
            let name = |value| BTreeMap::from([("word_perplexity".to_owned(), value)]);
            let units = BTreeMap::from([("word_perplexity".to_owned(), words)]);
            Record { item, scores: name(log), units, ..Record::default() }
        };
        let records = [page(0, -30.0, 10), page(1, -4.0, 7)];
        let records: Vec<&Record> = records.iter().collect();
        let score = Summary::of(&records).scores.remove(0);
        assert!((score.value - 2f64.exp()).abs() < 1e-12);
        // Residuals of the pages: 10 and -10.
        assert!((score.stderr.unwrap() - 20.0 / 17.0 * 2f64.exp()).abs() < 1e-12);
        let better = [page(0, -13.0, 10), page(1, -4.0, 7)];
        let better: Vec<&Record> = better.iter().collect();
        let (x, y) = paired_scores(&records, &better, "word_perplexity");
        let of = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
        assert!((of(&x) + 2.0).abs() < 1e-12 && (of(&y) + 1.0).abs() < 1e-12);
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
