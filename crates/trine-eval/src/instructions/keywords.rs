//! Words and letters that have to be there, or not, or so often.
//!
//! Keywords are regular expressions and capitals do not count, as in the original.

use std::sync::Arc;

use super::arguments::{Arguments, found, matches, regex};
use super::{Check, python};

/// All of some words are there, also within others.
pub(super) fn existence(arguments: &Arguments<'_>) -> Result<Check, String> {
    let words = arguments.texts("keywords")?;
    let words = words.iter().map(|word| regex(&format!("(?i){word}")));
    let words = words.collect::<Result<Vec<_>, _>>()?;
    Ok(Arc::new(move |text| words.iter().all(|word| found(word, text))))
}

/// A word is there so often, also within others.
pub(super) fn frequency(arguments: &Arguments<'_>) -> Result<Check, String> {
    let word = regex(&format!("(?i){}", python::strip(&arguments.text("keyword")?)))?;
    let (number, relation) = (arguments.number("frequency")?, arguments.relation("relation")?);
    Ok(Arc::new(move |text| relation.holds(matches(&word, text).len(), number)))
}

/// None of some words is there by itself.
pub(super) fn forbidden_words(arguments: &Arguments<'_>) -> Result<Check, String> {
    let words = arguments.texts("forbidden_words")?;
    let words = words.iter().map(|word| regex(&format!(r"(?i)\b{word}\b")));
    let words = words.collect::<Result<Vec<_>, _>>()?;
    Ok(Arc::new(move |text| !words.iter().any(|word| found(word, text))))
}

/// A character is there so often. (The original replaces what is no letter by a letter of chance.)
pub(super) fn letter_frequency(arguments: &Arguments<'_>) -> Result<Check, String> {
    let letter = arguments.text("letter")?.to_lowercase();
    if letter.chars().count() != 1 {
        return Err(format!("`letter`: expected one character, found \"{letter}\""));
    }
    let (number, relation) =
        (arguments.number("let_frequency")?, arguments.relation("let_relation")?);
    Ok(Arc::new(move |text| relation.holds(text.to_lowercase().matches(&letter).count(), number)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::instruction;

    #[test]
    fn words_may_stand_in_others_unless_they_are_forbidden() {
        let check = instruction("keywords:existence", json!({ "keywords": ["dog", "day"] }));
        assert!(check.followed("Dogs on Mondays") && !check.followed("dogs"));
        let check = instruction("keywords:forbidden_words", json!({ "forbidden_words": ["dog"] }));
        assert!(check.followed("dogs") && !check.followed("A DOG."));
    }

    #[test]
    fn occurrences_are_counted_from_the_number_on_or_below_it() {
        let twice = |relation| json!({ "keyword": " it ", "frequency": 2, "relation": relation });
        let (least, less) = (
            instruction("keywords:frequency", twice("at least")),
            instruction("keywords:frequency", twice("less than")),
        );
        assert!(least.followed("It sits") && !less.followed("It sits"));
        assert!(!least.followed("It") && less.followed("It"));
        let letter = json!({ "letter": "Q", "let_frequency": 2, "let_relation": "less than" });
        let letter = instruction("keywords:letter_frequency", letter);
        assert!(letter.followed("Quiz") && !letter.followed("Quick quiz"));
    }
}
