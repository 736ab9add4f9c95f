//! A model behind an address.

use std::path::Path;

use anyhow::{Context, bail};
use serde_json::json;
use trine_remote::{Remote, RemoteConfig};
use trine_tokenizer::Tokenizer;

use super::Questions;
use super::results::ModelResults;
use super::subject::Subject;
use crate::model;
use crate::output::note;

/// The address that a path is, if it is one.
pub(super) fn address(path: &Path) -> Option<&str> {
    path.to_str().filter(|text| text.starts_with("http://") || text.starts_with("https://"))
}

/// Everything about one model.
pub(super) fn evaluate(
    url: &str,
    adapter: Option<&Path>,
    questions: &Questions<'_>,
) -> anyhow::Result<ModelResults> {
    let args = questions.args;
    if adapter.is_some() || args.one_by_one || args.measure {
        bail!(
            "{url}: --adapter, --one-by-one and --measure are for models that are here; name what the server serves with --model-name"
        );
    }
    let Some(path) = &args.tokenizer else {
        bail!(
            "{url}: texts become tokens here: name the tokenizer.json of the model with --tokenizer"
        );
    };
    let tokenizer = Tokenizer::from_file(&model::tokenizer_path(path)?)
        .with_context(|| path.display().to_string())?;
    let mut remote = Remote::connect(&RemoteConfig {
        url: url.to_owned(),
        model: args.model_name.clone(),
        key: std::env::var("OPENAI_API_KEY").ok().filter(|key| !key.is_empty()),
        positions: args.context,
        concurrency: args.concurrency,
    })?;
    note!("[{} at {url}: texts of up to {} tokens]", remote.name(), remote.positions());
    // Which weights these are, only the server knows: a name stands for them.
    let identity = json!({
        "address": url, "name": remote.name(), "context": remote.positions(),
        "trine": env!("CARGO_PKG_VERSION"),
    });
    let keep = !args.no_keep && !questions.tasks.is_empty();
    let stop_ids = tokenizer.eos_id().into_iter().chain(tokenizer.eot_id()).collect();
    let subject = Subject {
        path: Path::new(url),
        adapter: None,
        tokenizer: &tokenizer,
        stop_ids,
        template: None,
        identity: keep.then_some(identity),
    };
    subject.answer(&mut remote, questions)
}
