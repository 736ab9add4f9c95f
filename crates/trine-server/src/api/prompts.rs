//! Texts or ids, one or several: what completions continue and embeddings are made of.

use std::sync::Arc;

use serde::Deserialize;

use crate::error::ApiError;
use crate::{App, prompt};

/// A text or its ids, or several.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, of token ids, or of lists of them"
)]
pub(super) enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    ManyIds(Vec<Vec<u32>>),
}

/// A prompt with its ids.
pub(super) struct Prompt {
    pub(super) ids: Vec<u32>,
    /// `None` for one that was sent as ids.
    pub(super) text: Option<String>,
}

impl Prompts {
    /// The ids of all prompts, each of which gets `n` choices; `param` is what they are called.
    pub(super) async fn read(
        self,
        app: &Arc<App>,
        param: &str,
        n: usize,
    ) -> Result<Vec<Prompt>, ApiError> {
        let count = match &self {
            Self::Text(_) | Self::Ids(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::ManyIds(many) => many.len(),
        };
        let limit = app.config.max_choices;
        if count == 0 || count.saturating_mul(n) > limit {
            let message =
                format!("expected 1 to {limit} choices, prompts times n, found {count} times {n}");
            return Err(ApiError::param(param, message));
        }
        let with_ids = |ids: Vec<u32>| {
            let ids = prompt::within(app, param, ids)?;
            Ok(Prompt { ids, text: None })
        };
        let texts = match self {
            Self::Ids(ids) => return Ok(vec![with_ids(ids)?]),
            Self::ManyIds(many) => return many.into_iter().map(with_ids).collect(),
            Self::Text(text) => vec![text],
            Self::Texts(texts) => texts,
        };
        let mut prompts = Vec::with_capacity(texts.len());
        for text in texts {
            let ids = prompt::of_text(app, param, text.clone()).await?;
            prompts.push(Prompt { ids, text: Some(text) });
        }
        Ok(prompts)
    }
}
