//! Finding and opening a model as a user names it.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use trine_format::{ModelFile, peft};
use trine_hub::{Fetched, Hub, Reference, SCHEME, Settings};
use trine_runtime::{LoadOptions, Model};
use trine_tokenizer::{ChatTemplate, Message, Tokenizer};

use crate::progress::DownloadProgress;

/// The model that a path means: a file, a Hugging Face directory, a run directory, which means its
/// latest checkpoint, or a model of the hub, which is downloaded where it is not in the cache.
pub(crate) fn resolve(path: &Path) -> anyhow::Result<PathBuf> {
    if let Some(reference) = hub_reference(path)? {
        return Ok(fetch(&reference)?.path);
    }
    if !path.join("checkpoints").is_dir() || path.join("config.json").exists() {
        return Ok(path.to_owned());
    }
    trine_train::checkpoint::latest(path)
        .with_context(|| format!("{}: a run that has no checkpoint yet", path.display()))
}

/// The file or model that the path of a tokenizer means: of a repository on the hub, only its
/// tokenizer.json is downloaded.
pub(crate) fn tokenizer_path(path: &Path) -> anyhow::Result<PathBuf> {
    match hub_reference(path)? {
        Some(reference) => Ok(fetch(&reference.or_file("tokenizer.json"))?.path),
        None => Ok(path.to_owned()),
    }
}

/// The place of data: a path, or a file of a data set on the hub, which is downloaded with all its
/// shards where it is one.
pub(crate) fn data_path(path: &Path) -> anyhow::Result<PathBuf> {
    match hub_reference(path)? {
        Some(reference) if !reference.is_dataset() => {
            bail!("{reference} is a model: expected hf://datasets/owner/name/FILE");
        }
        Some(reference) => {
            let shards = path.to_str().map(trine_eval::shards).unwrap_or_default();
            for shard in shards.iter().filter(|_| shards.len() > 1) {
                fetch(&shard.parse()?)?;
            }
            Ok(fetch(&reference)?.path)
        }
        None => Ok(path.to_owned()),
    }
}

/// What a path that begins with `hf://` refers to.
fn hub_reference(path: &Path) -> anyhow::Result<Option<Reference>> {
    match path.to_str() {
        Some(text) if text.starts_with(SCHEME) => Ok(Some(text.parse()?)),
        _ => Ok(None),
    }
}

/// Downloads what the cache does not have, as the environment says, with progress on stderr.
pub(crate) fn fetch(reference: &Reference) -> anyhow::Result<Fetched> {
    let hub = Hub::new(Settings::from_env()?)?;
    Ok(hub.fetch(reference, &mut DownloadProgress::new())?)
}

/// Opens the model that a path means.
pub(crate) fn open(path: &Path) -> anyhow::Result<ModelFile> {
    Ok(trine_train::quantizers::open(&resolve_model(path)?)?)
}

/// As [`resolve`], where an adapter will not do.
pub(crate) fn resolve_model(path: &Path) -> anyhow::Result<PathBuf> {
    let found = resolve(path)?;
    if found.join(peft::CONFIG).exists() && !found.join("config.json").exists() {
        let shown = path.display();
        bail!("{shown} is an adapter: name its model, and the adapter with --adapter {shown}");
    }
    Ok(found)
}

/// A model with its tokenizer, ready to generate.
pub(crate) struct Loaded {
    pub(crate) file: ModelFile,
    pub(crate) model: Model,
    pub(crate) tokenizer: Tokenizer,
}

/// Loads a model and the tokenizer that travels with it, or the one given instead.
pub(crate) fn load(
    path: &Path,
    tokenizer: Option<&Path>,
    options: &LoadOptions,
) -> anyhow::Result<Loaded> {
    let file = open(path)?;
    let tokenizer = match (tokenizer, file.tokenizer()) {
        (Some(path), _) => Tokenizer::from_file(&tokenizer_path(path)?)?,
        (None, Some(files)) => Tokenizer::from_json(&files.tokenizer_json)
            .with_context(|| format!("the tokenizer of {}", file.path().display()))?,
        (None, None) => bail!(
            "{} has no tokenizer: expected tokenizer.json beside the weights or tokenizer keys \
             inside the GGUF; name one with --tokenizer",
            file.path().display()
        ),
    };
    check_vocabulary(&tokenizer, &file)?;
    let model = Model::load_with(&file, options)?;
    Ok(Loaded { file, model, tokenizer })
}

/// Refuses a tokenizer with ids for which a model has no embedding.
pub(crate) fn check_vocabulary(tokenizer: &Tokenizer, file: &ModelFile) -> anyhow::Result<()> {
    let (ids, vocab_size) = (tokenizer.vocab_size(), file.config().vocab_size);
    if ids > vocab_size {
        let path = file.path().display();
        bail!("{path}: the tokenizer has {ids} ids, the model embeddings for {vocab_size}");
    }
    Ok(())
}

impl Loaded {
    /// Ids at which generation ends: the model's, and the tokenizer's ends of text and turn.
    pub(crate) fn stop_ids(&self) -> Vec<u32> {
        let mut ids = self.model.config().eos_token_ids.clone();
        ids.extend(self.tokenizer.eos_id());
        ids.extend(self.tokenizer.eot_id());
        ids
    }

    /// The ids of a text to continue: a beginning-of-text token first where the model wants one.
    pub(crate) fn prompt_ids(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        Ok(self.tokenizer.prompt(text)?)
    }

    /// The ids of a conversation up to the answer, as the model's template renders it.
    pub(crate) fn chat_ids(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
    ) -> anyhow::Result<Vec<u32>> {
        Ok(template.prompt(&self.tokenizer, messages)?)
    }
}
