//! A model that is here, on the runtime.

use std::path::Path;

use anyhow::bail;
use serde_json::{Value, json};
use trine_eval::{LanguageModel, OneByOne, RuntimeModel};
use trine_format::peft;
use trine_runtime::{LowRankType, Session};
use trine_train::config::DeviceConfig;

use super::card::CardModel;
use super::chat::Template;
use super::measure::Measured;
use super::results::ModelResults;
use super::subject::Subject;
use super::{Args, Questions, beside};
use crate::model::{self, Loaded};

/// Everything about one model.
pub(super) fn evaluate(
    path: &Path,
    adapter: Option<&Path>,
    questions: &Questions<'_>,
) -> anyhow::Result<ModelResults> {
    let args = questions.args;
    let loaded = model::load(path, args.tokenizer.as_deref(), &args.options())?;
    let timed = args.one_by_one || args.measure;
    let keep = !args.no_keep && !timed && !questions.tasks.is_empty();
    let identity = keep.then(|| identity(loaded.file.path(), adapter, args)).transpose()?;
    let chats = questions.tasks.iter().any(|(task, _)| args.chat.wants(task));
    let template = if chats { Template::of(&loaded, adapter)? } else { None };
    let stop_ids = loaded.stop_ids();
    let Loaded { model, tokenizer, .. } = &loaded;
    let limit = model.config().max_position_embeddings;
    let run_with =
        adapter.map(|dir| crate::adapter::load(model, dir, LowRankType::F32)).transpose()?;
    let runtime = || RuntimeModel::with_adapter(model, run_with.clone());
    let one_by_one = || {
        OneByOne::new(limit, |ids: &[u32]| {
            Session::with_adapter(model, run_with.clone()).logits_of_all(ids)
        })
    };
    let (mut shared, mut plain) = (runtime(), one_by_one());
    let mut measured = args.measure.then(|| Measured::new(model, runtime(), one_by_one()));
    let mut on_card = match args.device {
        DeviceConfig::Cpu => None,
        _ if adapter.is_some() || timed => {
            let device = args.device;
            bail!(
                "--adapter, --one-by-one and --measure are for the CPU, not for --device {device}"
            )
        }
        device => Some(CardModel::open(&loaded.file, device)?),
    };
    let language: &mut dyn LanguageModel = match (&mut on_card, &mut measured) {
        (Some(card), _) => card,
        (None, Some(measured)) => measured,
        (None, None) if args.one_by_one => &mut plain,
        (None, None) => &mut shared,
    };
    let subject = Subject { path, adapter, tokenizer, stop_ids, template, identity };
    let mut results = subject.answer(language, questions)?;
    if let Some(measured) = measured {
        measured.note();
        results.speed = measured.results();
    }
    if keep {
        // What was trained last: the adapter, where there is one.
        let adapter = adapter.map(model::resolve).transpose()?;
        beside::keep(adapter.as_deref().unwrap_or(loaded.file.path()), &results)?;
    }
    Ok(results)
}

/// What says which weights are scored and how: of the model, and of the two files of an adapter.
fn identity(path: &Path, adapter: Option<&Path>, args: &Args) -> anyhow::Result<Value> {
    let head = args.head.map_or("as stored", |head| head.dtype().name());
    let mut identity = json!({
        "weights_hash": trine_eval::fingerprint(path)?, "kv": args.kv.to_string(), "head": head,
        "trine": env!("CARGO_PKG_VERSION"),
    });
    // Only where there is one, so that results without keep their names.
    if args.device != DeviceConfig::Cpu {
        identity["device"] = json!(args.device);
    }
    if let Some(dir) = adapter {
        let dir = &model::resolve(dir)?;
        let file = |name: &str| trine_eval::fingerprint(&dir.join(name));
        identity["adapter_hashes"] = json!([file(peft::CONFIG)?, file(peft::MATRICES)?]);
    }
    Ok(identity)
}
