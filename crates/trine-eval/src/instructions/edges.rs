//! How an answer begins and ends, and whether it has commas.

use std::sync::Arc;

use super::arguments::Arguments;
use super::{Check, python};

/// It ends with a phrase, whatever its capitals and quotation marks.
pub(super) fn end_checker(arguments: &Arguments<'_>) -> Result<Check, String> {
    let phrase = arguments.text("end_phrase")?;
    let phrase = python::strip(&phrase).to_lowercase();
    Ok(Arc::new(move |text| {
        python::strip(text).trim_matches('"').to_lowercase().ends_with(&phrase)
    }))
}

/// It stands in double quotation marks.
pub(super) fn quotation(_: &Arguments<'_>) -> Result<Check, String> {
    Ok(Arc::new(|text| {
        let text = python::strip(text);
        text.len() > 1 && text.starts_with('"') && text.ends_with('"')
    }))
}

/// It has no comma.
pub(super) fn no_comma(_: &Arguments<'_>) -> Result<Check, String> {
    Ok(Arc::new(|text| !text.contains(',')))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::instruction;

    #[test]
    fn ends_are_compared_without_capitals_and_quotes() {
        let check = instruction("startend:end_checker", json!({ "end_phrase": "Any questions? " }));
        assert!(check.followed("\"So. ANY QUESTIONS?\" ") && !check.followed("Any questions? No."));
    }

    #[test]
    fn one_mark_is_no_pair() {
        let check = instruction("startend:quotation", json!({}));
        assert!(check.followed(" \"a\"\n") && check.followed("\"\""));
        assert!(!check.followed("\"") && !check.followed("\"a\" b") && !check.followed("“a”"));
    }

    #[test]
    fn a_comma_is_ascii() {
        let check = instruction("punctuation:no_comma", json!({}));
        assert!(check.followed("a、b") && !check.followed("1,000"));
    }
}
