//! Answers of a given form: JSON, JSON of a schema, a regular expression, a grammar.
//!
//! The form is a grammar of bytes (`llguidance`), which says after each id which ids may follow, so that
//! whatever the model would like to write, the text has the form. That a text ends is the model's to say,
//! where the form lets it: an answer that is cut off by `max_tokens` is the beginning of such a text.

use std::fmt;
use std::sync::{Arc, OnceLock};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde::Deserialize;
use serde_json::{Value, json};
use trine_runtime::{Constraint, Request};
use trine_tokenizer::Tokenizer;

use crate::App;
use crate::error::ApiError;
use crate::prompt::apart;

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

impl ResponseFormat {
    /// The form of answers, if they are to have one.
    fn grammar(self) -> Result<Option<(&'static str, TopLevelGrammar)>, ApiError> {
        let missing = |name: &str| {
            let param = format!("response_format.{name}");
            ApiError::param(param, "expected it, with this response_format.type")
        };
        Ok(Some(match &self.kind[..] {
            "text" => return Ok(None),
            "json_object" => match self.schema {
                Some(given) => ("response_format.schema", schema(given)),
                None => ("response_format", schema(json!({"type": "object"}))),
            },
            "json_schema" => {
                let named = self.json_schema.ok_or_else(|| missing("json_schema"))?;
                let given = named.get("schema").cloned();
                let given = given.ok_or_else(|| missing("json_schema.schema"))?;
                ("response_format.json_schema.schema", schema(given))
            }
            "regex" => {
                let regex = self.regex.ok_or_else(|| missing("regex"))?;
                ("response_format.regex", TopLevelGrammar::from_regex(&regex))
            }
            "grammar" => {
                let grammar = self.grammar.ok_or_else(|| missing("grammar"))?;
                ("response_format.grammar", TopLevelGrammar::from_lark(grammar))
            }
            found => {
                let kinds = "\"text\", \"json_object\", \"json_schema\", \"regex\" or \"grammar\"";
                let message = format!("expected {kinds}, found {found:?}");
                return Err(ApiError::param("response_format.type", message));
            }
        }))
    }
}

/// A JSON text of a schema.
fn schema(mut schema: Value) -> TopLevelGrammar {
    if let Some(keys) = schema.as_object_mut() {
        let options = json!({"whitespace_pattern": WHITESPACE});
        keys.entry("x-guidance").or_insert(options);
    }
    TopLevelGrammar::from_json_schema(schema)
}

/// What makes constraints of grammars, for a vocabulary; made when it is first needed.
#[derive(Default)]
pub(crate) struct Grammars(OnceLock<Result<ParserFactory, String>>);

/// What the answers to a request must look like.
#[derive(Clone, Default)]
pub(crate) struct Constrained {
    constraint: Option<Box<dyn Constraint>>,
    /// The id that ends a text of the form.
    end: Option<u32>,
}

impl Constrained {
    /// A request whose answer is to have the form.
    pub(crate) fn bind(&self, request: Request) -> Request {
        let mut stop = request.stop;
        stop.extend(self.end.filter(|end| !stop.contains(end)));
        Request { stop, constraint: self.constraint.clone(), ..request }
    }
}

impl Grammars {
    fn factory(&self, app: &App) -> Result<&ParserFactory, String> {
        let made = self.0.get_or_init(|| {
            let end = end(app).ok_or("no token of the model ends a text")?;
            let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie(&app.tokenizer, end)));
            let mut factory = ParserFactory::new_simple(&env).map_err(|e| e.to_string())?;
            factory.quiet();
            Ok(factory)
        });
        made.as_ref().map_err(Clone::clone)
    }
}

/// The id that ends a text: that of a turn, or of a document.
fn end(app: &App) -> Option<u32> {
    let own = app.stop.iter().copied().find(|id| (*id as usize) < app.tokenizer.vocab_size());
    app.tokenizer.eot_id().or_else(|| app.tokenizer.eos_id()).or(own)
}

/// The ids of a vocabulary by their bytes; `end` ends a text.
fn trie(tokenizer: &Tokenizer, end: u32) -> TokTrie {
    let n = tokenizer.vocab_size();
    let word = |id: u32| {
        // No text has a special token's name, so no grammar asks for one.
        let mut special = vec![TokTrie::SPECIAL_TOKEN_MARKER];
        match tokenizer.is_special(id) || id == end {
            true => {
                special.extend(tokenizer.token(id).unwrap_or_default().into_bytes());
                special
            }
            false => tokenizer.bytes_of(id),
        }
    };
    let words: Vec<Vec<u8>> = (0..n as u32).map(word).collect();
    TokTrie::from(&TokRxInfo::new(n as u32, end), &words)
}

/// What the answers to a request must look like, if anything; on a thread that may take its time.
pub(crate) async fn constraint(
    app: &Arc<App>,
    format: Option<ResponseFormat>,
) -> Result<Constrained, ApiError> {
    let Some((param, grammar)) = format.map_or(Ok(None), ResponseFormat::grammar)? else {
        return Ok(Constrained::default());
    };
    let made = apart(app, move |app| {
        let factory = app.grammars.factory(app)?;
        let mut matcher = Matcher::new(factory.create_parser(grammar));
        // What is wrong with a grammar may show only when it is used.
        matcher.compute_mask_or_eos().map_err(|e| e.to_string())?;
        Ok::<_, String>(Form(matcher))
    });
    match made.await? {
        Ok(form) => Ok(Constrained { constraint: Some(Box::new(form)), end: end(app) }),
        Err(cause) => {
            let cause = cause.lines().next().unwrap_or_default().to_owned();
            Err(ApiError::param(param, cause))
        }
    }
}

/// How far a text has come in its grammar.
struct Form(Matcher);

impl fmt::Debug for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Form").finish_non_exhaustive()
    }
}

impl Constraint for Form {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let allowed = self.0.compute_mask_or_eos().map_err(|e| e.to_string())?;
        for (id, logit) in logits.iter_mut().enumerate() {
            if id >= allowed.len() || !allowed.get(id) {
                *logit = f32::NEG_INFINITY;
            }
        }
        match allowed.is_zero() {
            true => Err("no token goes on with it".to_owned()),
            false => Ok(()),
        }
    }

    fn accept(&mut self, id: u32) -> Result<(), String> {
        // The end of a text that is whole already is followed by nothing.
        if self.0.is_stopped() {
            return Ok(());
        }
        self.0.consume_token(id).map_err(|e| e.to_string())
    }

    fn boxed(&self) -> Box<dyn Constraint> {
        Box::new(Self(self.0.deep_clone()))
    }
}
