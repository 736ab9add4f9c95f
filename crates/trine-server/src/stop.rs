//! Stop strings: a text ends before the first of them, wherever tokens begin and end.

/// Finds stop strings in a text that arrives in pieces.
pub(crate) struct StopStrings {
    stops: Vec<String>,
    /// The end of the text so far, which may be the beginning of a stop string.
    held: String,
}

impl StopStrings {
    /// None of `stops` is empty.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes the next piece; returns the text that is certain, and whether it has ended.
    pub(crate) fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        // That which is whole first, as if characters came one by one.
        let found = self.stops.iter().filter_map(|stop| {
            let at = self.held.find(stop)?;
            Some((at + stop.len(), at))
        });
        if let Some((_, at)) = found.min() {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(at);
            return (text, true);
        }
        let begins = |rest: &str| self.stops.iter().any(|stop| stop.starts_with(rest));
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let mut at = self.held.len().saturating_sub(longest);
        while !self.held.is_char_boundary(at) || (at < self.held.len() && !begins(&self.held[at..]))
        {
            at += 1;
        }
        let rest = self.held.split_off(at);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back when the text ends otherwise.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text up to a stop string, in pieces of every length.
    fn check(stops: &[&str], text: &str, expected: &str) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let characters: Vec<char> = text.chars().collect();
        for size in 1..=characters.len() {
            let mut finder = StopStrings::new(stops.clone());
            let (mut found, mut ended) = (String::new(), false);
            for piece in characters.chunks(size) {
                let (text, end) = finder.push(&String::from_iter(piece));
                assert!(expected.starts_with(&(found.clone() + &text)));
                found += &text;
                ended = end;
                if end {
                    break;
                }
            }
            if !ended {
                found += &finder.finish();
            }
            assert_eq!((&found[..], ended), (expected, expected != text), "pieces of {size}");
        }
    }

    #[test]
    fn a_text_ends_before_the_first_stop_string() {
        check(&[], "whatever", "whatever");
        check(&["\n\n"], "one\ntwo\n\nthree", "one\ntwo");
        check(&["zwei", "drei"], "eins zwzwei drei", "eins zw");
        check(&["aab"], "aaaab", "aa");
        check(&["für"], "dafür", "da");
        check(&["END"], "an EN", "an EN");
        check(&["b", "abc"], "xabc", "xa");
    }
}
