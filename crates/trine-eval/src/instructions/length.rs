//! How much an answer has: sentences, paragraphs, words.

use std::sync::{Arc, LazyLock};

use fancy_regex::Regex;

use super::arguments::{Arguments, matches};
use super::sentences::sentences;
use super::{Check, python};

/// A word is made of letters, digits and `_`: Python's `\w`, to which, unlike Rust's, the marks that
/// Indian scripts write vowels with do not belong.
static WORD: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"[\p{L}\p{N}_]+").expect("a pattern that a test compiles"));

/// `***` between paragraphs.
static DIVIDER: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\s?\*\*\*\s?").expect("a pattern that a test compiles"));

/// So many sentences.
pub(super) fn number_sentences(arguments: &Arguments<'_>) -> Result<Check, String> {
    let (number, relation) = (arguments.number("num_sentences")?, arguments.relation("relation")?);
    Ok(Arc::new(move |text| relation.holds(sentences(text).len(), number)))
}

/// So many words.
pub(super) fn number_words(arguments: &Arguments<'_>) -> Result<Check, String> {
    let (number, relation) = (arguments.number("num_words")?, arguments.relation("relation")?);
    Ok(Arc::new(move |text| relation.holds(matches(&WORD, text).len(), number)))
}

/// Exactly so many paragraphs with `***` between them, of which only the first and the last may be
/// empty and then are none.
pub(super) fn number_paragraphs(arguments: &Arguments<'_>) -> Result<Check, String> {
    let number = arguments.number("num_paragraphs")?;
    Ok(Arc::new(move |text| {
        let parts: Vec<bool> =
            DIVIDER.split(text).flatten().map(|part| python::strip(part).is_empty()).collect();
        let empty_within = parts.len() > 2 && parts[1..parts.len() - 1].contains(&true);
        !empty_within && parts.iter().filter(|empty| !**empty).count() == number
    }))
}

/// Exactly so many paragraphs with an empty line between them, of which one begins with a word.
///
/// The paragraphs are counted without the empty ones; which is the n-th, with them.
pub(super) fn nth_paragraph_first_word(arguments: &Arguments<'_>) -> Result<Check, String> {
    let (number, nth) = (arguments.number("num_paragraphs")?, arguments.number("nth_paragraph")?);
    let word = arguments.text("first_word")?.to_lowercase();
    if nth == 0 {
        return Err("`nth_paragraph`: expected a number from 1, found 0".to_owned());
    }
    Ok(Arc::new(move |text| {
        let paragraphs: Vec<&str> = text.split("\n\n").map(python::strip).collect();
        let full = paragraphs.iter().filter(|paragraph| !paragraph.is_empty()).count();
        full == number && nth <= full && first_word(paragraphs[nth - 1]) == word
    }))
}

/// The first word in small letters, without quotation marks before it, up to its first punctuation.
fn first_word(paragraph: &str) -> String {
    let word = paragraph.split(python::is_space).next().unwrap_or_default();
    let word = word.trim_start_matches('\'').trim_start_matches('"');
    word.split(['.', ',', '?', '!', '\'', '"']).next().unwrap_or_default().to_lowercase()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::instruction;

    #[test]
    fn words_are_pythons() {
        let words = |n: usize| {
            let arguments = json!({ "num_words": n, "relation": "at least" });
            instruction("length_constraints:number_words", arguments)
        };
        assert!(words(3).followed("don't stop") && !words(4).followed("don't stop"));
        // Two letters with a mark after each.
        assert!(words(2).followed("हिके"));
    }

    #[test]
    fn dividers_count_between_what_is_there() {
        let two =
            instruction("length_constraints:number_paragraphs", json!({ "num_paragraphs": 2 }));
        assert!(two.followed("a\n***\nb") && two.followed("***\na\n\n***\n\nb\n***"));
        assert!(!two.followed("a\n\nb") && !two.followed("a *** *** b"));
        assert!(!two.followed("a *** b *** c"));
    }

    #[test]
    fn the_nth_paragraph_begins_with_the_word() {
        let arguments = json!({ "num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Elm" });
        let check = instruction("length_constraints:nth_paragraph_first_word", arguments);
        assert!(check.followed("Oak.\n\n\"Elm's!") && check.followed("Oak\n\nELM, it is"));
        assert!(!check.followed("Elm\n\nOak") && !check.followed("Oak\n\nElm\n\nAsh"));
        // An empty one is not counted, but it is the second.
        assert!(!check.followed("Oak\n\n\n\nElm"));
        assert!(check.followed("Oak\n\nelm\n\n"));
    }
}
