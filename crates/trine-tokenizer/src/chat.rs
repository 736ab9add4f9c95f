//! Chat templates: the Jinja that models carry, rendered as transformers renders it.
//!
//! That is Jinja with `trim_blocks`, `lstrip_blocks`, loop controls, Python's string and dictionary
//! methods, `raise_exception`, and a `tojson` that writes what Python's `json.dumps` writes.
//! `strftime_now` is left undefined on purpose: templates ask whether it is defined, and without it
//! the same conversation is the same text on every day.
//!
//! A template is a program that came with a model, and not always with good will. Its length, the
//! steps it runs, the text it writes, and the widths it pads to are bounded, it runs on a stack of its
//! own that its nesting cannot exhaust, and the engine's panics are errors. Two things are not
//! bounded, as the engine has no means for it: the memory of the values that a template builds (a
//! string joined to itself forty times), and walking a `namespace` that was put into itself, which
//! ends the process. Neither reads or writes anything outside of it.

use std::io;
use std::thread;

use minijinja::value::{Kwargs, Rest, Serde, StringInput, Value, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, context, filters};
use serde::{Deserialize, Serialize};

use crate::{Tokenizer, TokenizerError};

/// Unicode's noncharacter U+FDD0: never part of a text, hence free to mark a place in one.
const MARK: char = '\u{fdd0}';

/// Longest template in bytes; those of models have up to some 20,000.
const LONGEST_TEMPLATE: usize = 1 << 16;
/// Longest text of a conversation in bytes.
const LONGEST_TEXT: usize = 1 << 26;
/// Instructions that a template may run, and for each message in addition; real ones need hundreds.
const STEPS: u64 = 100_000;
const STEPS_PER_MESSAGE: u64 = 10_000;
/// Bytes of stack for a template: the engine recurses as deep as expressions and values are nested.
/// What is not used costs nothing.
const STACK: usize = 1 << 28;
/// Widest indentation, padding or precision.
const WIDEST: usize = 1000;

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
        if jinja.len() > LONGEST_TEMPLATE {
            let cause = format!("{} bytes, expected up to {LONGEST_TEMPLATE}", jinja.len());
            return Err(TokenizerError::Template { cause });
        }
        apart(|| Self::compile(jinja))
    }

    fn compile(jinja: &str) -> Result<Self, TokenizerError> {
        let mut environment = Environment::new();
        let mut syntax = environment.syntax().to_builder();
        let syntax = syntax.trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(template_error)?);
        environment.set_unknown_method_callback(python_method);
        environment.add_function("raise_exception", |message: String| {
            Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", python_json);
        environment.add_filter("indent", indent);
        environment.add_filter("format", format);
        // These make as many elements as they are told to; no template of a model cuts into pieces.
        environment.remove_filter("batch");
        environment.remove_filter("slice");
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
        let steps = STEPS + STEPS_PER_MESSAGE * messages.len() as u64;
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(steps));
        let mut out = Text(Vec::new());
        apart(|| {
            let messages = Value::from(Serde(messages));
            let context = context! { messages, add_generation_prompt, bos_token, eos_token };
            let template = environment.get_template("chat").map_err(template_error)?;
            template.render_captured_to(context, &mut out).map(drop).map_err(template_error)
        })?;
        Ok(String::from_utf8_lossy(&out.0).into_owned())
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
        let text = self.render_for(
            tokenizer,
            &Self::unspecial(tokenizer, messages),
            add_generation_prompt,
        )?;
        Self::ids_of(tokenizer, &text)
    }

    /// Messages in which no name of a special token is whole: a mark after its first character breaks
    /// it.
    pub(crate) fn unspecial(tokenizer: &Tokenizer, messages: &[Message]) -> Vec<Message> {
        let specials = tokenizer.special_tokens();
        let broken = |text: &str| {
            let mut text = text.replace(MARK, "\u{fffd}");
            for (_, name) in &specials {
                let first = name.chars().next().map_or(0, char::len_utf8);
                text = text.replace(name, &format!("{}{MARK}{}", &name[..first], &name[first..]));
            }
            text
        };
        messages
            .iter()
            .map(|message| Message::new(broken(&message.role), broken(&message.content)))
            .collect()
    }

    /// [`ChatTemplate::render`] with the tokens of a tokenizer.
    pub(crate) fn render_for(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        let name = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default();
        let (bos, eos) = (name(tokenizer.bos_id()), name(tokenizer.eos_id()));
        self.render(messages, add_generation_prompt, &bos, &eos)
    }

    /// The ids of a text with marks: it is encoded in parts between them, none of which holds a name
    /// that a message brought.
    pub(crate) fn ids_of(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let parts: Result<Vec<_>, _> =
            text.split(MARK).map(|part| tokenizer.encode(part, false)).collect();
        Ok(parts?.concat())
    }

    /// The beginning of text, where the tokenizer puts one and `ids` have none.
    pub(crate) fn missing_bos(tokenizer: &Tokenizer, ids: &[u32]) -> Option<u32> {
        let bos = tokenizer.bos_id().filter(|_| tokenizer.adds_bos())?;
        (ids.first() != Some(&bos)).then_some(bos)
    }
}

impl ChatTemplate {
    /// The ids of a conversation up to the answer: [`ChatTemplate::encode`], with a beginning of text
    /// where the tokenizer puts one and the template did not.
    ///
    /// transformers renders without special tokens; a model that was trained with a beginning of text
    /// gets it here.
    ///
    /// # Errors
    /// As [`ChatTemplate::encode`]; [`TokenizerError::Template`] when nothing is rendered.
    pub fn prompt(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
    ) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode(tokenizer, messages, true)?;
        if let Some(bos) = Self::missing_bos(tokenizer, &ids) {
            ids.insert(0, bos);
        }
        if ids.is_empty() {
            let cause = "rendered an empty text".to_owned();
            return Err(TokenizerError::Template { cause });
        }
        Ok(ids)
    }
}

/// The engine's message, and where it wraps another error that at the bottom, which is the reason.
fn template_error(error: Error) -> TokenizerError {
    let sources = std::iter::successors(std::error::Error::source(&error), |e| e.source());
    let reason = sources.last().map(|reason| format!("{error}: {reason}"));
    TokenizerError::Template { cause: reason.unwrap_or_else(|| error.to_string()) }
}

/// Runs the engine on a thread with a stack for whatever is nested; its panics end there.
fn apart<T: Send>(
    run: impl FnOnce() -> Result<T, TokenizerError> + Send,
) -> Result<T, TokenizerError> {
    let refuse = |cause: String| TokenizerError::Template { cause };
    thread::scope(|scope| {
        let thread = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, run);
        let thread = thread.map_err(|e| refuse(format!("no thread for it: {e}")))?;
        thread.join().unwrap_or_else(|_| Err(refuse("the template engine panicked".to_owned())))
    })
}

/// The text of a conversation in the making, up to [`LONGEST_TEXT`].
struct Text(Vec<u8>);

impl io::Write for Text {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > LONGEST_TEXT - self.0.len() {
            return Err(io::Error::other(format!("a text of more than {LONGEST_TEXT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Refuses what would allocate as much as a template says.
fn check_width(width: usize) -> Result<(), Error> {
    if width <= WIDEST {
        return Ok(());
    }
    let message = format!("a width of {width}, expected up to {WIDEST}");
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Refuses a format, of `%` or of braces, with a wide field; a width may also be an argument.
fn check_format(format: &str, args: &[Value]) -> Result<(), Error> {
    let numbers = format.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    for digits in numbers {
        check_width(digits.parse().unwrap_or(usize::MAX))?;
    }
    if format.contains('*') {
        return args.iter().filter_map(Value::as_usize).try_for_each(check_width);
    }
    Ok(())
}

/// Python's methods of strings, lists and dictionaries.
fn python_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if method == "format" {
        check_format(value.as_str().unwrap_or_default(), args)?;
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// Jinja's `format`.
fn format(state: &mut State, format: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let values: Vec<Value> = args.iter().map(|arg| Value::clone(arg)).collect();
    check_format(format.as_str().unwrap_or_default(), &values)?;
    filters::format(state, format, args)
}

/// Jinja's `indent`.
fn indent(
    text: StringInput<'_>,
    width: Option<usize>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> Result<Value, Error> {
    let named: Option<usize> = options.get("width")?;
    check_width(width.or(named).unwrap_or_default())?;
    filters::indent(text, width, first, blank, options)
}

/// `tojson` as transformers defines it: `json.dumps(value, ensure_ascii=False, indent=indent)`.
///
/// Jinja's own escapes what is special in HTML, which a model has never seen.
fn python_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let refuse = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, e.to_string());
    let indent: Option<usize> = options.get("indent")?;
    check_width(indent.unwrap_or_default())?;
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
    fn begin_array_value<W>(&mut self, out: &mut W, first: bool) -> io::Result<()>
    where
        W: ?Sized + io::Write,
    {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W>(&mut self, out: &mut W, first: bool) -> io::Result<()>
    where
        W: ?Sized + io::Write,
    {
        self.begin_array_value(out, first)
    }

    fn begin_object_value<W>(&mut self, out: &mut W) -> io::Result<()>
    where
        W: ?Sized + io::Write,
    {
        out.write_all(b": ")
    }
}
