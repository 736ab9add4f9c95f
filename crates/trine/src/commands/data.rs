//! `trine data`: make and prepare training data.

use std::path::PathBuf;

use serde_json::json;
use trine_data::synth;
use trine_format::AtomicFile;

use super::train::prepare;
use crate::output::{self, note};

/// Subcommands of `trine data`.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Write the built-in synthetic corpus: stories and arithmetic from a seed
    Synth(SynthArgs),
    /// Tokenize texts into a directory that `trine train --data` reads
    Prepare(PrepareArgs),
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
    /// Text files, or .jsonl files with a "text" in every line
    #[arg(required = true)]
    files: Vec<PathBuf>,
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
            let data = prepare(&args.files, &args.tokenizer, &args.out, args.val_fraction)?;
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
