//! Chat templates: the Jinja that models carry, rendered as transformers renders it.
//!
//! That is Jinja with `trim_blocks`, `lstrip_blocks`, loop controls, Python's string and dictionary
//! methods, `raise_exception`, and a `tojson` that writes what Python's `json.dumps` writes.
//! `strftime_now` is left undefined on purpose: templates ask whether it is defined, and without it
//! the same conversation is the same text on every day.

use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};

use crate::{Tokenizer, TokenizerError};

/// Unicode's noncharacter U+FDD0: never part of a text, hence free to mark a place in one.
const MARK: char = '\u{fdd0}';

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// "system", "user", "assistant", or what else a template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message of a role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// Compiles a template, the `chat_template` of a tokenizer_config.json.
    ///
    /// # Errors
    /// [`TokenizerError::Template`] with the line of the mistake.
    pub fn new(jinja: &str) -> Result<Self, TokenizerError> {
        let mut environment = Environment::new();
        let mut syntax = environment.syntax().to_builder();
        let syntax = syntax.trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(template_error)?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| {
            Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", python_json);
        environment.add_template_owned("chat", jinja.to_owned()).map_err(template_error)?;
        Ok(Self { environment })
    }

    /// The text of a conversation; with `add_generation_prompt` the opening of the answer follows.
    ///
    /// `bos_token` and `eos_token` are what the template prints under these names.
    ///
    /// # Errors
    /// [`TokenizerError::Template`] when the template refuses the conversation or fails.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        bos_token: &str,
        eos_token: &str,
    ) -> Result<String, TokenizerError> {
        let messages = Value::from(Serde(messages));
        let template = self.environment.get_template("chat").map_err(template_error)?;
        template
            .render(context! { messages, add_generation_prompt, bos_token, eos_token })
            .map_err(template_error)
    }

    /// The ids of a conversation, in which only the template speaks in special tokens.
    ///
    /// The name of a special token inside a message stays text, so that no message can end its turn
    /// and begin another's. Otherwise these are the ids of [`ChatTemplate::render`].
    ///
    /// # Errors
    /// As [`ChatTemplate::render`] and [`Tokenizer::encode`].
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, TokenizerError> {
        // A mark after the first character breaks the name; the text is then encoded in parts
        // between marks, none of which holds a name that a message brought.
        let specials = tokenizer.special_tokens();
        let broken = |text: &str| {
            let mut text = text.replace(MARK, "\u{fffd}");
            for (_, name) in &specials {
                let first = name.chars().next().map_or(0, char::len_utf8);
                text = text.replace(name, &format!("{}{MARK}{}", &name[..first], &name[first..]));
            }
            text
        };
        let messages: Vec<Message> = messages
            .iter()
            .map(|message| Message::new(broken(&message.role), broken(&message.content)))
            .collect();
        let name = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default();
        let (bos, eos) = (name(tokenizer.bos_id()), name(tokenizer.eos_id()));
        let text = self.render(&messages, add_generation_prompt, &bos, &eos)?;
        let parts: Result<Vec<_>, _> =
            text.split(MARK).map(|part| tokenizer.encode(part, false)).collect();
        Ok(parts?.concat())
    }
}

fn template_error(error: Error) -> TokenizerError {
    TokenizerError::Template { cause: error.to_string() }
}

/// `tojson` as transformers defines it: `json.dumps(value, ensure_ascii=False, indent=indent)`.
///
/// Jinja's own escapes what is special in HTML, which a model has never seen.
fn python_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let refuse = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, e.to_string());
    let indent: Option<usize> = options.get("indent")?;
    let mut out = Vec::new();
    match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent);
            let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    }
    .map_err(refuse)?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

/// JSON on one line with Python's separators, `", "` and `": "`.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W>(&mut self, out: &mut W, first: bool) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W>(&mut self, out: &mut W, first: bool) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        self.begin_array_value(out, first)
    }

    fn begin_object_value<W>(&mut self, out: &mut W) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        out.write_all(b": ")
    }
}
