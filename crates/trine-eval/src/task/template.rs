//! Jinja over the fields of a record, strict: a field that is not there is an error.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, PoisonError};

use fancy_regex::Regex;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, context};
use serde_json::Value as Json;

use super::{Doc, Fault};

/// Templates and expressions with Python's methods of strings and three filters of our own.
#[derive(Debug)]
pub(super) struct Templates(Environment<'static>);

impl Templates {
    pub(super) fn new() -> Self {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let syntax = environment.syntax().to_builder().keep_trailing_newline(true).build();
        environment.set_syntax(syntax.expect("the syntax that was there, with one more newline"));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        let known = Mutex::new(HashMap::new());
        environment.add_filter(
            "regex_replace",
            move |text: String, pattern: String, with: String| {
                regex_replace(&known, &text, pattern, &with)
            },
        );
        environment.add_filter("position", position);
        environment.add_filter("positions", positions);
        Self(environment)
    }

    pub(super) fn check_text(&self, template: &str) -> Result<(), String> {
        self.0.template_from_str(template).map(drop).map_err(|error| cause(&error))
    }

    pub(super) fn check_expression(&self, expression: &str) -> Result<(), String> {
        self.0.compile_expression(expression).map(drop).map_err(|error| cause(&error))
    }

    /// A template, rendered.
    pub(super) fn text(
        &self,
        name: &'static str,
        template: &str,
        doc: &Doc,
    ) -> Result<String, Fault> {
        let rendered = self.0.render_str(template, fields(doc));
        rendered.map_err(|error| (name, cause(&error)))
    }

    /// What an expression says.
    pub(super) fn value(
        &self,
        name: &'static str,
        expression: &str,
        doc: &Doc,
    ) -> Result<Json, Fault> {
        let value = self.0.compile_expression(expression).and_then(|e| e.eval(fields(doc)));
        let value = value.map_err(|error| (name, cause(&error)))?;
        if value.is_undefined() {
            return Err((name, format!("`{expression}` is undefined")));
        }
        serde_json::to_value(&value).map_err(|error| (name, error.to_string()))
    }

    /// An expression that is a list of texts.
    pub(super) fn texts(
        &self,
        name: &'static str,
        expression: &str,
        doc: &Doc,
    ) -> Result<Vec<String>, Fault> {
        let value = self.value(name, expression, doc)?;
        let text = |value: &Json| value.as_str().map(str::to_owned);
        let texts = value.as_array().and_then(|all| all.iter().map(text).collect());
        texts.ok_or_else(|| (name, format!("expected a list of strings, found {value}")))
    }
}

/// The fields of a record, and the record as `doc`.
fn fields(doc: &Doc) -> Value {
    let all = Value::from(Serde(doc));
    context! { doc => all.clone(), ..all }
}

fn cause(error: &Error) -> String {
    let detail = error.detail().map_or(String::new(), |detail| format!(": {detail}"));
    let line = error.line().map_or(String::new(), |line| format!(" (line {line} of the template)"));
    format!("{}{detail}{line}", error.kind())
}

/// `re.sub`; an expression is compiled once.
fn regex_replace(
    known: &Mutex<HashMap<String, Regex>>,
    text: &str,
    pattern: String,
    with: &str,
) -> Result<String, Error> {
    let fault =
        |error: fancy_regex::Error| Error::new(ErrorKind::InvalidOperation, error.to_string());
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    let regex = match known.entry(pattern) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => {
            let regex = Regex::new(entry.key()).map_err(fault)?;
            entry.insert(regex)
        }
    };
    Ok(regex.try_replacen(text, 0, with).map_err(fault)?.into_owned())
}

/// Where a value first stands in a list.
fn position(list: Vec<Value>, value: Value) -> Result<usize, Error> {
    let absent = || {
        let list = Value::from(list.clone());
        Error::new(ErrorKind::InvalidOperation, format!("{value} is not in {list}"))
    };
    list.iter().position(|element| *element == value).ok_or_else(absent)
}

/// Where a value stands in a list.
fn positions(list: Vec<Value>, value: Value) -> Vec<usize> {
    let found = list.iter().enumerate().filter(|(_, element)| **element == value);
    found.map(|(index, _)| index).collect()
}
