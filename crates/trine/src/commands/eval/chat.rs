//! Which prompts go through the chat template of a model, and which template that is.

use std::path::Path;

use anyhow::Context;
use clap::ValueEnum;
use trine_eval::{Kind, Task};
use trine_tokenizer::ChatTemplate;

use crate::adapter;
use crate::model::Loaded;
use crate::output::note;

/// Prompts that are what a user says. Only tasks that generate have such.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Chat {
    /// Those of tasks that say so.
    Auto,
    /// Those of every task that generates.
    Always,
    /// None.
    Never,
}

/// A template, and its text, which results depend on.
pub(super) struct Template {
    pub(super) compiled: ChatTemplate,
    pub(super) text: String,
}

impl Template {
    /// That of the adapter, or that of the model, where there is one.
    pub(super) fn of(loaded: &Loaded, run_with: Option<&Path>) -> anyhow::Result<Option<Self>> {
        let trained_with = run_with.map(adapter::template_text).transpose()?.flatten();
        let models = || loaded.file.tokenizer().and_then(|files| files.chat_template());
        let Some(text) = trained_with.or_else(|| models().map(str::to_owned)) else {
            return Ok(None);
        };
        let compiled = ChatTemplate::new(&text)
            .with_context(|| format!("the chat template of {}", loaded.file.path().display()))?;
        Ok(Some(Self { compiled, text }))
    }
}

impl Chat {
    /// Whether the prompts of a task go through a template, if there is one.
    pub(super) fn wants(self, task: &Task) -> bool {
        match self {
            Self::Auto => task.generation().is_some_and(|generation| generation.chat),
            Self::Always => task.kind() == Kind::Generation,
            Self::Never => false,
        }
    }

    /// The template for a task: where it wants one, one is wanted of it, and the model has one.
    pub(super) fn template<'a>(
        self,
        task: &Task,
        found: Option<&'a Template>,
    ) -> Option<&'a Template> {
        let wanted = self.wants(task);
        if wanted && found.is_none() {
            note!("[{}: this model has no chat template: prompts stay as they are]", task.name());
        }
        found.filter(|_| wanted)
    }
}
