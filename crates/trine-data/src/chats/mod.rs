//! From files of conversations to a dataset of [`rows`](crate::rows).
//!
//! Each conversation is rendered with a chat template, and only what the model is to write is learned:
//! see [`ChatTemplate::turns`]. A text without turns is learned whole.

mod forms;

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use trine_tokenizer::{ChatTemplate, Message, Tokenizer, TokenizerError, Turns};

pub use forms::{Chat, Preference};

use crate::corpus::{CHUNK, LONGEST, io, open};
use crate::dataset::{check_fraction, commit, files};
use crate::rows::RowWriter;
use crate::text::Parts;
use crate::{Boundaries, DataError, Dataset, Progress, ShardWriter, evenly};

/// What happens to a conversation with more tokens than a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TooLong {
    /// Its end is left out; all of it, where no answer begins before.
    Truncate,
    /// It is left out.
    Drop,
    /// It is an error.
    Refuse,
}

/// How conversations become rows.
#[derive(Debug, Clone, Copy)]
pub struct ChatOptions<'a> {
    /// Renders conversations; without one only texts can be learned from.
    pub template: Option<&'a ChatTemplate>,
    /// Inputs of a row.
    pub seq_len: usize,
    /// Share of the conversations that validates.
    pub val_fraction: f64,
    /// What happens to conversations that are longer than a row.
    pub too_long: TooLong,
    /// Lines hold [preferences](Preference): a row is a better answer and a worse one.
    pub preferences: bool,
}

/// What became of the conversations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ChatCounts {
    /// Conversations that are in a row, to learn from or to validate on.
    pub conversations: usize,
    /// Those of them that lost their end.
    pub truncated: usize,
    /// Conversations that were left out.
    pub dropped: usize,
    /// Tokens of the conversations that are in a row.
    pub tokens: u64,
    /// Those of them that are learned, or validated on.
    pub learned: u64,
    /// Rows to learn from, and to validate on.
    pub rows: [usize; 2],
}

impl Dataset {
    /// Makes a dataset of conversations in JSON lines (also as `.gz`), in any of the forms of
    /// [`chats`](crate::chats).
    ///
    /// # Errors
    /// [`DataError::Line`] for a line that is none of the forms, or that the template refuses;
    /// [`DataError::Split`]; and what reading and writing finds.
    pub fn from_chats(
        dir: &Path,
        tokenizer: &Tokenizer,
        paths: &[PathBuf],
        options: ChatOptions<'_>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Self, ChatCounts), DataError> {
        check_fraction(options.val_fraction)?;
        fs::create_dir_all(dir).map_err(io(dir, "create"))?;
        let [_, train, val] = files(dir);
        let writer = |path: &Path| -> Result<RowWriter, DataError> {
            let sequences = if options.preferences { 2 } else { 1 };
            let row = sequences * (options.seq_len + 1);
            let shard = ShardWriter::create_rows(path, tokenizer, row)?;
            Ok(RowWriter::new(shard, tokenizer.vocab_size(), options.seq_len))
        };
        let (mut train, mut val) = (writer(&train)?, writer(&val)?);
        let mut validates = evenly(options.val_fraction);
        let (mut counts, mut bytes) = (ChatCounts::default(), 0);
        let mut dealt = [0usize; 2];
        for path in paths {
            let mut lines = Parts::new(path, open(path)?, b"\n", LONGEST).enumerate().peekable();
            while lines.peek().is_some() {
                let (mut held, mut size) = (Vec::new(), 0);
                while size < CHUNK
                    && let Some((number, line)) = lines.next()
                {
                    let (_, line) = line?;
                    size += line.len() + 1;
                    if !line.trim_ascii().is_empty() {
                        held.push((number + 1, line));
                    }
                }
                // All are read, so that of several mistakes the first is told, whichever was met first.
                let read: Vec<Result<_, _>> = held
                    .par_iter()
                    .map(|(number, line)| {
                        options.sequences(tokenizer, line).map_err(|cause| DataError::Line {
                            path: path.clone(),
                            line: *number,
                            cause,
                        })
                    })
                    .collect();
                for sequences in read {
                    let Some(sequences) = options.shortened(sequences?, &mut counts) else {
                        continue;
                    };
                    let validates = validates();
                    dealt[usize::from(validates)] += 1;
                    let writer = if validates { &mut val } else { &mut train };
                    match &sequences[..] {
                        [turns] => writer.push(turns)?,
                        together => writer.push_row(together)?,
                    }
                }
                bytes += size as u64;
                progress(Progress { bytes, tokens: counts.tokens });
            }
        }
        let path = paths.first().map_or(dir, PathBuf::as_path).to_owned();
        if counts.conversations + counts.dropped == 0 {
            return Err(DataError::EmptyCorpus { path });
        }
        if let Some(none) = dealt.iter().position(|dealt| *dealt == 0) {
            return Err(DataError::Split {
                path,
                conversations: counts.conversations,
                fraction: options.val_fraction,
                lacks: ["learn from", "validate on"][none],
            });
        }
        let dataset = commit(dir, tokenizer, || {
            counts.rows = [train.finish()?, val.finish()?];
            Ok(())
        })?;
        Ok((dataset, counts))
    }
}

impl ChatOptions<'_> {
    /// The sequences of a line, which go into one row together.
    fn sequences(&self, tokenizer: &Tokenizer, line: &[u8]) -> Result<Vec<Turns>, String> {
        let spoken = |messages: &[Message]| match self.template {
            Some(template) => template.turns(tokenizer, messages).map_err(|e| e.to_string()),
            None => Err("a conversation, but there is no chat template".to_owned()),
        };
        let sequences = if self.preferences {
            let both = forms::preference(line)?;
            let both: Result<Vec<_>, _> = both.iter().map(|messages| spoken(messages)).collect();
            both?.into_iter().map(last_answer).collect()
        } else {
            vec![match forms::parse(line)? {
                Chat::Messages(messages) => spoken(&messages)?,
                Chat::Text(text) => plain(tokenizer, &text).map_err(|e| e.to_string())?,
            }]
        };
        let (most, longest) =
            (self.seq_len + 1, sequences.iter().map(|turns| turns.ids.len()).max().unwrap_or(0));
        if self.too_long == TooLong::Refuse && longest > most {
            return Err(format!("expected at most {most} tokens, found {longest}"));
        }
        Ok(sequences)
    }

    /// What of the sequences of a line goes into a row, if anything.
    fn shortened(&self, mut line: Vec<Turns>, counts: &mut ChatCounts) -> Option<Vec<Turns>> {
        let most = self.seq_len + 1;
        let too_long = line.iter().any(|turns| turns.ids.len() > most);
        for turns in &mut line {
            turns.ids.truncate(most);
            turns.learned.truncate(most);
        }
        // Nothing comes before the first id, so it is not predicted.
        let learned =
            |turns: &Turns| turns.learned.iter().skip(1).filter(|learned| **learned).count();
        let is_empty = line.iter().any(|turns| learned(turns) == 0);
        if is_empty || too_long && self.too_long == TooLong::Drop {
            counts.dropped += 1;
            return None;
        }
        counts.conversations += 1;
        counts.truncated += usize::from(too_long);
        counts.tokens += line.iter().map(|turns| turns.ids.len() as u64).sum::<u64>();
        counts.learned += line.iter().map(|turns| learned(turns) as u64).sum::<u64>();
        Some(line)
    }
}

/// A text, all of which is learned.
fn plain(tokenizer: &Tokenizer, text: &str) -> Result<Turns, TokenizerError> {
    let boundaries = Boundaries::of(tokenizer);
    let mut turns = Turns::default();
    turns.push(boundaries.begin.as_slice(), false);
    turns.push(&tokenizer.encode_plain(text)?, true);
    turns.push(boundaries.end.as_slice(), true);
    Ok(turns)
}

/// A conversation of which only the last answer is learned.
fn last_answer(mut turns: Turns) -> Turns {
    let end = turns.learned.iter().rposition(|learned| *learned).unwrap_or(0);
    let before = turns.learned[..end].iter().rposition(|learned| !*learned);
    turns.learned[..before.unwrap_or(0)].fill(false);
    turns
}
