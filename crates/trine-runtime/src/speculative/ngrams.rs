//! Where the end of a text occurred before.
//!
//! As in an LZ77 compressor: places are found by the two ids before them, newest first, and compared
//! backwards; a place that went on as the text did stays the first candidate. Only when no pair
//! occurred, the place after the last single id counts. A step looks at a fixed number of places.

use std::collections::HashMap;

/// Places that are compared, at most.
const CANDIDATES: usize = 16;

/// Ids that are compared at a place, at most: so long a match is as good as any.
const LONGEST: usize = 32;

/// Ids that must be the same before one that is not.
const REPLACED: usize = 4;

/// A place where the text's last ids occurred before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Match {
    /// Index of the id that followed there.
    pub(super) at: usize,
    /// How many ids before it are those at the end of the text; counted up to [`LONGEST`]. 0 where the
    /// last id is another, and the text may go on as there nevertheless.
    pub(super) len: usize,
}

impl Match {
    /// The match after the text went on as it did there.
    pub(super) fn longer(self) -> Self {
        Self { at: self.at + 1, len: (self.len + 1).min(LONGEST) }
    }

    /// The match after the text went on otherwise: where so much was the same, one id may have been
    /// replaced by another.
    pub(super) fn resumed(self) -> Option<Self> {
        (self.len >= REPLACED).then_some(Self { at: self.at + 1, len: 0 })
    }
}

/// A text, and where its pairs of ids occur. A place is the index of the id after it; since no
/// place is at 0, 0 stands for none.
#[derive(Default)]
pub(super) struct Ngrams {
    text: Vec<u32>,
    /// For each place, counted from 1: the last one before it that follows the same two ids.
    earlier: Vec<usize>,
    /// The last place that follows an id, and that follows two.
    after_one: HashMap<u32, usize>,
    after_two: HashMap<(u32, u32), usize>,
}

impl Ngrams {
    /// Appends an id and returns the longest match, the newest among equals; `known`, one that is
    /// known to hold after it, comes before others of its length.
    pub(super) fn push(&mut self, id: u32, known: Option<Match>) -> Option<Match> {
        let before = self.text.last().copied();
        self.text.push(id);
        let place = self.text.len();
        let after_one = self.after_one.insert(id, place);
        let after_two = before.and_then(|before| self.after_two.insert((before, id), place));
        self.earlier.push(after_two.unwrap_or(0));

        let mut best = known;
        let mut at = after_two.unwrap_or(0);
        for _ in 0..CANDIDATES {
            let longest = best.map_or(0, |best| best.len);
            if at == 0 || longest == LONGEST {
                break;
            }
            let len = self.common(at);
            if len > longest {
                best = Some(Match { at, len });
            }
            at = self.earlier[at - 1];
        }
        best.or(after_one.map(|at| Match { at, len: 1 }))
    }

    /// How many ids before `at` are those at the end of the text.
    fn common(&self, at: usize) -> usize {
        let pairs = self.text[..at].iter().rev().zip(self.text.iter().rev());
        pairs.take(LONGEST).take_while(|(a, b)| a == b).count()
    }

    /// The id that followed a match.
    pub(super) fn followed(&self, matched: Match) -> u32 {
        self.text[matched.at]
    }

    /// The `count` ids that followed a match; where they reach the end of the text, they go on as
    /// the text would if it repeated what lies between.
    pub(super) fn continuation(&self, matched: Match, count: usize) -> Vec<u32> {
        let period = self.text.len() - matched.at;
        (0..count).map(|i| self.text[matched.at + i % period]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(ids: &[u32]) -> (Ngrams, Option<Match>) {
        let mut ngrams = Ngrams::default();
        let mut matched = None;
        ids.iter().for_each(|&id| matched = ngrams.push(id, None));
        (ngrams, matched)
    }

    #[test]
    fn the_longest_match_wins_and_then_the_newest() {
        //  0  1  2  3  4  5  6  7  8  9 10
        let (_, found) = text(&[9, 1, 2, 7, 3, 1, 2, 8, 9, 1, 2]);
        assert_eq!(found, Some(Match { at: 3, len: 3 }));
        let (_, found) = text(&[4, 1, 2, 7, 3, 1, 2, 8, 9, 1, 2]);
        assert_eq!(found, Some(Match { at: 7, len: 2 }));
        let (_, found) = text(&[1, 5, 1, 6, 1]);
        assert_eq!(found, Some(Match { at: 3, len: 1 }));
        assert_eq!(text(&[1, 2, 3]).1, None);
        assert_eq!(text(&[]).1, None);
    }

    #[test]
    fn a_known_match_is_kept_unless_another_is_longer() {
        let (mut ngrams, _) = text(&[4, 1, 2, 7, 3, 1, 2, 8, 9, 1]);
        let known = Some(Match { at: 3, len: 2 });
        assert_eq!(ngrams.push(2, known), known);
        let (mut ngrams, _) = text(&[4, 1, 2, 7, 9, 1, 2, 8, 9, 1]);
        assert_eq!(ngrams.push(2, known), Some(Match { at: 7, len: 3 }));
    }

    #[test]
    fn a_loop_goes_on_as_a_loop() {
        let (ngrams, found) = text(&[1, 2, 3, 1, 2, 3]);
        assert_eq!(ngrams.continuation(found.unwrap(), 7), [1, 2, 3, 1, 2, 3, 1]);
        let (ngrams, found) = text(&[5, 5, 5, 5]);
        assert_eq!(found, Some(Match { at: 3, len: 3 }));
        assert_eq!(ngrams.continuation(found.unwrap(), 3), [5, 5, 5]);
    }

    /// Against a search of everything, on a text of few ids; with a pair that occurs too often for
    /// all its places to be compared, what is found is still a match.
    #[test]
    fn matches_hold_and_are_longest_where_all_places_are_compared() {
        for (vocab, all) in [(23, true), (2, false)] {
            let mut ngrams = Ngrams::default();
            let mut state = 1u32;
            for n in 0..400 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let found = ngrams.push((state >> 16) % vocab, None);
                let longest = (1..=n).map(|at| ngrams.common(at)).max().unwrap_or(0);
                assert_eq!(found.is_some(), longest > 0);
                let Some(found) = found else { continue };
                assert_eq!(ngrams.common(found.at), found.len.max(ngrams.common(found.at)));
                assert!(found.len <= ngrams.common(found.at) && found.at <= n);
                assert!(!all || found.len == longest, "{n}: {found:?} instead of {longest}");
            }
        }
    }
}
