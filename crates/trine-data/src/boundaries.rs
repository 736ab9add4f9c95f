//! Where documents begin in a stream of ids.

use trine_tokenizer::Tokenizer;

/// The ids between which a dataset's documents lie: it writes them, and finds documents by them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Boundaries {
    /// First id of a document.
    pub begin: Option<u32>,
    /// Last id of a document.
    pub end: Option<u32>,
}

impl Boundaries {
    /// Those of a tokenizer: its begin token, where it puts one in front of a prompt, and its end
    /// token, if there is one.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        Self { begin: tokenizer.bos_id().filter(|_| tokenizer.adds_bos()), end: tokenizer.eos_id() }
    }

    /// Whether documents cannot be told apart.
    pub fn is_none(&self) -> bool {
        self.begin.is_none() && self.end.is_none()
    }

    /// For each id of a window, the index of the first id of its document, (window): what lies
    /// before it is another document's. A document that began before the window begins at 0.
    pub fn starts(&self, window: &[u32]) -> impl Iterator<Item = u32> {
        let (mut start, mut ended) = (0, false);
        window.iter().enumerate().map(move |(at, &id)| {
            if ended || self.begin == Some(id) {
                start = at as u32;
            }
            ended = self.end == Some(id);
            start
        })
    }
}
