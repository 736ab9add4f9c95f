//! The grammar of the synthetic corpus: `words.txt` and `stories.txt`, read once.
//!
//! Those two files say everything: which words belong together, which sentences there are, what
//! each of them takes for granted and what it changes. The generator and the checker both follow
//! [`Grammar`], so that they cannot disagree about what a proper story is.

use std::collections::HashMap;
use std::sync::LazyLock;

/// The built-in grammar.
pub(super) static GRAMMAR: LazyLock<Grammar> =
    LazyLock::new(|| Grammar::parse(include_str!("words.txt"), include_str!("stories.txt")));

/// Words in rows; what stands in one row belongs together.
pub(super) struct Table {
    name: &'static str,
    columns: Vec<&'static str>,
    /// (row, column) words.
    pub(super) rows: Vec<Vec<&'static str>>,
    /// For each column, the rows of each word.
    pub(super) index: Vec<HashMap<&'static str, Vec<u16>>>,
}

/// A place in a sentence where a word of a table stands.
#[derive(Clone, Copy)]
pub(super) struct Slot {
    pub(super) table: usize,
    pub(super) column: usize,
    /// Whose row it is; without a variable any row will do.
    pub(super) variable: Option<usize>,
    /// "a" or "an" stands before the word.
    pub(super) article: bool,
    /// The word begins with a capital letter.
    pub(super) capital: bool,
}

pub(super) enum Part {
    Text(&'static str),
    Slot(Slot),
}

/// A sentence and what it means for the story; facts and variables are sets of bits.
#[derive(Default)]
pub(super) struct Sentence {
    pub(super) parts: Vec<Part>,
    needs: u64,
    forbids: u64,
    adds: u64,
    removes: u64,
    /// Variables that must have appeared before.
    mentions: u64,
    /// Variables that must not have.
    introduces: u64,
}

/// A choice of sentences, of which one is told.
#[derive(Clone)]
pub(super) struct Step {
    /// Indices into [`Grammar::sentences`].
    pub(super) sentences: Vec<usize>,
    /// Whether it is told only every second time.
    pub(super) optional: bool,
}

pub(super) struct Grammar {
    pub(super) tables: Vec<Table>,
    /// The table of each variable.
    pub(super) variables: Vec<usize>,
    pub(super) sentences: Vec<Sentence>,
    pub(super) stories: Vec<Vec<Step>>,
}

/// What holds at a point of a story.
#[derive(Clone, Copy, Default, PartialEq)]
pub(super) struct State {
    facts: u64,
    introduced: u64,
}

impl State {
    /// Whether a sentence may be told now.
    pub(super) fn allows(self, sentence: &Sentence) -> bool {
        self.facts & sentence.needs == sentence.needs
            && self.facts & sentence.forbids == 0
            && self.introduced & sentence.mentions == sentence.mentions
            && self.introduced & sentence.introduces == 0
    }

    /// The state after a sentence. What a sentence that was not allowed took for granted is taken
    /// for granted from then on; for one that was allowed it was so already.
    pub(super) fn after(self, sentence: &Sentence) -> Self {
        let granted = (self.facts | sentence.needs) & !sentence.forbids;
        Self {
            facts: (granted & !sentence.removes) | sentence.adds,
            introduced: self.introduced | sentence.mentions | sentence.introduces,
        }
    }
}

impl Grammar {
    /// Reads the two files.
    ///
    /// # Panics
    /// On a mistake in them: they are part of this program, and any test finds it.
    fn parse(words: &'static str, stories: &'static str) -> Self {
        let tables = parse_tables(words);
        let mut parser = Parser { tables, ..Parser::default() };
        for (number, line) in stories.lines().enumerate() {
            parser
                .line(line.trim_end())
                .unwrap_or_else(|e| panic!("stories.txt line {}: {e}", number + 1));
        }
        parser.end_step();
        let stories = parser.groups.into_iter();
        let stories = stories.filter(|(name, _)| name.starts_with("story "));
        Self {
            tables: parser.tables,
            variables: parser.variables.into_iter().map(|(_, table)| table).collect(),
            sentences: parser.sentences,
            stories: stories.map(|(_, steps)| steps).collect(),
        }
    }

    /// All words that stand in the grammar itself or in its tables, as they are spelled there.
    pub(super) fn texts(&self) -> impl Iterator<Item = &'static str> {
        let literal = self.sentences.iter().flat_map(|s| &s.parts).filter_map(|part| match part {
            Part::Text(text) => Some(*text),
            Part::Slot(_) => None,
        });
        let cells = self.tables.iter().flat_map(|table| table.rows.iter().flatten().copied());
        literal.chain(cells).chain(["a", "an"])
    }
}

/// "a" or "an".
pub(super) fn article(word: &str) -> &'static str {
    let sounds_consonant = ["uni", "uku", "use", "eu", "one"].iter().any(|p| word.starts_with(p));
    let sounds_vowel = ["hour", "hono", "hones"].iter().any(|p| word.starts_with(p));
    let vowel = word.starts_with(['a', 'e', 'i', 'o', 'u']);
    if sounds_vowel || (vowel && !sounds_consonant) { "an" } else { "a" }
}

fn parse_tables(words: &'static str) -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    for line in words.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some((name, columns)) = line.strip_prefix("== ").and_then(|l| l.split_once(": ")) {
            let columns: Vec<_> = columns.split(' ').collect();
            let index = vec![HashMap::new(); columns.len()];
            tables.push(Table { name, columns, rows: Vec::new(), index });
            continue;
        }
        let table = tables.last_mut().expect("words.txt begins with a table");
        let mut rows = vec![Vec::new()];
        for cell in line.split('|') {
            // A cell of several words repeats what is there so far for each of them.
            rows = cell
                .trim()
                .split(", ")
                .flat_map(|word| rows.iter().map(move |row| [&row[..], &[word]].concat()))
                .collect();
        }
        assert!(rows.iter().all(|row| row.len() == table.columns.len()), "words.txt: {line}");
        table.rows.extend(rows);
    }
    for table in &mut tables {
        for (row, words) in table.rows.iter().enumerate() {
            for (index, word) in table.index.iter_mut().zip(words) {
                index.entry(*word).or_default().push(row as u16);
            }
        }
    }
    tables
}

#[derive(Default)]
struct Parser {
    tables: Vec<Table>,
    variables: Vec<(&'static str, usize)>,
    facts: Vec<&'static str>,
    sentences: Vec<Sentence>,
    groups: Vec<(&'static str, Vec<Step>)>,
    /// The step being read.
    choices: Vec<usize>,
    optional: bool,
}

impl Parser {
    fn line(&mut self, line: &'static str) -> Result<(), String> {
        if line.is_empty() {
            self.end_step();
        } else if let Some(name) = line.strip_prefix("== ") {
            self.end_step();
            self.groups.push((name, Vec::new()));
        } else if let Some(part) = line.strip_prefix("use ") {
            let group = self.groups.iter().find(|(name, _)| *name == part);
            let steps = group.ok_or(format!("no part {part}"))?.1.clone();
            self.groups.last_mut().ok_or("use outside of a story")?.1.extend(steps);
        } else if let Some(variables) = line.strip_prefix("var ") {
            let (names, table) = variables.split_once(": ").ok_or("no table")?;
            let table = self.table(table)?;
            self.variables.extend(names.split(' ').map(|name| (name, table)));
        } else if !line.starts_with('#') {
            let (mark, sentence) = line.split_at_checked(2).ok_or("neither sentence nor part")?;
            self.optional = mark == "~ ";
            let sentence = self.sentence(sentence)?;
            self.choices.push(self.sentences.len());
            self.sentences.push(sentence);
        }
        Ok(())
    }

    fn end_step(&mut self) {
        let sentences = std::mem::take(&mut self.choices);
        if let (false, Some((_, steps))) = (sentences.is_empty(), self.groups.last_mut()) {
            steps.push(Step { sentences, optional: self.optional });
        }
    }

    fn table(&self, name: &str) -> Result<usize, String> {
        self.tables.iter().position(|t| t.name == name).ok_or(format!("no table {name}"))
    }

    fn fact(&mut self, name: &'static str) -> u64 {
        let known = self.facts.iter().position(|fact| *fact == name);
        let bit = known.unwrap_or_else(|| {
            self.facts.push(name);
            self.facts.len() - 1
        });
        assert!(bit < 64, "more than 64 facts");
        1 << bit
    }

    fn sentence(&mut self, line: &'static str) -> Result<Sentence, String> {
        let (text, facts) = line.split_once(" @ ").unwrap_or((line, ""));
        let mut sentence = Sentence::default();
        for fact in facts.split_whitespace() {
            let (sign, name) = fact.split_at(1);
            let bit = self.fact(name);
            *match sign {
                "?" => &mut sentence.needs,
                "!" => &mut sentence.forbids,
                "+" => &mut sentence.adds,
                "-" => &mut sentence.removes,
                _ => return Err(format!("a fact begins with ? ! + or -: {fact}")),
            } |= bit;
        }
        let mut rest = text.trim();
        while let Some((before, after)) = rest.split_once('{') {
            let (slot, after) = after.split_once('}').ok_or("a brace is not closed")?;
            if !before.is_empty() {
                sentence.parts.push(Part::Text(before));
            }
            let slot = self.slot(slot, &mut sentence)?;
            sentence.parts.push(Part::Slot(slot));
            rest = after;
        }
        sentence.parts.push(Part::Text(rest));
        Ok(sentence)
    }

    /// Reads `[a ][+][Variable.]column` and notes what becomes of the variable.
    fn slot(&self, slot: &str, sentence: &mut Sentence) -> Result<Slot, String> {
        let (article, slot) = slot.strip_prefix("a ").map_or((false, slot), |slot| (true, slot));
        let (introduces, slot) = slot.strip_prefix('+').map_or((false, slot), |slot| (true, slot));
        let (variable, column) = match slot.split_once('.') {
            Some((name, column)) => {
                let variable = self.variables.iter().position(|(known, _)| *known == name);
                (Some(variable.ok_or(format!("no variable {name}"))?), column)
            }
            None => (None, slot),
        };
        let capital = column.starts_with(|c: char| c.is_ascii_uppercase());
        let column = column.to_ascii_lowercase();
        let table = match variable {
            Some(variable) => self.variables[variable].1,
            None => self.table(&column)?,
        };
        if let Some(variable) = variable {
            let bit = 1 << variable;
            if introduces {
                sentence.introduces |= bit;
            } else if sentence.introduces & bit == 0 {
                sentence.mentions |= bit;
            }
        }
        let columns = &self.tables[table].columns;
        let column = columns.iter().position(|name| *name == column);
        let column = column.ok_or(format!("no such column: {slot}"))?;
        Ok(Slot { table, column, variable, article, capital })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn articles_follow_the_sound() {
        for (word, expected) in [
            ("apple", "an"),
            ("ball", "a"),
            ("honest", "an"),
            ("hourglass", "an"),
            ("house", "a"),
            ("unicorn", "a"),
            ("umbrella", "an"),
            ("ukulele", "a"),
            ("old", "an"),
            ("obedient", "an"),
        ] {
            assert_eq!(article(word), expected, "{word}");
        }
    }

    #[test]
    fn rows_of_words_are_repeated_for_each() {
        let rows = &parse_tables("== t: x y z\na, b | c | d, e\n")[0].rows;
        let expected = [["a", "c", "d"], ["b", "c", "d"], ["a", "c", "e"], ["b", "c", "e"]];
        assert_eq!(*rows, expected);
    }

    #[test]
    fn keys_are_unique_where_rows_are_people() {
        let names = GRAMMAR.tables.iter().find(|table| table.name == "name").unwrap();
        assert!(names.index[0].values().all(|rows| rows.len() == 1));
        assert!(names.rows.len() > 250);
    }
}
