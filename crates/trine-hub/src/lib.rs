//! Models from the Hugging Face hub: `hf://owner/name` becomes a local path.
//!
//! ```text
//! hf://owner/name@revision ─► Reference ─► commit and file names (one request)
//!                                              │ the files that make a model
//!        path in the cache ◄── SHA-256 ◄── blobs, resumed by range requests
//! ```
//!
//! - [`Reference`]: what a user writes.
//! - [`Settings`]: `HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME` and the others that Python's
//!   `huggingface_hub` reads, with the same meaning.
//! - [`Hub::fetch`]: downloads what is not in the cache yet. The cache is the one of
//!   `huggingface_hub`, in layout and locks, so that each finds what the other downloaded.
//! - [`Observer`]: watches; this crate prints nothing.
//!
//! Blobs are named by their hash on the hub and take that name only after it was checked. The
//! layout of the cache is the `hf-hub` crate's. Its downloader is not used: it sends the token to
//! whatever host a file is redirected to, believes the length of a file for its content, appends a
//! whole file to a part of it when a server ignores a range, and waits for ever.
//!
//! It knows the names of a model's files and nothing of what is inside.

#![forbid(unsafe_code)]

mod cache;
mod download;
mod error;
mod http;
mod hub;
mod reference;
mod select;
mod settings;

pub use error::HubError;
pub use hub::{Fetched, Hub};
pub use reference::{Reference, SCHEME};
pub use settings::Settings;

/// Watches a download. Every method may be left as it is.
pub trait Observer {
    /// A file begins: its name in the repository, its size in bytes where the hub tells it, and how
    /// many of them an earlier attempt left here.
    fn begin(&mut self, file: &str, size: Option<u64>, present: u64) {
        let _ = (file, size, present);
    }

    /// So many bytes of the file are here; fewer than before where it had to begin anew.
    fn position(&mut self, bytes: u64) {
        let _ = bytes;
    }

    /// The file is whole and checked.
    fn end(&mut self) {}

    /// Something a person would want to know, e.g. that a dropped connection is tried again.
    fn note(&mut self, text: &str) {
        let _ = text;
    }
}

/// Watches nothing.
impl Observer for () {}
