//! Two answers instead of one, and the request before the answer.

use std::sync::Arc;

use super::arguments::Arguments;
use super::{Check, python};

/// Exactly two answers that differ, with `******` between them.
pub(super) fn two_responses(_: &Arguments<'_>) -> Result<Check, String> {
    Ok(Arc::new(|text| {
        let parts: Vec<&str> = text.split("******").map(python::strip).collect();
        let empty_within = parts.len() > 2 && parts[1..parts.len() - 1].contains(&"");
        let full: Vec<&&str> = parts.iter().filter(|part| !part.is_empty()).collect();
        !empty_within && full.len() == 2 && full[0] != full[1]
    }))
}

/// The request stands before the answer, word for word but for capitals.
pub(super) fn repeat_prompt(arguments: &Arguments<'_>) -> Result<Check, String> {
    let prompt = arguments.text("prompt_to_repeat")?;
    let prompt = python::strip(&prompt).to_lowercase();
    Ok(Arc::new(move |text| python::strip(text).to_lowercase().starts_with(&prompt)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::instruction;

    #[test]
    fn two_answers_differ() {
        let two = instruction("combination:two_responses", json!({}));
        assert!(two.followed("a\n******\nb") && two.followed("****** a ****** b ******"));
        assert!(
            !two.followed("a\n******\na")
                && !two.followed("a")
                && !two.followed("a ****** ****** b")
        );
    }

    #[test]
    fn the_request_is_repeated_first() {
        let arguments = json!({ "prompt_to_repeat": "Write. " });
        let repeat = instruction("combination:repeat_prompt", arguments);
        assert!(repeat.followed(" WRITE. Well") && !repeat.followed("Sure: Write."));
    }
}
