//! From text to a dataset: a directory that training reads.
//!
//! ```text
//! tokenizer.json    the tokenizer, as it goes with the model later
//! train.bin         tokens to train on, see [`shard`](crate::shard)
//! val.bin           tokens to validate on
//! ```
//!
//! A corpus is one text, or documents. One text is cut by position, the last part validates, as
//! nanoGPT does; nothing is added to it. Documents are dealt out whole, evenly over the corpus; each
//! is encoded as a prompt would be (the begin token in front, where the tokenizer puts one) and
//! closed with the end token, if there is one. What a document says is text: the name of a special
//! token in it stays a name.
//!
//! Conversations become rows instead, see [`rows`](crate::rows); everything else is the same.
//!
//! A dataset that is made anew in its place is the old one, the new one, or none at all:
//! `tokenizer.json` goes before the first shard is replaced and comes after the last. The directory
//! itself is not replaced, as it may hold other files.

use std::fs;
use std::path::{Path, PathBuf};

use trine_format::{AtomicFile, flush_name};
use trine_tokenizer::Tokenizer;

use crate::corpus::{CHUNK, blocks, io};
use crate::{Boundaries, Corpus, DataError, Shard, ShardWriter};

/// How far a preparation has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of text that are tokens now.
    pub bytes: u64,
    /// Tokens written, those between documents included.
    pub tokens: u64,
}

/// A prepared corpus.
#[derive(Debug)]
pub struct Dataset {
    /// The tokenizer the shards were made with.
    pub tokenizer: Tokenizer,
    /// Tokens to train on.
    pub train: Shard,
    /// Tokens to validate on.
    pub val: Shard,
}

impl Dataset {
    /// Opens a dataset and checks that its parts belong together.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`], what [`Shard::open`] finds, and [`DataError::OtherTokenizer`].
    pub fn open(dir: &Path) -> Result<Self, DataError> {
        let [tokenizer, train, val] = files(dir);
        let tokenizer = Tokenizer::from_file(&tokenizer)?;
        let (train, val) = (Shard::open(&train)?, Shard::open(&val)?);
        train.check_tokenizer(tokenizer.hash())?;
        val.check_tokenizer(tokenizer.hash())?;
        Ok(Self { tokenizer, train, val })
    }

    /// Makes a dataset of files: [`Dataset::from_documents`] of [`Corpus::documents`] or, where it
    /// [is one text](Corpus::is_one_text), what [`Dataset::from_text`] makes of it. The corpus is
    /// not held, with one exception: a text is read whole for a tokenizer whose ids depend on what
    /// stands in the line before, like those of SentencePiece.
    ///
    /// `progress` is called after every few megabytes of text.
    ///
    /// # Errors
    /// As [`Dataset::from_text`], and what reading the files finds.
    pub fn from_corpus(
        dir: &Path,
        tokenizer: &Tokenizer,
        corpus: &Corpus,
        val_fraction: f64,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, DataError> {
        match &corpus.files[..] {
            [path] if corpus.is_one_text() => {
                let blocks = || blocks(path, tokenizer.cuts_at_lines());
                from_one(dir, tokenizer, blocks, val_fraction, progress)
            }
            _ => from_many(dir, tokenizer, corpus.documents(), val_fraction, CHUNK, progress),
        }
    }

    /// Makes a dataset of one text: the last `val_fraction` of its characters validates.
    ///
    /// # Errors
    /// [`DataError::EmptyCorpus`], [`DataError::Fraction`], [`DataError::Tokenizer`] for a text
    /// the tokenizer cannot express, and what writing finds.
    pub fn from_text(
        dir: &Path,
        tokenizer: &Tokenizer,
        text: &str,
        val_fraction: f64,
    ) -> Result<Self, DataError> {
        from_one(dir, tokenizer, || std::iter::once(Ok(text)), val_fraction, &mut |_| {})
    }

    /// Makes a dataset of documents: one in `1 / val_fraction` validates, [evenly]. They are taken
    /// one after the other and never held all. To report progress, let the iterator count.
    ///
    /// # Errors
    /// As [`Dataset::from_text`], and the first error of `documents`.
    pub fn from_documents(
        dir: &Path,
        tokenizer: &Tokenizer,
        documents: impl IntoIterator<Item = Result<String, DataError>>,
        val_fraction: f64,
    ) -> Result<Self, DataError> {
        from_many(dir, tokenizer, documents, val_fraction, CHUNK, &mut |_| {})
    }
}

/// Deals out a share of what comes: of the first `n` calls, the whole part of `n * share` are true.
pub fn evenly(share: f64) -> impl FnMut() -> bool + Send {
    let mut count = 0u64;
    move || {
        let before = (count as f64 * share) as u64;
        count += 1;
        (count as f64 * share) as u64 > before
    }
}

/// A dataset of one text, which `blocks` gives twice: to count its characters and to encode it.
fn from_one<S: AsRef<str>, I: Iterator<Item = Result<S, DataError>>>(
    dir: &Path,
    tokenizer: &Tokenizer,
    blocks: impl Fn() -> I,
    val_fraction: f64,
    progress: &mut dyn FnMut(Progress),
) -> Result<Dataset, DataError> {
    check_fraction(val_fraction)?;
    let mut characters = 0;
    for block in blocks() {
        characters += block?.as_ref().chars().count();
    }
    if characters == 0 {
        return Err(DataError::EmptyCorpus { path: dir.to_owned() });
    }
    // Counted in characters, as nanoGPT does: the same cut for every tokenizer.
    let mut train = (characters as f64 * (1.0 - val_fraction)) as usize;
    let mut writers = Writers::create(dir, tokenizer)?;
    for block in blocks() {
        let block = block?;
        let block = block.as_ref();
        let cut = block.char_indices().nth(train).map_or(block.len(), |(at, _)| at);
        let (before, after) = block.split_at(cut);
        train -= train.min(before.chars().count());
        writers.train.push(&tokenizer.encode_plain(before)?)?;
        writers.val.push(&tokenizer.encode_plain(after)?)?;
        writers.report(block.len(), progress);
    }
    writers.finish(dir, tokenizer)
}

/// A dataset of documents, of which about `chunk` bytes are held and encoded together.
fn from_many(
    dir: &Path,
    tokenizer: &Tokenizer,
    documents: impl IntoIterator<Item = Result<String, DataError>>,
    val_fraction: f64,
    chunk: usize,
    progress: &mut dyn FnMut(Progress),
) -> Result<Dataset, DataError> {
    check_fraction(val_fraction)?;
    let mut writers = Writers::create(dir, tokenizer)?;
    let mut validates = evenly(val_fraction);
    let (mut held, mut bytes) = (Vec::new(), 0);
    for document in documents {
        let document = document?;
        if document.is_empty() {
            continue;
        }
        bytes += document.len();
        held.push((document, validates()));
        if bytes >= chunk {
            writers.push(tokenizer, &std::mem::take(&mut held))?;
            writers.report(std::mem::take(&mut bytes), progress);
        }
    }
    writers.push(tokenizer, &held)?;
    writers.report(bytes, progress);
    if writers.written.bytes == 0 {
        return Err(DataError::EmptyCorpus { path: dir.to_owned() });
    }
    writers.finish(dir, tokenizer)
}

pub(crate) fn files(dir: &Path) -> [PathBuf; 3] {
    ["tokenizer.json", "train.bin", "val.bin"].map(|name| dir.join(name))
}

pub(crate) fn check_fraction(found: f64) -> Result<(), DataError> {
    if (0.0..1.0).contains(&found) { Ok(()) } else { Err(DataError::Fraction { found }) }
}

struct Writers {
    train: ShardWriter,
    val: ShardWriter,
    boundaries: Boundaries,
    written: Progress,
}

impl Writers {
    fn create(dir: &Path, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        fs::create_dir_all(dir).map_err(io(dir, "create"))?;
        let [_, train, val] = files(dir);
        Ok(Self {
            train: ShardWriter::create(&train, tokenizer)?,
            val: ShardWriter::create(&val, tokenizer)?,
            boundaries: Boundaries::of(tokenizer),
            written: Progress::default(),
        })
    }

    /// Says that `bytes` more of text are written.
    fn report(&mut self, bytes: usize, progress: &mut dyn FnMut(Progress)) {
        self.written.bytes += bytes as u64;
        self.written.tokens = (self.train.count() + self.val.count()) as u64;
        progress(self.written);
    }

    /// Encodes documents and appends each to train or, where its flag says so, to val.
    fn push(
        &mut self,
        tokenizer: &Tokenizer,
        documents: &[(String, bool)],
    ) -> Result<(), DataError> {
        let texts: Vec<&str> = documents.iter().map(|(text, _)| text.as_str()).collect();
        let encoded = tokenizer.encode_plain_batch(&texts)?;
        for (ids, (_, validates)) in encoded.iter().zip(documents) {
            let writer = if *validates { &mut self.val } else { &mut self.train };
            writer.push(self.boundaries.begin.as_slice())?;
            writer.push(ids)?;
            writer.push(self.boundaries.end.as_slice())?;
        }
        Ok(())
    }

    fn finish(self, dir: &Path, tokenizer: &Tokenizer) -> Result<Dataset, DataError> {
        commit(dir, tokenizer, || {
            self.train.finish()?;
            self.val.finish()?;
            Ok(())
        })
    }
}

/// Gives both shards, which `finish` does, and the tokenizer their names, in the order that leaves no
/// mixture of an old dataset and a new one.
pub(crate) fn commit(
    dir: &Path,
    tokenizer: &Tokenizer,
    finish: impl FnOnce() -> Result<(), DataError>,
) -> Result<Dataset, DataError> {
    let [json, ..] = files(dir);
    // An old train.bin beside a new val.bin could agree in everything that `open` compares.
    match fs::remove_file(&json) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        removed => {
            removed.map_err(io(&json, "replace"))?;
            flush_name(&json)?;
        }
    }
    finish()?;
    AtomicFile::replace(&json, tokenizer.json().as_bytes())?;
    Dataset::open(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use tempfile::TempDir;

    fn bytes_of(dir: &TempDir) -> [Vec<u8>; 2] {
        ["train.bin", "val.bin"].map(|name| fs::read(dir.path().join(name)).expect("a shard"))
    }

    #[test]
    fn a_text_in_blocks_has_the_tokens_of_the_whole() {
        let text = "One line,\n  and an indented one.\n\nA last lĩne\r\nof four.\n".repeat(9);
        let bpe = Tokenizer::train_bpe([&text].iter(), 300).expect("a tokenizer");
        let characters = Tokenizer::characters(&text).expect("a tokenizer");
        for tokenizer in [bpe, characters, Tokenizer::bytes()] {
            assert!(tokenizer.cuts_at_lines());
            for fraction in [0.0, 0.1, 0.5, 0.77] {
                let [whole, parts] = [(); 2].map(|()| TempDir::new().expect("a directory"));
                Dataset::from_text(whole.path(), &tokenizer, &text, fraction).expect("a dataset");
                let blocks = || text.split_inclusive("\n\n").map(Ok);
                let mut seen = Vec::new();
                let mut progress = |now| seen.push(now);
                from_one(parts.path(), &tokenizer, blocks, fraction, &mut progress)
                    .expect("a dataset");
                assert_eq!(bytes_of(&whole), bytes_of(&parts), "{fraction}");
                assert_eq!(seen.len(), blocks().count());
                assert_eq!(seen.last().map(|p| p.bytes), Some(text.len() as u64));
            }
        }
    }

    #[test]
    fn documents_are_held_a_chunk_at_a_time() {
        let documents = || (0..100).map(|i| Ok(format!("document {i}")));
        let [whole, parts] = [(); 2].map(|()| TempDir::new().expect("a directory"));
        let tokenizer = Tokenizer::bytes();
        Dataset::from_documents(whole.path(), &tokenizer, documents(), 0.3).expect("a dataset");
        // Bytes that were taken and are not reported as written are held.
        let (taken, written, most) = (Cell::new(0), Cell::new(0), Cell::new(0));
        let counted = documents().inspect(|document| {
            taken.set(taken.get() + document.as_ref().map_or(0, String::len) as u64);
            most.set(most.get().max(taken.get() - written.get()));
        });
        let mut tokens = 0;
        let mut progress = |now: Progress| {
            written.set(now.bytes);
            tokens = now.tokens;
        };
        let made = from_many(parts.path(), &tokenizer, counted, 0.3, 40, &mut progress);
        let made = made.expect("a dataset");
        assert_eq!(bytes_of(&whole), bytes_of(&parts));
        assert_eq!(written.get(), taken.get());
        assert_eq!(tokens, (made.train.len() + made.val.len()) as u64);
        assert!(most.get() < 40 + "document 99".len() as u64, "{}", most.get());
    }

    #[test]
    fn a_share_is_dealt_out_evenly() {
        for share in [0.0, 0.1, 0.3, 0.5, 1.0] {
            let mut deal = evenly(share);
            let mut count = 0;
            for n in 1..500 {
                count += usize::from(deal());
                assert_eq!(count, (n as f64 * share) as usize);
            }
        }
    }
}
