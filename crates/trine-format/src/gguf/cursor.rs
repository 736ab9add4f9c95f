//! Reading numbers and strings from untrusted bytes.
//!
//! Nothing is allocated for a count or a length before the bytes that it announces are known to be
//! there, so memory use is bounded by the size of the file.

use std::fmt::Display;
use std::path::Path;

use crate::FormatError;

/// A position in the header of a file.
pub(super) struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(path: &'a Path, bytes: &'a [u8]) -> Self {
        Self { path, bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn refuse(
        &self,
        what: &str,
        expected: impl Display,
        found: impl Display,
    ) -> FormatError {
        let what = format_args!("{what} before byte {}", self.at).to_string();
        FormatError::malformed(self.path, what, expected, found)
    }

    /// The next `count * size` bytes.
    pub(super) fn run(
        &mut self,
        count: u64,
        size: usize,
        what: &str,
    ) -> Result<&'a [u8], FormatError> {
        self.check(count, size, what)?;
        let start = self.at;
        self.at += count as usize * size;
        Ok(&self.bytes[start..self.at])
    }

    /// Checks that `count` things of at least `size` bytes can follow.
    pub(super) fn check(&self, count: u64, size: usize, what: &str) -> Result<(), FormatError> {
        let left = self.bytes.len() - self.at;
        match usize::try_from(count).ok().and_then(|n| n.checked_mul(size)) {
            Some(bytes) if bytes <= left => Ok(()),
            _ => {
                let found = format_args!("{left} bytes left in the file").to_string();
                Err(self.refuse(what, format_args!("{count} x {size} bytes"), found))
            }
        }
    }

    pub(super) fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N], FormatError> {
        let mut out = [0; N];
        out.copy_from_slice(self.run(1, N, what)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.bytes(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.bytes(what)?))
    }

    pub(super) fn string(&mut self, what: &str) -> Result<String, FormatError> {
        let len = self.u64(what)?;
        let bytes = self.run(len, 1, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(e) => Err(self.refuse(what, "UTF-8", e)),
        }
    }

    /// `count` elements of at least `size` bytes each.
    pub(super) fn list<T>(
        &mut self,
        count: u64,
        size: usize,
        what: &str,
        mut read: impl FnMut(&mut Self) -> Result<T, FormatError>,
    ) -> Result<Vec<T>, FormatError> {
        self.check(count, size, what)?;
        (0..count).map(|_| read(self)).collect()
    }
}
