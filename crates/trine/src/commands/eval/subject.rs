//! A model that is evaluated, wherever it is: texts, then tasks.

use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use serde_json::Value;
use trine_eval::{Evaluation, LanguageModel, Store};
use trine_tokenizer::Tokenizer;

use super::Questions;
use super::chat::Template;
use super::results::{ModelResults, TaskResults};
use super::text;
use crate::output::note;
use crate::progress::EvalProgress;

/// What is known of a model beside how it answers.
pub(super) struct Subject<'a> {
    /// What it is called.
    pub(super) path: &'a Path,
    pub(super) adapter: Option<&'a Path>,
    pub(super) tokenizer: &'a Tokenizer,
    /// Ids at which its texts end.
    pub(super) stop_ids: Vec<u32>,
    pub(super) template: Option<Template>,
    /// What results of items are kept under, if they are.
    pub(super) identity: Option<Value>,
}

impl Subject<'_> {
    /// Asks it everything.
    pub(super) fn answer(
        &self,
        language: &mut dyn LanguageModel,
        questions: &Questions<'_>,
    ) -> anyhow::Result<ModelResults> {
        let Questions { tasks, texts, sandbox, args } = *questions;
        let (tokenizer, stop_ids) = (self.tokenizer, &self.stop_ids);
        let mut results = ModelResults::new(self.path, self.adapter);
        for text in texts {
            let sizes = (args.window, args.stride);
            results.texts.push(text::measure(text, tokenizer, language, sizes)?);
        }
        for (task, data) in tasks {
            let settings = args.settings();
            let template = args.chat.template(task, self.template.as_ref());
            let mut store = match &self.identity {
                None => Store::in_memory(),
                Some(identity) => {
                    let (text, identity) = (template.map(|t| &t.text[..]), identity.clone());
                    let conditions =
                        settings.conditions(task, data, tokenizer, text, sandbox, identity);
                    Store::open(&args.out, task.name(), &conditions)?
                }
            };
            let items = settings.items(data);
            let known = store.first(items).len();
            let before = language.work();
            let begin = Instant::now();
            {
                let mut progress = EvalProgress::new(task.name(), items, "items");
                let template = template.map(|template| &template.compiled);
                let evaluation =
                    Evaluation { task, data, tokenizer, stop_ids, template, sandbox, settings };
                evaluation
                    .run(language, &mut store, &mut |known| progress.on_known(known))
                    .with_context(|| format!("{} on {}", self.path.display(), task.name()))?;
            }
            let mut result = TaskResults::new(task, data, &settings, &store, known);
            result.chat = template.is_some();
            result.note(begin.elapsed(), before, language.work());
            results.tasks.push(result);
        }
        if let Some(missing) = results.tasks.iter().find(|task| task.summary.scored == 0) {
            note!("warning: {}: no item could be scored", missing.name);
        }
        Ok(results)
    }
}
