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
use std::ops::Deref;
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
