//! What the objects of an answer have in common, be it whole or in chunks, of a chat or a completion.

use serde_json::{Value, json};
use trine_runtime::Usage;

use crate::App;
use crate::app::seconds;
use crate::params::Params;

/// Who answers, when, and what it takes.
pub(super) struct Frame {
    id: String,
    /// In seconds since 1970.
    created: u64,
    /// What answers.
    model: String,
    wants_usage: bool,
    /// Ids of all prompts.
    prompts: usize,
    /// What each choice took.
    used: Vec<Usage>,
}

impl Frame {
    /// An answer of so many choices, named by its kind, of the model `model`.
    pub(super) fn new(
        app: &App,
        kind: &str,
        model: String,
        params: &Params,
        prompts: usize,
        choices: usize,
    ) -> Self {
        Self {
            id: format!("{kind}-{:016x}", app.unique()),
            created: seconds(),
            model,
            wants_usage: params.wants_usage(),
            prompts,
            used: vec![Usage::default(); choices],
        }
    }

    /// Number of choices.
    pub(super) fn choices(&self) -> usize {
        self.used.len()
    }

    /// A choice has ended.
    pub(super) fn end(&mut self, index: usize, usage: Usage) {
        self.used[index] = usage;
    }

    /// An object of a kind, with some choices.
    pub(super) fn object(&self, kind: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }

    /// The whole answer.
    pub(super) fn whole(&self, kind: &str, choices: Vec<Value>) -> Value {
        let mut whole = self.object(kind, choices);
        whole["usage"] = usage(self.prompts, &self.used);
        whole
    }

    /// The last chunk of a stream, if what it took is asked for.
    pub(super) fn last(&self, kind: &str) -> Vec<Value> {
        if self.wants_usage { vec![self.whole(kind, Vec::new())] } else { Vec::new() }
    }
}

/// What the choices of a request took together. Their prompts count once each, not once a choice.
fn usage(prompts: usize, choices: &[Usage]) -> Value {
    let cached: usize = choices.iter().map(|usage| usage.cached).max().unwrap_or(0);
    let generated: usize = choices.iter().map(|usage| usage.generated).sum();
    json!({
        "prompt_tokens": prompts,
        "completion_tokens": generated,
        "total_tokens": prompts + generated,
        "prompt_tokens_details": {"cached_tokens": cached.min(prompts)},
    })
}
