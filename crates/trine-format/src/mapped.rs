//! The one memory map.
//!
//! Models are larger than what a process should copy, so files are mapped read-only and their
//! pages come from the operating system's cache, shared between processes.
//!
//! **Caveat.** A map is a view, not a copy. Should another process truncate a file while it is
//! mapped, reading past the new end raises SIGBUS and ends this process; should it write into the
//! file, the bytes change under the reader. No portable API prevents either. Everything this crate
//! writes appears by renaming a finished file, which leaves existing maps untouched.

#![allow(unsafe_code)]

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;

use crate::FormatError;

/// A file mapped read-only; dereferences to its bytes.
#[derive(Debug)]
pub struct Mapped(memmap2::Mmap);

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl Mapped {
    /// Gives the memory of a range back, where the system can: it stays readable, at the price of
    /// reading it from the file again.
    ///
    /// Pages of a map count as memory of the process from the first look at them, so that who reads
    /// a whole model once would seem to hold all of it.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if range.start < range.end && range.end <= self.0.len() {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the range lies in the map. The map is of a file, read-only and never written
            // through, so a page that is dropped is read from the file with the same bytes; that
            // the file does not change is the caveat above. A refusal changes nothing.
            let _refused =
                unsafe { self.0.unchecked_advise_range(advice, range.start, range.len()) };
        }
        #[cfg(not(unix))]
        let _kept = range;
    }
}

/// Some bytes of a tensor that lies in `whole`, as far as it has them.
pub(crate) fn part(whole: &Range<usize>, bytes: Range<usize>) -> Range<usize> {
    let at = |byte: usize| whole.start.saturating_add(byte).min(whole.end);
    at(bytes.start)..at(bytes.end)
}

/// Maps a whole file read-only.
///
/// # Errors
/// A file that cannot be opened or mapped, or that is not a regular file.
pub fn map_file(path: &Path) -> Result<Mapped, FormatError> {
    let file = File::open(path).map_err(FormatError::io(path, "open"))?;
    let meta = file.metadata().map_err(FormatError::io(path, "read the size"))?;
    if !meta.is_file() {
        return Err(FormatError::malformed(path, "kind of file", "a regular file", "another kind"));
    }
    // SAFETY: the map is read-only and owns its pages until dropped. That no other process changes
    // or truncates the file meanwhile cannot be checked; the module's essay states this caveat.
    // All readers in this workspace treat mapped bytes as untrusted and check what they read, and
    // `[u8]` has no invalid values.
    let map = unsafe { memmap2::Mmap::map(&file) };
    map.map(Mapped).map_err(FormatError::io(path, "map"))
}
