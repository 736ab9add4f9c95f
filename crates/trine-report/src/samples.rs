//! What runs wrote, by prompt: the last text of each run, and behind it the way there.

use std::collections::BTreeSet;
use std::fmt::Write;

use crate::Run;
use crate::chart::color;
use crate::text::{count, escape};

/// Most earlier texts that are shown.
const EARLIER: usize = 8;

/// The part of the page about samples; empty where nothing was written.
pub(crate) fn html(runs: &[Run]) -> String {
    let mut seen = BTreeSet::new();
    let all = runs.iter().flat_map(|run| &run.samples).flat_map(|samples| &samples.texts);
    let prompts: Vec<&str> =
        all.map(|(prompt, _)| prompt.as_str()).filter(|prompt| seen.insert(*prompt)).collect();
    let mut out = String::new();
    for prompt in prompts {
        out.push_str("<div class=\"prompt\">");
        let _ = match prompt {
            "" => write!(out, "<h3>From nothing</h3>"),
            prompt => write!(out, "<h3>\u{201c}{}\u{201d}</h3>", escape(prompt)),
        };
        for (index, run) in runs.iter().enumerate() {
            out.push_str(&of_run(run, index, prompt, runs.len() > 1));
        }
        out.push_str("</div>");
    }
    out
}

fn of_run(run: &Run, index: usize, prompt: &str, named: bool) -> String {
    let texts: Vec<(u64, &str)> = run
        .samples
        .iter()
        .filter_map(|samples| {
            let text = samples.texts.iter().find(|(p, _)| p == prompt)?;
            Some((samples.step, text.1.as_str()))
        })
        .collect();
    let Some((last, earlier)) = texts.split_last() else { return String::new() };
    let mut out = format!("<div class=\"written\" data-run=\"{index}\">");
    if named {
        let name = escape(&run.name);
        let _ = write!(out, "<h4><i class=\"chip {}\"></i>{name}</h4>", color(index));
    }
    out.push_str(&text(prompt, last));
    if !earlier.is_empty() {
        // The first, and others evenly up to the last but one.
        let n = earlier.len().min(EARLIER);
        let at = |i: usize| i * (earlier.len() - 1) / (n - 1).max(1);
        let shown: BTreeSet<usize> = (0..n).map(at).collect();
        let open = if named { "" } else { " open" };
        let _ = write!(out, "<details{open}><summary>earlier</summary>");
        shown.iter().rev().for_each(|i| out.push_str(&text(prompt, &earlier[*i])));
        out.push_str("</details>");
    }
    out.push_str("</div>");
    out
}

fn text(prompt: &str, (step, text): &(u64, &str)) -> String {
    format!(
        "<div class=\"text\"><span>step {}</span><p><em>{}</em>{}</p></div>",
        count(*step),
        escape(prompt),
        escape(text.trim_end())
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::Samples;

    #[test]
    fn texts_are_shown_by_prompt_the_last_first() {
        let samples = |step: u64| Samples {
            step,
            texts: vec![("Once".to_owned(), format!(" <{step}>")), (String::new(), "x".to_owned())],
        };
        let run = Run { samples: (1..=30).map(samples).collect(), ..Run::default() };
        let html = html(&[run]);
        let places: Vec<_> = ["&lt;30&gt;", "&lt;29&gt;", "&lt;1&gt;", "From nothing"]
            .map(|text| html.find(text).unwrap())
            .into();
        assert!(places.is_sorted(), "{places:?}");
        assert_eq!(html.matches("Once</em>").count(), EARLIER + 1);
        assert!(super::html(&[Run::default()]).is_empty());
    }
}
