//! Speculative decoding without loss: guesses that cost nothing, checked in one pass.
//!
//! Decoding one token reads every weight once; decoding a few together reads them once as well. So
//! it pays to guess the next ids, send them through the model with the last one, and keep those that
//! the model would have produced (Leviathan et al., arXiv 2211.17192). The guess is what followed
//! when the text's last ids occurred before: prompt lookup, which needs no second model and is right
//! wherever a text repeats itself or its prompt (quotations, summaries, edits of code). Where the text
//! leaves what it repeated, the guess is that one id was replaced and the rest goes on as before.
//!
//! # Why nothing is lost
//!
//! A guess `x` is one id, not a distribution, and for these the rule of speculative sampling is:
//! keep `x` with probability `p(x)`, else draw from `p` without `x`, renormalized. Drawing `y` from
//! `p` and keeping the guess when `y = x` is that rule: it keeps `x` with probability `p(x)`, and
//! otherwise `y` is distributed as `p` under the condition `y ≠ x`. So the sampler chooses each id
//! as if there were no guesses, from the same logits, with the same random number; a guess only
//! decides whether the logits after that id are at hand already. As a token's logits have the same
//! bits alone and in a batch, the ids are the same with and without speculation, one by one,
//! greedy or sampled, whatever filters and penalties the sampler has.
//!
//! # How many
//!
//! A wrong guess costs its share of the pass. [`Draft::Auto`] weighs that against what it saves:
//! see `length`.

mod length;
mod ngrams;

use std::time::Duration;

use length::Length;
use ngrams::{Match, Ngrams};

/// Most guesses of [`Draft::Auto`] in a pass: with the last id, a batch of 16.
const MOST: usize = 15;

/// How many ids to guess ahead. It changes the speed, never the ids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Draft {
    /// None: one token at a time.
    Off,
    /// As many as have paid so far, by the text's own record and the time that passes took.
    #[default]
    Auto,
    /// So many wherever the last ids occurred before.
    Fixed(usize),
}

/// Guesses how a text goes on from how it went on before.
///
/// It is told every id of the text ([`Self::push`]) and what passes cost ([`Self::timed`]), and asked
/// for guesses before a pass ([`Self::draft`]). Memory grows with the text, by some 60 bytes an id.
///
/// ```
/// use trine_runtime::{Draft, Drafter};
///
/// let mut drafter = Drafter::new(Draft::Fixed(3));
/// drafter.extend(&[5, 6, 7, 8, 9, 5, 6]);
/// assert_eq!(drafter.draft(10), [7, 8, 9]);
/// ```
pub struct Drafter {
    mode: Draft,
    ngrams: Ngrams,
    length: Length,
    /// Where the last ids occurred before.
    matched: Option<Match>,
}

impl Drafter {
    /// A drafter of an empty text.
    pub fn new(mode: Draft) -> Self {
        Self { mode, ngrams: Ngrams::default(), length: Length::default(), matched: None }
    }

    /// Appends an id to the text, after holding it against the guess there would have been: so it is
    /// known at no cost how good guesses are, also where none are made.
    pub fn push(&mut self, id: u32) {
        if self.mode == Draft::Off {
            return;
        }
        let known = self.matched.take().and_then(|matched| {
            let right = self.ngrams.followed(matched) == id;
            self.length.guessed(matched.len, right);
            if right { Some(matched.longer()) } else { matched.resumed() }
        });
        self.matched = self.ngrams.push(id, known);
    }

    /// [`Self::push`] for each of `ids`.
    pub fn extend(&mut self, ids: &[u32]) {
        ids.iter().for_each(|&id| self.push(id));
    }

    /// The ids that may come next, at most `most`; none when that is not expected to pay.
    pub fn draft(&self, most: usize) -> Vec<u32> {
        let Some(matched) = self.matched else { return Vec::new() };
        let count = match self.mode {
            Draft::Off => 0,
            Draft::Auto => self.length.best(matched.len, most.min(MOST)),
            Draft::Fixed(count) => count.min(most),
        };
        self.ngrams.continuation(matched, count)
    }

    /// Takes note of how long a pass with `tokens` ids took.
    pub fn timed(&mut self, tokens: usize, time: Duration) {
        self.length.timed(tokens, time.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drafter(mode: Draft, text: &[u32]) -> Drafter {
        let mut drafter = Drafter::new(mode);
        drafter.extend(text);
        drafter
    }

    #[test]
    fn what_followed_before_is_guessed() {
        let text = [1, 2, 3, 4, 5, 1, 2, 3];
        assert_eq!(drafter(Draft::Fixed(2), &text).draft(9), [4, 5]);
        assert_eq!(drafter(Draft::Fixed(9), &text).draft(3), [4, 5, 1]);
        assert_eq!(drafter(Draft::Fixed(2), &text).draft(0), [0; 0]);
        assert_eq!(drafter(Draft::Off, &text).draft(9), [0; 0]);
        assert_eq!(drafter(Draft::Fixed(2), &[1, 2, 3]).draft(9), [0; 0]);
        assert_eq!(drafter(Draft::Fixed(2), &[]).draft(9), [0; 0]);
    }

    #[test]
    fn a_replaced_id_is_skipped_where_much_was_the_same() {
        let edited = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 77];
        assert_eq!(drafter(Draft::Fixed(2), &edited).draft(9), [6, 7]);
        // The next id is replaced as well: too little is the same.
        let edited = [&edited[..], &[78]].concat();
        assert_eq!(drafter(Draft::Fixed(2), &edited).draft(9), [0; 0]);
        assert_eq!(drafter(Draft::Fixed(2), &[1, 2, 3, 4, 5, 6, 1, 2, 3, 77]).draft(9), [0; 0]);
    }

    #[test]
    fn a_text_that_repeats_itself_earns_long_guesses() {
        let period: Vec<u32> = (0..40).collect();
        let mut drafter = drafter(Draft::Auto, &period.repeat(4));
        assert_eq!(drafter.draft(99), (0..MOST as u32).collect::<Vec<_>>());
        // And a text that stops doing so loses them: the last ids occurred before, what followed
        // did not follow again.
        for round in 0..400 {
            drafter.extend(&[5, 6, 7, 1000 + round]);
        }
        drafter.extend(&[5, 6, 7]);
        assert_eq!(drafter.draft(99), [0; 0]);
    }
}
