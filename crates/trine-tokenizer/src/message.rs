//! What is said in a conversation.

use serde_json::{Map, Value};

/// One message of a conversation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Message {
    /// "system", "user", "assistant", "tool", or what else a template knows.
    pub role: String,
    /// What was said.
    pub content: String,
    /// Calls of functions that the model made.
    pub tool_calls: Vec<Call>,
    /// Of a "tool" message: which call it answers.
    pub tool_call_id: Option<String>,
    /// Who speaks; of a "tool" message the function that was called.
    pub name: Option<String>,
}

impl Message {
    /// A message of a role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), ..Self::default() }
    }
}

/// A call of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// What the message with its result refers to.
    pub id: String,
    /// The function.
    pub name: String,
    /// What it is called with, by name.
    pub arguments: Map<String, Value>,
}
