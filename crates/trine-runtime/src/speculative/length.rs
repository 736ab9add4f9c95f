//! How many guesses pay.
//!
//! With `a(m)` the share of right guesses after a match of `m` ids, `k` guesses after such a match
//! are expected to give
//!
//! ```text
//! E(k) = 1 + a(m) + a(m) a(m + 1) + ... + a(m) ... a(m + k - 1)
//! ```
//!
//! ids, the first being the one that every pass gives. A pass with `n` ids takes `1 + s (n - 1)`
//! times as long as one with a single id. The best `k` is where `E(k) / (1 + s k)` is largest; `k` is
//! 0 where no guess makes it larger than 1, and then speculation costs nothing.
//!
//! Both are measured as the text goes: `a` from every id, guessed ahead or not, and `s` from the time
//! that passes take, since it depends on the machine, the threads and the kernels.

/// Lengths of matches that are told apart, from 0; longer ones count as the last.
const LENGTHS: usize = 9;

/// Share of right guesses to begin with. A guess after a long match is a good one.
const ACCEPTANCE: [f64; LENGTHS] = [0.5, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.9];

/// Time of a further id in a pass, relative to a pass of one, to begin with.
const SLOPE: f64 = 0.2;

/// Weight that an observation keeps when the next one comes.
const MEMORY: f64 = 15.0 / 16.0;

/// Weight of a new time among those before, and of a new slope when there are many; the first ones
/// weigh more, so that one or two passes tell where guesses never pay.
const NEW_TIME: f64 = 1.0 / 8.0;

/// How much of what is known of `s` each pass with a single id forgets: it was measured with guesses
/// only, and where none are made, a bad measurement would stay for good.
const FORGET: f64 = 1.0 / 512.0;

/// How much more a guess must promise than a single id, since both estimates are rough.
const MARGIN: f64 = 1.03;

/// What is known of guesses and passes.
pub(super) struct Length {
    /// Right guesses and all guesses after matches of each length, older ones weighing less; they
    /// begin as one guess, right in part.
    right: [f64; LENGTHS],
    all: [f64; LENGTHS],
    /// Seconds of a pass with one id.
    single: Option<f64>,
    /// `s`
    slope: f64,
    /// Weight of the next measurement of `s`.
    new_slope: f64,
}

impl Default for Length {
    fn default() -> Self {
        Self { right: ACCEPTANCE, all: [1.0; LENGTHS], single: None, slope: SLOPE, new_slope: 0.5 }
    }
}

impl Length {
    /// Takes note of a guess after a match of `len` ids.
    pub(super) fn guessed(&mut self, len: usize, right: bool) {
        let bucket = bucket(len);
        self.right[bucket] = self.right[bucket] * MEMORY + f64::from(u8::from(right));
        self.all[bucket] = self.all[bucket] * MEMORY + 1.0;
    }

    /// Takes note of the time of a pass.
    pub(super) fn timed(&mut self, tokens: usize, seconds: f64) {
        if tokens == 1 {
            let single = self.single.unwrap_or(seconds);
            // A pass that was held up says little: it counts as one of twice the time.
            self.single = Some(single + (seconds.min(2.0 * single) - single) * NEW_TIME);
            self.slope += (SLOPE - self.slope) * FORGET;
        } else if let Some(single) = self.single.filter(|single| *single > 0.0) {
            let slope = (seconds / single - 1.0) / (tokens - 1) as f64;
            self.slope += (slope.clamp(0.0, 1.0) - self.slope) * self.new_slope;
            self.new_slope = (self.new_slope / (1.0 + self.new_slope)).max(NEW_TIME);
        }
    }

    /// The number of guesses after a match of `len` ids, at most `most`.
    pub(super) fn best(&self, len: usize, most: usize) -> usize {
        let (mut best, mut best_gain) = (0, MARGIN);
        let (mut ids, mut reached) = (1.0, 1.0);
        for k in 1..=most {
            let bucket = bucket(len + k - 1);
            reached *= self.right[bucket] / self.all[bucket];
            ids += reached;
            let gain = ids / (1.0 + self.slope * k as f64);
            if gain > best_gain {
                (best, best_gain) = (k, gain);
            }
        }
        best
    }
}

fn bucket(len: usize) -> usize {
    len.min(LENGTHS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(guesses: &[(usize, bool)], passes: &[(usize, f64)]) -> Length {
        let mut length = Length::default();
        guesses.iter().for_each(|&(len, right)| length.guessed(len, right));
        passes.iter().for_each(|&(tokens, seconds)| length.timed(tokens, seconds));
        length
    }

    #[test]
    fn right_guesses_lengthen_and_wrong_ones_end_it() {
        let first = after(&[], &[]).best(4, 15);
        assert!((1..15).contains(&first), "{first}");
        let right: Vec<_> = (1..=8).flat_map(|len| [(len, true); 40]).collect();
        assert_eq!(after(&right, &[]).best(4, 15), 15);
        assert_eq!(after(&right, &[]).best(4, 3), 3);
        let wrong: Vec<_> = (1..=8).flat_map(|len| [(len, false); 40]).collect();
        assert_eq!(after(&wrong, &[]).best(4, 15), 0);
        // Others' mistakes do not count against a length.
        let mixed: Vec<_> = wrong.iter().map(|&(len, _)| (len, len > 4)).collect();
        assert_eq!(after(&mixed, &[]).best(4, 15), 0);
        assert!(after(&mixed, &[]).best(5, 15) > 8);
        // And what was wrong once may be right later.
        let later: Vec<_> = wrong.iter().chain(&right).copied().collect();
        assert!(after(&later, &[]).best(4, 15) > 2);
    }

    /// A pass that takes as long as its ids one by one saves nothing, however good the guesses.
    #[test]
    fn guesses_follow_what_a_pass_costs() {
        let right: Vec<_> = (1..=8).flat_map(|len| [(len, true); 8]).collect();
        let best = |slope: f64| {
            let passes = [[(1, 1.0), (8, 1.0 + 7.0 * slope)]; 40].concat();
            after(&right, &passes).best(3, 15)
        };
        assert_eq!(best(1.0), 0);
        let lengths = [0.9, 0.5, 0.2, 0.02].map(best);
        assert!(lengths.is_sorted() && lengths[0] < lengths[3], "{lengths:?}");
        assert_eq!(lengths[3], 15);
    }

    /// A small model may take longer to wake threads than to compute: known at once, tried again later.
    #[test]
    fn where_passes_never_pay_few_are_tried() {
        let right: Vec<_> = (1..=8).flat_map(|len| [(len, true); 8]).collect();
        let mut length = after(&right, &[(1, 1.0)]);
        let mut wasted = 0;
        while length.best(3, 15) > 0 && wasted < 100 {
            length.timed(1 + length.best(3, 15), 40.0);
            wasted += 1;
        }
        assert!(wasted <= 10, "{wasted}");
        (0..1000).for_each(|_| length.timed(1, 1.0));
        assert!(length.best(3, 15) > 4);
    }

    #[test]
    fn a_pass_that_is_held_up_is_no_measure() {
        let mut length = after(&[], &[[(1, 1.0), (4, 1.6)]; 40].concat());
        assert!((length.slope - 0.2).abs() < 0.01, "{}", length.slope);
        length.timed(4, 1e3);
        length.timed(1, 1e3);
        assert!(length.slope < 0.31 && length.single < Some(1.2), "{}", length.slope);
        // Nor is a clock that stands still.
        let still = after(&[], &[(1, 0.0), (4, 0.0)]);
        assert!((still.slope - SLOPE).abs() < 1e-9);
    }
}
