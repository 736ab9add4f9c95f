//! `trine tokenizer`: train one, and use any.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::json;
use trine_format::AtomicFile;
use trine_tokenizer::Tokenizer;

use crate::data::{self, CorpusArgs};
use crate::model;
use crate::output::{self, note};
use crate::progress::TokenizingProgress;

/// Subcommands of `trine tokenizer`.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Train a byte-level BPE on texts
    Train(TrainArgs),
    /// Print the ids of a text
    Encode(EncodeArgs),
    /// Print the text of ids
    Decode(DecodeArgs),
}

/// Options of `trine tokenizer train`.
#[derive(clap::Args)]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    corpus: CorpusArgs,
    /// Where to write the tokenizer.json
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Number of tokens, special ones included
    #[arg(long, default_value_t = 4096, value_name = "N")]
    vocab_size: usize,
}

/// Options of `trine tokenizer encode`.
#[derive(clap::Args)]
pub(crate) struct EncodeArgs {
    /// tokenizer.json, a model with a tokenizer, or hf://owner/name
    tokenizer: PathBuf,
    /// The text
    text: String,
    /// Leave out the beginning-of-text token
    #[arg(long)]
    no_special: bool,
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

/// Options of `trine tokenizer decode`.
#[derive(clap::Args)]
pub(crate) struct DecodeArgs {
    /// tokenizer.json, a model with a tokenizer, or hf://owner/name
    tokenizer: PathBuf,
    /// Token ids, separated by commas
    #[arg(value_delimiter = ',', required = true)]
    ids: Vec<u32>,
    /// Show special tokens
    #[arg(long)]
    special: bool,
}

pub(crate) fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Train(args) => train(args),
        Command::Encode(args) => {
            let ids = open(&args.tokenizer)?.encode(&args.text, !args.no_special)?;
            if args.json {
                return output::print_line(&json!(ids).to_string());
            }
            let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
            output::print_line(&ids.join(","))
        }
        Command::Decode(args) => {
            let text = open(&args.tokenizer)?
                .decode(&args.ids, !args.special)
                .with_context(|| args.tokenizer.display().to_string())?;
            output::print_line(&text)
        }
    }
}

fn train(args: &TrainArgs) -> anyhow::Result<()> {
    let spec = format!("bpe:{}", args.vocab_size);
    let mut progress = TokenizingProgress::new();
    let (tokenizer, _) = data::tokenizer_for(&args.corpus.corpus(), &spec, &mut progress)?;
    AtomicFile::replace(&args.out, tokenizer.json().as_bytes())?;
    note!("wrote {} with {} tokens", args.out.display(), tokenizer.vocab_size());
    Ok(())
}

/// The tokenizer of a path: a tokenizer.json, or what travels with a model.
fn open(path: &Path) -> anyhow::Result<Tokenizer> {
    let path = &model::tokenizer_path(path)?;
    if path.extension().is_some_and(|e| e == "json") {
        return Ok(Tokenizer::from_file(path)?);
    }
    let file = model::open(path)?;
    let files = file.tokenizer().with_context(|| format!("{} has no tokenizer", path.display()))?;
    Tokenizer::from_json(&files.tokenizer_json)
        .with_context(|| format!("the tokenizer of {}", path.display()))
}
