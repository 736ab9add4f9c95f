//! `trine download`: a model of the hub in the local cache, without opening it.

use serde_json::json;
use trine_hub::Reference;

use crate::model;
use crate::output::{self, note};

/// Options of `trine download`.
#[derive(clap::Args)]
#[command(after_help = "\
The files go to the cache that Python's huggingface_hub uses. A download that was interrupted is \
continued; large files are checked against their SHA-256.

HF_TOKEN         access token for private and gated repositories
HF_HOME          where the cache is; ~/.cache/huggingface by default
HF_HUB_CACHE     the cache itself; $HF_HOME/hub by default
HF_ENDPOINT      another hub than https://huggingface.co
HF_HUB_OFFLINE   1: use the cache only")]
pub(crate) struct Args {
    /// hf://owner/name, hf://owner/name@revision, or a file of either: hf://owner/name/model.gguf
    model: Reference,
    /// Branch, tag or commit; main by default
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut reference = args.model.clone();
    if let Some(revision) = &args.revision {
        reference = reference.at_revision(revision)?;
    }
    let fetched = model::fetch(&reference)?;
    if args.json {
        let result = json!({
            "repository": reference.repo(),
            "revision": reference.revision(),
            "commit": fetched.commit,
            "path": fetched.path,
            "received_bytes": fetched.received,
        });
        return output::print_line(&result.to_string());
    }
    match fetched.received {
        0 => note!("{reference} is in the cache already"),
        n => note!("downloaded {} of {reference}", output::bytes(n)),
    }
    output::print_line(&fetched.path.display().to_string())
}
