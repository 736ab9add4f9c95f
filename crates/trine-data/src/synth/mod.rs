//! The built-in synthetic corpus: short stories and arithmetic, made from a seed.
//!
//! It exists so that a whole training run needs no download and its result can be judged without
//! an opinion. A story has somebody with a name, a kind and a trait, who wants, loses, shares,
//! promises, learns or repairs something, often with a friend; what is told later must agree with
//! what was told before: the pronoun with the name, the home with the animal, the drink with the
//! thirst, who has the kite, three apples and two more are five. About one document in five is a
//! few lines of arithmetic. [`score`] says how far a text keeps the rules; every document made here
//! keeps all of them.
//!
//! ```
//! use trine_data::synth::{Synth, score};
//!
//! let story = Synth::new(1).find(|document| document.starts_with("Once")).expect("endless");
//! assert!(score(&story).is_perfect());
//! let wrong = score("Once upon a time, there was a brave dog named Tom. She ran back home.");
//! assert!(!wrong.is_perfect());
//! ```
//!
//! The documents of a seed are the same on every machine and in every build; a test pins them.

mod check;
mod grammar;

pub use check::{Score, Tally, score};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use grammar::{GRAMMAR, Part, Slot, State, article};

/// Lines of a document of arithmetic.
const LINES: usize = 8;

/// Largest operand of arithmetic.
const LARGEST: usize = 25;

/// An endless iterator of documents, a function of its seed.
#[derive(Debug, Clone)]
pub struct Synth {
    rng: ChaCha8Rng,
}

impl Synth {
    /// The documents of a seed.
    pub fn new(seed: u64) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// A text of at least `bytes` bytes: documents with an empty line between them.
    pub fn text(self, bytes: usize) -> String {
        let mut text = String::with_capacity(bytes + 1024);
        for document in self {
            text.push_str(&document);
            text.push('\n');
            if text.len() >= bytes {
                break;
            }
            text.push('\n');
        }
        text
    }

    /// A number below `n`.
    fn below(&mut self, n: usize) -> usize {
        // A product instead of a remainder: no division, and the bias is below n / 2^32.
        ((u64::from(self.rng.next_u32()) * n as u64) >> 32) as usize
    }

    fn story(&mut self) -> String {
        let grammar = &*GRAMMAR;
        let mut state = State::default();
        let mut rows = vec![None; grammar.variables.len()];
        let mut text = String::with_capacity(600);
        let story = &grammar.stories[self.below(grammar.stories.len())];
        for step in story {
            if step.optional && self.below(2) == 0 {
                continue;
            }
            let possible = || {
                let sentences = step.sentences.iter().map(|i| &grammar.sentences[*i]);
                sentences.filter(|sentence| state.allows(sentence))
            };
            let count = possible().count();
            let Some(sentence) = possible().nth(self.below(count.max(1))) else { continue };
            state = state.after(sentence);
            if !text.is_empty() {
                text.push(' ');
            }
            for part in &sentence.parts {
                match part {
                    Part::Text(literal) => text.push_str(literal),
                    Part::Slot(slot) => self.fill(*slot, &mut rows, &mut text),
                }
            }
        }
        text
    }

    /// Writes the word of a slot; a variable without a row is given one.
    fn fill(&mut self, slot: Slot, rows: &mut [Option<usize>], text: &mut String) {
        let table = &GRAMMAR.tables[slot.table];
        let row = match slot.variable {
            None => self.below(table.rows.len()),
            Some(variable) => rows[variable].unwrap_or_else(|| {
                // Two variables of one table never share a key: two friends have two names.
                let taken = |row: usize| {
                    let others = rows.iter().zip(&GRAMMAR.variables);
                    others.filter(|(_, of)| **of == slot.table).any(|(other, _)| {
                        other.is_some_and(|other| table.rows[other][0] == table.rows[row][0])
                    })
                };
                loop {
                    let row = self.below(table.rows.len());
                    if !taken(row) {
                        return row;
                    }
                }
            }),
        };
        if let Some(variable) = slot.variable {
            rows[variable] = Some(row);
        }
        let word = table.rows[row][slot.column];
        if slot.article {
            text.push_str(article(word));
            text.push(' ');
        }
        match word.chars().next() {
            Some(first) if slot.capital => {
                text.push(first.to_ascii_uppercase());
                text.push_str(&word[first.len_utf8()..]);
            }
            _ => text.push_str(word),
        }
    }

    fn arithmetic(&mut self) -> String {
        let mut line = || {
            let (a, b) = (self.below(LARGEST + 1), self.below(LARGEST + 1));
            match self.below(5) {
                0 | 1 => format!("{a} + {b} = {}", a + b),
                2 | 3 => format!("{} - {} = {}", a.max(b), a.min(b), a.abs_diff(b)),
                _ if a == b => format!("{a} = {b}"),
                _ => format!("{a} {} {b}", if a < b { '<' } else { '>' }),
            }
        };
        let lines: Vec<String> = (0..LINES).map(|_| line()).collect();
        lines.join("\n")
    }
}

impl Iterator for Synth {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        Some(if self.below(5) == 0 { self.arithmetic() } else { self.story() })
    }
}

/// The documents of a seed, of `bytes` bytes together or a little more.
pub fn documents(seed: u64, bytes: usize) -> impl Iterator<Item = String> + Send {
    let mut total = 0;
    Synth::new(seed).take_while(move |document| {
        let wanted = total < bytes;
        total += document.len();
        wanted
    })
}

/// Openings for a model trained on this corpus: stories, and a sum.
pub fn prompts() -> &'static [&'static str] {
    &[
        "Once upon a time, there was a brave rabbit named",
        "Once upon a time, there was a kind girl named Lily. One day, Lily went to the forest. \
         But soon she was very thirsty.",
        "There once was a clever fox called Max. He had a red kite.",
        "Leo was a curious boy. He wanted to learn to swim.",
        "17 + 25 =",
    ]
}
