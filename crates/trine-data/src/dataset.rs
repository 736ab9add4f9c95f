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
//! A dataset that is made anew in its place is the old one, the new one, or none at all:
//! `tokenizer.json` goes before the first shard is replaced and comes after the last. The directory
//! itself is not replaced, as it may hold other files.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use trine_format::{AtomicFile, flush_name};
use trine_tokenizer::Tokenizer;

use crate::{DataError, Shard, ShardWriter};

/// Bytes of documents that are encoded together, in parallel.
const CHUNK: usize = 8 << 20;

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
        check_fraction(val_fraction)?;
        if text.is_empty() {
            return Err(DataError::EmptyCorpus { path: dir.to_owned() });
        }
        // Counted in characters, as nanoGPT does: the same cut for every tokenizer.
        let characters = text.chars().count();
        let train = (characters as f64 * (1.0 - val_fraction)) as usize;
        let cut = text.char_indices().nth(train).map_or(text.len(), |(at, _)| at);
        let (train, val) = text.split_at(cut);
        let mut writers = Writers::create(dir, tokenizer)?;
        writers.train.push(&tokenizer.encode_plain(train)?)?;
        writers.val.push(&tokenizer.encode_plain(val)?)?;
        writers.finish(dir, tokenizer)
    }

    /// Makes a dataset of documents: one in `1 / val_fraction` validates.
    ///
    /// # Errors
    /// As [`Dataset::from_text`], and the first error of `documents`.
    pub fn from_documents(
        dir: &Path,
        tokenizer: &Tokenizer,
        documents: impl IntoIterator<Item = Result<String, DataError>>,
        val_fraction: f64,
    ) -> Result<Self, DataError> {
        check_fraction(val_fraction)?;
        let mut writers = Writers::create(dir, tokenizer)?;
        let (mut chunk, mut bytes, mut count) = (Vec::new(), 0, 0);
        for document in documents {
            let document = document?;
            if document.is_empty() {
                continue;
            }
            bytes += document.len();
            // Documents before this one that validate are the whole part of count * fraction.
            let share = |n: usize| (n as f64 * val_fraction) as usize;
            let validates = share(count + 1) > share(count);
            count += 1;
            chunk.push((document, validates));
            if bytes >= CHUNK {
                writers.push(tokenizer, &std::mem::take(&mut chunk))?;
                bytes = 0;
            }
        }
        writers.push(tokenizer, &chunk)?;
        if count == 0 {
            return Err(DataError::EmptyCorpus { path: dir.to_owned() });
        }
        writers.finish(dir, tokenizer)
    }
}

/// Reads a text file.
///
/// # Errors
/// [`DataError::Io`], [`DataError::NotUtf8`] and [`DataError::EmptyCorpus`], naming the file.
pub fn read_text(path: &Path) -> Result<String, DataError> {
    let io = |source| DataError::Io { path: path.to_owned(), action: "read", source };
    let text = String::from_utf8(fs::read(path).map_err(io)?).map_err(|e| DataError::NotUtf8 {
        path: path.to_owned(),
        position: e.utf8_error().valid_up_to(),
    })?;
    if text.is_empty() { Err(DataError::EmptyCorpus { path: path.to_owned() }) } else { Ok(text) }
}

/// The documents of files: each line of a `.jsonl` file has one under "text", any other file is one.
///
/// # Errors
/// An item, as [`read_text`], or [`DataError::Line`] for a line without a text.
pub fn read_documents(
    paths: &[PathBuf],
) -> impl Iterator<Item = Result<String, DataError>> + Send + '_ {
    type Documents<'a> = Box<dyn Iterator<Item = Result<String, DataError>> + Send + 'a>;
    paths.iter().flat_map(|path| -> Documents<'_> {
        if path.extension().is_none_or(|extension| extension != "jsonl") {
            return Box::new(std::iter::once_with(|| read_text(path)));
        }
        let io = |source| DataError::Io { path: path.clone(), action: "read", source };
        let lines = match fs::File::open(path) {
            Ok(file) => BufReader::new(file).split(b'\n').enumerate(),
            Err(e) => return Box::new(std::iter::once(Err(io(e)))),
        };
        Box::new(lines.filter_map(move |(i, line)| match line.map_err(io) {
            Ok(line) if line.trim_ascii().is_empty() => None,
            line => Some(line.and_then(|line| json_text(path, i + 1, &line))),
        }))
    })
}

fn json_text(path: &Path, line: usize, json: &[u8]) -> Result<String, DataError> {
    #[derive(serde::Deserialize)]
    struct Document {
        text: String,
    }
    let refuse = |e: serde_json::Error| DataError::Line {
        path: path.to_owned(),
        line,
        // A document is one line of the file, whose number is told already.
        cause: e.to_string().replace(" at line 1 column ", ", column "),
    };
    serde_json::from_slice(json).map(|document: Document| document.text).map_err(refuse)
}

fn files(dir: &Path) -> [PathBuf; 3] {
    ["tokenizer.json", "train.bin", "val.bin"].map(|name| dir.join(name))
}

fn check_fraction(found: f64) -> Result<(), DataError> {
    if (0.0..1.0).contains(&found) { Ok(()) } else { Err(DataError::Fraction { found }) }
}

struct Writers {
    train: ShardWriter,
    val: ShardWriter,
}

impl Writers {
    fn create(dir: &Path, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let io = |source| DataError::Io { path: dir.to_owned(), action: "create", source };
        fs::create_dir_all(dir).map_err(io)?;
        let [_, train, val] = files(dir);
        Ok(Self {
            train: ShardWriter::create(&train, tokenizer)?,
            val: ShardWriter::create(&val, tokenizer)?,
        })
    }

    /// Encodes documents and appends each to train or, where its flag says so, to val.
    fn push(
        &mut self,
        tokenizer: &Tokenizer,
        documents: &[(String, bool)],
    ) -> Result<(), DataError> {
        let texts: Vec<&str> = documents.iter().map(|(text, _)| text.as_str()).collect();
        let bos = tokenizer.bos_id().filter(|_| tokenizer.adds_bos());
        let encoded = tokenizer.encode_plain_batch(&texts)?;
        for (ids, (_, validates)) in encoded.iter().zip(documents) {
            let writer = if *validates { &mut self.val } else { &mut self.train };
            writer.push(bos.as_slice())?;
            writer.push(ids)?;
            writer.push(tokenizer.eos_id().as_slice())?;
        }
        Ok(())
    }

    fn finish(self, dir: &Path, tokenizer: &Tokenizer) -> Result<Dataset, DataError> {
        let [json, ..] = files(dir);
        let io = |source| DataError::Io { path: json.clone(), action: "replace", source };
        // An old train.bin beside a new val.bin could agree in everything that `open` compares.
        match fs::remove_file(&json) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            removed => {
                removed.map_err(io)?;
                flush_name(&json)?;
            }
        }
        self.train.finish()?;
        self.val.finish()?;
        AtomicFile::replace(&json, tokenizer.json().as_bytes())?;
        Dataset::open(dir)
    }
}
