//! Texts, tokenizers and prepared data, as commands and configurations name them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use trine_data::chats::{ChatOptions, TooLong};
use trine_data::{Corpus, DataError, Dataset, Mixture, evenly, synth};
use trine_tokenizer::Tokenizer;
use trine_train::config::{DataConfig, Objective};
use trine_train::{Base, RunConfig};

use crate::output::{self, note};
use crate::progress::TokenizingProgress;

/// Bytes of files of which a BPE is learned from all of the text; of larger corpora it sees as even
/// a share as makes this much.
const LEARN_FROM: u64 = 1 << 30;

/// Files of text, and how documents lie in them.
#[derive(clap::Args)]
pub(crate) struct CorpusArgs {
    /// Text, .jsonl or .parquet files; text and .jsonl also as .gz
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Key of the text in JSON lines, column of the text in parquet files
    #[arg(long, default_value = "text", value_name = "KEY")]
    text_key: String,
    /// What separates documents in text files, e.g. '\n\n' or '<|endoftext|>'
    #[arg(long, value_parser = separator, value_name = "TEXT")]
    split_on: Option<String>,
}

impl CorpusArgs {
    pub(crate) fn corpus(&self) -> Corpus {
        Corpus {
            files: self.files.clone(),
            text_key: self.text_key.clone(),
            split_on: self.split_on.clone(),
        }
    }
}

/// A separator as shells can say it: with `\n`, `\r`, `\t` and `\\`.
fn separator(text: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        out.push(match c {
            '\\' => match characters.next() {
                Some('n') => '\n',
                Some('r') => '\r',
                Some('t') => '\t',
                Some('\\') => '\\',
                _ => return Err(r"expected \n, \r, \t or \\ after a backslash".to_owned()),
            },
            c => c,
        });
    }
    if out.is_empty() { Err("expected a text that is not empty".to_owned()) } else { Ok(out) }
}

/// The tokens of a new run: prepared already, or made now and kept in the run directory.
pub(crate) fn of_new_run(config: &RunConfig, run_dir: &Path) -> anyhow::Result<Mixture> {
    let data = &config.data;
    let path = Path::new(&data.path);
    if !data.sources.is_empty() || path.is_dir() {
        return prepared(config);
    }
    if data.path.is_empty() {
        bail!("no training data: name a text file with --data or data.path");
    }
    let into = run_dir.join("data");
    note!("tokenizing {} into {}", data.path, into.display());
    if data.path == "synth" {
        let documents = || synth::documents(config.seed, data.synth_bytes);
        let tokenizer = tokenizer(&data.tokenizer, documents(), 1.0)?;
        let (mut progress, mut bytes) = (TokenizingProgress::new(), 0);
        let documents = documents().map(|document| {
            bytes += document.len() as u64;
            progress.on_text(bytes, data.synth_bytes as u64);
            Ok(document)
        });
        let made = Dataset::from_documents(&into, &tokenizer, documents, data.val_fraction)?;
        return Ok(made.into());
    }
    Ok(prepare(&corpus(data), &data.tokenizer, &into, data.val_fraction)?.into())
}

/// The tokens of a new fine-tuning: made now, with the model's own tokenizer and template, or a directory
/// that was made before.
pub(crate) fn of_finetuning(
    config: &RunConfig,
    base: &Base,
    run_dir: &Path,
) -> anyhow::Result<Mixture> {
    let data = &config.data;
    let path = Path::new(&data.path);
    if data.path.is_empty() {
        bail!("no training data: name a file with --data or data.path");
    }
    if path.is_dir() {
        return prepared(config);
    }
    let (into, tokenizer) = (run_dir.join("data"), base.tokenizer()?);
    let corpus = corpus(data);
    let total = corpus.bytes_on_disk()?;
    note!("tokenizing {} into {}", data.path, into.display());
    let mut progress = TokenizingProgress::new();
    let mut on_progress = |done: trine_data::Progress| progress.on_text(done.bytes, total);
    let finetune = config.finetune.as_ref();
    if finetune.is_some_and(|f| f.objective == Objective::Text) {
        let fraction = data.val_fraction;
        return Ok(
            Dataset::from_corpus(&into, &tokenizer, &corpus, fraction, &mut on_progress)?.into()
        );
    }
    let template = base.template()?;
    let options = ChatOptions {
        template: template.as_ref(),
        seq_len: data.seq_len,
        val_fraction: data.val_fraction,
        too_long: finetune.map_or(TooLong::Truncate, |f| f.too_long),
        preferences: finetune.is_some_and(|f| f.objective == Objective::Dpo),
    };
    let made = Dataset::from_chats(&into, &tokenizer, &corpus.files, options, &mut on_progress);
    let (dataset, counts) = match made {
        Err(e) if template.is_none() => {
            let hint = "a model without a chat template learns conversations with one that \
                        finetune.chat_template names";
            return Err(anyhow::Error::from(e).context(hint));
        }
        made => made?,
    };
    drop(progress);
    note!(
        "{} conversations in {} rows to learn from and {} to validate on: {} tokens, of which {} are \
         learned",
        output::count(counts.conversations as u64),
        output::count(counts.rows[0] as u64),
        output::count(counts.rows[1] as u64),
        output::count(counts.tokens),
        output::count(counts.learned),
    );
    if counts.truncated + counts.dropped > 0 {
        note!(
            "{} conversations lost their end, {} were left out: data.seq_len is {}",
            output::count(counts.truncated as u64),
            output::count(counts.dropped as u64),
            data.seq_len,
        );
    }
    Ok(dataset.into())
}

/// The file that a configuration names, and how documents lie in it.
fn corpus(data: &DataConfig) -> Corpus {
    Corpus {
        files: vec![PathBuf::from(&data.path)],
        text_key: data.text_key.clone(),
        split_on: Some(data.split_on.clone()).filter(|separator| !separator.is_empty()),
    }
}

/// The tokens of a run that has begun.
pub(crate) fn of_run(config: &RunConfig, run_dir: &Path) -> anyhow::Result<Mixture> {
    let own = run_dir.join("data");
    if config.data.sources.is_empty() && own.is_dir() {
        return Ok(Dataset::open(&own)?.into());
    }
    prepared(config)
}

/// Prepared data that a configuration names.
fn prepared(config: &RunConfig) -> anyhow::Result<Mixture> {
    let data = &config.data;
    if data.sources.is_empty() {
        return Ok(Dataset::open(Path::new(&data.path))?.into());
    }
    let sources: Vec<_> = data.sources.iter().map(|s| (Path::new(&s.path), s.weight)).collect();
    Ok(Mixture::open(&sources)?)
}

/// Tokenizes a corpus: one text is cut by position, anything else by document.
pub(crate) fn prepare(
    corpus: &Corpus,
    tokenizer_spec: &str,
    into: &Path,
    val_fraction: f64,
) -> anyhow::Result<Dataset> {
    let mut progress = TokenizingProgress::new();
    let (tokenizer, total) = tokenizer_for(corpus, tokenizer_spec, &mut progress)?;
    let mut on_progress = |done: trine_data::Progress| progress.on_text(done.bytes, total);
    Ok(Dataset::from_corpus(into, &tokenizer, corpus, val_fraction, &mut on_progress)?)
}

/// A tokenizer for a corpus, as [`tokenizer`], and how many bytes of text the corpus has.
///
/// All of it is read, whatever the tokenizer: an error in a file is found before anything is
/// written.
pub(crate) fn tokenizer_for(
    corpus: &Corpus,
    spec: &str,
    progress: &mut TokenizingProgress,
) -> anyhow::Result<(Tokenizer, u64)> {
    let share = LEARN_FROM as f64 / corpus.bytes_on_disk()?.max(LEARN_FROM) as f64;
    let (mut bytes, mut blank) = (0, true);
    let mut error: Option<DataError> = None;
    let texts = corpus.texts().map_while(|text| match text {
        Ok(text) => {
            bytes += text.len() as u64;
            blank &= text.trim().is_empty();
            progress.on_reading(bytes);
            Some(text)
        }
        Err(e) => {
            error = Some(e);
            None
        }
    });
    let mut texts = texts.fuse();
    let made = tokenizer(spec, &mut texts, share);
    match &made {
        Ok(_) => texts.for_each(drop),
        // There may be no tokenizer because there is no text.
        Err(_) => drop(texts.next()),
    }
    if let Some(error) = error {
        return Err(error.into());
    }
    if blank {
        let names: Vec<_> = corpus.files.iter().map(|path| path.display().to_string()).collect();
        bail!("{}: the corpus is empty", names.join(", "));
    }
    Ok((made?, bytes))
}

/// The tokenizer that `data.tokenizer` asks for, made from `texts` where it is not a file; a BPE
/// from an even share of them.
fn tokenizer<S: AsRef<str> + Send>(
    spec: &str,
    texts: impl Iterator<Item = S> + Send,
    share: f64,
) -> anyhow::Result<Tokenizer> {
    let expected = "char, byte, bpe:<vocabulary size> or the path of a tokenizer.json";
    Ok(match spec.split_once(':') {
        Some(("bpe", size)) => {
            let size =
                size.parse().with_context(|| format!("tokenizer `{spec}`: expected {expected}"))?;
            let mut learns = evenly(share);
            let texts = texts.filter(move |_| learns());
            Tokenizer::train_bpe(texts, size).with_context(|| format!("tokenizer `{spec}`"))?
        }
        _ if spec == "char" => {
            let alphabet: BTreeSet<char> = texts.fold(BTreeSet::new(), |mut alphabet, text| {
                alphabet.extend(text.as_ref().chars());
                alphabet
            });
            Tokenizer::characters(&alphabet.into_iter().collect::<String>())?
        }
        _ if spec == "byte" => Tokenizer::bytes(),
        _ => Tokenizer::from_file(Path::new(spec))
            .with_context(|| format!("tokenizer `{spec}`: expected {expected}"))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separators_are_said_with_escapes() {
        for (said, meant) in [("\\n\\n", "\n\n"), ("<|x|>", "<|x|>"), ("\\\\n\\t\\r", "\\n\t\r")] {
            assert_eq!(separator(said).as_deref(), Ok(meant));
        }
        for wrong in ["", "\\", "a\\x", "\\u{0}"] {
            assert!(separator(wrong).is_err(), "{wrong}");
        }
    }
}
