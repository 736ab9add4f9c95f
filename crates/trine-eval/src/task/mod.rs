//! A task: how records of a file become texts, and how the model's answers become scores.
//!
//! Tasks are small TOML files. Those in `tasks/` are part of the program; anybody's own are given by
//! path. Prompts are Jinja templates, lists and answers Jinja expressions, both over the fields of a
//! record (and `doc`, the whole of it). As the same set exists in several forms, a task may have
//! several `[[form]]`s; the first whose fields a file has is taken.

mod builtin;
mod spec;
mod template;

use std::path::Path;

use serde_json::{Map, Value};

pub use builtin::names;
pub use spec::{Extract, Generation, Kind, Metric};
use spec::{Form, Spec, check};
use template::Templates;

use crate::EvalError;
use crate::instructions::Instruction;
use crate::perplexity::Size;

/// A record of a data set.
pub type Doc = Map<String, Value>;

/// What a model is asked about an item.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Contexts and continuations.
    Choice {
        /// Of every option.
        options: Vec<(String, String)>,
        /// Characters of every option, as `acc_norm` counts them.
        chars: Vec<usize>,
        /// Numbers of those that are right.
        gold: Vec<usize>,
    },
    /// A context and what follows.
    Continuation(String, String),
    /// A text, and what its likelihood is divided by.
    Document(String, Size),
    /// A text to continue.
    Generation {
        /// The text.
        prompt: String,
        /// What it is judged by.
        expected: Expected,
    },
}

/// What a text that a model wrote is judged by.
#[derive(Clone, Debug, PartialEq)]
pub enum Expected {
    /// Answers that are right.
    Targets(Vec<String>),
    /// Instructions that it should follow.
    Instructions(Vec<Instruction>),
    /// The program of [`Task::program`].
    Program,
}

/// A task that was read and checked.
#[derive(Debug)]
pub struct Task {
    spec: Spec,
    templates: Templates,
    toml: String,
}

impl Task {
    /// A built-in task by name, or one of a file by a path that ends in `.toml`.
    ///
    /// # Errors
    /// A name that is none; a file that cannot be read or is no task.
    pub fn open(name: &str) -> Result<Self, EvalError> {
        if name.ends_with(".toml") {
            let path = Path::new(name);
            let text =
                std::fs::read_to_string(path).map_err(EvalError::io(path, "read the task"))?;
            return Self::parse(&text, name);
        }
        let known = || names().map(str::to_owned).collect();
        let text = builtin::text(name)
            .ok_or_else(|| EvalError::UnknownTask { name: name.to_owned(), known: known() })?;
        Self::parse(text, name)
    }

    /// A task from the text of its file; `origin` names it in errors.
    ///
    /// # Errors
    /// What is no TOML, a key that is missing, unknown or of the wrong type (with its line), a template
    /// that does not parse, metrics or forms that do not fit the kind.
    pub fn parse(text: &str, origin: &str) -> Result<Self, EvalError> {
        let refuse = |cause: String| EvalError::Task { origin: origin.to_owned(), cause };
        let spec: Spec = toml::from_str(text).map_err(|error| refuse(error.to_string()))?;
        check(&spec).map_err(refuse)?;
        let templates = Templates::new();
        for (at, name, text) in spec.templates() {
            templates.check_text(text).map_err(|e| refuse(format!("{at}`{name}`: {e}")))?;
        }
        for (at, name, text) in spec.expressions() {
            templates.check_expression(text).map_err(|e| refuse(format!("{at}`{name}`: {e}")))?;
        }
        for (name, pattern) in spec.patterns() {
            fancy_regex::Regex::new(pattern).map_err(|e| refuse(format!("`{name}`: {e}")))?;
        }
        Ok(Self { spec, templates, toml: text.to_owned() })
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Changes whenever scores may.
    pub fn version(&self) -> u32 {
        self.spec.version
    }

    /// The task of lm-evaluation-harness that asks the same.
    pub fn harness(&self) -> Option<&str> {
        self.spec.harness.as_deref()
    }

    /// How answers are had.
    pub fn kind(&self) -> Kind {
        self.spec.kind
    }

    /// What items are scored by.
    pub fn metrics(&self) -> &[Metric] {
        &self.spec.metrics
    }

    /// Examples before a question, unless told otherwise.
    pub fn shots(&self) -> usize {
        self.spec.shots.count
    }

    /// Names that its file may have.
    pub fn files(&self) -> &[String] {
        &self.spec.files
    }

    /// Where items come from, for people with a network.
    pub fn source(&self) -> Option<&str> {
        self.spec.source.as_deref()
    }

    /// Names and source of a file of examples; `None` where it needs none.
    pub fn shot_files(&self) -> Option<(&[String], Option<&str>)> {
        let shots = &self.spec.shots;
        (!shots.files.is_empty()).then_some((&shots.files, shots.source.as_deref()))
    }

    /// Examples that stand in the task itself.
    pub fn shot_examples(&self) -> &[Doc] {
        &self.spec.shots.examples
    }

    /// What is done with generated text.
    pub fn generation(&self) -> Option<&Generation> {
        self.spec.generation.as_ref()
    }

    /// The text of its file.
    pub fn toml(&self) -> &str {
        &self.toml
    }

    /// The group an item belongs to.
    pub fn group(&self, doc: &Doc) -> Option<String> {
        match doc.get(self.spec.group.as_ref()?)? {
            Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        }
    }

    /// What to ask about an item, after the first `count` examples of `pool` that fit it.
    ///
    /// # Errors
    /// [`EvalError::Item`] with the field: no form fits, a template fails, an answer is none of the
    /// options, fewer examples than asked for.
    pub fn request(
        &self,
        index: usize,
        doc: &Doc,
        pool: &[Doc],
        count: usize,
    ) -> Result<Request, EvalError> {
        let refuse = |fault| self.refuse(index, fault);
        let preamble = self.preamble(doc, pool, count).map_err(refuse)?;
        self.ask(doc, &preamble).map_err(refuse)
    }

    /// Description and answered examples.
    fn preamble(&self, doc: &Doc, pool: &[Doc], count: usize) -> Result<String, Fault> {
        let mut text = self.templates.text("description", &self.spec.description, doc)?;
        let same = self.spec.shots.same.as_ref();
        let fits = |shot: &&Doc| same.is_none_or(|field| shot.get(field) == doc.get(field));
        let shots: Vec<_> = pool.iter().filter(fits).take(count).collect();
        if shots.len() < count {
            let of = same.map_or(String::new(), |field| format!(" with the same {field}"));
            let cause = format!("expected {count} examples{of}, found {}", shots.len());
            return Err(("shots", cause));
        }
        for shot in shots {
            let (prompt, answer) = match self.ask(shot, "")? {
                Request::Choice { options, gold, .. } => {
                    let right = gold.first().and_then(|gold| options.into_iter().nth(*gold));
                    right.ok_or(("gold", "expected a right option in an example".to_owned()))?
                }
                Request::Continuation(prompt, target) => (prompt, self.delimited(&target)),
                Request::Document(..) => {
                    let cause = "expected none: documents are not answers";
                    return Err(("shots", cause.to_owned()));
                }
                Request::Generation { prompt, expected } => {
                    let answer = match (&self.form(shot)?.target, expected) {
                        (Some(target), _) => self.templates.text("target", target, shot)?,
                        (None, Expected::Targets(targets)) => {
                            targets.into_iter().next().unwrap_or_default()
                        }
                        (None, Expected::Instructions(_) | Expected::Program) => {
                            let cause = "expected none: no answer is given in this task";
                            return Err(("shots", cause.to_owned()));
                        }
                    };
                    (prompt, self.delimited(&answer))
                }
            };
            text.push_str(&format!("{prompt}{answer}\n\n"));
        }
        Ok(text)
    }

    fn delimited(&self, answer: &str) -> String {
        format!("{}{answer}", self.spec.delimiter)
    }

    fn form(&self, doc: &Doc) -> Result<&Form, Fault> {
        let fits = |form: &&Form| form.needs.iter().all(|field| doc.contains_key(field));
        self.spec.form.iter().find(fits).ok_or_else(|| {
            let forms: Vec<_> = self.spec.form.iter().map(|form| form.needs.join(", ")).collect();
            let found: Vec<_> = doc.keys().map(String::as_str).collect();
            let expected = forms.join("; or ");
            ("form", format!("expected the fields {expected}; found {}", found.join(", ")))
        })
    }

    fn ask(&self, doc: &Doc, preamble: &str) -> Result<Request, Fault> {
        let (form, templates) = (self.form(doc)?, &self.templates);
        let text = |name, template: &Option<String>| {
            templates.text(name, template.as_deref().unwrap_or_default(), doc)
        };
        match self.spec.kind {
            Kind::Continuation => {
                let prompt = format!("{preamble}{}", text("prompt", &form.prompt)?);
                Ok(Request::Continuation(prompt, text("target", &form.target)?))
            }
            Kind::Document => {
                let document = format!("{preamble}{}", text("document", &form.document)?);
                let size = match &form.counted {
                    Some(_) => Size::of_page(&text("counted", &form.counted)?),
                    None => Size::of_page(&document),
                };
                Ok(Request::Document(document, size))
            }
            Kind::Generation => {
                let prompt = format!("{preamble}{}", text("prompt", &form.prompt)?);
                Ok(Request::Generation { prompt, expected: self.expected(form, doc)? })
            }
            Kind::MultipleChoice => {
                let (texts, options): (Vec<String>, Vec<_>) = match &form.contexts {
                    Some(contexts) => {
                        let contexts = templates.texts("contexts", contexts, doc)?;
                        let target = self.delimited(&text("target", &form.target)?);
                        let option = |c: &String| (format!("{preamble}{c}"), target.clone());
                        let options = contexts.iter().map(option).collect();
                        (contexts, options)
                    }
                    None => {
                        let expression = form.choices.as_deref().unwrap_or_default();
                        let choices = templates.texts("choices", expression, doc)?;
                        let prompt = format!("{preamble}{}", text("prompt", &form.prompt)?);
                        let option = |c: &String| (prompt.clone(), self.delimited(c));
                        let options = choices.iter().map(option).collect();
                        (choices, options)
                    }
                };
                if options.is_empty() {
                    return Err(("choices", "expected at least one option, found none".to_owned()));
                }
                let gold = form.gold.as_deref().unwrap_or_default();
                let gold = right(&templates.value("gold", gold, doc)?, &texts)?;
                let chars = texts.iter().map(|text| text.chars().count()).collect();
                Ok(Request::Choice { options, chars, gold })
            }
        }
    }
}

impl Task {
    /// What an answer is judged by.
    fn expected(&self, form: &Form, doc: &Doc) -> Result<Expected, Fault> {
        let templates = &self.templates;
        if form.program.is_some() {
            return Ok(Expected::Program);
        }
        if let Some(names) = &form.instructions {
            let arguments = form.arguments.as_deref().unwrap_or_default();
            return Ok(Expected::Instructions(self.instructions(names, arguments, doc)?));
        }
        let targets = match &form.targets {
            Some(targets) => templates.texts("targets", targets, doc)?,
            None => {
                vec![templates.text("target", form.target.as_deref().unwrap_or_default(), doc)?]
            }
        };
        Ok(Expected::Targets(targets))
    }

    /// Whether answers are parts of programs that are run.
    pub fn runs_programs(&self) -> bool {
        self.spec.metrics.contains(&Metric::Pass)
    }

    /// The program in Python that judges an answer, by whether it comes to its end.
    ///
    /// # Errors
    /// As [`Task::request`].
    pub fn program(&self, index: usize, doc: &Doc, answer: &str) -> Result<String, EvalError> {
        let mut doc = doc.clone();
        doc.insert("completion".to_owned(), answer.into());
        let form = self.form(&doc);
        let program = form.and_then(|form| {
            let template = form.program.as_deref().unwrap_or_default();
            self.templates.text("program", template, &doc)
        });
        program.map_err(|fault| self.refuse(index, fault))
    }

    fn refuse(&self, item: usize, (field, cause): Fault) -> EvalError {
        EvalError::Item { task: self.spec.name.clone(), item, field, cause }
    }

    /// The instructions of an item.
    fn instructions(
        &self,
        names: &str,
        arguments: &str,
        doc: &Doc,
    ) -> Result<Vec<Instruction>, Fault> {
        let names = self.templates.texts("instructions", names, doc)?;
        let arguments = self.templates.value("arguments", arguments, doc)?;
        let objects: Option<Vec<&Doc>> =
            arguments.as_array().and_then(|all| all.iter().map(Value::as_object).collect());
        let objects = objects.filter(|objects| objects.len() == names.len()).ok_or_else(|| {
            let cause = format!("expected {} objects in a list, found {arguments}", names.len());
            ("arguments", cause)
        })?;
        if names.is_empty() {
            return Err(("instructions", "expected at least one, found none".to_owned()));
        }
        let instruction = |(name, arguments): (&String, &Doc)| {
            Instruction::new(name, arguments).map_err(|cause| ("instructions", cause))
        };
        names.iter().zip(objects).map(instruction).collect()
    }
}

/// A field, and what is wrong with it.
type Fault = (&'static str, String);

/// Numbers of the right options.
fn right(gold: &Value, options: &[String]) -> Result<Vec<usize>, Fault> {
    let one = |gold: &Value| {
        let index = match gold {
            Value::String(text) => options.iter().position(|option| option == text),
            number => number.as_u64().map(|index| index as usize),
        };
        index.filter(|index| *index < options.len()).ok_or_else(|| {
            let (last, options) = (options.len() - 1, options.join("`, `"));
            ("gold", format!("expected 0 to {last}, or one of `{options}`; found {gold}"))
        })
    };
    match gold {
        Value::Array(all) => all.iter().map(one).collect(),
        gold => Ok(vec![one(gold)?]),
    }
}
