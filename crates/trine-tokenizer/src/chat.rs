//! Chat templates: what a model is shown of a conversation.
//!
//! A template is rendered as transformers renders it ([`crate::jinja`]), with the same variables. What
//! is more than that: no text of a message becomes a special token, and how a model calls functions is
//! learned from what its template writes.

use std::sync::OnceLock;

use minijinja::value::{Serde, Value};
use minijinja::{Environment, context};

use crate::calls::{CallFormat, Spelling};
use crate::{Message, Tokenizer, TokenizerError, jinja};

/// Unicode's noncharacter U+FDD0: never part of a text, hence free to mark a place in one.
const MARK: char = '\u{fdd0}';

/// Longest template in bytes; those of models have up to some 20,000.
const LONGEST_TEMPLATE: usize = 1 << 16;
/// Instructions that a template may run, and for each message and tool in addition; real ones need
/// hundreds.
const STEPS: u64 = 100_000;
const STEPS_PER_MESSAGE: u64 = 10_000;

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// How it writes calls, once that was asked for.
    calls: OnceLock<Option<CallFormat>>,
}

impl ChatTemplate {
    /// Compiles a template, the `chat_template` of a tokenizer_config.json.
    ///
    /// # Errors
    /// [`TokenizerError::Template`] with the line of the mistake.
    pub fn new(template: &str) -> Result<Self, TokenizerError> {
        if template.len() > LONGEST_TEMPLATE {
            let cause = format!("{} bytes, expected up to {LONGEST_TEMPLATE}", template.len());
            return Err(TokenizerError::Template { cause });
        }
        let environment = jinja::compile(template)?;
        Ok(Self { environment, calls: OnceLock::new() })
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
        let messages = Spelling::default().spell(messages);
        self.run(&messages, &[], add_generation_prompt, bos_token, eos_token)
    }

    /// Runs the template with what transformers gives it: messages, tools and, where there are none,
    /// `none` in their place.
    fn run(
        &self,
        messages: &[serde_json::Value],
        tools: &[serde_json::Value],
        add_generation_prompt: bool,
        bos_token: &str,
        eos_token: &str,
    ) -> Result<String, TokenizerError> {
        let steps = STEPS + STEPS_PER_MESSAGE * (messages.len() + tools.len()) as u64;
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(steps));
        jinja::render(&environment, || {
            let messages = Value::from(Serde(messages));
            let none = || Value::from(());
            let tools = if tools.is_empty() { none() } else { Value::from(Serde(tools)) };
            let documents = none();
            context! { messages, tools, documents, add_generation_prompt, bos_token, eos_token }
        })
    }

    /// How the template writes calls of functions; `None` where it does not read `tools`, or writes
    /// calls in a way that cannot be told from an example. Found out once.
    pub fn call_format(&self, tokenizer: &Tokenizer) -> Option<&CallFormat> {
        self.calls.get_or_init(|| CallFormat::learn(self, tokenizer)).as_ref()
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
        self.encode_with_tools(tokenizer, messages, &[], add_generation_prompt)
    }

    fn encode_with_tools(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        tools: &[serde_json::Value],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, TokenizerError> {
        let has_calls = messages.iter().any(|message| !message.tool_calls.is_empty());
        let format = if has_calls { self.call_format(tokenizer) } else { None };
        let spelling = format.map(|format| format.spelling).unwrap_or_default();
        let broken = Broken::new(tokenizer);
        let messages = broken.values(spelling.spell(messages));
        let tools = broken.values(tools.to_vec());
        let text = self.render_values(tokenizer, &messages, &tools, add_generation_prompt)?;
        Self::ids_of(tokenizer, &text)
    }

    /// Messages in which no name of a special token is whole.
    pub(crate) fn unspecial(tokenizer: &Tokenizer, messages: &[Message]) -> Vec<Message> {
        let broken = Broken::new(tokenizer);
        let message = |message: &Message| Message {
            role: broken.text(&message.role),
            content: broken.text(&message.content),
            ..message.clone()
        };
        messages.iter().map(message).collect()
    }

    /// [`ChatTemplate::render`] with the tokens of a tokenizer.
    pub(crate) fn render_for(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        let messages = Spelling::default().spell(messages);
        self.render_values(tokenizer, &messages, &[], add_generation_prompt)
    }

    /// Runs the template with the tokens of a tokenizer.
    pub(crate) fn render_values(
        &self,
        tokenizer: &Tokenizer,
        messages: &[serde_json::Value],
        tools: &[serde_json::Value],
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        let name = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default();
        let (bos, eos) = (name(tokenizer.bos_id()), name(tokenizer.eos_id()));
        self.run(messages, tools, add_generation_prompt, &bos, &eos)
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
        self.prompt_with_tools(tokenizer, messages, &[])
    }

    /// The same with descriptions of tools, in OpenAI's form, which the template may read.
    ///
    /// # Errors
    /// As [`ChatTemplate::prompt`].
    pub fn prompt_with_tools(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        tools: &[serde_json::Value],
    ) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode_with_tools(tokenizer, messages, tools, true)?;
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

/// Breaks names of special tokens, by a mark after their first character.
struct Broken(Vec<(u32, String)>);

impl Broken {
    fn new(tokenizer: &Tokenizer) -> Self {
        Self(tokenizer.special_tokens())
    }

    fn text(&self, text: &str) -> String {
        let mut text = text.replace(MARK, "\u{fffd}");
        for (_, name) in &self.0 {
            let first = name.chars().next().map_or(0, char::len_utf8);
            text = text.replace(name, &format!("{}{MARK}{}", &name[..first], &name[first..]));
        }
        text
    }

    /// All texts in a value, keys among them.
    fn value(&self, value: serde_json::Value) -> serde_json::Value {
        use serde_json::Value;
        match value {
            Value::String(text) => Value::String(self.text(&text)),
            Value::Array(values) => Value::Array(self.values(values)),
            Value::Object(map) => {
                let broken = |(key, value): (String, Value)| (self.text(&key), self.value(value));
                Value::Object(map.into_iter().map(broken).collect())
            }
            other => other,
        }
    }

    fn values(&self, values: Vec<serde_json::Value>) -> Vec<serde_json::Value> {
        values.into_iter().map(|value| self.value(value)).collect()
    }
}
