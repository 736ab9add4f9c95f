//! What came of an evaluation, as Markdown for people.

use serde_json::json;
use trine_eval::{Metric, Reference, Score, Task, task_names};

use super::Args;
use super::results::{Compared, ModelResults, TaskResults, compare};
use super::text::TextResults;
use crate::output;

/// Rows and columns that become a Markdown table.
struct Table(Vec<Vec<String>>);

impl Table {
    fn new(header: &[&str]) -> Self {
        Self(vec![header.iter().map(|name| (*name).to_owned()).collect()])
    }

    fn print(&self) -> anyhow::Result<()> {
        if self.0.len() == 1 {
            return Ok(());
        }
        let columns = self.0[0].len();
        let width = |c: usize| self.0.iter().map(|row| row[c].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |cells: &[String]| {
            let cells: Vec<_> =
                cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            format!("| {} |", cells.join(" | "))
        };
        let rule: Vec<String> = widths.iter().map(|width| "-".repeat((*width).max(3))).collect();
        let rows = self.0[1..].iter().map(|row| line(row));
        let lines: Vec<String> = [line(&self.0[0]), line(&rule)].into_iter().chain(rows).collect();
        output::print_line(&(lines.join("\n") + "\n"))
    }
}

/// The built-in tasks.
pub(super) fn list(as_json: bool) -> anyhow::Result<()> {
    let tasks = task_names().map(Task::open).collect::<Result<Vec<_>, _>>()?;
    let metrics = |task: &Task| task.metrics().iter().map(|m| m.name()).collect::<Vec<_>>();
    if as_json {
        let task = |task: &Task| {
            json!({
                "name": task.name(), "version": task.version(), "kind": task.kind().name(),
                "metrics": metrics(task), "shots": task.shots(), "lm_eval_task": task.harness(),
                "files": task.files(), "source": task.source(),
            })
        };
        let all: Vec<_> = tasks.iter().map(task).collect();
        return output::print_line(&json!(all).to_string());
    }
    let header =
        ["task", "version", "kind", "metrics", "shots", "as lm-evaluation-harness'", "files"];
    let mut table = Table::new(&header);
    for task in &tasks {
        table.0.push(vec![
            task.name().to_owned(),
            task.version().to_string(),
            task.kind().name().to_owned(),
            metrics(task).join(", "),
            task.shots().to_string(),
            task.harness().unwrap_or("-").to_owned(),
            task.files().join(" or "),
        ]);
    }
    table.print()
}

/// The tables of one or two models.
pub(super) fn print(models: &[ModelResults], args: &Args) -> anyhow::Result<()> {
    texts(models)?;
    tasks(models, args.reference)?;
    if let [a, b] = models {
        comparison(a, b, args.seed)?;
    }
    if args.reference && models.iter().any(|model| !model.tasks.is_empty()) {
        let title = Reference::bitnet_2b4t().title;
        output::print_line(&format!(
            "Reference columns: {title}, with the examples that stand in parentheses where they differ."
        ))?;
    }
    Ok(())
}

fn texts(models: &[ModelResults]) -> anyhow::Result<()> {
    let header = [
        "model",
        "text",
        "bits per byte",
        "perplexity: token",
        "word",
        "byte",
        "tokens",
        "words",
        "bytes",
        "window/stride",
    ];
    let mut table = Table::new(&header);
    for model in models {
        for TextResults { path, found, windows } in &model.texts {
            let count = |n: usize| output::count(n as u64);
            table.0.push(vec![
                model.name(),
                path.display().to_string(),
                format!("{:.4}", found.bits_per_byte()),
                large(found.token()),
                large(found.word()),
                format!("{:.4}", found.byte()),
                count(found.tokens),
                count(found.size.words),
                count(found.size.bytes),
                format!("{}/{}", windows.window, windows.stride),
            ]);
        }
    }
    table.print()
}

/// A perplexity, which of a bad model has many digits.
fn large(value: f64) -> String {
    if value < 1e6 { format!("{value:.3}") } else { format!("{value:.3e}") }
}

fn tasks(models: &[ModelResults], reference: bool) -> anyhow::Result<()> {
    let known = reference.then(Reference::bitnet_2b4t);
    let mut header =
        vec!["model", "task", "version", "shots", "items", "metric", "score", "± error", "chance"];
    if let Some(known) = &known {
        header.extend(known.models.iter().map(|name| &name[..]));
    }
    let mut table = Table::new(&header);
    for model in models {
        for task in &model.tasks {
            for score in &task.summary.scores {
                let mut row = row(model, task, score);
                if let Some(known) = &known {
                    row.extend(beside(known, task, score));
                }
                table.0.push(row);
            }
        }
    }
    table.print()?;
    for model in models {
        for task in &model.tasks {
            remarks(model, task)?;
        }
    }
    Ok(())
}

fn row(model: &ModelResults, task: &TaskResults, score: &Score) -> Vec<String> {
    let number = |value: f64| match &score.metric[..] {
        name if Metric::is_share(name) => format!("{:.2} %", 100.0 * value),
        "byte_perplexity" | "bits_per_byte" => format!("{value:.4}"),
        _ => large(value),
    };
    let chance = task.summary.chance.filter(|_| score.metric.starts_with("acc"));
    vec![
        model.name(),
        task.name.clone(),
        task.version.to_string(),
        task.shots.to_string(),
        output::count(task.summary.scored as u64),
        score.metric.clone(),
        number(score.value),
        score.stderr.map_or("-".to_owned(), number),
        chance.map_or("-".to_owned(), number),
    ]
}

/// Cells of the report, beside the score that stands for the task.
fn beside(known: &Reference, task: &TaskResults, score: &Score) -> Vec<String> {
    let row = known.scores.get(&task.name);
    let Some(row) = row.filter(|_| task.headline() == Some(&score.metric)) else {
        return vec![String::new(); known.models.len()];
    };
    let shots = match row.shots == task.shots {
        true => String::new(),
        false => format!(" ({})", row.shots),
    };
    row.values.iter().map(|value| format!("{value:.2}{shots}")).collect()
}

/// What was left out or cut, and the scores of groups.
fn remarks(model: &ModelResults, task: &TaskResults) -> anyhow::Result<()> {
    let summary = &task.summary;
    let mut said = Vec::new();
    for (why, count) in &summary.skipped {
        said.push(format!("{} left out ({why})", output::count(*count as u64)));
    }
    if summary.cut > 0 {
        said.push(format!("{} begin later than they should (cut to the context)", summary.cut));
    }
    if !said.is_empty() {
        let (name, items) = (&task.name, output::count(summary.items as u64));
        let path = model.name();
        output::print_line(&format!("{path}, {name}: of {items} items {}.\n", said.join(", ")))?;
    }
    let mut table = Table::new(&["model", "task", "group", "items", "metric", "score", "± error"]);
    for (name, (items, scores)) in &summary.groups {
        for score in scores {
            table.0.push(vec![
                model.name(),
                task.name.clone(),
                output::printable(name),
                output::count(*items as u64),
                score.metric.clone(),
                format!("{:.2} %", 100.0 * score.value),
                score.stderr.map_or("-".to_owned(), |error| format!("{:.2} %", 100.0 * error)),
            ]);
        }
    }
    table.print()
}

fn comparison(a: &ModelResults, b: &ModelResults, seed: u64) -> anyhow::Result<()> {
    let header =
        ["second less first", "metric", "items", "difference", "± error", "95 % interval", "p"];
    let mut table = Table::new(&header);
    for (a, b) in a.tasks.iter().zip(&b.tasks) {
        for Compared { metric, items, difference } in compare(a, b, seed)? {
            // Differences of log-likelihoods are in nats.
            let (factor, unit) =
                if Metric::is_share(&metric) { (100.0, "%") } else { (1.0, "nat") };
            let number = |value: f64| format!("{:+.2} {unit}", factor * value);
            let interval = difference.interval;
            table.0.push(vec![
                a.name.clone(),
                metric,
                output::count(items as u64),
                number(difference.mean),
                difference.stderr.map_or("-".to_owned(), |e| format!("{:.2} {unit}", factor * e)),
                format!("{} to {}", number(interval.0), number(interval.1)),
                format!("{:.4}", difference.p),
            ]);
        }
    }
    table.print()
}
