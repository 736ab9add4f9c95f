//! The form of an answer: bullets, highlights, sections, titles, JSON, one of three answers.

use std::sync::{Arc, LazyLock};

use fancy_regex::Regex;
use serde::de::IgnoredAny;

use super::arguments::{Arguments, matches, regex};
use super::{Check, python};

macro_rules! pattern {
    ($pattern:literal) => {
        LazyLock::new(|| Regex::new($pattern).expect("a pattern that a test compiles"))
    };
}

/// A line that begins with one asterisk, and one that begins with a dash.
static BULLETS: [LazyLock<Regex>; 2] = [pattern!(r"(?m)^\s*\*[^\*].*$"), pattern!(r"(?m)^\s*-.*$")];
static HIGHLIGHT: LazyLock<Regex> = pattern!(r"\*[^\n\*]*\*");
static DOUBLE_HIGHLIGHT: LazyLock<Regex> = pattern!(r"\*\*[^\n\*]*\*\*");
static TITLE: LazyLock<Regex> = pattern!(r"<<[^\n]+>>");

/// The answers that a constrained response contains one of.
const ANSWERS: [&str; 3] = ["My answer is yes.", "My answer is no.", "My answer is maybe."];

/// Exactly so many bullets, of either kind.
pub(super) fn number_bullet_lists(arguments: &Arguments<'_>) -> Result<Check, String> {
    let number = arguments.number("num_bullets")?;
    let count =
        |text: &str| BULLETS.iter().map(|bullet| matches(bullet, text).len()).sum::<usize>();
    Ok(Arc::new(move |text| count(text) == number))
}

/// One of three answers, word for word, among whatever else.
pub(super) fn constrained_response(_: &Arguments<'_>) -> Result<Check, String> {
    Ok(Arc::new(|text| ANSWERS.iter().any(|answer| text.contains(answer))))
}

/// At least so many highlights, in one pair of asterisks or two, that are not empty.
pub(super) fn number_highlighted_sections(arguments: &Arguments<'_>) -> Result<Check, String> {
    let number = arguments.number("num_highlights")?;
    Ok(Arc::new(move |text| {
        let full = |inner: &&str| !python::strip(inner).is_empty();
        let single = matches(&HIGHLIGHT, text).into_iter().map(|found| found.trim_matches('*'));
        let double = matches(&DOUBLE_HIGHLIGHT, text);
        let double = double.into_iter().map(|found| &found[2..found.len() - 2]);
        single.filter(full).count() + double.filter(full).count() >= number
    }))
}

/// At least so many sections that begin with a word and a number.
pub(super) fn multiple_sections(arguments: &Arguments<'_>) -> Result<Check, String> {
    let word = arguments.text("section_spliter")?;
    let (head, number) = (
        regex(&format!(r"\s?{}\s?\d+\s?", python::strip(&word)))?,
        arguments.number("num_sections")?,
    );
    Ok(Arc::new(move |text| matches(&head, text).len() >= number))
}

/// JSON and nothing else, but for the ticks of Markdown.
pub(super) fn json_format(_: &Arguments<'_>) -> Result<Check, String> {
    Ok(Arc::new(|text| {
        let opened = ["```json", "```Json", "```JSON", "```"]
            .iter()
            .fold(python::strip(text), |text, ticks| text.strip_prefix(ticks).unwrap_or(text));
        let inner = python::strip(opened.strip_suffix("```").unwrap_or(opened));
        serde_json::from_str::<IgnoredAny>(inner).is_ok()
    }))
}

/// A title in double angular brackets.
pub(super) fn title(_: &Arguments<'_>) -> Result<Check, String> {
    Ok(Arc::new(|text| {
        let inner = |title: &str| {
            let inner = title.trim_start_matches('<').trim_end_matches('>');
            !python::strip(inner).is_empty()
        };
        matches(&TITLE, text).into_iter().any(inner)
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::instruction;

    #[test]
    fn bullets_are_counted_exactly() {
        let arguments = json!({ "num_bullets": 2 });
        let two = instruction("detectable_format:number_bullet_lists", arguments);
        assert!(two.followed("So:\n* a\n  - b") && two.followed("*a\n*b"));
        assert!(!two.followed("**a**\n* b") && !two.followed("* a\n* b\n- c"));
    }

    #[test]
    fn empty_highlights_do_not_count() {
        let arguments = json!({ "num_highlights": 2 });
        let two = instruction("detectable_format:number_highlighted_sections", arguments);
        assert!(two.followed("*a* and *b*") && two.followed("**a** and **b**"));
        assert!(!two.followed("*a* and ** **") && !two.followed("*a* *b\nc*"));
        // To one pair of asterisks, two are an empty highlight on either side: this is one.
        assert!(!two.followed("**a**"));
    }

    #[test]
    fn sections_titles_and_answers_are_found() {
        let arguments = json!({ "section_spliter": "SECTION", "num_sections": 2 });
        let two = instruction("detectable_format:multiple_sections", arguments);
        assert!(two.followed("SECTION 1 a\nSECTION2 b") && !two.followed("Section 1\nSECTION 2"));
        let title = instruction("detectable_format:title", json!({}));
        assert!(title.followed("<<a>>\nb") && !title.followed("<< >>") && !title.followed("<a>"));
        let fixed = instruction("detectable_format:constrained_response", json!({}));
        assert!(fixed.followed("Well. My answer is no.") && !fixed.followed("my answer is no."));
    }

    #[test]
    fn json_may_stand_in_ticks() {
        let json = instruction("detectable_format:json_format", json!({}));
        assert!(json.followed("```json\n{\"a\": [1, 2.5e3, null]}\n```") && json.followed("\"a\""));
        assert!(
            !json.followed("Here: {}")
                && !json.followed("{\"a\": 1,}")
                && !json.followed("```py\n1```")
        );
    }
}
