//! Functions that a model may call: what a request says about them, checked.
//!
//! | module | what it holds |
//! | --- | --- |
//! | here | `tools`, `tool_choice`, `parallel_tool_calls` of a request |
//! | `form` | the grammar of answers that call |
//! | `reader` | from the text of an answer to its calls, piece by piece |
//! | `describe` | conversations for templates that know nothing of tools |
//!
//! How calls are written is the template's business ([`trine_tokenizer::CallFormat`]). Whatever a model
//! would write, its calls are well-formed: from where a call begins on, the grammar holds the name of a
//! function and arguments of its schema.

mod describe;
mod form;
mod reader;

use serde::Deserialize;
use serde_json::{Map, Value, json};

pub(crate) use describe::described;
pub(crate) use form::{Calling, constraint};
pub(crate) use reader::{CallReader, Delta};

use crate::error::ApiError;

/// Most tools, as OpenAI has it; the length of their names, and of all of them as JSON in bytes.
const TOOLS: usize = 128;
const NAME: usize = 64;
const BYTES: usize = 256 << 10;

/// What may stand between the parts of arguments: they are one line, as templates write them.
const BLANK: &str = " ?";

/// What was sent.
#[derive(Deserialize)]
pub(crate) struct Asked {
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
}

/// Functions that the model may call in its answer; at least one.
pub(crate) struct Tools {
    /// As they were sent: what the template shows the model.
    pub(crate) definitions: Vec<Value>,
    functions: Vec<Function>,
    choice: Choice,
    /// Whether an answer may have several calls.
    parallel: bool,
}

struct Function {
    name: String,
    /// Of its arguments.
    schema: Value,
}

/// Which functions are called, and whether any has to be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Choice {
    Auto,
    Required,
    /// That of an index.
    Named(usize),
}

impl Asked {
    /// What may be called; `None` when nothing may. Tools that must not be called are not shown to the
    /// model either.
    pub(crate) fn read(self) -> Result<Option<Tools>, ApiError> {
        let definitions = self.tools.unwrap_or_default();
        if definitions.len() > TOOLS {
            let message = format!("expected at most {TOOLS}, found {}", definitions.len());
            return Err(ApiError::param("tools", message));
        }
        let bytes = definitions.iter().map(|tool| tool.to_string().len()).sum::<usize>();
        if bytes > BYTES {
            let message = format!("expected at most {BYTES} bytes of JSON, found {bytes}");
            return Err(ApiError::param("tools", message));
        }
        let functions = definitions.iter().enumerate().map(|(i, tool)| Function::read(i, tool));
        let functions = functions.collect::<Result<Vec<_>, _>>()?;
        for (i, Function { name, .. }) in functions.iter().enumerate() {
            if functions[..i].iter().any(|other| other.name == *name) {
                let param = format!("tools[{i}].function.name");
                return Err(ApiError::param(param, format!("{name:?} was there before")));
            }
        }
        let choice = Choice::read(self.tool_choice, &functions)?;
        let parallel = self.parallel_tool_calls != Some(false);
        Ok(choice.map(|choice| Tools { definitions, functions, choice, parallel }))
    }
}

impl Choice {
    fn read(choice: Option<Value>, functions: &[Function]) -> Result<Option<Self>, ApiError> {
        let refuse = |param: &str, message: String| Err(ApiError::param(param, message));
        let needs_tools = |choice| match functions {
            [] => refuse("tool_choice", "expected \"tools\" with it".to_owned()),
            _ => Ok(Some(choice)),
        };
        let choice = choice.unwrap_or(Value::Null);
        match choice.as_str() {
            Some("none") => return Ok(None),
            Some("auto") => return Ok((!functions.is_empty()).then_some(Self::Auto)),
            Some("required") => return needs_tools(Self::Required),
            None if choice.is_null() => return Ok((!functions.is_empty()).then_some(Self::Auto)),
            _ => (),
        }
        if choice["type"] != "function" {
            let expected = "expected \"none\", \"auto\", \"required\" or a function";
            return refuse("tool_choice", format!("{expected}, found {choice}"));
        }
        let name = &choice["function"]["name"];
        match functions.iter().position(|function| function.name == *name) {
            Some(index) => needs_tools(Self::Named(index)),
            None => {
                let message = format!("expected the name of one of the tools, found {name}");
                refuse("tool_choice.function.name", message)
            }
        }
    }
}

impl Function {
    fn read(index: usize, tool: &Value) -> Result<Self, ApiError> {
        let refuse = |key: &str, expected: &str, found: &Value| {
            let found = match found {
                Value::Null => "nothing".to_owned(),
                Value::Array(_) => "an array".to_owned(),
                Value::Object(_) => "an object".to_owned(),
                other => other.to_string(),
            };
            let param = format!("tools[{index}]{key}");
            ApiError::param(param, format!("expected {expected}, found {found}"))
        };
        if tool["type"] != "function" {
            return Err(refuse(".type", "\"function\"", &tool["type"]));
        }
        let function = &tool["function"];
        if !function.is_object() {
            return Err(refuse(".function", "an object", function));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        let name = &function["name"];
        let good = |name: &&str| (1..=NAME).contains(&name.len()) && name.chars().all(plain);
        let Some(name) = name.as_str().filter(good) else {
            let expected = format!("1 to {NAME} letters, digits, \"_\", \"-\" or \".\"");
            return Err(refuse(".function.name", &expected, name));
        };
        let description = &function["description"];
        if !(description.is_string() || description.is_null()) {
            return Err(refuse(".function.description", "a string", description));
        }
        let strict = &function["strict"];
        if !(strict.is_boolean() || strict.is_null()) {
            return Err(refuse(".function.strict", "a boolean", strict));
        }
        let parameters = match &function["parameters"] {
            Value::Null => Map::new(),
            Value::Object(schema) if schema.get("type").is_none_or(|kind| kind == "object") => {
                schema.clone()
            }
            found => {
                let expected = "a JSON schema of an object";
                return Err(refuse(".function.parameters", expected, found));
            }
        };
        Ok(Self { name: name.to_owned(), schema: schema(parameters, *strict == true) })
    }
}

/// The schema of arguments: an object, with none but the properties that are named, where nothing says
/// otherwise, as small models would go on inventing some. What the grammar does not know of a schema is
/// an error only where the request is `strict`.
fn schema(mut schema: Map<String, Value>, strict: bool) -> Value {
    schema.entry("type").or_insert_with(|| json!("object"));
    let says = ["additionalProperties", "patternProperties", "unevaluatedProperties", "$ref"]
        .into_iter()
        .chain(["allOf", "anyOf", "oneOf"]);
    if !says.into_iter().any(|key| schema.contains_key(key)) {
        schema.insert("additionalProperties".to_owned(), json!(false));
    }
    let options = json!({"whitespace_pattern": BLANK, "lenient": !strict});
    schema.insert("x-guidance".to_owned(), options);
    schema.into()
}
