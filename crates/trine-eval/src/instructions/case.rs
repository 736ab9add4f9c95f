//! Capitals and small letters.

use std::sync::Arc;

use super::arguments::Arguments;
use super::language::is_in;
use super::words::words;
use super::{Check, python};

/// So many words in capitals. A hyphen joins words to one.
pub(super) fn capital_word_frequency(arguments: &Arguments<'_>) -> Result<Check, String> {
    let (number, relation) =
        (arguments.number("capital_frequency")?, arguments.relation("capital_relation")?);
    let capitals = |text: &str| words(text).iter().filter(|word| python::is_upper(word)).count();
    Ok(Arc::new(move |text| relation.holds(capitals(text), number)))
}

/// English in capitals throughout.
pub(super) fn english_capital(_: &Arguments<'_>) -> Result<Check, String> {
    Ok(Arc::new(|text| python::is_upper(text) && is_in(text, "en")))
}

/// English without a capital.
pub(super) fn english_lowercase(_: &Arguments<'_>) -> Result<Check, String> {
    Ok(Arc::new(|text| python::is_lower(text) && is_in(text, "en")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::instruction;

    #[test]
    fn capital_words_are_counted() {
        let arguments = json!({ "capital_frequency": 2, "capital_relation": "at least" });
        let two = instruction("change_case:capital_word_frequency", arguments);
        assert!(two.followed("I am NOT.") && two.followed("CANNOT") && two.followed("DON'T go"));
        assert!(!two.followed("A-B c") && !two.followed("One Two 34"));
    }

    #[test]
    fn every_letter_has_the_case_and_english_is_asked_for() {
        let capital = instruction("change_case:english_capital", json!({}));
        assert!(capital.followed("THE HARBOUR WAS QUIET IN THE MORNING, AND NOBODY SPOKE."));
        assert!(!capital.followed("THE HARBOUR WAS QUIET IN THE MORNING, AND NOBODY SPOKe."));
        let small = instruction("change_case:english_lowercase", json!({}));
        assert!(small.followed("the harbour was quiet in the morning, and nobody spoke."));
        assert!(!small.followed("am morgen war der hafen still, und niemand sprach ein wort."));
    }
}
