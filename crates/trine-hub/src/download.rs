//! One file: described by the hub, downloaded or continued, checked, named.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use ureq::http::StatusCode;

use crate::cache::{RepoCache, create_parent};
use crate::http::{Ask, Client, Failure, etag, header};
use crate::{HubError, Observer, Reference};

/// Bytes read at once.
const BUFFER: usize = 1 << 17;

/// Downloads files of one commit.
pub(crate) struct Download<'a> {
    pub(crate) client: &'a Client,
    pub(crate) cache: &'a RepoCache,
    /// The repository at that commit; names no file.
    pub(crate) repo: &'a Reference,
    pub(crate) commit: &'a str,
}

/// What the hub says of a file.
struct Description {
    /// The name of its blob, in most cases its hash.
    etag: String,
    size: Option<u64>,
}

impl Download<'_> {
    /// Makes sure that the commit has this file in the cache; returns how many bytes came.
    pub(crate) fn file(&self, name: &str, observer: &mut dyn Observer) -> Result<u64, HubError> {
        if self.cache.snapshot(self.commit).join(name).is_file() {
            return Ok(0);
        }
        let subject = self.repo.clone().or_file(name);
        let url = self.client.url(&subject.resolve_path(self.commit));
        let Description { etag, size } = self.describe(&url, &subject, observer)?;
        let blob = self.cache.blob(&etag);
        let mut received = 0;
        // Another commit may have the same file.
        if !blob.is_file() {
            create_parent(&blob)?;
            let _held = self.cache.lock(&etag, name, observer)?;
            if !blob.is_file() {
                let part = self.cache.incomplete(&etag);
                received = self.fill(&part, &url, size, &subject, observer)?;
                if !check(&part, &etag, &subject)? {
                    observer
                        .note(&format!("{name}: the hub names no hash; only its size is known"));
                }
                fs::rename(&part, &blob).map_err(HubError::io(&blob, "rename into place"))?;
                observer.end();
            }
        }
        self.cache.link(&etag, self.commit, name)?;
        Ok(received)
    }

    fn describe(
        &self,
        url: &str,
        subject: &Reference,
        observer: &mut dyn Observer,
    ) -> Result<Description, HubError> {
        let mut patience = self.client.patience(url);
        let response = loop {
            match self.client.send(url, Ask::Description, subject) {
                Ok(response) => break response,
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Again(cause)) => patience.again(cause, observer)?,
            }
        };
        let headers = response.headers();
        let expected = "an `ETag` of letters, digits, `-`, `_` and `.`";
        let refuse = |found: &str| HubError::answer(subject.to_string(), expected, found);
        let etag = etag(headers).ok_or_else(|| refuse("none"))?;
        // It becomes the name of a file.
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if !(1..=128).contains(&etag.len()) || etag.starts_with('.') || !etag.bytes().all(allowed) {
            return Err(refuse(&format!("`{etag}`")));
        }
        // The length of a redirect is not that of the file.
        let own = if response.status().is_redirection() { None } else { Some("content-length") };
        let size = [Some("x-linked-size"), own]
            .into_iter()
            .flatten()
            .find_map(|name| header(headers, name)?.parse().ok());
        Ok(Description { etag: etag.to_owned(), size })
    }

    /// Continues the file `path` until it has all of its bytes, and flushes it to the disk.
    fn fill(
        &self,
        path: &Path,
        url: &str,
        size: Option<u64>,
        subject: &Reference,
        observer: &mut dyn Observer,
    ) -> Result<u64, HubError> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut part = Part {
            path,
            file: file.map_err(HubError::io(path, "create"))?,
            length: 0,
            received: 0,
            size,
        };
        part.length = part.file.seek(SeekFrom::End(0)).map_err(HubError::io(path, "read"))?;
        if size.is_some_and(|size| part.length > size) {
            part.restart()?;
        }
        observer.begin(subject.file().unwrap_or_default(), size, part.length);
        let mut patience = self.client.patience(url);
        let mut furthest = part.length;
        while size != Some(part.length) {
            let attempt = self.append(&mut part, url, subject, observer);
            // A server that ignores ranges begins anew each time: only new ground is progress.
            if part.length > furthest {
                furthest = part.length;
                patience.renew();
            }
            match (attempt, size) {
                (Err(Failure::Final(error)), _) => return Err(error),
                (Err(Failure::Again(cause)), _) => patience.again(cause, observer)?,
                (Ok(()), Some(size)) if part.length < size => {
                    let cause = format!("the answer ended after byte {} of {size}", part.length);
                    patience.again(cause, observer)?;
                }
                (Ok(()), _) => break,
            }
        }
        part.file.sync_all().map_err(HubError::io(path, "flush"))?;
        Ok(part.received)
    }

    /// One request for what is missing.
    fn append(
        &self,
        part: &mut Part<'_>,
        url: &str,
        subject: &Reference,
        observer: &mut dyn Observer,
    ) -> Result<(), Failure> {
        let response = self.client.send(url, Ask::From(part.length), subject)?;
        match response.status() {
            StatusCode::RANGE_NOT_SATISFIABLE => {
                part.restart()?;
                return Err(Failure::Again("the hub has no such range".into()));
            }
            StatusCode::PARTIAL_CONTENT => {
                let range = header(response.headers(), "content-range").unwrap_or("none");
                if !range.starts_with(&format!("bytes {}-", part.length)) {
                    let expected = "the range that was asked for";
                    let found = format!("`{range}` from byte {}", part.length);
                    return Err(HubError::answer(subject.to_string(), expected, found).into());
                }
            }
            // The whole file, whatever was asked for.
            _ if part.length > 0 => part.restart()?,
            _ => {}
        }
        let mut reader = response.into_body().into_reader();
        let mut buffer = vec![0; BUFFER];
        loop {
            let n = match reader.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    let cause = format!("the connection was lost after byte {}: {e}", part.length);
                    return Err(Failure::Again(cause));
                }
            };
            part.write(&buffer[..n], subject)?;
            observer.position(part.length);
        }
    }
}

/// A file that is being filled.
struct Part<'a> {
    path: &'a Path,
    file: File,
    length: u64,
    received: u64,
    size: Option<u64>,
}

impl Part<'_> {
    fn write(&mut self, bytes: &[u8], subject: &Reference) -> Result<(), HubError> {
        let length = self.length + bytes.len() as u64;
        if let Some(size) = self.size.filter(|size| length > *size) {
            self.restart()?;
            let found = format!("more than the {size} bytes that it described");
            return Err(HubError::answer(subject.to_string(), "the file of the hub", found));
        }
        self.file.write_all(bytes).map_err(HubError::io(self.path, "write"))?;
        self.length = length;
        self.received += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> Result<(), HubError> {
        let empty = self.file.set_len(0).and_then(|()| self.file.rewind());
        empty.map_err(HubError::io(self.path, "empty"))?;
        self.length = 0;
        Ok(())
    }
}

/// Compares a file with the hash that names it: SHA-256 for large files, git's SHA-1 for those that
/// lie in the repository itself. A file with another hash is deleted. Returns whether the name is a
/// hash at all.
fn check(path: &Path, etag: &str, subject: &Reference) -> Result<bool, HubError> {
    let hex = etag.bytes().all(|b| b.is_ascii_hexdigit());
    let read = HubError::io(path, "read");
    let (kind, found) = match etag.len() {
        64 if hex => ("SHA-256", digest(path, Context::new(&SHA256))),
        40 if hex => {
            let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
            let length = fs::metadata(path).map(|meta| meta.len());
            let digest = length.and_then(|length| {
                context.update(format!("blob {length}\0").as_bytes());
                digest(path, context)
            });
            ("git SHA-1", digest)
        }
        _ => return Ok(false),
    };
    let found = found.map_err(read)?;
    if found.eq_ignore_ascii_case(etag) {
        return Ok(true);
    }
    fs::remove_file(path).map_err(HubError::io(path, "delete"))?;
    Err(HubError::Hash { file: subject.to_string(), kind, expected: etag.to_owned(), found })
}

/// The digest of a file in hexadecimal.
fn digest(path: &Path, mut context: Context) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; BUFFER];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => context.update(&buffer[..n]),
        }
    }
    Ok(context.finish().as_ref().iter().map(|b| format!("{b:02x}")).collect())
}
