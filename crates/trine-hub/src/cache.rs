//! The cache of one repository, as `hf-hub` and Python's `huggingface_hub` lay it out; locked as
//! the latter does.
//!
//! ```text
//! models--owner--name/refs/main                  a commit
//!                     blobs/<etag>               a file, named by its hash on the hub
//!                     blobs/<etag>.incomplete    the beginning of one
//!                     snapshots/<commit>/<file>  a link to a blob
//! .locks/models--owner--name/<etag>.lock         held while a blob is written
//! ```
//!
//! Of a data set, `datasets--owner--name`.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use trine_format::AtomicFile;

use crate::reference::is_plain_path;
use crate::{HubError, Observer, Reference};

/// Length of a commit's name.
const COMMIT_DIGITS: usize = 40;

pub(crate) struct RepoCache {
    /// Knows where snapshots are.
    repo: CacheRepo,
    root: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(crate) fn new(cache: &Path, reference: &Reference) -> Self {
        let kind = if reference.is_dataset() { RepoType::Dataset } else { RepoType::Model };
        let repo = Repo::new(reference.repo().to_owned(), kind);
        let folder = repo.folder_name();
        let (root, locks) = (cache.join(&folder), cache.join(".locks").join(folder));
        Self { repo: Cache::new(cache.to_owned()).repo(repo), root, locks }
    }

    /// The directory of a commit.
    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.repo.pointer_path(commit)
    }

    /// Where the file of this hash is or will be.
    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// Where the beginning of the file of this hash is.
    pub(crate) fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// The commit that a revision had when it was last downloaded; a commit is itself.
    pub(crate) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        let commit = commit.trim();
        (!commit.contains('/') && is_plain_path(commit)).then(|| commit.to_owned())
    }

    /// Remembers the commit of a revision.
    pub(crate) fn set_commit(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if is_commit(revision) || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        create_parent(&path)?;
        Ok(AtomicFile::replace(&path, commit.as_bytes())?)
    }

    /// Whether another commit than this is known for a revision, with files that this one lacks here.
    pub(crate) fn would_lose(&self, revision: &str, commit: &str) -> bool {
        let Some(known) = self.commit(revision) else { return false };
        let here = self.files(commit);
        self.files(&known).iter().any(|file| here.binary_search(file).is_err())
    }

    /// Names of all files of a commit that are whole, with `/` between directories, sorted.
    pub(crate) fn files(&self, commit: &str) -> Vec<String> {
        fn visit(dir: &Path, prefix: &str, found: &mut Vec<String>) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let Ok(name) = entry.file_name().into_string() else { continue };
                let name = format!("{prefix}{name}");
                // Follows links, so that one to a blob that was removed is no file.
                match fs::metadata(entry.path()) {
                    Ok(meta) if meta.is_file() => found.push(name),
                    Ok(meta) if meta.is_dir() => visit(&entry.path(), &format!("{name}/"), found),
                    _ => {}
                }
            }
        }
        let mut found = Vec::new();
        visit(&self.snapshot(commit), "", &mut found);
        found.sort();
        found
    }

    /// Lets a commit have a file: links its name to the blob of this hash.
    pub(crate) fn link(&self, etag: &str, commit: &str, file: &str) -> Result<(), HubError> {
        let pointer = self.snapshot(commit).join(file);
        create_parent(&pointer)?;
        if pointer.exists() {
            return Ok(());
        }
        // A link to a blob that somebody removed is in the way.
        let _none = fs::remove_file(&pointer);
        // Relative, so that the cache may be moved: up from the file's directories, then from the
        // commit's and that of all snapshots.
        let up = "../".repeat(file.split('/').count() + 1);
        let blob = self.blob(etag);
        match symlink(&format!("{up}blobs/{etag}"), &pointer) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                // File systems and users without symbolic links: the file itself, as Python does.
                fs::hard_link(&blob, &pointer).or_else(|_| fs::rename(&blob, &pointer))
            }
            made => made,
        }
        // Another process may have linked the same meanwhile.
        .or_else(|e| if pointer.exists() { Ok(()) } else { Err(e) })
        .map_err(HubError::io(&pointer, "link"))
    }

    /// Waits until nobody else, Python included, downloads the file of this hash.
    /// `name` is what the observer is told.
    pub(crate) fn lock(
        &self,
        etag: &str,
        name: &str,
        observer: &mut dyn Observer,
    ) -> Result<File, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.map_err(HubError::io(&path, "create"))?;
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {
                observer.note(&format!("{name}: another process is downloading it; waiting"));
            }
            Err(TryLockError::Error(e)) => return Err(HubError::io(&path, "lock")(e)),
        }
        file.lock().map_err(HubError::io(&path, "lock"))?;
        Ok(file)
    }
}

/// Whether a revision is a commit, which never means another one later.
pub(crate) fn is_commit(revision: &str) -> bool {
    revision.len() == COMMIT_DIGITS && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Makes the directory that a file is to be in.
pub(crate) fn create_parent(path: &Path) -> Result<(), HubError> {
    let dir = path.parent().unwrap_or(path);
    fs::create_dir_all(dir).map_err(HubError::io(dir, "create"))
}

#[cfg(unix)]
fn symlink(target: &str, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &str, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target.replace('/', "\\"), link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &str, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
