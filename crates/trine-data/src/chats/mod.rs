//! From files of conversations to a dataset of [`rows`](crate::rows).
//!
//! Each conversation is rendered with a chat template, and only what the model is to write is learned:
//! see [`ChatTemplate::turns`]. A text without turns is learned whole.

mod forms;

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use trine_tokenizer::{ChatTemplate, Tokenizer, Turns};

pub use forms::Chat;

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
            let shard = ShardWriter::create_rows(path, tokenizer, options.seq_len + 1)?;
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
                let turns: Result<Vec<_>, _> = held
                    .par_iter()
                    .map(|(number, line)| {
                        options.turns(tokenizer, line).map_err(|cause| DataError::Line {
                            path: path.clone(),
                            line: *number,
                            cause,
                        })
                    })
                    .collect();
                for turns in turns? {
                    let Some(turns) = options.shortened(turns, &mut counts) else { continue };
                    let validates = validates();
                    dealt[usize::from(validates)] += 1;
                    let writer = if validates { &mut val } else { &mut train };
                    writer.push(&turns.ids, &turns.learned)?;
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
    /// The ids of a line, and which of them are learned.
    fn turns(&self, tokenizer: &Tokenizer, line: &[u8]) -> Result<Turns, String> {
        let turns = match (forms::parse(line)?, self.template) {
            (Chat::Messages(messages), Some(template)) => {
                template.turns(tokenizer, &messages).map_err(|e| e.to_string())?
            }
            (Chat::Messages(_), None) => {
                return Err("a conversation, but there is no chat template".to_owned());
            }
            (Chat::Text(text), _) => {
                let ids = tokenizer.encode_plain(&text).map_err(|e| e.to_string())?;
                let boundaries = Boundaries::of(tokenizer);
                let mut turns = Turns::default();
                turns.push(boundaries.begin.as_slice(), false);
                turns.push(&ids, true);
                turns.push(boundaries.end.as_slice(), true);
                turns
            }
        };
        let most = self.seq_len + 1;
        if self.too_long == TooLong::Refuse && turns.ids.len() > most {
            return Err(format!("expected at most {most} tokens, found {}", turns.ids.len()));
        }
        Ok(turns)
    }

    /// What of a conversation goes into a row, if anything.
    fn shortened(&self, mut turns: Turns, counts: &mut ChatCounts) -> Option<Turns> {
        let (most, len) = (self.seq_len + 1, turns.ids.len());
        turns.ids.truncate(most);
        turns.learned.truncate(most);
        // Nothing comes before the first id, so it is not predicted.
        let learned = turns.learned.iter().skip(1).filter(|learned| **learned).count();
        if learned == 0 || len > most && self.too_long == TooLong::Drop {
            counts.dropped += 1;
            return None;
        }
        counts.conversations += 1;
        counts.truncated += usize::from(len > most);
        counts.tokens += turns.ids.len() as u64;
        counts.learned += learned as u64;
        Some(turns)
    }
}
