//! Streams of text, taken apart without holding them: at a separator, or wherever no token is cut.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use crate::DataError;
use crate::corpus::io;

type Reader = Box<dyn BufRead + Send>;

/// The text of bytes of a file, of which the first stands at position `at`.
pub(crate) fn utf8(path: &Path, bytes: Vec<u8>, at: usize) -> Result<String, DataError> {
    String::from_utf8(bytes).map_err(|e| DataError::NotUtf8 {
        path: path.to_owned(),
        position: at + e.utf8_error().valid_up_to(),
    })
}

/// What lies between separators, each part with the position of its first byte. There is nothing
/// after a separator that ends the stream, and nothing after an error.
pub(crate) struct Parts<'a> {
    path: &'a Path,
    reader: Option<Reader>,
    separator: &'a [u8],
    longest: usize,
    position: usize,
}

impl<'a> Parts<'a> {
    /// Parts of at most `longest` bytes between `separator`, which is not empty.
    pub(crate) fn new(path: &'a Path, reader: Reader, separator: &'a [u8], longest: usize) -> Self {
        Self { path, reader: Some(reader), separator, longest, position: 0 }
    }

    /// The next part; `None` at the end.
    fn read(&mut self, reader: &mut Reader) -> Result<Option<(usize, Vec<u8>)>, DataError> {
        let Some(&last) = self.separator.last() else { return Ok(None) };
        let (at, mut part) = (self.position, Vec::new());
        loop {
            let room = (self.longest + self.separator.len() + 1).saturating_sub(part.len());
            let read = reader.by_ref().take(room as u64).read_until(last, &mut part);
            let read = read.map_err(io(self.path, "read"))?;
            self.position += read;
            let text = part.strip_suffix(self.separator).map(<[u8]>::len);
            // What has not ended yet may end with a part of a separator.
            let open = if read == 0 { 0 } else { self.separator.len() };
            if text.unwrap_or(part.len().saturating_sub(open)) > self.longest {
                return Err(DataError::TooLong { path: self.path.to_owned(), most: self.longest });
            }
            if let Some(text) = text {
                part.truncate(text);
                return Ok(Some((at, part)));
            }
            if read == 0 {
                return Ok((!part.is_empty()).then_some((at, part)));
            }
        }
    }
}

impl Iterator for Parts<'_> {
    type Item = Result<(usize, Vec<u8>), DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut reader = self.reader.take()?;
        let part = self.read(&mut reader).transpose()?;
        if part.is_ok() {
            self.reader = Some(reader);
        }
        Some(part)
    }
}

/// One text in blocks: together they are the text, and each but the first begins with the visible
/// first character of a line. There is nothing after an error.
pub(crate) struct Blocks {
    path: PathBuf,
    reader: Option<Reader>,
    size: usize,
    longest: usize,
    /// Bytes that are read and belong to a later block.
    rest: Vec<u8>,
    position: usize,
}

impl Blocks {
    /// Blocks of about `size` bytes; larger ones where there is no place to cut, up to `longest`.
    pub(crate) fn new(path: &Path, reader: Reader, size: usize, longest: usize) -> Self {
        let reader = Some(reader);
        Self { path: path.to_owned(), reader, size, longest, rest: Vec::new(), position: 0 }
    }

    fn read(&mut self, reader: &mut Reader) -> Result<Option<String>, DataError> {
        let mut block = std::mem::take(&mut self.rest);
        let mut size = self.size.min(self.longest + 1);
        loop {
            let room = size.saturating_sub(block.len());
            let read = reader.by_ref().take(room as u64).read_to_end(&mut block);
            let read = read.map_err(io(&self.path, "read"))?;
            let end = read < room;
            // One of more than `longest` bytes is asked for where the text must not be cut.
            if !end
                && self.size <= self.longest
                && let Some(cut) = last_cut(&block)
            {
                self.rest = block.split_off(cut);
            }
            if end || !self.rest.is_empty() {
                break;
            }
            if block.len() > self.longest {
                return Err(DataError::TooLong { path: self.path.clone(), most: self.longest });
            }
            // Doubled, so that a long line is not searched again for each block's worth of it.
            size = size.saturating_mul(2).min(self.longest + 1);
        }
        if block.is_empty() {
            return Ok(None);
        }
        let at = self.position;
        self.position += block.len();
        utf8(&self.path, block, at).map(Some)
    }
}

impl Iterator for Blocks {
    type Item = Result<String, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut reader = self.reader.take()?;
        let block = self.read(&mut reader).transpose()?;
        if block.is_ok() {
            self.reader = Some(reader);
        }
        Some(block)
    }
}

/// The last place in a text where a line begins with a visible character, beyond its beginning.
fn last_cut(text: &[u8]) -> Option<usize> {
    // At the end a character may not be whole yet; it is not visible then.
    let first = |at: usize| {
        let bytes = &text[at..text.len().min(at + 4)];
        bytes.utf8_chunks().next().and_then(|chunk| chunk.valid().chars().next())
    };
    let visible = |at: usize| first(at).is_some_and(|c| !c.is_whitespace());
    (1..text.len()).rev().find(|&at| text[at - 1] == b'\n' && visible(at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reader(text: &str) -> Reader {
        Box::new(std::io::Cursor::new(text.as_bytes().to_vec()))
    }

    fn blocks(text: &str, size: usize, longest: usize) -> Result<Vec<String>, DataError> {
        Blocks::new(Path::new("t"), reader(text), size, longest).collect()
    }

    fn parts(text: &str, separator: &str, longest: usize) -> Result<Vec<String>, DataError> {
        Parts::new(Path::new("t"), reader(text), separator.as_bytes(), longest)
            .map(|part| part.and_then(|(at, part)| utf8(Path::new("t"), part, at)))
            .collect()
    }

    proptest! {
        #[test]
        fn blocks_are_the_text_cut_at_lines(text in "[aé \n\r\u{2028}]{0,60}", size in 1usize..20) {
            let blocks = blocks(&text, size, 100).unwrap();
            prop_assert_eq!(blocks.concat(), text.clone());
            for pair in blocks.windows(2) {
                prop_assert!(pair[0].ends_with('\n'));
                prop_assert!(!pair[1].starts_with(char::is_whitespace));
            }
            // A block is larger than asked for only where it could not be cut.
            for block in blocks.iter().filter(|block| block.len() > size) {
                prop_assert_eq!(last_cut(&block.as_bytes()[..size]), None);
            }
        }

        #[test]
        fn parts_are_those_of_split(text in "[ab-]{0,40}", separator in "(-|--|a-|-a-|aab)") {
            let mut expected: Vec<String> = text.split(&separator).map(str::to_owned).collect();
            if expected.last().is_some_and(String::is_empty) {
                expected.pop();
            }
            prop_assert_eq!(parts(&text, &separator, 100).unwrap(), expected);
        }
    }

    #[test]
    fn what_is_too_long_is_refused_before_it_is_read() {
        assert_eq!(parts("aaaa-aaaa", "-", 4).unwrap().len(), 2);
        assert_eq!(parts("aaaa--aaaa", "--", 4).unwrap().len(), 2);
        let message = parts("aaaa-aaaaa", "-", 4).unwrap_err().to_string();
        assert!(message.contains("t: ") && message.contains("longer than 4 bytes"), "{message}");
        let endless = Box::new(std::io::BufReader::new(std::io::repeat(b'x')));
        assert!(Parts::new(Path::new("t"), endless, b"--", 1000).next().unwrap().is_err());
        let endless = Box::new(std::io::BufReader::new(std::io::repeat(b'x')));
        assert!(Blocks::new(Path::new("t"), endless, 10, 1000).next().unwrap().is_err());
        // One that must not be cut is one block.
        assert_eq!(blocks("a\nb\nc", usize::MAX, 5).unwrap(), ["a\nb\nc"]);
        assert!(blocks("a\nb\nc\n", usize::MAX, 5).is_err());
    }
}
