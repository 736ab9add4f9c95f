//! A token shard: the ids of a text on disk, memory-mapped when read.
//!
//! # Layout, version 1
//!
//! All numbers are little-endian.
//!
//! | bytes | what |
//! | --- | --- |
//! | 0..8 | the magic `TRINETOK` |
//! | 8..12 | u32, the version: 1 |
//! | 12..16 | u32, bytes of a token: 2 where 65,536 numbers suffice, otherwise 4 |
//! | 16..20 | u32, size of the vocabulary |
//! | 20..24 | u32, ids of a row; 0 where the ids are one text |
//! | 24..32 | zero |
//! | 32..64 | BLAKE3 hash of the tokenizer.json the ids were made with |
//! | 64.. | the ids, u16 or u32 |
//! | last 16 | u64, number of ids; the magic `KOTENIRT` |
//!
//! In a shard of rows each id carries what a conversation needs: V being the size of the vocabulary, V is
//! added to the id of a token that the model is to predict, and 2 V to that of one that begins a
//! conversation. Rows are those of [`rows`](crate::rows).
//!
//! The number stands at the end because a writer that streams knows it last; a file that was cut
//! off anywhere lacks it. A reader checks all of this when it opens a file, in constant time. That
//! each id is below the vocabulary's size is checked where ids are read, window by window: a
//! corpus of any size opens at once, and no id reaches a model unchecked.

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use trine_format::{AtomicFile, Mapped, map_file};
use trine_tokenizer::Tokenizer;

use crate::DataError;

const MAGIC: &[u8; 8] = b"TRINETOK";
const END: &[u8; 8] = b"KOTENIRT";
const VERSION: u32 = 1;
const HEADER: usize = 64;
const TRAILER: usize = 16;

/// Bytes of a code below `codes`.
fn width(codes: usize) -> usize {
    if codes <= 1 << 16 { 2 } else { 4 }
}

/// Codes of a vocabulary: of a text its ids, of rows each id with one of three marks.
fn codes(vocab_size: usize, row: usize) -> usize {
    if row == 0 { vocab_size } else { vocab_size.saturating_mul(3) }
}

fn hex(hash: &[u8; 32]) -> String {
    hash[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes a shard token by token; the file appears when it is finished.
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    file: AtomicFile,
    /// Codes there are.
    codes: usize,
    row: usize,
    count: usize,
    /// Encoded ids on their way to the file.
    bytes: Vec<u8>,
}

impl ShardWriter {
    /// Begins a shard of ids of a tokenizer.
    ///
    /// # Errors
    /// [`DataError::Format`] when the file cannot be made.
    pub fn create(path: &Path, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        Self::create_rows(path, tokenizer, 0)
    }

    /// Begins a shard of rows of `row` codes.
    pub(crate) fn create_rows(
        path: &Path,
        tokenizer: &Tokenizer,
        row: usize,
    ) -> Result<Self, DataError> {
        let vocab_size = tokenizer.vocab_size();
        let codes = codes(vocab_size, row);
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&(width(codes) as u32).to_le_bytes());
        header[16..20].copy_from_slice(&(vocab_size as u32).to_le_bytes());
        header[20..24].copy_from_slice(&(row as u32).to_le_bytes());
        header[32..].copy_from_slice(&tokenizer.hash());
        let mut writer = Self {
            path: path.to_owned(),
            file: AtomicFile::create(path)?,
            codes,
            row,
            count: 0,
            bytes: header.to_vec(),
        };
        writer.flush()?;
        Ok(writer)
    }

    /// Appends ids.
    ///
    /// # Errors
    /// [`DataError::Token`] for an id outside the vocabulary, [`DataError::Io`] e.g. for a full
    /// disk.
    pub fn push(&mut self, ids: &[u32]) -> Result<(), DataError> {
        check_ids(&self.path, ids, self.count, self.codes)?;
        for id in ids {
            self.bytes.extend_from_slice(&id.to_le_bytes()[..width(self.codes)]);
        }
        self.count += ids.len();
        self.flush()
    }

    /// Codes of a row, 0 for a text.
    pub(crate) fn row(&self) -> usize {
        self.row
    }

    /// Tokens appended so far.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Ends the shard and gives the file its name. Returns the number of tokens.
    ///
    /// # Errors
    /// [`DataError::Io`] and [`DataError::Format`] when the disk refuses.
    pub fn finish(mut self) -> Result<usize, DataError> {
        self.bytes.extend_from_slice(&(self.count as u64).to_le_bytes());
        self.bytes.extend_from_slice(END);
        self.flush()?;
        self.file.commit()?;
        Ok(self.count)
    }

    fn flush(&mut self) -> Result<(), DataError> {
        let io = |source| DataError::Io { path: self.path.clone(), action: "write", source };
        self.file.write_all(&self.bytes).map_err(io)?;
        self.bytes.clear();
        Ok(())
    }
}

fn check_ids(path: &Path, ids: &[u32], first: usize, vocab_size: usize) -> Result<(), DataError> {
    match ids.iter().position(|id| *id as usize >= vocab_size) {
        None => Ok(()),
        Some(at) => Err(DataError::Token {
            path: path.to_owned(),
            position: first + at,
            id: ids[at],
            vocab_size,
        }),
    }
}

/// A shard, open for reading.
pub struct Shard {
    path: PathBuf,
    map: Mapped,
    width: usize,
    vocab_size: usize,
    /// Ids of a row, 0 for a text.
    row: usize,
    count: usize,
}

impl Shard {
    /// Opens a shard and checks its header, its length and its end.
    ///
    /// # Errors
    /// [`DataError::Header`] for another kind or version of file, [`DataError::Length`] for one
    /// that is damaged, [`DataError::Format`] for one that cannot be mapped.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let map = map_file(path)?;
        let bytes: &[u8] = &map;
        let found = bytes.len() as u64;
        let length = |expected| DataError::Length { path: path.to_owned(), expected, found };
        let refuse = |field, expected: String, found: String| {
            Err(DataError::Header { path: path.to_owned(), field, expected, found })
        };
        if !bytes.starts_with(MAGIC) {
            let start = String::from_utf8_lossy(&bytes[..bytes.len().min(8)]).into_owned();
            return refuse("magic", format!("{:?}", "TRINETOK"), format!("{start:?}"));
        }
        if bytes.len() < HEADER + TRAILER {
            return Err(length((HEADER + TRAILER) as u64));
        }
        let number = |at: usize| u32_at(bytes, at);
        if number(8) != VERSION {
            return refuse("version", VERSION.to_string(), number(8).to_string());
        }
        let vocab_size = number(16) as usize;
        if vocab_size == 0 {
            return refuse("vocabulary size", "at least 1".to_owned(), "0".to_owned());
        }
        let row = number(20) as usize;
        let width = width(codes(vocab_size, row));
        if number(12) as usize != width {
            return refuse("token width", width.to_string(), number(12).to_string());
        }
        if bytes[24..32] != [0; 8] {
            return refuse("reserved field", "zero".to_owned(), "not zero".to_owned());
        }
        let (body, trailer) = bytes.split_at(bytes.len() - TRAILER);
        if !trailer.ends_with(END) {
            return refuse("end mark", format!("{:?}", "KOTENIRT"), "missing".to_owned());
        }
        let count = u64::from(u32_at(trailer, 0)) | u64::from(u32_at(trailer, 4)) << 32;
        let expected = count.checked_mul(width as u64);
        let expected = expected.and_then(|ids| ids.checked_add((HEADER + TRAILER) as u64));
        if expected != Some(found) {
            return Err(length(expected.unwrap_or(u64::MAX)));
        }
        let count = (body.len() - HEADER) / width;
        if row != 0 && (row < 2 || !count.is_multiple_of(row)) {
            let found = format!("rows of {row} in {count} tokens");
            return refuse("row length", "at least 2, and whole rows".to_owned(), found);
        }
        Ok(Self { path: path.to_owned(), width, vocab_size, row, count, map })
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the vocabulary the ids are from.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Ids of a row, if it is a shard of rows.
    pub fn row(&self) -> Option<usize> {
        (self.row > 0).then_some(self.row)
    }

    /// BLAKE3 hash of the tokenizer.json the ids were made with.
    pub fn tokenizer_hash(&self) -> [u8; 32] {
        let mut hash = [0; 32];
        hash.copy_from_slice(&self.map[32..64]);
        hash
    }

    /// Refuses a tokenizer that the ids were not made with.
    ///
    /// # Errors
    /// [`DataError::OtherTokenizer`].
    pub fn check_tokenizer(&self, hash: [u8; 32]) -> Result<(), DataError> {
        let expected = self.tokenizer_hash();
        if hash == expected {
            return Ok(());
        }
        let (expected, found) = (hex(&expected), hex(&hash));
        Err(DataError::OtherTokenizer { path: self.path.clone(), expected, found })
    }

    /// Appends the tokens `start..start + len` to `out`, of rows with their marks.
    ///
    /// # Errors
    /// [`DataError::OutOfRange`], and [`DataError::Token`] for an id outside the vocabulary; `out`
    /// is as before then.
    pub fn read(&self, start: usize, len: usize, out: &mut Vec<u32>) -> Result<(), DataError> {
        let end = start.saturating_add(len);
        if end > self.count {
            let (path, tokens) = (self.path.clone(), self.count);
            return Err(DataError::OutOfRange { path, start, end, tokens });
        }
        let bytes = &self.map[HEADER + start * self.width..HEADER + end * self.width];
        let before = out.len();
        match self.width {
            2 => out
                .extend(bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])))),
            _ => out.extend(bytes.chunks_exact(4).map(|b| u32_at(b, 0))),
        }
        let checked =
            check_ids(&self.path, &out[before..], start, codes(self.vocab_size, self.row));
        if checked.is_err() {
            out.truncate(before);
        }
        checked
    }
}

impl fmt::Debug for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shard")
            .field("path", &self.path)
            .field("vocab_size", &self.vocab_size)
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
