//! How far a text keeps the rules of the grammar.
//!
//! A text is documents, separated by empty lines. A line that begins with a digit is arithmetic and
//! is computed again. Any other line is sentences: each is compared with all sentences of the
//! grammar, which decides whether it is a sentence; and one that is must then agree with the story
//! so far, which is known as a set of facts and, for each variable, the rows of its table that are
//! still possible. "Her" leaves the rows of girls, "Lily" one of them, and a later "his" none.
//!
//! A sentence the text breaks off in is not counted, so that a sample cut at a number of tokens is
//! not punished for its length.

use std::collections::HashSet;
use std::fmt;
use std::ops::AddAssign;
use std::sync::LazyLock;

use super::grammar::{GRAMMAR, Part, Sentence, Slot, State, article};

/// Longest entry of a table, in words.
const PHRASE: usize = 6;

/// Readings of a story that are kept.
const READINGS: usize = 16;

/// So many of so many are as they should be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// How many are as they should be.
    pub right: usize,
    /// How many there are.
    pub total: usize,
}

impl Tally {
    /// Share of the right ones; 1 where there is nothing to judge.
    pub fn share(self) -> f64 {
        if self.total == 0 { 1.0 } else { self.right as f64 / self.total as f64 }
    }

    fn count(&mut self, right: bool) {
        self.right += usize::from(right);
        self.total += 1;
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.right += other.right;
        self.total += other.total;
    }
}

/// What [`score`] finds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Score {
    /// Sentences that the grammar knows, of all.
    pub sentences: Tally,
    /// Of those, the ones that agree with their story so far.
    pub consistency: Tally,
    /// Lines of arithmetic that are true, of all.
    pub arithmetic: Tally,
    /// Words that occur in the grammar, of all.
    pub words: Tally,
}

impl Score {
    /// Whether nothing is wrong, and there is something at all.
    pub fn is_perfect(&self) -> bool {
        let all = [self.sentences, self.consistency, self.arithmetic, self.words];
        all.iter().all(|tally| tally.right == tally.total)
            && self.sentences.total + self.arithmetic.total > 0
    }
}

impl AddAssign for Score {
    fn add_assign(&mut self, other: Self) {
        self.sentences += other.sentences;
        self.consistency += other.consistency;
        self.arithmetic += other.arithmetic;
        self.words += other.words;
    }
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sentences, consistency, arithmetic, words } = self;
        for (name, Tally { right, total }) in [
            ("sentences", sentences),
            (", consistent", consistency),
            (", arithmetic", arithmetic),
            (", words", words),
        ] {
            write!(f, "{name} {right}/{total}")?;
        }
        Ok(())
    }
}

/// Judges a text by the grammar of the synthetic corpus.
pub fn score(text: &str) -> Score {
    let mut score = Score::default();
    let mut story = Readings::new();
    let mut lines = text.lines().map(str::trim).peekable();
    while let Some(line) = lines.next() {
        if line.is_empty() {
            story = Readings::new();
        } else if line.starts_with(|c: char| c.is_ascii_digit()) {
            let truth = is_true(line);
            let broken_off = truth.is_none() && lines.peek().is_none();
            if !broken_off {
                score.arithmetic.count(truth == Some(true));
            }
        } else {
            words(line).for_each(|word| score.words.count(is_known(word)));
            for sentence in sentences(line) {
                if is_whole(sentence) || lines.peek().is_some() {
                    story.judge(sentence, &mut score);
                }
            }
        }
    }
    score
}

/// Whether a line of arithmetic is true; `None` if it is no such line.
fn is_true(line: &str) -> Option<bool> {
    let parts: Vec<&str> = line.split(' ').collect();
    let number = |i: usize| parts.get(i)?.parse::<i64>().ok();
    match (parts.get(1)?, parts.get(3), parts.len()) {
        (&"+", Some(&"="), 5) => Some(number(0)?.checked_add(number(2)?)? == number(4)?),
        (&"-", Some(&"="), 5) => Some(number(0)?.checked_sub(number(2)?)? == number(4)?),
        (&"<", None, 3) => Some(number(0)? < number(2)?),
        (&">", None, 3) => Some(number(0)? > number(2)?),
        (&"=", None, 3) => Some(number(0)? == number(2)?),
        _ => None,
    }
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '-' && c != '\'')
        .map(|word| word.trim_matches(['-', '\'']))
        .filter(|word| !word.is_empty())
}

fn is_known(word: &str) -> bool {
    static KNOWN: LazyLock<HashSet<String>> =
        LazyLock::new(|| GRAMMAR.texts().flat_map(words).map(str::to_owned).collect());
    let word = word.strip_suffix("'s").unwrap_or(word);
    KNOWN.contains(word) || lower_first(word).is_some_and(|word| KNOWN.contains(&word))
}

/// A word without its capital; `None` if it has none.
fn lower_first(word: &str) -> Option<String> {
    let first = word.chars().next().filter(char::is_ascii_uppercase)?;
    Some(format!("{}{}", first.to_ascii_lowercase(), &word[1..]))
}

/// Cuts a line after the end marks of sentences. What is said in quotes belongs to the sentence
/// around it: `"Why?" asked Tom.` is one.
fn sentences(line: &str) -> impl Iterator<Item = &str> {
    let mut rest = line;
    std::iter::from_fn(move || {
        let bytes = rest.as_bytes();
        let mut quoted = false;
        for (i, byte) in bytes.iter().enumerate() {
            quoted ^= *byte == b'"';
            let ends = match byte {
                b'.' | b'!' | b'?' => true,
                b'"' => i > 0 && matches!(bytes[i - 1], b'.' | b'!' | b'?'),
                _ => false,
            };
            if !ends || quoted {
                continue;
            }
            let next = rest[i + 1..].strip_prefix(' ').unwrap_or_default();
            if next.starts_with(|c: char| c.is_uppercase() || c == '"') {
                let (sentence, tail) = rest.split_at(i + 1);
                rest = tail.trim_start();
                return Some(sentence);
            }
        }
        Some(std::mem::take(&mut rest)).filter(|sentence| !sentence.is_empty())
    })
}

/// Whether a sentence has come to its end. None of the grammar ends within a quotation.
fn is_whole(sentence: &str) -> bool {
    sentence.ends_with(['.', '!', '?']) && sentence.matches('"').count().is_multiple_of(2)
}

/// All readings of the story so far that agree with it: a kite that somebody had may be lost later,
/// or broken, and the sentence that says so decides.
struct Readings(Vec<Reading>);

impl Readings {
    fn new() -> Self {
        let rows = vec![None; GRAMMAR.variables.len()];
        Self(vec![Reading { state: State::default(), rows }])
    }

    /// Reads a sentence. If no reading agrees, the story goes on as if one had, so that one mistake
    /// is one mistake.
    fn judge(&mut self, text: &str, score: &mut Score) {
        let (mut agreeing, mut others) = (Vec::new(), Vec::new());
        for sentence in &GRAMMAR.sentences {
            let mut words = Vec::new();
            if !matches(&sentence.parts, text, &mut words) {
                continue;
            }
            for reading in &self.0 {
                let (after, agrees) = reading.after(sentence, &words);
                let list = if agrees { &mut agreeing } else { &mut others };
                if list.len() < READINGS && !list.contains(&after) {
                    list.push(after);
                }
            }
        }
        let (agrees, is_sentence) = (!agreeing.is_empty(), agreeing.len() + others.len() > 0);
        score.sentences.count(is_sentence);
        if is_sentence {
            score.consistency.count(agrees);
            self.0 = if agrees { agreeing } else { others };
        }
    }
}

/// One way to understand a story so far.
#[derive(Clone, PartialEq)]
struct Reading {
    state: State,
    /// For each variable the rows it may still be; `None` before it appears.
    rows: Vec<Option<Vec<u16>>>,
}

impl Reading {
    /// The reading after a sentence, and whether the sentence agrees with it.
    fn after(&self, sentence: &Sentence, words: &[(Slot, String)]) -> (Self, bool) {
        let mut after = self.clone();
        let mut agrees = self.state.allows(sentence);
        after.state = self.state.after(sentence);
        for (slot, word) in words {
            let Some(variable) = slot.variable else { continue };
            let rows = &GRAMMAR.tables[slot.table].index[slot.column][word.as_str()];
            let possible: Vec<u16> = match &after.rows[variable] {
                Some(before) => rows.iter().copied().filter(|row| before.contains(row)).collect(),
                None => rows.clone(),
            };
            if possible.is_empty() || after.is_taken(*slot, variable, word) {
                agrees = false;
            } else {
                after.rows[variable] = Some(possible);
            }
        }
        (after, agrees)
    }

    /// Whether a key is that of another variable of the table: two friends have two names.
    fn is_taken(&self, slot: Slot, variable: usize, word: &str) -> bool {
        let key = |row: &u16| GRAMMAR.tables[slot.table].rows[usize::from(*row)][0];
        let others = self.rows.iter().zip(&GRAMMAR.variables).enumerate();
        slot.column == 0
            && others
                .filter(|(other, (_, table))| *other != variable && **table == slot.table)
                .filter_map(|(_, (rows, _))| rows.as_ref())
                .any(|rows| rows.iter().all(|row| key(row) == word))
    }
}

/// Whether a text is a sentence of this form; `words` are then what its slots hold.
fn matches(parts: &[Part], text: &str, words: &mut Vec<(Slot, String)>) -> bool {
    let Some((part, parts)) = parts.split_first() else { return text.is_empty() };
    let slot = match part {
        Part::Text(literal) => {
            return text.strip_prefix(literal).is_some_and(|rest| matches(parts, rest, words));
        }
        Part::Slot(slot) => slot,
    };
    let (expected, text) = match text.split_once(' ') {
        Some((article @ ("a" | "an"), rest)) if slot.article => (Some(article), rest),
        _ if slot.article => return false,
        _ => (None, text),
    };
    let index = &GRAMMAR.tables[slot.table].index[slot.column];
    let ends = text.char_indices().filter(|(_, c)| !c.is_alphanumeric() && *c != '-');
    // Longest first: "music box" before "music".
    let ends: Vec<usize> = ends.map(|(i, _)| i).chain([text.len()]).take(PHRASE + 1).collect();
    for end in ends.into_iter().rev() {
        let (word, rest) = text.split_at(end);
        let word = if slot.capital { lower_first(word) } else { Some(word.to_owned()) };
        let Some(word) = word.filter(|word| index.contains_key(word.as_str())) else { continue };
        if expected.is_some_and(|found| found != article(&word)) {
            continue;
        }
        let length = words.len();
        words.push((*slot, word));
        if matches(parts, rest, words) {
            return true;
        }
        words.truncate(length);
    }
    false
}
