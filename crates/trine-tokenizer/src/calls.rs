//! How a template writes calls of functions: learned by letting it write some.
//!
//! Templates of models that call functions agree in what they are given (`tools`, and `tool_calls` of
//! messages, in OpenAI's form) and in nothing that they write. But a call is always a name and JSON with
//! some text around both, so two conversations with calls in them show that text, whoever made the
//! template:
//!
//! ```text
//! open NAME middle ARGUMENTS (between NAME middle ARGUMENTS)* close
//! ```
//!
//! What the template writes in a history is what the model has learned to write, so it is also the form
//! in which its answers are read. Where no such text is found (names after arguments, arguments in
//! other forms than JSON) there is no format, and who asks has to do without the template.

use serde_json::{Map, Value, json};

use crate::{Call, ChatTemplate, Message, Tokenizer};

/// Names of two functions, and an argument, which no template writes by itself.
const NAMES: [&str; 2] = ["probe_function_one", "probe_function_two"];
const ARGUMENT: &str = "probe_argument";
/// Ids of two calls. Mistral's templates refuse any but nine letters and digits.
const IDS: [&str; 2] = ["probe1111", "probe2222"];
/// A question and an answer in words.
const QUESTION: &str = "probe question";
const ANSWER: &str = "probe answer";

/// The text around the names and arguments of calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallFormat {
    /// Before the first name.
    pub open: String,
    /// Between a name and its arguments.
    pub middle: String,
    /// After the last arguments.
    pub close: String,
    /// Between arguments and the next name; `None` where an answer has one call at most.
    pub between: Option<String>,
    /// How messages are given to the template.
    pub(crate) spelling: Spelling,
}

/// What templates disagree in about messages with calls.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Spelling {
    /// A message that has no text beside its calls has the content `none`, and not an empty one.
    no_content: bool,
    /// Arguments are the text of an object, and not the object.
    arguments_as_text: bool,
}

impl Spelling {
    /// Messages as a template reads them.
    pub(crate) fn spell(self, messages: &[Message]) -> Vec<Value> {
        messages.iter().map(|message| self.message(message)).collect()
    }

    fn message(self, message: &Message) -> Value {
        let mut spelled = json!({"role": message.role, "content": message.content});
        if !message.tool_calls.is_empty() {
            if self.no_content && message.content.is_empty() {
                spelled["content"] = Value::Null;
            }
            spelled["tool_calls"] = message.tool_calls.iter().map(|call| self.call(call)).collect();
        }
        if let Some(id) = &message.tool_call_id {
            spelled["tool_call_id"] = json!(id);
        }
        if let Some(name) = &message.name {
            spelled["name"] = json!(name);
        }
        spelled
    }

    fn call(self, call: &Call) -> Value {
        let mut arguments = Value::Object(call.arguments.clone());
        if self.arguments_as_text {
            arguments = Value::String(arguments.to_string());
        }
        let function = json!({"name": call.name, "arguments": arguments});
        json!({"id": call.id, "type": "function", "function": function})
    }
}

impl CallFormat {
    /// The format of Hermes and Qwen, which many models have seen: for those whose template has none.
    pub fn hermes() -> Self {
        Self {
            open: "<tool_call>\n{\"name\": \"".to_owned(),
            middle: "\", \"arguments\": ".to_owned(),
            close: "}\n</tool_call>".to_owned(),
            between: Some("}\n</tool_call>\n<tool_call>\n{\"name\": \"".to_owned()),
            spelling: Spelling::default(),
        }
    }

    /// What tells a call from a text in words, wherever it comes: a tag. `None` where calls have no tag,
    /// so that an answer that calls has to begin with [`CallFormat::open`].
    pub fn tag(&self) -> Option<&str> {
        let open = self.open.trim_start();
        let end = match (open.chars().next()?, open.chars().nth(1)?) {
            ('<', _) => '>',
            ('[', 'A'..='Z' | 'a'..='z') => ']',
            _ => return None,
        };
        Some(open.find(end).map_or(open, |at| &open[..=at]))
    }

    /// Special tokens that calls are written with, in the order of their ids.
    pub fn special_tokens(&self, tokenizer: &Tokenizer) -> Vec<(u32, String)> {
        let between = self.between.as_deref().unwrap_or_default();
        let parts = [&self.open, &self.middle, &self.close, between];
        let mut tokens = tokenizer.special_tokens();
        tokens.retain(|(_, name)| parts.iter().any(|part| part.contains(name)));
        tokens
    }

    /// What a template writes around two names and their arguments.
    pub(crate) fn learn(template: &ChatTemplate, tokenizer: &Tokenizer) -> Option<Self> {
        let probe = Probe { template, tokenizer };
        // Who does not read tools does not show them to the model.
        probe.render(Spelling::default(), None, true)?.find(NAMES[0])?;
        let spellings = [(false, false), (true, false), (false, true), (true, true)];
        spellings.into_iter().find_map(|(no_content, arguments_as_text)| {
            probe.observe(Spelling { no_content, arguments_as_text })
        })
    }
}

/// A template that is made to write calls.
struct Probe<'a> {
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
}

impl Probe<'_> {
    /// A question and perhaps an answer.
    fn render(&self, spelling: Spelling, answer: Option<Message>, open: bool) -> Option<String> {
        let mut messages = vec![Message::new("user", QUESTION)];
        messages.extend(answer);
        let properties = json!({ARGUMENT: {"type": "integer", "description": "An argument."}});
        let parameters =
            json!({"type": "object", "properties": properties, "required": [ARGUMENT]});
        let tool = |name: &str| {
            let description = "A function.";
            let function =
                json!({"name": name, "description": description, "parameters": parameters});
            json!({"type": "function", "function": function})
        };
        let messages = spelling.spell(&messages);
        self.template.render_values(self.tokenizer, &messages, &NAMES.map(tool), open).ok()
    }

    /// An answer of so many calls.
    fn calls(count: usize) -> Message {
        let call = |(name, id): (&str, &str)| Call {
            id: id.to_owned(),
            name: name.to_owned(),
            arguments: arguments(),
        };
        let tool_calls = NAMES.into_iter().zip(IDS).take(count).map(call).collect();
        Message { tool_calls, ..Message::new("assistant", "") }
    }

    fn observe(&self, spelling: Spelling) -> Option<CallFormat> {
        let answered = self.render(spelling, Some(Message::new("assistant", ANSWER)), false)?;
        let (before, after) = answered.split_once(ANSWER)?;
        let opening = self.render(spelling, None, true)?;
        // Where the template lets a model begin, or where an answer in words would.
        let begun = |text: &str| {
            let rest = text.strip_prefix(before).or_else(|| text.strip_prefix(&opening))?;
            Some(rest.to_owned())
        };
        let one = begun(&self.render(spelling, Some(Self::calls(1)), false)?)?;
        let (open, rest) = one.split_once(NAMES[0])?;
        let (middle, rest) = split_arguments(rest)?;
        let close = without_id(without_end(rest, after)?, IDS[0])?;
        let two = || {
            let two = begun(&self.render(spelling, Some(Self::calls(2)), false)?)?;
            let (first, rest) = two.split_once(NAMES[0])?;
            let (second, rest) = split_arguments(rest)?;
            let (between, rest) = rest.split_once(NAMES[1])?;
            let (third, rest) = split_arguments(rest)?;
            let last = without_id(without_end(rest, after)?, IDS[1])?;
            let alike = first == open && second == middle && third == middle && last == close;
            without_id(between, IDS[0]).filter(|_| alike)
        };
        let between = two();
        let (open, middle) = (open.to_owned(), middle.to_owned());
        Some(CallFormat { open, middle, close, between, spelling })
    }
}

fn arguments() -> Map<String, Value> {
    Map::from_iter([(ARGUMENT.to_owned(), json!(1))])
}

/// A text before and after the arguments in it.
fn split_arguments(text: &str) -> Option<(&str, &str)> {
    let begin = text[..text.find(&format!("\"{ARGUMENT}\""))?].rfind('{')?;
    let mut values = serde_json::Deserializer::from_str(&text[begin..]).into_iter::<Value>();
    let found = values.next()?.ok()?;
    let end = begin + values.byte_offset();
    (found == Value::Object(arguments())).then(|| (&text[..begin], &text[end..]))
}

/// What follows calls without what ends every turn; `None` where they end otherwise.
fn without_end<'t>(rest: &'t str, turn_end: &str) -> Option<&'t str> {
    rest.trim_end().strip_suffix(turn_end.trim_end())
}

/// A text without the id that a call has in some formats: a model need not write it, as the server gives
/// ids. `None` where it stands otherwise than as a further key.
fn without_id(text: &str, id: &str) -> Option<String> {
    let text = text.replace(&format!(", \"id\": \"{id}\""), "");
    (!IDS.iter().any(|id| text.contains(id))).then_some(text)
}
