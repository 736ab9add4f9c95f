//! The grammar of answers that call functions.
//!
//! Where a function has to be called the answer is nothing but calls. Where the model may choose, it may
//! write anything until it writes what calls begin with; from there on it is bound.

use std::fmt::Write;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
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

/// What answers must look like, and how their calls are to be read.
pub(crate) async fn constraint(
    app: &Arc<App>,
    served: &Served,
    tools: &Arc<Tools>,
) -> Result<(Constrained, Calling), ApiError> {
    let (template, tools) = (served.template.clone(), tools.clone());
    let made = apart(app, move |app| {
        let format = template.as_ref().and_then(|template| template.call_format(&app.tokenizer));
        let format = format.cloned().unwrap_or_else(CallFormat::hermes);
        let specials = format.special_tokens(&app.tokenizer);
        let grammar = grammar(&tools, &format, &specials);
        let compile = |lark: String| Constrained::new(app, TopLevelGrammar::from_lark(lark));
        let constrained = compile(grammar).map_err(|cause| {
            let (i, cause) = tools.mistake(compile).unwrap_or((None, cause));
            let param = i.map(|i| format!("tools[{i}].function.parameters"));
            ApiError::param(param.unwrap_or_else(|| "tools".to_owned()), cause)
        })?;
        let shown = specials.into_iter().map(|(id, _)| id).collect();
        Ok((constrained, Calling { format, shown }))
    });
    made.await?
}

impl Tools {
    /// The first function whose schema alone makes no grammar, and why.
    fn mistake(
        &self,
        compile: impl Fn(String) -> Result<Constrained, String>,
    ) -> Option<(Option<usize>, String)> {
        let called = |i: &usize| self.may_call(*i);
        (0..self.functions.len()).filter(called).find_map(|i| {
            let cause = compile(format!("start: %json {}", self.functions[i].schema)).err()?;
            Some((Some(i), cause))
        })
    }

    fn may_call(&self, index: usize) -> bool {
        !matches!(self.choice, Choice::Named(named) if named != index)
    }
}

/// The grammar, in Lark's notation. `specials` are the special tokens of the format.
fn grammar(tools: &Tools, format: &CallFormat, specials: &[(u32, String)]) -> String {
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
    if tools.choice == Choice::Auto {
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
            None => rule(format!("begin[lazy]: {}", quoted(open))),
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
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_tokens_stand_for_themselves() {
        let specials = [(7, "<a>".to_owned()), (9, "<a>>".to_owned())];
        assert_eq!(literal("x\n<a>\"<a>>", &specials), "\"x\\n\" <[7]> \"\\\"\" <[9]>");
        assert_eq!(literal("<a>", &specials), "<[7]>");
        assert_eq!(literal("", &specials), "\"\"");
    }
}
