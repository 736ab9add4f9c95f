//! What `trine eval` found of the checkpoints of a run: a table of the last, curves where there are
//! several.
//!
//! Each line of a run's `evaluations.jsonl` is a task on a checkpoint. A line that says nothing of the
//! kind is passed over; of two about the same, the later counts.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::chart::{Chart, Curve, color};
use crate::scale::{Kind, Unit};
use crate::text::{count, escape, percent, significant};
use crate::{ReportError, Run};

/// The file in a run directory.
const FILE: &str = "evaluations.jsonl";

/// A task on a checkpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// Update after which the checkpoint was written.
    pub step: u64,
    /// Name of the task.
    pub task: String,
    /// Answered examples before each question.
    pub shots: u64,
    /// Items that have a score.
    pub items: u64,
    /// What a model that knows nothing scores.
    pub chance: Option<f64>,
    /// Name of the score that stands for the task.
    pub headline: String,
    /// Value and standard error by metric.
    pub scores: BTreeMap<String, (f64, Option<f64>)>,
}

/// The evaluations in a run directory, by step.
///
/// # Errors
/// A file that is there and cannot be read.
pub(crate) fn read(run: &Path) -> Result<Vec<Evaluation>, ReportError> {
    let path = run.join(FILE);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(&path).map_err(|source| ReportError::Read { path, source })?;
    let lines = text.lines().filter_map(|line| serde_json::from_str(line).ok());
    let mut found = BTreeMap::new();
    for one in lines.filter_map(|line: Value| evaluation(&line)) {
        found.insert((one.step, one.task.clone(), one.shots), one);
    }
    Ok(found.into_values().collect())
}

fn evaluation(line: &Value) -> Option<Evaluation> {
    let number = |key: &str| line.get(key).and_then(Value::as_u64);
    let text = |key: &str| line.get(key).and_then(Value::as_str).map(str::to_owned);
    let score = |(name, found): (&String, &Value)| {
        let value = found.get("value")?.as_f64()?;
        Some((name.clone(), (value, found.get("stderr").and_then(Value::as_f64))))
    };
    Some(Evaluation {
        step: number("step")?,
        task: text("task")?,
        shots: number("shots")?,
        items: number("scored")?,
        chance: line.get("chance").and_then(Value::as_f64),
        headline: text("headline").unwrap_or_default(),
        scores: line.get("metrics")?.as_object()?.iter().filter_map(score).collect(),
    })
}

/// The part of the page about evaluations; empty where there were none.
pub(crate) fn html(runs: &[Run]) -> String {
    let table = table(runs);
    let charts: String = charts(runs).iter().filter_map(Chart::html).collect();
    match charts.as_str() {
        "" => table,
        charts => format!("<div class=\"charts\">{charts}</div>{table}"),
    }
}

/// A task with its number of examples.
type Asked<'a> = (&'a str, u64);

fn asked(runs: &[Run]) -> Vec<Asked<'_>> {
    let all = runs.iter().flat_map(|run| &run.evaluations);
    let all: std::collections::BTreeSet<Asked<'_>> =
        all.map(|one| (one.task.as_str(), one.shots)).collect();
    all.into_iter().collect()
}

/// Of a run, by step.
fn of<'a>(
    run: &'a Run,
    (task, shots): Asked<'a>,
) -> impl DoubleEndedIterator<Item = &'a Evaluation> {
    run.evaluations.iter().filter(move |one| one.task == task && one.shots == shots)
}

/// The last evaluation of every run by every metric.
fn table(runs: &[Run]) -> String {
    let mut rows = String::new();
    for asked in asked(runs) {
        let last: Vec<Option<&Evaluation>> =
            runs.iter().map(|run| of(run, asked).next_back()).collect();
        let metrics = last.iter().flatten().flat_map(|one| one.scores.keys());
        let metrics: std::collections::BTreeSet<&String> = metrics.collect();
        for metric in metrics {
            let chance = last.iter().flatten().find_map(|one| one.chance);
            let chance = chance.filter(|_| metric.starts_with("acc"));
            let _ = write!(
                rows,
                "<tr><th>{}<td>{}<td>{}<td>{}",
                escape(asked.0),
                asked.1,
                escape(metric),
                chance.map_or("\u{2013}".to_owned(), percent)
            );
            for (index, one) in last.iter().enumerate() {
                let score = one.and_then(|one| Some((one, one.scores.get(metric)?)));
                let shown = score.map(|(one, (value, error))| {
                    let error =
                        error.map_or(String::new(), |e| format!(" \u{b1} {}", show(metric, e)));
                    format!(
                        "{}{error} <small>step {}, {} items</small>",
                        show(metric, *value),
                        count(one.step),
                        count(one.items)
                    )
                });
                let shown = shown.unwrap_or_else(|| "\u{2013}".to_owned());
                let _ = write!(rows, "<td data-run=\"{index}\">{shown}");
            }
            rows.push_str("</tr>");
        }
    }
    if rows.is_empty() {
        return rows;
    }
    let mut head = String::new();
    for (index, run) in runs.iter().enumerate() {
        let (class, name) = (color(index), escape(&run.name));
        let _ = write!(head, "<th data-run=\"{index}\"><i class=\"chip {class}\"></i>{name}");
    }
    format!(
        "<div class=\"wide\"><table><thead><tr><th>Task<th>Examples<th>Score<th>Chance{head}</tr>\
         </thead><tbody>{rows}</tbody></table></div>"
    )
}

fn show(metric: &str, value: f64) -> String {
    if is_share(metric) { percent(value) } else { significant(value, 4) }
}

/// Whether a metric is a share, and no loss or perplexity.
fn is_share(metric: &str) -> bool {
    !metric.ends_with("perplexity") && metric != "bits_per_byte"
}

/// The score that stands for a task over the steps, where a run has it at several.
fn charts(runs: &[Run]) -> Vec<Chart<'_>> {
    let end = runs.iter().map(Run::step).max().unwrap_or(0) as f64;
    let chart = |asked: Asked<'_>| {
        let curve = |(index, run): (usize, &Run)| {
            let point =
                |one: &Evaluation| Some((one.step as f64, one.scores.get(&one.headline)?.0));
            let points = of(run, asked).filter_map(point).collect();
            Curve { name: run.name.clone(), index, points, raw: Vec::new() }
        };
        let curves: Vec<Curve> = runs.iter().enumerate().map(curve).collect();
        curves.iter().any(|curve| curve.points.len() > 1).then_some(curves)
    };
    asked(runs)
        .into_iter()
        .filter_map(|(task, shots)| {
            let curves = chart((task, shots))?;
            let first = runs.iter().find_map(|run| of(run, (task, shots)).next())?;
            let unit = if is_share(&first.headline) { Unit::Share } else { Unit::Number };
            Some(Chart {
                title: task,
                note: &first.headline,
                x: "step",
                xs: [0.0, end],
                wide: false,
                kind: Kind::Linear,
                unit,
                dots: true,
                runs: true,
                curves,
                marks: Vec::new(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, scores: &[(u64, f64)]) -> Run {
        let dir = tempfile::tempdir().unwrap();
        let line = |(step, acc): &(u64, f64)| {
            serde_json::json!({
                "step": step, "task": "arc_easy", "version": 1, "shots": 0, "items": 30,
                "scored": 29, "chance": 0.25, "headline": "acc",
                "metrics": { "acc": { "value": acc, "stderr": 0.05 } },
            })
            .to_string()
                + "\n"
        };
        let text = scores.iter().map(line).collect::<String>() + "{}\nnothing\n{\"step\": 3";
        fs::write(dir.path().join(FILE), text).unwrap();
        let evaluations = read(dir.path()).unwrap();
        Run { name: name.to_owned(), evaluations, ..Run::default() }
    }

    #[test]
    fn the_last_evaluation_stands_in_the_table() {
        let runs =
            [run("a<", &[(10, 0.3), (20, 0.5), (20, 0.4)]), run("b", &[]), run("c", &[(5, 0.2)])];
        assert_eq!(runs[0].evaluations.len(), 2);
        let html = html(&runs);
        for part in
            ["40.0\u{202f}% \u{b1} 5.00\u{202f}%", "step 20, 29 items", "25.0\u{202f}%", "a&lt;"]
        {
            assert!(html.contains(part), "{part}: {html}");
        }
        assert_eq!(html.matches("<tr>").count(), 2);
    }

    #[test]
    fn there_is_a_curve_where_there_are_several_checkpoints() {
        assert!(!html(&[run("a", &[(10, 0.3)])]).contains("<figure"));
        assert!(html(&[run("a", &[(10, 0.3), (20, 0.4)])]).contains("<figure"));
        assert!(html(&[run("a", &[])]).is_empty() && html(&[Run::default()]).is_empty());
    }
}
