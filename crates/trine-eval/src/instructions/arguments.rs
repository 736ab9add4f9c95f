//! Arguments of an instruction, by name and type.

use fancy_regex::Regex;
use serde_json::Value;

use crate::task::Doc;

/// The arguments of one instruction.
pub(super) struct Arguments<'a>(pub(super) &'a Doc);

/// How a count is compared with a number.
#[derive(Clone, Copy, Debug)]
pub(super) enum Relation {
    LessThan,
    AtLeast,
}

impl Relation {
    pub(super) fn holds(self, count: usize, number: usize) -> bool {
        match self {
            Self::LessThan => count < number,
            Self::AtLeast => count >= number,
        }
    }
}

impl Arguments<'_> {
    fn get<T>(
        &self,
        name: &str,
        expected: &str,
        as_type: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<T, String> {
        let value = self.0.get(name).filter(|value| !value.is_null());
        value.and_then(as_type).ok_or_else(|| {
            let found = value.map_or("nothing".to_owned(), Value::to_string);
            format!("`{name}`: expected {expected}, found {found}")
        })
    }

    /// A text that is not empty.
    pub(super) fn text(&self, name: &str) -> Result<String, String> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        self.get(name, "a text", |value| text(value).filter(|text| !text.is_empty()))
    }

    /// A list of texts.
    pub(super) fn texts(&self, name: &str) -> Result<Vec<String>, String> {
        self.get(name, "a list of texts", |value| {
            value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect()
        })
    }

    /// A count. JSON that went through pandas may have it as `3.0`.
    pub(super) fn number(&self, name: &str) -> Result<usize, String> {
        self.get(name, "a number from 0", |value| {
            let whole = value.as_f64().filter(|n| n.fract() == 0.0 && (0.0..1e9).contains(n))?;
            Some(whole as usize)
        })
    }

    /// How to compare.
    pub(super) fn relation(&self, name: &str) -> Result<Relation, String> {
        self.get(name, "\"less than\" or \"at least\"", |value| match value.as_str()? {
            "less than" => Some(Relation::LessThan),
            "at least" => Some(Relation::AtLeast),
            _ => None,
        })
    }
}

/// An expression made of an argument, which may itself be one.
pub(super) fn regex(pattern: &str) -> Result<Regex, String> {
    Regex::new(pattern).map_err(|error| format!("`{pattern}`: {error}"))
}

/// Whether an expression matches somewhere; one that gives up does not.
pub(super) fn found(regex: &Regex, text: &str) -> bool {
    regex.is_match(text).unwrap_or(false)
}

/// Matches that do not overlap.
pub(super) fn matches<'t>(regex: &Regex, text: &'t str) -> Vec<&'t str> {
    regex.find_iter(text).flatten().map(|found| found.as_str()).collect()
}
