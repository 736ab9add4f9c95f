//! The page: head, summary, curves, layers, samples.

use std::fmt::Write;

use crate::chart::color;
use crate::text::{count, escape, percent, short, significant};
use crate::{Run, Summary, curves, evaluations, layers, samples, summary};

/// One HTML page about these runs, with everything it needs inside.
pub fn page(runs: &[Run]) -> String {
    let title = match runs {
        [run] => run.name.clone(),
        runs => format!("{} runs", runs.len()),
    };
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title} \u{b7} \
         Trine</title><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><meta \
         name=\"color-scheme\" content=\"light dark\"><meta http-equiv=\"Content-Security-Policy\" \
         content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\
         <style>{}</style></head><body><header><p>Training report</p><h1>{title}</h1></header>\n",
        include_str!("style.css"),
        title = escape(&title),
    );
    out.push_str(&notes(runs));
    let summaries: Vec<Summary> = runs.iter().map(Summary::of).collect();
    match (runs, summaries.as_slice()) {
        ([run], [summary]) => out.push_str(&tiles(run, summary)),
        _ => {
            out.push_str(&table(&summaries));
            out.push_str(&differences(runs));
            out.push_str(&legend(runs));
        }
    }
    let charts = |title: &str, body: String| match body.as_str() {
        "" => String::new(),
        _ => section(title, &format!("<div class=\"charts\">{body}</div>")),
    };
    out.push_str(&charts("Training", curves::training(runs)));
    out.push_str(&charts("Trits", curves::ternary(runs)));
    out.push_str(&section("Evaluations", &evaluations::html(runs)));
    out.push_str(&section("Layers", &layers::html(runs)));
    out.push_str(&section("Samples", &samples::html(runs)));
    out.push_str(&configuration(runs));
    let _ = writeln!(out, "<script>{}</script></body></html>", include_str!("script.js"));
    out
}

/// A part of the page; nothing where it has no body.
fn section(title: &str, body: &str) -> String {
    if body.is_empty() {
        return String::new();
    }
    format!("<section><h2>{title}</h2>{body}</section>\n")
}

/// What a reader has to know before the numbers.
fn notes(runs: &[Run]) -> String {
    let mut out = String::new();
    for run in runs {
        let name = escape(&run.name);
        if run.updates.is_empty() {
            let _ = write!(out, "<p class=\"note\">{name} has not made a step yet.</p>");
        }
        if run.damaged_lines > 0 {
            let lines = if run.damaged_lines == 1 { "line" } else { "lines" };
            let _ = write!(
                out,
                "<p class=\"note\">{name}: {} {lines} of metrics.jsonl could not be read and \
                 were passed over.</p>",
                count(run.damaged_lines as u64)
            );
        }
    }
    out
}

fn number(value: Option<f64>, show: impl Fn(f64) -> String) -> String {
    value.map_or("\u{2013}".to_owned(), show)
}

fn loss(value: f64) -> String {
    significant(value, 4)
}

/// How far a run has come: steps and, before its end, a bar.
fn progress(summary: &Summary) -> String {
    let step = count(summary.step);
    match summary.steps {
        Some(steps) if summary.step < steps => {
            let percent = 100.0 * summary.step as f64 / steps as f64;
            format!(
                "{step} <small>of {}</small><i class=\"bar\"><i style=\"width:{percent:.1}%\"></i></i>",
                count(steps)
            )
        }
        _ => step,
    }
}

/// The numbers of a single run.
fn tiles(run: &Run, summary: &Summary) -> String {
    let mut out = String::from("<div class=\"tiles\">");
    let mut tile = |name: &str, value: String, note: String| {
        if value != "\u{2013}" {
            let note = if note.is_empty() { note } else { format!("<small>{note}</small>") };
            let _ = write!(out, "<div><span>{name}</span><b>{value}</b>{note}</div>");
        }
    };
    let best = summary.best_val_loss.filter(|best| Some(*best) != summary.val_loss);
    let best = best.map_or(String::new(), |best| format!("best {}", loss(best)));
    tile("Validation loss", number(summary.val_loss, loss), best);
    tile("Training loss", number(summary.train_loss, loss), "mean of the last updates".to_owned());
    tile(
        "Steps",
        progress(summary),
        match summary.events {
            0 => String::new(),
            1 => "1 event".to_owned(),
            n => format!("{n} events"),
        },
    );
    tile("Tokens", number(summary.tokens, short), String::new());
    tile("Parameters", number(summary.parameters, short), String::new());
    let machine = |key: &str| {
        run.about.get(key).map(|value| match value.as_str() {
            Some(text) => text.to_owned(),
            None => value.to_string(),
        })
    };
    let on = match (machine("threads"), machine("isa")) {
        (Some(threads), Some(isa)) => format!("{threads} threads, {isa}"),
        _ => String::new(),
    };
    tile("Tokens per second", number(summary.tokens_per_second, short), escape(&on));
    tile("Zeros", number(summary.zero, percent), "of all trits".to_owned());
    tile("Flips", number(summary.flips_by_update, percent), "of trits, by one update".to_owned());
    out.push_str("</div>\n");
    out
}

/// The numbers of several runs; the best losses stand out.
fn table(summaries: &[Summary]) -> String {
    let best =
        |field: fn(&Summary) -> Option<f64>| summaries.iter().filter_map(field).reduce(f64::min);
    let (val, train) = (best(|s| s.val_loss), best(|s| s.train_loss));
    let mut out = String::from(
        "<div class=\"wide\"><table><thead><tr><th>Run<th>Validation loss<th>best<th>Training loss\
         <th>Steps<th>Tokens<th>Parameters<th>Tokens/s<th>Zeros<th>Flips</tr></thead><tbody>",
    );
    for (index, s) in summaries.iter().enumerate() {
        let cell = |value: Option<f64>, best: Option<f64>| {
            let class = if value.is_some() && value == best { " class=\"best\"" } else { "" };
            format!("<td{class}>{}", number(value, loss))
        };
        let _ = write!(
            out,
            "<tr data-run=\"{index}\"><th><i class=\"chip {}\"></i>{}{}{}{}<td>{}<td>{}<td>{}<td>{}\
             <td>{}<td>{}</tr>",
            color(index),
            escape(&s.name),
            cell(s.val_loss, val),
            cell(s.best_val_loss, None),
            cell(s.train_loss, train),
            progress(s),
            number(s.tokens, short),
            number(s.parameters, short),
            number(s.tokens_per_second, short),
            number(s.zero, percent),
            number(s.flips_by_update, percent),
        );
    }
    out.push_str("</tbody></table></div>\n");
    out
}

/// Where configurations differ; what most runs have is quiet.
fn differences(runs: &[Run]) -> String {
    let keys = summary::differences(runs);
    if keys.is_empty() {
        return "<p class=\"quiet\">All configurations are the same.</p>".to_owned();
    }
    let mut out = String::from(
        "<h3>Differences in configuration</h3><div class=\"wide\"><table class=\"config\"><thead>\
         <tr><th>Key",
    );
    for (index, run) in runs.iter().enumerate() {
        let (class, name) = (color(index), escape(&run.name));
        let _ = write!(out, "<th data-run=\"{index}\"><i class=\"chip {class}\"></i>{name}");
    }
    out.push_str("</tr></thead><tbody>");
    for (key, values) in keys {
        let _ = write!(out, "<tr><th>{}", escape(key));
        let times = |value: &Option<&str>| values.iter().filter(|v| *v == value).count();
        let usual = |value: &Option<&str>| 2 * times(value) > values.len();
        let any = values.iter().any(usual);
        for (index, value) in values.iter().enumerate() {
            let class = match (any, usual(value)) {
                (_, true) => "",
                (true, false) => " class=\"other\"",
                (false, false) => " class=\"own\"",
            };
            let shown = value.map_or("\u{2013}".to_owned(), escape);
            let _ = write!(out, "<td{class} data-run=\"{index}\">{shown}");
        }
        out.push_str("</tr>");
    }
    out.push_str("</tbody></table></div>\n");
    out
}

/// Switches of the runs.
fn legend(runs: &[Run]) -> String {
    let button = |(index, run): (usize, &Run)| {
        let (class, name) = (color(index), escape(&run.name));
        format!(
            "<button type=\"button\" aria-pressed=\"true\" data-toggle=\"{index}\"><i class=\"chip \
             {class}\"></i>{name}</button>"
        )
    };
    let buttons: String = runs.iter().enumerate().map(button).collect();
    format!("<nav class=\"runs\">{buttons}</nav>\n")
}

/// All keys of all configurations, folded up.
fn configuration(runs: &[Run]) -> String {
    let mut out = String::new();
    for run in runs {
        let about = run.about.as_object().into_iter().flatten();
        let about = about.map(|(key, value)| match value.as_str() {
            Some(text) => (key.clone(), text.to_owned()),
            None => (key.clone(), value.to_string()),
        });
        let pairs = run.config.clone().into_iter().chain(about);
        let rows: String = pairs
            .map(|(key, value)| format!("<dt>{}</dt><dd>{}</dd>", escape(&key), escape(&value)))
            .collect();
        let _ = write!(
            out,
            "<details class=\"all\"><summary>{} <span>{}</span></summary><dl>{rows}</dl></details>",
            escape(&run.name),
            escape(&run.path.display().to_string())
        );
    }
    section("Configuration", &out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::{Event, Samples, Update};

    fn run(name: &str, steps: u64) -> Run {
        let update = |step| Update { step, loss: Some(9.0 / step as f64), ..Update::default() };
        Run {
            name: name.to_owned(),
            config: [("train.steps".to_owned(), "40".to_owned())].into(),
            updates: (1..=steps).map(update).collect(),
            validations: vec![(steps, 0.5)],
            events: vec![Event { step: 2, kind: "spike".to_owned() }],
            samples: vec![Samples { step: 1, texts: vec![("p".into(), "<script>".into())] }],
            ..Run::default()
        }
    }

    #[test]
    fn a_page_has_nothing_from_elsewhere_and_escapes_what_runs_say() {
        for runs in [vec![run("<a>", 30)], (0..10).map(|i| run(&format!("<{i}>"), 40)).collect()] {
            let page = page(&runs);
            assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("src="));
            assert!(!page.contains("<a>") && !page.contains("<0>") && page.contains("&lt;"));
            // One script of ours, and data in every chart.
            let scripts = page.matches("<script").count();
            assert_eq!(scripts, 1 + page.matches("<script type=\"application/json\">").count());
            assert!(page.contains("spike at step 2"));
        }
    }

    #[test]
    fn a_run_that_goes_on_says_how_far_it_is() {
        assert!(page(&[run("a", 30)]).contains("30 <small>of 40</small>"));
        assert!(!page(&[run("a", 40)]).contains("<small>of 40</small>"));
    }

    #[test]
    fn a_run_without_steps_is_a_page_that_says_so() {
        let page = page(&[Run { name: "new".to_owned(), damaged_lines: 2, ..Run::default() }]);
        assert!(page.contains("new has not made a step yet") && page.contains("2 lines"));
        assert!(!page.contains("<figure"));
    }

    #[test]
    fn values_that_most_runs_have_are_quiet() {
        let mut runs = [run("a", 9), run("b", 9), run("c", 9)];
        for (run, rate) in runs.iter_mut().zip(["1", "1", "2"]) {
            run.config.insert("rate".to_owned(), rate.to_owned());
        }
        let html = differences(&runs);
        assert_eq!(html.matches("class=\"other\"").count(), 1);
        assert!(html.contains("class=\"other\" data-run=\"2\">2"), "{html}");
    }
}
