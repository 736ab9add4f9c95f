//! Files and directories that appear whole or not at all.
//!
//! Writing goes to a hidden temporary sibling; `commit` flushes it to the disk, renames it to the
//! final name and flushes the directory that holds the name. A crash, an error or a drop before
//! that leaves nothing under the final name, and what was there before stays.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use tempfile::{Builder, NamedTempFile, TempDir};

use crate::FormatError;

/// Bytes collected before a write reaches the operating system.
const BUFFER: usize = 1 << 20;

/// Bytes after which the disk is set to work on what it has been given.
const FLUSH_EVERY: usize = 64 << 20;

/// A file in the making; implements [`Write`] through a buffer.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
    /// Bytes written since the last flush began.
    unflushed: usize,
    /// A flush that goes on while more is written, so that the last one is short.
    flush: Option<JoinHandle<io::Result<()>>>,
}

impl AtomicFile {
    /// Starts a file that will be named `path`; an existing one is replaced on commit.
    ///
    /// # Errors
    /// When the directory is missing or not writable, or the name is [not for files](replaceable).
    pub fn create(path: &Path) -> Result<Self, FormatError> {
        replaceable(path)?;
        let file = builder(0o666)
            .tempfile_in(parent(path))
            .map_err(|e| FormatError::io(path, "create")(bare(e)))?;
        let file = BufWriter::with_capacity(BUFFER, file);
        Ok(Self { path: path.to_owned(), file, unflushed: 0, flush: None })
    }

    /// Writes a whole file at once: its old contents or `bytes` are there, never a part.
    ///
    /// # Errors
    /// As [`AtomicFile::create`], [`AtomicFile::put`] and [`AtomicFile::commit`].
    pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), FormatError> {
        let mut file = Self::create(path)?;
        file.put(bytes)?;
        file.commit()
    }

    /// The final name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes all of `bytes`, naming the final file on failure.
    ///
    /// # Errors
    /// E.g. a full disk.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        self.file.write_all(bytes).map_err(FormatError::io(&self.path, "write"))?;
        self.flush_meanwhile(bytes.len()).map_err(FormatError::io(&self.path, "flush"))
    }

    /// Flushes to the disk and gives the file its final name.
    ///
    /// # Errors
    /// When the disk is full or the name cannot be taken; nothing is left behind then.
    pub fn commit(self) -> Result<(), FormatError> {
        let Self { path, file, flush, .. } = self;
        flushed(flush).map_err(FormatError::io(&path, "flush"))?;
        let file =
            file.into_inner().map_err(|e| FormatError::io(&path, "write")(e.into_error()))?;
        file.as_file().sync_all().map_err(FormatError::io(&path, "flush"))?;
        file.persist(&path).map_err(|e| FormatError::io(&path, "rename into place")(e.error))?;
        flush_name(&path)
    }

    /// Counts `written` bytes, and from time to time begins to flush what there is on a thread of
    /// its own: the operating system would leave most of a large file to the end.
    fn flush_meanwhile(&mut self, written: usize) -> io::Result<()> {
        self.unflushed += written;
        let busy = self.flush.as_ref().is_some_and(|flush| !flush.is_finished());
        if self.unflushed < FLUSH_EVERY || busy {
            return Ok(());
        }
        // The system reports an error of the disk once, so it must not be lost here.
        flushed(self.flush.take())?;
        self.unflushed = 0;
        let file = self.file.get_ref().as_file().try_clone()?;
        self.flush = Some(std::thread::Builder::new().spawn(move || file.sync_data())?);
        Ok(())
    }
}

/// The outcome of a flush, which this waits for.
fn flushed(flush: Option<JoinHandle<io::Result<()>>>) -> io::Result<()> {
    let outcome = flush.map(|flush| flush.join().map_err(|_| io::Error::other("flushing failed")));
    outcome.transpose()?.unwrap_or(Ok(()))
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.flush_meanwhile(written)?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A directory in the making: write files under [`AtomicDir::path`], then commit.
#[derive(Debug)]
pub struct AtomicDir {
    target: PathBuf,
    dir: TempDir,
}

impl AtomicDir {
    /// Starts a directory that will be named `target`.
    ///
    /// # Errors
    /// When the directory above is missing or not writable.
    pub fn create(target: &Path) -> Result<Self, FormatError> {
        let dir = builder(0o777)
            .tempdir_in(parent(target))
            .map_err(|e| FormatError::io(target, "create")(bare(e)))?;
        Ok(Self { target: target.to_owned(), dir })
    }

    /// Where to write files until the commit.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Gives the directory its final name, which must be free or an empty directory.
    ///
    /// # Errors
    /// When something is there already (it is left as it is), or the disk refuses.
    pub fn commit(self) -> Result<(), FormatError> {
        self.sync()?;
        // Renaming over an empty directory is allowed by POSIX, over a filled one is refused.
        fs::rename(self.dir.path(), &self.target)
            .map_err(FormatError::io(&self.target, "rename into place"))?;
        self.finish()
    }

    /// As [`AtomicDir::commit`], but replaces what has the final name now.
    ///
    /// The old one is moved aside first and moved back should the new one not take its place, so
    /// at every moment at least one of them is whole on the disk.
    ///
    /// # Errors
    /// When the disk refuses; the old one is then in place.
    pub fn commit_replacing(self) -> Result<(), FormatError> {
        self.sync()?;
        let io = |action| FormatError::io(&self.target, action);
        if fs::symlink_metadata(&self.target).is_err() {
            return self.commit();
        }
        let aside =
            builder(0o777).tempdir_in(parent(&self.target)).map_err(io("make room beside"))?;
        let old = aside.path().join("old");
        fs::rename(&self.target, &old).map_err(io("move aside"))?;
        if let Err(e) = fs::rename(self.dir.path(), &self.target) {
            if fs::rename(&old, &self.target).is_err() {
                // The old one now exists under `aside` only: it must survive this process.
                let _kept = aside.keep();
            }
            return Err(io("rename into place")(e));
        }
        self.finish()
    }

    /// Flushes every file and directory below to the disk.
    fn sync(&self) -> Result<(), FormatError> {
        sync_tree(self.dir.path()).map_err(FormatError::io(&self.target, "flush"))
    }

    fn finish(self) -> Result<(), FormatError> {
        // The temporary name is gone, so there is nothing left to remove on drop.
        let _renamed = self.dir.keep();
        flush_name(&self.target)
    }
}

/// Checks that a finished file may take the name `path`: nothing is there, or a regular file.
///
/// A rename would replace a device or a pipe by a file: `/dev/null` would be gone from the system.
/// Directories are refused here too, before the work and not after it.
///
/// # Errors
/// [`FormatError::Malformed`] naming what is there.
pub fn replaceable(path: &Path) -> Result<(), FormatError> {
    let found = match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => "a directory",
        Ok(meta) if !meta.is_file() => "a device or pipe",
        _ => return Ok(()),
    };
    Err(FormatError::malformed(path, "file to write", "a new name or a regular file", found))
}

/// Makes it durable that a name was given or taken away: flushes the directory that holds it.
///
/// Whoever renames or removes by himself calls this afterwards, as the types of this module do.
///
/// # Errors
/// When the directory is missing or the disk refuses.
pub fn flush_name(path: &Path) -> Result<(), FormatError> {
    sync_dir(parent(path)).map_err(FormatError::io(path, "flush the directory of"))
}

/// The error of the operating system, without the temporary name that `tempfile` adds to it.
fn bare(e: io::Error) -> io::Error {
    let text = e.to_string();
    let cause = text.split_once(" at path \"").map(|(cause, _)| cause.to_owned());
    match cause {
        Some(cause) => io::Error::new(e.kind(), cause),
        None => e,
    }
}

/// Names temporaries: hidden, and recognizable should a crash leave one behind.
fn builder(mode: u32) -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    builder.prefix(".trine-").suffix(".tmp");
    permissions(&mut builder, mode);
    builder
}

/// A finished file has the permissions of any new file, not the private ones of a temporary.
#[cfg(unix)]
fn permissions(builder: &mut Builder<'_, '_>, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    builder.permissions(fs::Permissions::from_mode(mode));
}

#[cfg(not(unix))]
fn permissions(_: &mut Builder<'_, '_>, _: u32) {}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync_dir(dir)
}

/// Makes a rename durable. Only Unix lets a directory be opened and flushed.
fn sync_dir(dir: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}
