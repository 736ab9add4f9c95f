//! What a user writes: `hf://owner/name`, with `@revision` and `/file` where wanted; a data set is
//! `hf://datasets/owner/name`.

use std::fmt;
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::HubError;

/// What a reference begins with.
pub const SCHEME: &str = "hf://";

/// What stands before the owner of a data set.
const DATASETS: &str = "datasets/";

/// The branch that is meant where none is named.
const DEFAULT_REVISION: &str = "main";

/// Everything but what a URL takes as it is.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// A repository on the hub, or one file of it.
///
/// `hf://owner/name`, `hf://owner/name@revision`, `hf://owner/name/file.gguf`,
/// `hf://owner/name@revision/file.gguf`. A revision is a branch, a tag or a commit; a `/` in it is
/// written `%2F`, except in `refs/pr/N` and its like. `hf://datasets/owner/name` is a data set: no
/// owner has the name `datasets`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    dataset: bool,
    repo: String,
    revision: Option<String>,
    file: Option<String>,
}

impl Reference {
    /// Whether it is a data set, not a model.
    pub fn is_dataset(&self) -> bool {
        self.dataset
    }

    /// `owner/name`.
    pub fn repo(&self) -> &str {
        &self.repo
    }

    /// Branch, tag or commit; `main` where none was named.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(DEFAULT_REVISION)
    }

    /// The file inside the repository, with `/` between directories.
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }

    /// The same at a revision.
    ///
    /// # Errors
    /// When it names another revision already, or this is none.
    pub fn at_revision(mut self, revision: &str) -> Result<Self, HubError> {
        if self.revision.as_deref().is_some_and(|own| own != revision) {
            return Err(refuse(&self.to_string(), "one revision, not another one beside it"));
        }
        if !is_plain_path(revision) {
            return Err(refuse(revision, "a revision: a branch, a tag or a commit"));
        }
        self.revision = Some(revision.to_owned());
        Ok(self)
    }

    /// One file of the same repository, where none is named yet.
    #[must_use]
    pub fn or_file(mut self, file: &str) -> Self {
        self.file.get_or_insert_with(|| file.to_owned());
        self
    }

    /// The repository alone.
    pub(crate) fn without_file(mut self) -> Self {
        self.file = None;
        self
    }

    /// Path of the hub's answer about the revision.
    pub(crate) fn listing_path(&self) -> String {
        let kind = if self.dataset { "datasets" } else { "models" };
        format!("api/{kind}/{}/revision/{}", self.repo, escape(self.revision(), false))
    }

    /// Path of the file's content at a commit.
    pub(crate) fn resolve_path(&self, commit: &str) -> String {
        let file = escape(self.file.as_deref().unwrap_or_default(), true);
        let kind = if self.dataset { DATASETS } else { "" };
        format!("{kind}{}/resolve/{commit}/{file}", self.repo)
    }
}

impl FromStr for Reference {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let refuse = |expected: &str| refuse(text, expected);
        let rest =
            text.strip_prefix(SCHEME).ok_or_else(|| refuse("a name beginning with hf://"))?;
        let (dataset, rest) = match rest.strip_prefix(DATASETS) {
            Some(rest) => (true, rest),
            None => (false, rest),
        };
        let (owner, rest) = rest.split_once('/').ok_or_else(|| match dataset {
            true => refuse("hf://datasets/owner/name"),
            false => refuse("hf://owner/name"),
        })?;
        // A name has no `@` and no `/`: whichever comes first ends it.
        let end = rest.find(['@', '/']).unwrap_or(rest.len());
        let (name, rest) = rest.split_at(end);
        if !is_repo_part(owner) || !is_repo_part(name) {
            return Err(refuse("hf://owner/name of letters, digits, `-`, `_` and `.`"));
        }
        let (revision, file) = match rest.strip_prefix('@') {
            Some(rest) => {
                let (revision, file) = split_revision(rest);
                let decoded = percent_decode_str(revision).decode_utf8();
                let decoded = decoded.ok().filter(|revision| is_plain_path(revision));
                let revision =
                    decoded.ok_or_else(|| refuse("a branch, a tag or a commit after `@`"))?;
                (Some(revision.into_owned()), file)
            }
            None => (None, rest),
        };
        // A slash at the end, as shells complete it for a directory, names no file.
        let file = file.strip_prefix('/').unwrap_or(file);
        if !file.is_empty() && !is_plain_path(file) {
            return Err(refuse("the name of a file inside the repository"));
        }
        let file = (!file.is_empty()).then(|| file.to_owned());
        Ok(Self { dataset, repo: format!("{owner}/{name}"), revision, file })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.dataset { DATASETS } else { "" };
        write!(f, "{SCHEME}{kind}{}", self.repo)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        self.file.iter().try_for_each(|file| write!(f, "/{file}"))
    }
}

fn refuse(text: &str, expected: &str) -> HubError {
    HubError::Reference { text: text.to_owned(), expected: expected.to_owned() }
}

/// The revision at the beginning of `text`, and what follows it.
fn split_revision(text: &str) -> (&str, &str) {
    let parts = if text.starts_with("refs/") { 3 } else { 1 };
    let end = text.match_indices('/').nth(parts - 1).map_or(text.len(), |(at, _)| at);
    text.split_at(end)
}

/// Whether the hub allows this as an owner or a name. The cache joins both with `--`, so neither
/// may hold that.
fn is_repo_part(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=96).contains(&part.len())
        && part.chars().all(allowed)
        && !part.starts_with(['-', '.'])
        && !part.ends_with(['-', '.'])
        && !part.contains("--")
        && !part.contains("..")
}

/// Whether a name leads to somewhere below the directory it is joined to, and nowhere else.
pub(crate) fn is_plain_path(name: &str) -> bool {
    let plain = |part: &str| !matches!(part, "" | "." | "..");
    // A backslash and a colon mean something in a path on Windows.
    let harmless = |c: char| !c.is_control() && !matches!(c, '\\' | ':');
    name.len() <= 1000 && name.chars().all(harmless) && name.split('/').all(plain)
}

/// A part of a URL; slashes are kept where they separate directories.
fn escape(part: &str, keep_slashes: bool) -> String {
    const BUT_SLASHES: &AsciiSet = &ESCAPED.remove(b'/');
    let set = if keep_slashes { BUT_SLASHES } else { ESCAPED };
    utf8_percent_encode(part, set).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, repo: &str, revision: &str, file: Option<&str>) {
        let reference: Reference = text.parse().unwrap();
        assert_eq!(reference.repo(), repo);
        assert_eq!(reference.revision(), revision);
        assert_eq!(reference.file(), file);
    }

    #[test]
    fn references_are_taken_apart() {
        check("hf://o/n", "o/n", "main", None);
        check("hf://o/n/", "o/n", "main", None);
        check("hf://o/n@v1", "o/n", "v1", None);
        check("hf://o/n/m.gguf", "o/n", "main", Some("m.gguf"));
        check("hf://o/n@v1.0/m.gguf", "o/n", "v1.0", Some("m.gguf"));
        check("hf://o/n@refs/pr/7/d/m.gguf", "o/n", "refs/pr/7", Some("d/m.gguf"));
        check("hf://o/n@a%2Fb/m.gguf", "o/n", "a/b", Some("m.gguf"));
        check("hf://microsoft/bitnet-b1.58-2B-4T", "microsoft/bitnet-b1.58-2B-4T", "main", None);
    }

    #[test]
    fn data_sets_are_told_from_models() {
        check("hf://datasets/o/n@v1/d/t.jsonl", "o/n", "v1", Some("d/t.jsonl"));
        for (text, dataset) in [("hf://datasets/o/n/t.jsonl", true), ("hf://dataset/n", false)] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!((reference.is_dataset(), reference.to_string()), (dataset, text.to_owned()));
        }
        assert!("hf://datasets/n".parse::<Reference>().is_err());
        let reference: Reference = "hf://datasets/o/n/a b.jsonl".parse().unwrap();
        assert_eq!(reference.listing_path(), "api/datasets/o/n/revision/main");
        assert_eq!(reference.resolve_path("c"), "datasets/o/n/resolve/c/a%20b.jsonl");
    }

    #[test]
    fn what_names_nothing_or_leads_elsewhere_is_refused() {
        for text in [
            "hf:/o/n",
            "hf://",
            "hf://o",
            "hf://o/",
            "hf:///n",
            "hf://o/@v",
            "hf://o/n@",
            "hf://../n",
            "hf://o/..",
            "hf://o/a--b",
            "hf://o/n n",
            "hf://o/n?x",
            "hf://o/n/../x",
            "hf://o/n@../x",
            "hf://o/n@%2E%2E",
            "hf://o/n@a%2F..%2Fb",
            "hf://o/n//x",
            "hf://o/n/a\\b",
            "hf://o/n/c:x",
            "hf://o/n@%FF",
        ] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn two_revisions_are_one_too_many() {
        let reference: Reference = "hf://o/n@v1".parse().unwrap();
        assert!(reference.clone().at_revision("v1").is_ok());
        assert!(reference.at_revision("v2").is_err());
        let reference: Reference = "hf://o/n".parse().unwrap();
        assert!(reference.clone().at_revision("../x").is_err());
        assert_eq!(reference.at_revision("a/b").unwrap().revision(), "a/b");
    }

    #[test]
    fn urls_are_escaped() {
        assert_eq!(escape("a b/c?.gguf", true), "a%20b/c%3F.gguf");
        assert_eq!(escape("refs/pr/1", false), "refs%2Fpr%2F1");
    }
}
