//! The form that a request wants its answer to have: JSON, JSON of a schema, a regular expression, a
//! grammar.

use llguidance::api::TopLevelGrammar;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::ApiError;

/// What may stand between the parts of a JSON text: without a bound, a small model goes on with blanks for
/// ever.
const WHITESPACE: &str = r"\n? {0,16}";

/// `response_format` of a request.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
    /// As OpenAI has it: the schema is one of its keys.
    json_schema: Option<Value>,
    /// As llama.cpp has it beside `json_object`.
    schema: Option<Value>,
    regex: Option<String>,
    /// Lark.
    grammar: Option<String>,
}

/// The form of an answer.
pub(crate) enum Form {
    /// JSON of a schema.
    Json(Value),
    Regex(String),
    Lark(String),
}

impl ResponseFormat {
    /// The form of answers, if they are to have one, and the parameter that says so.
    pub(crate) fn form(self) -> Result<Option<(&'static str, Form)>, ApiError> {
        let missing = |name: &str| {
            let param = format!("response_format.{name}");
            ApiError::param(param, "expected it, with this response_format.type")
        };
        Ok(Some(match &self.kind[..] {
            "text" => return Ok(None),
            "json_object" => match self.schema {
                Some(given) => ("response_format.schema", json_of(given)),
                None => ("response_format", json_of(json!({"type": "object"}))),
            },
            "json_schema" => {
                let named = self.json_schema.ok_or_else(|| missing("json_schema"))?;
                let given = named.get("schema").cloned();
                let given = given.ok_or_else(|| missing("json_schema.schema"))?;
                ("response_format.json_schema.schema", json_of(given))
            }
            "regex" => {
                let regex = self.regex.ok_or_else(|| missing("regex"))?;
                ("response_format.regex", Form::Regex(regex))
            }
            "grammar" => {
                let grammar = self.grammar.ok_or_else(|| missing("grammar"))?;
                ("response_format.grammar", Form::Lark(grammar))
            }
            found => {
                let kinds = "\"text\", \"json_object\", \"json_schema\", \"regex\" or \"grammar\"";
                let message = format!("expected {kinds}, found {found:?}");
                return Err(ApiError::param("response_format.type", message));
            }
        }))
    }
}

impl Form {
    /// Texts of the form.
    pub(crate) fn grammar(self) -> TopLevelGrammar {
        match self {
            Self::Json(schema) => TopLevelGrammar::from_json_schema(schema),
            Self::Regex(regex) => TopLevelGrammar::from_regex(&regex),
            Self::Lark(grammar) => TopLevelGrammar::from_lark(grammar),
        }
    }
}

/// A JSON text of a schema.
fn json_of(mut schema: Value) -> Form {
    if let Some(keys) = schema.as_object_mut() {
        let options = json!({"whitespace_pattern": WHITESPACE});
        keys.entry("x-guidance").or_insert(options);
    }
    Form::Json(schema)
}
