//! Downloads from a hub that is played by two local servers: everything that works, and everything
//! that goes wrong on the way.

#![allow(clippy::unwrap_used)]

mod disk;
mod faults;
mod server;
mod works;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use server::{FakeHub, Request};
use tempfile::TempDir;
use trine_hub::{Fetched, Hub, HubError, Observer, Settings};

const COMMIT: &str = "1111111111111111111111111111111111111111";
const OTHER: &str = "2222222222222222222222222222222222222222";

/// Bytes that differ at every place one could resume wrongly.
fn large(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * i % 251) as u8).collect()
}

/// A hub, and a cache that is gone afterwards.
struct Place {
    hub: FakeHub,
    dir: TempDir,
    settings: Settings,
}

/// What an observer saw.
#[derive(Default)]
struct Seen {
    notes: Vec<String>,
    /// File, size and bytes present of each beginning.
    begun: Vec<(String, Option<u64>, u64)>,
    last: u64,
    ended: usize,
}

impl Observer for Seen {
    fn begin(&mut self, file: &str, size: Option<u64>, present: u64) {
        self.begun.push((file.to_owned(), size, present));
    }

    fn position(&mut self, bytes: u64) {
        self.last = bytes;
    }

    fn end(&mut self) {
        self.ended += 1;
    }

    fn note(&mut self, text: &str) {
        self.notes.push(text.to_owned());
    }
}

impl Place {
    /// A repository with one small file, one large one, and one that no model needs.
    fn new() -> Self {
        let weights = large(5000);
        Self::with(&[
            ("README.md", b"read me"),
            ("config.json", b"{}"),
            ("model.safetensors", &weights),
        ])
    }

    fn with(files: &[(&str, &[u8])]) -> Self {
        let hub = FakeHub::new(COMMIT, files);
        let dir = tempfile::tempdir().unwrap();
        let mut settings = Settings::new(dir.path().join("hub"));
        settings.endpoint.clone_from(&hub.url);
        settings.backoff = Duration::from_millis(1);
        Self { hub, dir, settings }
    }

    fn fetch(&self, reference: &str) -> Result<Fetched, HubError> {
        self.watch(reference, &mut Seen::default())
    }

    fn watch(&self, reference: &str, seen: &mut Seen) -> Result<Fetched, HubError> {
        Hub::new(self.settings.clone())?.fetch(&reference.parse()?, seen)
    }

    /// Fetches what must fail with a message that holds all of `names`.
    #[track_caller]
    fn refused(&self, reference: &str, names: &[&str]) {
        let error = self.fetch(reference).unwrap_err().to_string();
        for name in names {
            assert!(error.contains(name), "no {name:?} in {error}");
        }
        assert!(!error.contains("signature"), "{error}");
    }

    fn repo(&self) -> PathBuf {
        self.settings.cache.join("models--our--tiny")
    }

    /// Names of the blobs, whole or not, sorted.
    fn blobs(&self) -> Vec<String> {
        names(&self.repo().join("blobs"))
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    let mut names: Vec<_> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Method and path of requests, without signatures.
fn lines(requests: &[Request]) -> Vec<String> {
    let path = |r: &Request| r.path.split('?').next().unwrap().to_owned();
    requests.iter().map(|r| format!("{} {}", r.method, path(r))).collect()
}

/// The ranges that were asked for of files that were downloaded from the CDN.
fn ranges(requests: &[Request]) -> Vec<String> {
    let range = |r: &Request| r.headers.get("range").cloned().unwrap_or_default();
    requests.iter().filter(|r| r.at_cdn && r.method == "GET").map(range).collect()
}
