//! From a reference to a path.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::cache::{RepoCache, is_commit};
use crate::download::Download;
use crate::http::Client;
use crate::reference::is_plain_path;
use crate::select::{self, Choice, INDEX, choose, summary};
use crate::{HubError, Observer, Reference, Settings};

/// A hub and a cache of it.
pub struct Hub {
    settings: Settings,
    client: Client,
}

/// What was asked for, on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// The snapshot directory of a model, or a file in it.
    pub path: PathBuf,
    /// The commit that the revision means.
    pub commit: String,
    /// Bytes that were downloaded now.
    pub received: u64,
}

/// A commit and the names of its files, sorted as the hub sorts them.
struct Listing {
    commit: String,
    names: Vec<String>,
}

impl Hub {
    /// A hub with these settings; nothing is asked or written yet.
    ///
    /// # Errors
    /// When the endpoint is no URL.
    pub fn new(settings: Settings) -> Result<Self, HubError> {
        Ok(Self { client: Client::new(&settings)?, settings })
    }

    /// The local path of a model or file, downloaded where the cache does not have it.
    ///
    /// A repository gives the directory of its commit with the files that make a model
    /// (configuration, tokenizer, safetensors) or an adapter of one, or the path of its only GGUF file.
    /// Where the hub
    /// cannot be reached, the commit that was downloaded last is used.
    ///
    /// # Errors
    /// When there is no such thing, or no right to it; when the connection fails too often; when a
    /// file has another hash than the hub says; when the disk refuses; offline, when the cache does
    /// not have it.
    pub fn fetch(
        &self,
        reference: &Reference,
        observer: &mut dyn Observer,
    ) -> Result<Fetched, HubError> {
        let cache = RepoCache::new(&self.settings.cache, reference);
        let cached = |why: &str| self.cached(&cache, reference, why);
        if self.settings.offline {
            return cached("HF_HUB_OFFLINE forbids a download");
        }
        let here = cached("");
        if let Ok(here) = &here
            && is_commit(reference.revision())
            && reference.file().is_some()
        {
            return Ok(here.clone());
        }
        let listing = match (self.list(reference, here.is_err(), observer), here) {
            (Ok(listing), _) => listing,
            (Err(error @ HubError::Network { .. }), Ok(here)) => {
                observer.note(&format!("{error}: using commit {} of the cache", here.commit));
                return Ok(here);
            }
            (Err(error), _) => return Err(error),
        };
        self.download(&cache, reference, &listing, observer)
    }

    fn download(
        &self,
        cache: &RepoCache,
        reference: &Reference,
        Listing { commit, names }: &Listing,
        observer: &mut dyn Observer,
    ) -> Result<Fetched, HubError> {
        let repo = reference.clone().without_file();
        let download = Download { client: &self.client, cache, repo: &repo, commit };
        let no_model = |expected: String, found: String| HubError::NoModel {
            repo: format!("{repo} at {commit}"),
            expected,
            found,
        };
        let snapshot = cache.snapshot(commit);
        let choice = match reference.file() {
            None if reference.is_dataset() => {
                return Err(no_model(
                    format!("one of its files, as in {repo}/FILE"),
                    summary(names),
                ));
            }
            Some(file) if names.iter().any(|name| name == file) => Choice::File(file.to_owned()),
            Some(file) => return Err(no_model(format!("a file `{file}`"), summary(names))),
            None => choose(names).map_err(|(expected, found)| no_model(expected, found))?,
        };
        let mut received = 0;
        let path = match choice {
            Choice::File(file) => {
                received += download.file(&file, observer)?;
                snapshot.join(file)
            }
            Choice::Directory(files) => {
                for file in &files {
                    received += download.file(file, observer)?;
                }
                if files.iter().any(|file| file == INDEX) {
                    for shard in self.shards(cache, commit, &repo)? {
                        if !names.contains(&shard) {
                            return Err(no_model(
                                format!("{shard}, which {INDEX} names"),
                                "none".into(),
                            ));
                        }
                        received += download.file(&shard, observer)?;
                    }
                }
                snapshot
            }
        };
        // Last, so that a revision never means a commit that is here in part only. One file of a
        // later commit is no reason to lose sight of the whole model of an earlier.
        let whole = reference.file().is_none();
        if whole || !cache.would_lose(reference.revision(), commit) {
            cache.set_commit(reference.revision(), commit)?;
        }
        Ok(Fetched { path, commit: commit.clone(), received })
    }

    /// What the cache has of it.
    fn cached(
        &self,
        cache: &RepoCache,
        reference: &Reference,
        why: &str,
    ) -> Result<Fetched, HubError> {
        let missing = |missing: String| HubError::NotCached {
            repo: reference.to_string(),
            cache: self.settings.cache.clone(),
            missing,
            why: why.to_owned(),
        };
        let commit = cache
            .commit(reference.revision())
            .ok_or_else(|| missing(format!("nothing of revision `{}`", reference.revision())))?;
        let names = cache.files(&commit);
        let snapshot = cache.snapshot(&commit);
        let path = match reference.file() {
            Some(file) if names.iter().any(|name| name == file) => snapshot.join(file),
            Some(file) => return Err(missing(format!("no `{file}`"))),
            None => match choose(&names) {
                Ok(Choice::File(file)) => snapshot.join(file),
                Ok(Choice::Directory(files)) => {
                    if files.iter().any(|file| file == INDEX) {
                        let mut shards = self.shards(cache, &commit, reference)?;
                        shards.retain(|shard| !names.contains(shard));
                        if !shards.is_empty() {
                            let shards: Vec<_> = shards.into_iter().collect();
                            return Err(missing(format!("no {}", summary(&shards))));
                        }
                    }
                    snapshot
                }
                Err((expected, found)) => {
                    return Err(missing(format!("expected {expected}, found {found}")));
                }
            },
        };
        Ok(Fetched { path, commit, received: 0 })
    }

    fn shards(
        &self,
        cache: &RepoCache,
        commit: &str,
        repo: &Reference,
    ) -> Result<BTreeSet<String>, HubError> {
        let path = cache.snapshot(commit).join(INDEX);
        let text = fs::read_to_string(&path).map_err(HubError::io(&path, "read"))?;
        select::shards(&text, &repo.clone().without_file().or_file(INDEX).to_string())
    }

    /// Asks the hub what a revision is.
    fn list(
        &self,
        reference: &Reference,
        patient: bool,
        observer: &mut dyn Observer,
    ) -> Result<Listing, HubError> {
        let subject = reference.clone().without_file();
        let url = self.client.url(&subject.listing_path());
        let text = self.client.text(&url, &subject, patient, observer)?;
        let refuse = |found: String| {
            HubError::answer(&url, "JSON with `sha` and `siblings` of a model", found)
        };
        let json: Value = serde_json::from_str(&text).map_err(|e| refuse(e.to_string()))?;
        let commit = json.get("sha").and_then(Value::as_str).unwrap_or_default();
        if !(7..=64).contains(&commit.len()) || !commit.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(refuse(format!("`{commit}` for a commit")));
        }
        let siblings = json.get("siblings").and_then(Value::as_array);
        let siblings = siblings.ok_or_else(|| refuse("no `siblings`".into()))?;
        let names = siblings.iter().filter_map(|file| file.get("rfilename")?.as_str());
        // A name that leads out of the snapshot is none that a model needs.
        let names = names.filter(|name| is_plain_path(name)).map(str::to_owned).collect();
        Ok(Listing { commit: commit.to_owned(), names })
    }
}
