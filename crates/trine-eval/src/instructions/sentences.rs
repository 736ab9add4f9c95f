//! A text as sentences.
//!
//! The steps are those of Punkt (Kiss & Strunk, 2006, "Unsupervised Multilingual Sentence Boundary
//! Detection") as NLTK takes them, which the original of the instructions asks: a `?` or `!` ends a
//! sentence, a full stop does unless it belongs to an abbreviation, an initial, an ordinal or an
//! ellipsis; then the next word has a say. What Punkt learned of a corpus, which words are
//! abbreviations and which begin sentences, is here two short lists of our own, so that rare
//! abbreviations and names after an ellipsis may be judged otherwise.

use std::collections::HashSet;
use std::sync::LazyLock;

use fancy_regex::Regex;

use super::python;

/// Words that a full stop belongs to. Not `etc`, `e.g` and `i.e`, which Punkt's English model does not
/// have either.
static ABBREVIATIONS: LazyLock<HashSet<&str>> = LazyLock::new(|| {
    "mr mrs ms messrs dr prof st gen lt maj adm gov sen rep reps \
    jr sr inc ltd co corp cos bros cie ph.d m.b.a \
    jan feb aug sep sept oct nov dec tues wed fri a.m p.m \
    u.s u.k u.n u.s.a u.s.s.r d.c n.y n.j n.c n.h n.m n.d s.c w.va l.a ave ft ala ariz calif \
    colo conn fla ga ill kan ky mass md mich minn nev okla ore pa tenn va vt wash wis \
    vs yr"
        .split(' ')
        .collect()
});

/// Words that begin sentences so often that, in capitals, they end the one before even after an
/// abbreviation or an ellipsis.
static STARTERS: LazyLock<HashSet<&str>> = LazyLock::new(|| {
    "according although among both but despite even he however i if in indeed instead it many \
    meanwhile moreover most nevertheless nonetheless nor separately similarly since so some \
    the there these they this though thus under when while yet"
        .split(' ')
        .collect()
});

/// Words that names and titles have in capitals as well, so that they say nothing.
static COMMON: LazyLock<HashSet<&str>> = LazyLock::new(|| {
    "a after all also an and another are as at be because before by can could did do during each \
    every first for from had has have his how is its last let may more my new next no not now of \
    on once one or other our second she should that their then third those to today two until we \
    what where who why will with would you"
        .split(' ')
        .collect()
});

macro_rules! pattern {
    ($($part:expr),*) => {
        LazyLock::new(|| Regex::new(concat!($($part),*)).expect("a pattern that a test compiles"))
    };
}

/// A sign that no word holds.
macro_rules! sign {
    () => {
        r#"[)";}\]*:@'({\[‘’“”«»?!]"#
    };
}

/// Dashes and dots that are one sign.
macro_rules! run {
    () => {
        r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)"
    };
}

/// Where a sentence may end, and what follows.
static END: LazyLock<Regex> = pattern!(r"[.?!](?=(?P<after>", sign!(), r"|\s+(?P<next>\S+)))");

/// A word with its full stop, or a sign.
static TOKEN: LazyLock<Regex> = pattern!(
    "(?:",
    run!(),
    r#"|(?=[^("`{\[:;&#*@)}\]\-,])\S+?(?=\s|$|"#,
    sign!(),
    "|",
    run!(),
    r",(?=$|\s|",
    sign!(),
    "|",
    run!(),
    r"))|\S)"
);

/// Signs at the beginning of a sentence that belong to the one before.
static CLOSING: LazyLock<Regex> = pattern!(r#"\A['")\]}‘’“”«»]+?(?:\s+|(?=--)|(?m:$))"#);

static NUMBER: LazyLock<Regex> = pattern!(r"\A-?[.,]?\d[\d,.\-]*\.?\z");

/// The sentences of a text, without the white space around them.
pub(super) fn sentences(text: &str) -> Vec<&str> {
    let spans = spans(text);
    let (mut found, mut skip) = (Vec::new(), 0);
    for (index, &(start, end)) in spans.iter().enumerate() {
        let start = start + skip;
        skip = 0;
        let next = spans.get(index + 1).map(|&(start, end)| (start, &text[start..end]));
        if let Some((next, rest)) = next
            && let Ok(Some(closing)) = CLOSING.find(rest)
        {
            found.push(&text[start..next + python::rstrip(closing.as_str()).len()]);
            skip = closing.end();
        } else if start < end {
            found.push(&text[start..end]);
        }
    }
    found
}

/// Where sentences begin and end, before closing signs are given to the one they close.
fn spans(text: &str) -> Vec<(usize, usize)> {
    let (mut spans, mut begin) = (Vec::new(), 0);
    for Candidate { word, end, next, context } in candidates(text) {
        if ends(&text[word..context]) {
            spans.push((begin, end));
            begin = next.unwrap_or(end);
        }
    }
    spans.push((begin, begin.max(python::rstrip(text).len())));
    spans
}

/// A place where a sentence may end.
#[derive(Clone, Copy)]
struct Candidate {
    /// Where the word before it begins.
    word: usize,
    /// After its sign.
    end: usize,
    /// Where the next word begins, if white space is between.
    next: Option<usize>,
    /// After the next word or sign.
    context: usize,
}

/// The candidates of a text; of several in one word, the last.
fn candidates(text: &str) -> Vec<Candidate> {
    let mut all: Vec<Candidate> = Vec::new();
    let mut last: Option<(Candidate, usize)> = None;
    for captures in END.captures_iter(text).flatten() {
        let (Some(sign), Some(after)) = (captures.get(0), captures.name("after")) else { continue };
        let from = last.map_or(0, |(_, at)| at);
        // White space that is the very first character does not count.
        let space = text[from..sign.start()].rfind([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
        let word = match (space, last) {
            (Some(space), _) if space > 0 => from + space + 1,
            (_, Some((candidate, _))) => candidate.word,
            (_, None) => 0,
        };
        if let Some((candidate, at)) = last
            && at <= word
        {
            all.push(candidate);
        }
        let next = captures.name("next").map(|next| next.start());
        let candidate = Candidate { word, end: sign.end(), next, context: after.end() };
        last = Some((candidate, sign.start()));
    }
    all.extend(last.map(|(candidate, _)| candidate));
    all
}

/// Whether a sentence ends within a few words, before the last of them.
fn ends(context: &str) -> bool {
    let tokens: Vec<&str> = context
        .split('\n')
        .flat_map(|line| TOKEN.find_iter(line).flatten().map(|token| token.as_str()))
        .collect();
    tokens.windows(2).any(|pair| ends_before(pair[0], pair[1]))
}

/// Whether `token` ends a sentence when `next` follows.
fn ends_before(token: &str, next: &str) -> bool {
    if [".", "?", "!"].contains(&token) {
        return true;
    }
    if !token.ends_with('.') {
        return false;
    }
    let word = token[..token.len() - 1].to_lowercase();
    let next_word = next.to_lowercase();
    let next_word = if next.len() > 1 { next_word.trim_end_matches('.') } else { &next_word };
    let first = next.chars().next().unwrap_or(' ');
    let (upper, lower) = (first.is_uppercase(), first.is_lowercase());
    let goes_on = lower || [";", ":", ",", ".", "!", "?"].contains(&next);
    let last = word.rsplit('-').next().unwrap_or_default();
    let abbreviation = [&word[..], last].iter().any(|word| ABBREVIATIONS.contains(*word));
    let known = STARTERS.contains(next_word) || COMMON.contains(next_word);
    if word.ends_with('.') {
        // After an ellipsis, a word in capitals that need not have any begins a sentence.
        return upper && !COMMON.contains(next_word);
    }
    if abbreviation {
        return upper && STARTERS.contains(next_word);
    }
    let initial = word.chars().count() == 1 && word.chars().all(char::is_alphabetic);
    if initial {
        // Of the other letters Punkt has learned that they are abbreviations.
        return "abijoquxyz".contains(&word) && !goes_on && (!upper || known);
    }
    if NUMBER.is_match(token).unwrap_or(false) {
        return !goes_on;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_stops_end_sentences_unless_they_belong_to_a_word() {
        for (text, expected) in [
            ("One. Two! Three? Four", 4),
            ("Mr. Smith met Dr. Jones at 5 p.m. in Washington.", 1),
            ("He left at 5 p.m. He came back.", 2),
            ("He left at 5 p.m. She stayed.", 1),
            ("J. R. Smith wrote it. It sold.", 2),
            ("Plan B. It is better than vitamin C. It works.", 2),
            ("It cost 3.50 in the U.S. and 4 here.", 1),
            ("Wait... what? Well... He knew.", 3),
            ("(He said so.) \"Did he?\" she asked.", 3),
            ("Really?! Yes!!! No", 3),
            ("1. Apples\n2. Pears", 3),
            ("no end\n\nno end either", 1),
            ("", 0),
            (" \n", 0),
        ] {
            assert_eq!(sentences(text).len(), expected, "{text}: {:?}", sentences(text));
        }
    }

    #[test]
    fn closing_signs_stay_with_what_they_close() {
        assert_eq!(sentences("(One.) Two."), ["(One.)", "Two."]);
        assert_eq!(sentences("“One.” ‘Two!’  Three. "), ["“One.”", "‘Two!’", "Three."]);
        assert_eq!(sentences("She said \"No.\""), ["She said \"No.\""]);
    }
}
