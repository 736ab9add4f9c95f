//! The template engine, with what transformers adds to Jinja, and within bounds.
//!
//! Added are `trim_blocks`, `lstrip_blocks`, loop controls, Python's string and dictionary methods,
//! `raise_exception`, and a `tojson` that writes what Python's `json.dumps` writes. `strftime_now` is
//! left undefined on purpose: templates ask whether it is defined, and without it the same conversation
//! is the same text on every day.
//!
//! A template is a program that came with a model, and not always with good will. Its length, the
//! steps it runs, the text it writes, and the widths it pads to are bounded, it runs on a stack of its
//! own that its nesting cannot exhaust, and the engine's panics are errors. Two things are not
//! bounded, as the engine has no means for it: the memory of the values that a template builds (a
//! string joined to itself forty times), and walking a `namespace` that was put into itself, which
//! ends the process. Neither reads or writes anything outside of it.

use std::io;
use std::thread;

use minijinja::value::{Kwargs, Rest, StringInput, Value, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, filters};
use serde::Serialize;

use crate::TokenizerError;

/// Longest text of a conversation in bytes.
const LONGEST_TEXT: usize = 1 << 26;
/// Bytes of stack for a template: the engine recurses as deep as expressions and values are nested.
/// What is not used costs nothing.
const STACK: usize = 1 << 28;
/// Widest indentation, padding or precision.
const WIDEST: usize = 1000;

/// What the template is called in its environment.
const NAME: &str = "chat";

/// An environment with a template.
///
/// # Errors
/// [`TokenizerError::Template`] with the line of the mistake.
pub(crate) fn compile(template: &str) -> Result<Environment<'static>, TokenizerError> {
    apart(|| {
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
        environment.add_template_owned(NAME, template.to_owned()).map_err(template_error)?;
        Ok(environment)
    })
}

/// What the template writes, given its variables.
///
/// # Errors
/// [`TokenizerError::Template`] when it refuses them or fails.
pub(crate) fn render(
    environment: &Environment<'static>,
    variables: impl FnOnce() -> Value + Send,
) -> Result<String, TokenizerError> {
    let mut out = Text(Vec::new());
    apart(|| {
        let template = environment.get_template(NAME).map_err(template_error)?;
        template.render_captured_to(variables(), &mut out).map(drop).map_err(template_error)
    })?;
    Ok(String::from_utf8_lossy(&out.0).into_owned())
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
    let Some(indent) = indent else {
        return Ok(Value::from_safe_string(spaced(value).map_err(refuse)?));
    };
    let spaces = " ".repeat(indent);
    let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
    let mut out = Vec::new();
    value
        .serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty))
        .map_err(refuse)?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

/// JSON on one line as Python writes it, which is what models have seen.
pub fn spaced_json(value: &serde_json::Value) -> String {
    spaced(value).unwrap_or_else(|_| value.to_string())
}

fn spaced(value: &impl Serialize) -> Result<String, serde_json::Error> {
    let mut out = Vec::new();
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced))?;
    Ok(String::from_utf8_lossy(&out).into_owned())
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
