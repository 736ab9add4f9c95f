//! `trine logits`: how implementations are compared.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::ArgGroup;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;
use trine_format::AtomicFile;
use trine_runtime::{LoadOptions, LowRankType, Model, Session};

use crate::adapter::AdapterArgs;
use crate::model;
use crate::output::{self, note};

/// Options of `trine logits`.
#[derive(clap::Args)]
#[command(group = ArgGroup::new("input").args(["ids", "text"]).required(true))]
pub(crate) struct Args {
    /// GGUF file, Hugging Face directory, run directory, or hf://owner/name
    model: PathBuf,
    /// Token ids, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "ID,ID")]
    ids: Vec<u32>,
    /// Text instead of ids, for the model's tokenizer
    #[arg(long, allow_hyphen_values = true)]
    text: Option<String>,
    #[command(flatten)]
    adapter: AdapterArgs,
    /// Write all logits to a safetensors file: `logits`, f32, (T, V)
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print one JSON object with the likeliest tokens of every position
    #[arg(long)]
    json: bool,
    /// Number of likeliest tokens to print for every position
    #[arg(long, default_value_t = 5, value_name = "N")]
    top: usize,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if let Some(path) = &args.out {
        trine_format::replaceable(path)?;
    }
    let (model, ids) = match &args.text {
        Some(text) => {
            let loaded = model::load(&args.model, None, &LoadOptions::default())?;
            let ids = loaded.prompt_ids(text)?;
            (loaded.model, ids)
        }
        None => (Model::load(&model::open(&args.model)?)?, args.ids.clone()),
    };
    let vocab = model.config().vocab_size;
    let adapter = args.adapter.load(&model, LowRankType::F32)?;
    let logits = Session::with_adapter(&model, adapter)
        .logits_of_all(&ids)
        .with_context(|| args.model.display().to_string())?;
    if let Some(path) = &args.out {
        let bytes: Vec<u8> = logits.iter().flat_map(|l| l.to_le_bytes()).collect();
        let view = TensorView::new(Dtype::F32, vec![ids.len(), vocab], &bytes)?;
        let bytes = safetensors::serialize([("logits", view)], None)?;
        AtomicFile::replace(path, &bytes)?;
        note!("wrote logits ({}, {vocab}) to {}", ids.len(), path.display());
        if !args.json {
            return Ok(());
        }
    }
    if let Some(at) = logits.iter().position(|l| l.is_nan()) {
        bail!("the logit of token {} at position {} is NaN", at % vocab, at / vocab);
    }
    let top = |row: &[f32]| -> Vec<(u32, f32)> {
        let mut pairs: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
        pairs.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        pairs.truncate(args.top);
        pairs
    };
    let rows = logits.chunks_exact(vocab).zip(&ids).enumerate();
    if args.json {
        let positions: Vec<_> = rows
            .map(|(position, (row, id))| json!({ "position": position, "id": id, "top": top(row) }))
            .collect();
        return output::print_line(
            &json!({ "vocab_size": vocab, "positions": positions }).to_string(),
        );
    }
    for (position, (row, id)) in rows {
        let top: Vec<String> = top(row).iter().map(|(id, l)| format!("{id}:{l:.4}")).collect();
        output::print_line(&format!("{position}\t{id}\t{}", top.join(" ")))?;
    }
    Ok(())
}
