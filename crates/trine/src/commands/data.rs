//! `trine data`: make, prepare and list training data.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use trine_data::{Boundaries, Dataset, synth};
use trine_format::AtomicFile;

use crate::data::{CorpusArgs, prepare};
use crate::output::{self, note};

/// Subcommands of `trine data`.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Write the built-in synthetic corpus: stories and arithmetic from a seed
    Synth(SynthArgs),
    /// Tokenize texts into a directory that `trine train --data` reads
    Prepare(PrepareArgs),
    /// Show what prepared directories hold
    List(ListArgs),
    /// Score a text against the grammar of the synthetic corpus
    Score(ScoreArgs),
}

/// Options of `trine data synth`.
#[derive(clap::Args)]
pub(crate) struct SynthArgs {
    /// Where to write: a text file, or .jsonl with one document a line
    out: PathBuf,
    /// Size of the corpus in bytes
    #[arg(long, default_value_t = 8_000_000, value_name = "N")]
    bytes: usize,
    /// Same seed, same corpus
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
}

/// Options of `trine data prepare`.
#[derive(clap::Args)]
pub(crate) struct PrepareArgs {
    #[command(flatten)]
    corpus: CorpusArgs,
    /// Directory to write
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// char, byte, bpe:SIZE or the path of a tokenizer.json
    #[arg(long, default_value = "bpe:4096", value_name = "SPEC")]
    tokenizer: String,
    /// Share that is held out for validation
    #[arg(long, default_value_t = 0.1, value_name = "F")]
    val_fraction: f64,
}

/// Options of `trine data list`.
#[derive(clap::Args)]
pub(crate) struct ListArgs {
    /// Directories of `trine data prepare`
    #[arg(required = true)]
    directories: Vec<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Options of `trine data score`.
#[derive(clap::Args)]
pub(crate) struct ScoreArgs {
    /// Text file
    file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Synth(args) => write_synth(args),
        Command::Prepare(args) => {
            let data =
                prepare(&args.corpus.corpus(), &args.tokenizer, &args.out, args.val_fraction)?;
            note!(
                "wrote {}: {} training and {} validation tokens, vocabulary {}",
                args.out.display(),
                output::count(data.train.len() as u64),
                output::count(data.val.len() as u64),
                data.tokenizer.vocab_size()
            );
            if data.val.is_empty() {
                note!("nothing was held out: training needs a larger --val-fraction or more text");
            }
            Ok(())
        }
        Command::List(args) => list(args),
        Command::Score(args) => {
            let score = synth::score(&trine_data::read_text(&args.file)?);
            if args.json {
                let tally = |t: synth::Tally| json!({ "right": t.right, "total": t.total });
                let score = json!({
                    "sentences": tally(score.sentences),
                    "consistency": tally(score.consistency),
                    "arithmetic": tally(score.arithmetic),
                    "words": tally(score.words),
                });
                return output::print_line(&score.to_string());
            }
            output::print_line(&describe(&score))
        }
    }
}

fn list(args: &ListArgs) -> anyhow::Result<()> {
    let datasets: Result<Vec<Value>, _> =
        args.directories.iter().map(|dir| Ok(about(dir, &Dataset::open(dir)?))).collect();
    // Opened before anything is printed: a mistake among several is an error and no list.
    let datasets = datasets.map_err(|e: trine_data::DataError| e)?;
    if args.json {
        return output::print_line(&json!({ "datasets": datasets }).to_string());
    }
    let lines: Vec<String> = datasets.iter().map(in_words).collect();
    output::print_line(&lines.join("\n"))
}

/// What a dataset holds.
fn about(dir: &Path, data: &Dataset) -> Value {
    let (train, val) = (data.train.len(), data.val.len());
    let hash: String = data.tokenizer.hash().iter().map(|byte| format!("{byte:02x}")).collect();
    let boundaries = Boundaries::of(&data.tokenizer);
    let token = |id: Option<u32>| id.and_then(|id| data.tokenizer.token(id));
    json!({
        "path": dir.display().to_string(),
        "tokens": train + val,
        "train_tokens": train,
        "val_tokens": val,
        "vocab_size": data.tokenizer.vocab_size(),
        "tokenizer_hash": hash,
        "begin_token": token(boundaries.begin),
        "end_token": token(boundaries.end),
    })
}

/// A dataset in a line.
fn in_words(about: &Value) -> String {
    let number = |key: &str| output::count(about[key].as_u64().unwrap_or_default());
    let text = |key: &str| about[key].as_str().unwrap_or("none").to_owned();
    format!(
        "{}: {} tokens, {} for training and {} for validation, vocabulary {}, tokenizer {:.16}, \
         documents begin with {} and end with {}",
        text("path"),
        number("tokens"),
        number("train_tokens"),
        number("val_tokens"),
        number("vocab_size"),
        text("tokenizer_hash"),
        text("begin_token"),
        text("end_token")
    )
}

/// A score in words.
pub(crate) fn describe(score: &synth::Score) -> String {
    let tally = |t: synth::Tally| format!("{:.0} % of {}", t.share() * 100.0, t.total);
    format!(
        "sentences of the grammar: {}; agreeing with what was told before: {}; sums right: {}",
        tally(score.sentences),
        tally(score.consistency),
        tally(score.arithmetic)
    )
}

fn write_synth(args: &SynthArgs) -> anyhow::Result<()> {
    let mut file = AtomicFile::create(&args.out)?;
    if args.out.extension().is_some_and(|e| e == "jsonl") {
        for document in synth::documents(args.seed, args.bytes) {
            file.put(format!("{}\n", json!({ "text": document })).as_bytes())?;
        }
    } else {
        file.put(synth::Synth::new(args.seed).text(args.bytes).as_bytes())?;
    }
    file.commit()?;
    note!("wrote {}", args.out.display());
    Ok(())
}
