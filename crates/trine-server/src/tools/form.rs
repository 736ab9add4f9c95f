//! The grammar of answers that call functions.
//!
//! Where a function has to be called the answer is nothing but calls. Where the model may choose, it may
//! write anything until it writes what calls begin with; from there on it is bound. If what it writes
//! otherwise is to be JSON of a schema, an answer is either that or calls.

use std::fmt::Write;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use serde_json::Value;
use trine_tokenizer::CallFormat;

use super::{Choice, Function, Tools};
use crate::App;
use crate::error::ApiError;
use crate::grammar::Constrained;
use crate::params::Served;
use crate::prompt::apart;

/// Most calls of an answer: a small model would go on for ever.
const CALLS: usize = 16;

/// How answers call.
pub(crate) struct Calling {
    pub(crate) format: CallFormat,
    /// Special tokens that belong to the text of calls.
    pub(crate) shown: Vec<u32>,
}

/// What answers must look like, and how their calls are to be read. One that does not call is JSON of
/// the schema `answer`, if there is one, which a parameter of the request gives.
pub(crate) async fn constraint(
    app: &Arc<App>,
    served: &Served,
    tools: &Arc<Tools>,
    answer: Option<(&'static str, Value)>,
) -> Result<(Constrained, Calling), ApiError> {
    let (template, tools) = (served.template.clone(), tools.clone());
    let made = apart(app, move |app| {
        let format = template.as_ref().and_then(|template| template.call_format(&app.tokenizer));
        let format = format.cloned().unwrap_or_else(CallFormat::hermes);
        let specials = format.special_tokens(&app.tokenizer);
        if answer.is_some() && format.tag().is_none() {
            let message = "the model's calls look like JSON: expected \"text\" beside tools";
            return Err(ApiError::param("response_format.type", message));
        }
        let schema = answer.as_ref().map(|(_, schema)| schema);
        let grammar = grammar(&tools, &format, &specials, schema);
        let constrained = Constrained::new(app, TopLevelGrammar::from_lark(grammar));
        let constrained = constrained.map_err(|cause| match tools.mistake(app) {
            Some((i, cause)) => ApiError::param(format!("tools[{i}].function.parameters"), cause),
            None => match answer {
                Some((param, schema)) if compile(app, &schema).is_err() => {
                    ApiError::param(param, cause)
                }
                _ => ApiError::param("tools", cause),
            },
        })?;
        let shown = specials.into_iter().map(|(id, _)| id).collect();
        Ok((constrained, Calling { format, shown }))
    });
    made.await?
}

impl Tools {
    /// The first function whose schema alone makes no grammar, and why.
    fn mistake(&self, app: &App) -> Option<(usize, String)> {
        let called = |i: &usize| self.may_call(*i);
        (0..self.functions.len()).filter(called).find_map(|i| {
            let cause = compile(app, &self.functions[i].schema).err()?;
            Some((i, cause))
        })
    }

    fn may_call(&self, index: usize) -> bool {
        !matches!(self.choice, Choice::Named(named) if named != index)
    }
}

fn compile(app: &App, schema: &Value) -> Result<Constrained, String> {
    Constrained::new(app, TopLevelGrammar::from_json_schema(schema.clone()))
}

/// The grammar, in Lark's notation. `specials` are the special tokens of the format, and `answer` is the
/// schema of answers without calls.
fn grammar(
    tools: &Tools,
    format: &CallFormat,
    specials: &[(u32, String)],
    answer: Option<&Value>,
) -> String {
    let literal = |text: &str| literal(text, specials);
    let open = format.open.trim_start();
    let between = match (&format.between, tools.choice) {
        (Some(between), Choice::Auto | Choice::Required) if tools.parallel => Some(between),
        _ => None,
    };
    let more = between.map(|_| format!("(between call){{0,{}}}", CALLS - 1)).unwrap_or_default();
    let mut lark = "%llguidance {}\n".to_owned();
    let mut rule = |text: String| {
        // Writing to a string cannot fail.
        let _infallible = writeln!(lark, "{text}");
    };
    if let (Choice::Auto, Some(schema)) = (tools.choice, answer) {
        rule(format!("start: answer | begin call {more} close"));
        rule(format!("answer: %json {schema}"));
        rule(format!("begin: {}", literal(open)));
    } else if tools.choice == Choice::Auto {
        rule(format!("start: FREE | begin call {more} close"));
        rule(r"FREE: /(.|\n)*/".to_owned());
        let tag = format.tag();
        let rest = &open[tag.unwrap_or(open).len()..];
        match tag {
            Some(tag) if specials.iter().any(|(_, name)| name == tag) => {
                rule(format!("begin: FREE {} {}", literal(tag), literal(rest)));
            }
            Some(tag) => {
                rule(format!("begin: tag {}", literal(rest)));
                rule(format!("tag[lazy]: FREE {}", quoted(tag)));
            }
            // The reader drops blanks as well.
            None => rule(format!("begin[lazy]: /\\s*/ {}", quoted(open))),
        }
    } else {
        rule(format!("start: begin call {more} close"));
        rule(format!("begin: {}", literal(open)));
    }
    let called: Vec<_> = (0..tools.functions.len()).filter(|i| tools.may_call(*i)).collect();
    let names: Vec<String> = called.iter().map(|i| format!("call_{i}")).collect();
    rule(format!("call: {}", names.join(" | ")));
    for i in called {
        let Function { name, schema } = &tools.functions[i];
        rule(format!("call_{i}: {} %json {schema}", literal(&format!("{name}{}", format.middle))));
    }
    if let Some(between) = between {
        rule(format!("between: {}", literal(between)));
    }
    rule(format!("close: {}", literal(&format.close)));
    lark
}

/// A text that is to come as it is, special tokens in it as such.
fn literal(text: &str, specials: &[(u32, String)]) -> String {
    let (mut parts, mut rest) = (Vec::new(), text);
    let next = |rest: &str| {
        let places = specials.iter().filter_map(|(id, name)| Some((rest.find(name)?, name, *id)));
        places.min_by_key(|(at, name, _)| (*at, usize::MAX - name.len()))
    };
    while let Some((at, name, id)) = next(rest) {
        if at > 0 {
            parts.push(quoted(&rest[..at]));
        }
        parts.push(format!("<[{id}]>"));
        rest = &rest[at + name.len()..];
    }
    if !rest.is_empty() || parts.is_empty() {
        parts.push(quoted(rest));
    }
    parts.join(" ")
}

/// Lark's strings are JSON's.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
pub(super) mod testing {
    use super::CallFormat;

    /// Calls that are nothing but JSON.
    pub(crate) fn bare() -> CallFormat {
        let mut format = CallFormat::hermes();
        format.open = "{\"name\": \"".to_owned();
        format.middle = "\", \"parameters\": ".to_owned();
        format.close = "}".to_owned();
        format.between = None;
        format
    }
}

#[cfg(test)]
mod tests {
    use llguidance::toktrie::ApproximateTokEnv;
    use llguidance::{Matcher, ParserFactory};
    use serde_json::json;

    use super::super::Asked;
    use super::testing::bare;
    use super::*;

    /// Whether a text, byte by byte, is an answer in a format, with other parameters beside two tools.
    fn accepts(format: &CallFormat, other: Value, text: &str) -> bool {
        accepts_or(None, format, other, text)
    }

    /// The same where answers that do not call have a schema.
    fn accepts_or(answer: Option<&Value>, format: &CallFormat, other: Value, text: &str) -> bool {
        let schema =
            json!({"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]});
        let tool = |name: &str, schema: Option<&Value>| json!({"type": "function", "function": {"name": name, "parameters": schema}});
        let mut asked = json!({"tools": [tool("f", Some(&schema)), tool("g", None)]});
        asked.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
        let tools = serde_json::from_value::<Asked>(asked).unwrap().read().unwrap().unwrap();
        let lark = TopLevelGrammar::from_lark(grammar(&tools, format, &[], answer));
        let factory = ParserFactory::new_simple(&ApproximateTokEnv::single_byte_env()).unwrap();
        let mut matcher = Matcher::new(factory.create_parser(lark));
        let goes = text.bytes().all(|byte| matcher.consume_token(byte.into()).is_ok());
        goes && matcher.is_accepting().unwrap()
    }

    fn call(name: &str, arguments: &str) -> String {
        format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n</tool_call>")
    }

    #[test]
    fn who_may_call_may_write_anything_up_to_a_call() {
        let auto = |text: &str| accepts(&CallFormat::hermes(), json!({}), text);
        let (f, g) = (call("f", "{\"x\": true}"), call("g", "{}"));
        for text in ["", "words,\n\"<tool_call\" <b> é", &f, &format!("So: {f}\n{g}")] {
            assert!(auto(text), "{text}");
        }
        for text in [
            &call("h", "{}"),
            &call("f", "{}"),
            &call("f", "{\"x\": 1}"),
            &call("f", "{\"x\": true, \"y\": 1}"),
            &call("g", "{"),
            "<tool_call> what",
            &format!("{g} and words"),
            &format!("{g}{g}"),
        ] {
            assert!(!auto(text), "{text}");
        }
    }

    #[test]
    fn an_answer_has_as_many_calls_as_it_may() {
        let (f, g) = (call("f", "{\"x\": true}"), call("g", "{}"));
        let two = format!("{g}\n{f}");
        let check = |other: Value, may: &[&str], may_not: &[&str]| {
            let accepts = |text: &str| accepts(&CallFormat::hermes(), other.clone(), text);
            assert!(may.iter().all(|text| accepts(text)), "{other}");
            assert!(!may_not.iter().any(|text| accepts(text)), "{other}");
        };
        let none = json!({"parallel_tool_calls": false});
        check(none, &["words", &f], &[&two]);
        let required = json!({"tool_choice": "required"});
        check(required, &[&f, &g, &two], &["", "words", &format!("words {f}")]);
        let named = json!({"tool_choice": {"type": "function", "function": {"name": "g"}}});
        check(named, &[&g], &["", &f, &two]);
        let many = |count: usize| vec![&g[..]; count].join("\n");
        let required = json!({"tool_choice": "required"});
        check(required, &[&many(CALLS)], &[&many(CALLS + 1)]);
    }

    #[test]
    fn an_answer_of_a_schema_is_that_or_calls() {
        let schema = json!({"type": "object", "properties": {"y": {"type": "integer"}}, "required": ["y"], "additionalProperties": false});
        let check = |other: Value, text: &str| {
            accepts_or(Some(&schema), &CallFormat::hermes(), other, text)
        };
        let g = call("g", "{}");
        for text in ["{\"y\": 1}", &g] {
            assert!(check(json!({}), text), "{text}");
        }
        for text in ["", "words", "{\"x\": 1}", &format!("words {g}"), &call("h", "{}")] {
            assert!(!check(json!({}), text), "{text}");
        }
        let required = json!({"tool_choice": "required"});
        assert!(check(required.clone(), &g) && !check(required, "{\"y\": 1}"));
    }

    #[test]
    fn without_a_tag_only_the_beginning_of_an_answer_is_a_call() {
        let auto = |text: &str| accepts(&bare(), json!({}), text);
        let call = "{\"name\": \"f\", \"parameters\": {\"x\": false}}";
        for text in ["", "words", "{\"x\": 1}", "{\"names\"", call, &format!(" \n{call}")] {
            assert!(auto(text), "{text}");
        }
        assert!(auto(&format!("It would be {call} then.")));
        for text in ["{\"name\": \"h\"", &call.replace("false", "1"), &format!("{call} words")] {
            assert!(!auto(text), "{text}");
        }
    }

    #[test]
    fn special_tokens_stand_for_themselves() {
        let specials = [(7, "<a>".to_owned()), (9, "<a>>".to_owned())];
        assert_eq!(literal("x\n<a>\"<a>>", &specials), "\"x\\n\" <[7]> \"\\\"\" <[9]>");
        assert_eq!(literal("<a>", &specials), "<[7]>");
        assert_eq!(literal("", &specials), "\"\"");
    }
}
