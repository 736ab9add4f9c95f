//! Answers of a given form, whatever the model would like to write.
//!
//! The form is a grammar of bytes (`llguidance`), which says after each id which ids may follow, so that
//! the text has the form. That a text ends is the model's to say,
//! where the form lets it: an answer that is cut off by `max_tokens` is the beginning of such a text.

use std::fmt;
use std::sync::{Arc, OnceLock};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use trine_runtime::{Constraint, Request};
use trine_tokenizer::Tokenizer;

use crate::App;
use crate::error::ApiError;
use crate::prompt::apart;
use crate::response_format::ResponseFormat;

const NO_END: &str = "no token of the model ends a text";

/// What makes constraints of grammars, for a vocabulary; made when it is first needed.
#[derive(Default)]
pub(crate) struct Grammars(OnceLock<Result<ParserFactory, String>>);

/// What the answers to a request must look like.
#[derive(Default)]
pub(crate) struct Constrained {
    constraint: Option<Box<dyn Constraint>>,
    /// Ids that end a text of the form.
    ends: Vec<u32>,
}

impl Constrained {
    /// Answers of a grammar.
    ///
    /// # Errors
    /// What is wrong with the grammar, in a line.
    pub(crate) fn new(app: &App, grammar: TopLevelGrammar) -> Result<Self, String> {
        let make = || {
            let factory = app.grammars.factory(app)?;
            let end = end(app).ok_or(NO_END)?;
            let mut matcher = Matcher::new(factory.create_parser(grammar));
            // What is wrong with a grammar may show only when it is used.
            matcher.compute_mask_or_eos().map_err(|e| e.to_string())?;
            let ends: Vec<u32> =
                [end].into_iter().chain(app.stop.iter().copied().filter(|id| *id != end)).collect();
            let constraint: Box<dyn Constraint> = Box::new(Form { matcher, ends: ends.clone() });
            Ok::<_, String>(Self { constraint: Some(constraint), ends })
        };
        make().map_err(|cause| cause.lines().next().unwrap_or_default().to_owned())
    }

    /// A request whose answer is to have the form.
    pub(crate) fn bind(&self, request: Request) -> Request {
        let mut stop = request.stop;
        stop.extend(self.ends.iter().filter(|end| !stop.contains(end)).collect::<Vec<_>>());
        Request { stop, constraint: self.constraint.clone(), ..request }
    }
}

impl Grammars {
    fn factory(&self, app: &App) -> Result<&ParserFactory, String> {
        let made = self.0.get_or_init(|| {
            let end = end(app).ok_or(NO_END)?;
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
    let Some((param, form)) = format.map_or(Ok(None), ResponseFormat::form)? else {
        return Ok(Constrained::default());
    };
    let made = apart(app, move |app| Constrained::new(app, form.grammar())).await?;
    made.map_err(|cause| ApiError::param(param, cause))
}

/// How far a text has come in its grammar.
struct Form {
    matcher: Matcher,
    /// The id that ends a text in the grammar, and others that mean the same.
    ends: Vec<u32>,
}

impl fmt::Debug for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Form").finish_non_exhaustive()
    }
}

impl Constraint for Form {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|e| e.to_string())?;
        let is_allowed = |id: usize| id < allowed.len() && allowed.get(id);
        // Where the text may end, it may end in any way.
        let may_end = self.ends.first().is_some_and(|end| is_allowed(*end as usize));
        let ends = |id: usize| may_end && self.ends.contains(&(id as u32));
        for (id, logit) in logits.iter_mut().enumerate() {
            if !(is_allowed(id) || ends(id)) {
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
        if self.matcher.is_stopped() {
            return Ok(());
        }
        let end = self.ends.first().copied().filter(|_| self.ends.contains(&id));
        self.matcher.consume_token(end.unwrap_or(id)).map_err(|e| e.to_string())
    }

    fn boxed(&self) -> Box<dyn Constraint> {
        Box::new(Self { matcher: self.matcher.deep_clone(), ends: self.ends.clone() })
    }
}
