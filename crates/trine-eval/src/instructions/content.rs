//! Things that an answer has to contain: placeholders, a postscript.

use std::sync::{Arc, LazyLock};

use fancy_regex::Regex;

use super::arguments::{Arguments, found, matches, regex};
use super::{Check, python};

/// Text in brackets, on one line.
static PLACEHOLDER: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\[.*?\]").expect("a pattern that a test compiles"));

/// At least so many placeholders like `[address]`.
pub(super) fn number_placeholders(arguments: &Arguments<'_>) -> Result<Check, String> {
    let number = arguments.number("num_placeholders")?;
    Ok(Arc::new(move |text| matches(&PLACEHOLDER, text).len() >= number))
}

/// A postscript. Of the two usual markers any spelling will do; another is a regular expression.
pub(super) fn postscript(arguments: &Arguments<'_>) -> Result<Check, String> {
    let marker = arguments.text("postscript_marker")?;
    let pattern = match python::strip(&marker) {
        "P.P.S" => r"p\.\s?p\.\s?s".to_owned(),
        "P.S." => r"p\.\s?s\.".to_owned(),
        other => other.to_lowercase(),
    };
    let pattern = regex(&pattern)?;
    Ok(Arc::new(move |text| found(&pattern, &text.to_lowercase())))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::instruction;

    #[test]
    fn brackets_close_on_their_line() {
        let arguments = json!({ "num_placeholders": 2 });
        let two = instruction("detectable_content:number_placeholders", arguments);
        assert!(two.followed("[a] and [b]") && two.followed("[] []"));
        assert!(!two.followed("[a] [b\nc]"));
    }

    #[test]
    fn postscripts_are_found_by_their_marker() {
        let check = |marker: &str| {
            instruction("detectable_content:postscript", json!({ "postscript_marker": marker }))
        };
        assert!(
            check("P.S.").followed("Yours.\np. s. I am") && !check("P.S.").followed("PS: I am")
        );
        assert!(check("P.P.S").followed("P.P. S more") && !check("P.P.S").followed("P.S. more"));
        assert!(check("NB").followed("nb. so"));
    }
}
