//! Adapters as users name them: directories of the package `peft`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use trine_format::peft::Lora;
use trine_format::{ModelConfig, TokenizerFiles, names};
use trine_runtime::{Adapter, LowRankType, Model};
use trine_tokenizer::ChatTemplate;

use crate::model::resolve;
use crate::output::{bytes, note};

/// Option of the commands that run a model for one user.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct AdapterArgs {
    /// Directory of an adapter, adapter_config.json and adapter_model.safetensors, to run the model with,
    /// or hf://owner/name; of a run its latest checkpoint
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<PathBuf>,
}

impl AdapterArgs {
    /// The adapter, if one is named.
    pub(crate) fn load(
        &self,
        model: &Model,
        dtype: LowRankType,
    ) -> anyhow::Result<Option<Arc<Adapter>>> {
        self.adapter.as_deref().map(|dir| load(model, dir, dtype)).transpose()
    }
}

/// Loads the adapter in `dir` for a model, and says what it is. The name of the model that it was trained
/// beside is only a name: shapes decide whether it fits.
pub(crate) fn load(model: &Model, dir: &Path, dtype: LowRankType) -> anyhow::Result<Arc<Adapter>> {
    let of = || format!("adapter {}", dir.display());
    let lora = read(dir, model.config()).with_context(of)?;
    let adapter = Adapter::new(model, &lora, dtype).with_context(of)?;
    let targets: Vec<&str> = lora.targets.iter().map(|p| names::module(*p)).collect();
    let base = lora.base.map_or(String::new(), |base| format!(", trained beside {base}"));
    note!(
        "adapter {}: rank {} for {}, {}{base}",
        dir.display(),
        lora.rank,
        targets.join(", "),
        bytes(adapter.bytes() as u64)
    );
    Ok(Arc::new(adapter))
}

/// Reads the adapter in a directory, or in the latest checkpoint of a run.
pub(crate) fn read(dir: &Path, config: &ModelConfig) -> anyhow::Result<Lora> {
    Ok(Lora::read(&resolve(dir)?, config)?)
}

/// The chat template that the adapter in a directory was trained with, if it is there.
pub(crate) fn template(dir: &Path) -> anyhow::Result<Option<ChatTemplate>> {
    let template = template_text(dir)?.map(|text| ChatTemplate::new(&text)).transpose();
    template.with_context(|| dir.display().to_string())
}

/// The same as text.
pub(crate) fn template_text(dir: &Path) -> anyhow::Result<Option<String>> {
    let dir = resolve(dir)?;
    if !dir.join("tokenizer.json").exists() {
        return Ok(None);
    }
    Ok(TokenizerFiles::open(&dir)?.chat_template().map(str::to_owned))
}

/// What `NAME=DIR` names, or `DIR` after its last part.
pub(crate) fn named(text: &str) -> anyhow::Result<(String, PathBuf)> {
    let (name, dir) = match text.split_once('=') {
        Some((name, dir)) => (name.to_owned(), dir),
        None => {
            let last = Path::new(text).file_name().map(|name| name.to_string_lossy().into_owned());
            (last.unwrap_or_default(), text)
        }
    };
    if name.is_empty() || dir.is_empty() {
        bail!("--adapter {text}: expected NAME=DIR, or a directory that has a name");
    }
    Ok((name, PathBuf::from(dir)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_is_called_as_its_user_says_or_after_its_directory() {
        for (text, name, dir) in [
            ("law=runs/a", "law", "runs/a"),
            ("runs/law/", "law", "runs/law/"),
            ("law=a=b", "law", "a=b"),
        ] {
            assert_eq!(named(text).unwrap(), (name.to_owned(), PathBuf::from(dir)));
        }
        for text in ["", "=runs/a", "law=", "/"] {
            assert!(named(text).is_err(), "{text}");
        }
    }
}
