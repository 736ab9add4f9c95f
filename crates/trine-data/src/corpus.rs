//! From files to documents, one at a time.
//!
//! | name of the file | its documents |
//! | --- | --- |
//! | `*.jsonl` | what each line has under a key |
//! | `*.parquet` | the rows of a column (cargo feature `parquet`) |
//! | any other | the whole text, or what lies between separators |
//! | `*.gz` | as the name without `.gz` says |
//!
//! A corpus may be larger than the memory: a document is held whole, and no more than [`LONGEST`]
//! bytes of one; one text without documents passes in blocks of about [`CHUNK`] bytes.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;

use crate::DataError;
use crate::text::{Blocks, Parts, utf8};

/// Bytes of text that are encoded together, in parallel.
pub(crate) const CHUNK: usize = 8 << 20;

/// Most bytes of a document, or of a line of a text that is read in blocks. A compressed file
/// decides its size when it is read; this ends one that has no end.
pub(crate) const LONGEST: usize = 1 << 30;

pub(crate) type Documents<'a> = Box<dyn Iterator<Item = Result<String, DataError>> + Send + 'a>;

/// Files of text, and how documents lie in them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corpus {
    /// The files, read in this order.
    pub files: Vec<PathBuf>,
    /// Key of the text in a JSON line, column of the text in a parquet file.
    pub text_key: String,
    /// What separates the documents of a text file, exactly as it stands there; line breaks around
    /// it belong to it. A text file is one document otherwise.
    pub split_on: Option<String>,
}

/// What a file's name says about its documents.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Text,
    JsonLines,
    Parquet,
}

impl Form {
    fn of(path: &Path) -> Self {
        let inner = if is_gzip(path) { path.with_extension("") } else { path.to_owned() };
        match inner.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl") => Self::JsonLines,
            Some("parquet") => Self::Parquet,
            _ => Self::Text,
        }
    }
}

fn is_gzip(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gz")
}

impl Corpus {
    /// Files with the text under "text", where they have keys, and text files of one document.
    pub fn new(files: impl Into<Vec<PathBuf>>) -> Self {
        Self { files: files.into(), text_key: "text".to_owned(), split_on: None }
    }

    /// Whether it is one text, which is cut by position and to which nothing is added: a single
    /// text file without separators.
    pub fn is_one_text(&self) -> bool {
        self.separator().is_none()
            && matches!(&self.files[..], [path] if Form::of(path) == Form::Text)
    }

    /// Bytes of the files as they lie on the disk.
    ///
    /// # Errors
    /// [`DataError::Io`] naming a file that is not there.
    pub fn bytes_on_disk(&self) -> Result<u64, DataError> {
        let size = |path: &PathBuf| Ok(fs::metadata(path).map_err(io(path, "read"))?.len());
        self.files.iter().map(size).sum()
    }

    /// The documents. Those of a text file with separators that hold only space are left out.
    ///
    /// # Errors
    /// An item: as [`read_text`]; [`DataError::Line`] or [`DataError::Row`] for a document without
    /// a text; [`DataError::Parquet`] for a file that is none, and [`DataError::Feature`] where
    /// this build reads none.
    pub fn documents(&self) -> impl Iterator<Item = Result<String, DataError>> + Send + '_ {
        self.files.iter().flat_map(|path| {
            self.documents_of(path).unwrap_or_else(|e| Box::new(std::iter::once(Err(e))))
        })
    }

    /// All of its text in parts, for what does not look at documents: making a tokenizer. One text
    /// comes in blocks that begin where no token of a byte-level tokenizer is cut.
    ///
    /// # Errors
    /// An item, as of [`Corpus::documents`].
    pub fn texts(&self) -> impl Iterator<Item = Result<String, DataError>> + Send + '_ {
        let texts: Documents<'_> = match &self.files[..] {
            [path] if self.is_one_text() => blocks(path, true),
            _ => Box::new(self.documents()),
        };
        texts
    }

    fn separator(&self) -> Option<&str> {
        self.split_on.as_deref().filter(|separator| !separator.is_empty())
    }

    fn documents_of<'a>(&'a self, path: &'a Path) -> Result<Documents<'a>, DataError> {
        match (Form::of(path), self.separator()) {
            (Form::Parquet, _) => crate::parquet::rows(path, &self.text_key),
            (Form::JsonLines, _) => {
                let lines = Parts::new(path, open(path)?, b"\n", LONGEST).enumerate();
                Ok(Box::new(lines.filter_map(move |(i, line)| match line {
                    Ok((_, line)) if line.trim_ascii().is_empty() => None,
                    line => Some(line.and_then(|(_, line)| {
                        json_text(&self.text_key, &line)
                            .map_err(|cause| line_error(path, i + 1, cause))
                    })),
                })))
            }
            (Form::Text, Some(separator)) => {
                let parts = Parts::new(path, open(path)?, separator.as_bytes(), LONGEST);
                Ok(Box::new(parts.filter_map(move |part| {
                    let text = part.and_then(|(at, part)| utf8(path, part, at));
                    let text = text.map(|text| text.trim_matches(['\r', '\n']).to_owned());
                    let blank = text.as_ref().is_ok_and(|text| text.trim().is_empty());
                    (!blank).then_some(text)
                })))
            }
            (Form::Text, None) => Ok(Box::new(std::iter::once_with(|| read_text(path)))),
        }
    }
}

/// Reads a text file, decompressed where its name ends in `.gz`.
///
/// # Errors
/// [`DataError::Io`], [`DataError::NotUtf8`], [`DataError::TooLong`] and
/// [`DataError::EmptyCorpus`], naming the file.
pub fn read_text(path: &Path) -> Result<String, DataError> {
    let mut text = Vec::new();
    open(path)?.take(LONGEST as u64 + 1).read_to_end(&mut text).map_err(io(path, "read"))?;
    if text.len() > LONGEST {
        return Err(DataError::TooLong { path: path.to_owned(), most: LONGEST });
    }
    let text = utf8(path, text, 0)?;
    if text.is_empty() { Err(DataError::EmptyCorpus { path: path.to_owned() }) } else { Ok(text) }
}

/// A text file in blocks of about [`CHUNK`] bytes, or whole where it must not be cut.
pub(crate) fn blocks(path: &Path, may_be_cut: bool) -> Documents<'static> {
    let size = if may_be_cut { CHUNK } else { usize::MAX };
    match open(path) {
        Ok(reader) => Box::new(Blocks::new(path, reader, size, LONGEST)),
        Err(e) => Box::new(std::iter::once(Err(e))),
    }
}

pub(crate) fn open(path: &Path) -> Result<Box<dyn BufRead + Send>, DataError> {
    let file = BufReader::new(File::open(path).map_err(io(path, "read"))?);
    if !is_gzip(path) {
        return Ok(Box::new(file));
    }
    // A file may be several compressed ones, one after the other.
    Ok(Box::new(BufReader::new(MultiGzDecoder::new(file))))
}

pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> DataError {
    move |source| DataError::Io { path: path.to_owned(), action, source }
}

fn line_error(path: &Path, line: usize, cause: serde_json::Error) -> DataError {
    // A document is one line of the file, whose number is told already.
    let cause = cause.to_string().replace(" at line 1 column ", ", column ");
    DataError::Line { path: path.to_owned(), line, cause }
}

/// The string that a JSON object has under a key.
fn json_text(key: &str, json: &[u8]) -> serde_json::Result<String> {
    use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

    struct Key<'a>(&'a str);

    impl<'de> DeserializeSeed<'de> for Key<'_> {
        type Value = String;

        fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<String, D::Error> {
            json.deserialize_map(self)
        }
    }

    impl<'de> Visitor<'de> for Key<'_> {
        type Value = String;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "an object with a text under `{}`", self.0)
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<String, A::Error> {
            let mut text = None;
            while let Some(key) = map.next_key::<String>()? {
                if key != self.0 {
                    map.next_value::<IgnoredAny>()?;
                } else if text.replace(map.next_value()?).is_some() {
                    return Err(A::Error::custom(format_args!("duplicate field `{key}`")));
                }
            }
            text.ok_or_else(|| A::Error::custom(format_args!("missing field `{}`", self.0)))
        }
    }

    let mut json = serde_json::Deserializer::from_slice(json);
    let text = Key(key).deserialize(&mut json)?;
    json.end()?;
    Ok(text)
}
