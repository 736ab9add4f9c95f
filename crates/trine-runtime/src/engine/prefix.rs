//! Sequences that were seen, for texts that begin as they did.
//!
//! Pages are shared between clones of a sequence, so an entry costs memory only for what nobody else
//! holds, and a text that begins like an entry begins with the entry's pages. Because a token's bits
//! do not depend on what went through beside it, it makes no difference who computed them. What they
//! were computed with does: an entry serves only texts with the same adapter.

use std::sync::Arc;

use crate::Sequence;
use crate::adapter::{Adapter, same};

/// Positions from which on an entry is worth its search.
const SHORTEST: usize = 16;

/// Most entries.
const MOST: usize = 256;

/// Texts that were seen, the one used last at the end.
#[derive(Default)]
pub(super) struct PrefixCache {
    entries: Vec<Entry>,
}

struct Entry {
    /// As many as the sequence has positions.
    ids: Vec<u32>,
    sequence: Sequence,
}

impl Entry {
    /// With how many of its ids a text begins; none when that has another adapter.
    fn common(&self, text: &[u32], adapter: Option<&Arc<Adapter>>) -> usize {
        if same(self.sequence.adapter(), adapter) { common(&self.ids, text) } else { 0 }
    }
}

impl PrefixCache {
    /// A sequence with the adapter that has seen as much of `text` as any entry, and less than all of it.
    pub(super) fn find(
        &mut self,
        text: &[u32],
        adapter: Option<&Arc<Adapter>>,
    ) -> Option<Sequence> {
        let common = |entry: &Entry| entry.common(text, adapter);
        let best = (0..self.entries.len()).max_by_key(|&i| common(&self.entries[i]))?;
        let positions = common(&self.entries[best]).min(text.len().saturating_sub(1));
        if positions < SHORTEST {
            return None;
        }
        let entry = self.entries.remove(best);
        let mut sequence = entry.sequence.clone();
        sequence.truncate(positions);
        self.entries.push(entry);
        Some(sequence)
    }

    /// How many ids of `text` an entry has that was computed with the adapter.
    pub(super) fn longest(&self, text: &[u32], adapter: Option<&Arc<Adapter>>) -> usize {
        self.entries.iter().map(|entry| entry.common(text, adapter)).max().unwrap_or(0)
    }

    /// Keeps a sequence that has seen the first ids of `text`.
    pub(super) fn insert(&mut self, text: &[u32], sequence: Sequence) {
        let ids = &text[..sequence.positions()];
        if ids.len() < SHORTEST || self.longest(ids, sequence.adapter()) == ids.len() {
            return;
        }
        // What the new one begins with, it has as well.
        let is_part = |entry: &Entry| entry.common(ids, sequence.adapter()) == entry.ids.len();
        self.entries.retain(|entry| !is_part(entry));
        if self.entries.len() == MOST {
            self.entries.remove(0);
        }
        self.entries.push(Entry { ids: ids.to_vec(), sequence });
    }

    /// Forgets the entry that was used longest ago; `false` when there is none.
    pub(super) fn forget_oldest(&mut self) -> bool {
        let any = !self.entries.is_empty();
        if any {
            self.entries.remove(0);
        }
        any
    }

    /// All sequences.
    pub(super) fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.entries.iter().map(|entry| &entry.sequence)
    }
}

/// With how many ids both texts begin.
pub(super) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
