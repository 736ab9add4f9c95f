//! A text as words, as the Penn Treebank has them: punctuation apart, `can't` as `ca` and `n't`.
//!
//! These are the steps of NLTK's `NLTKWordTokenizer`, whose words the original counts.

use std::sync::LazyLock;

use fancy_regex::Regex;

use super::sentences::sentences;

/// What is replaced by what before a space is put on either side of a sentence.
const INNER: &[(&str, &str)] = &[
    // Opening quotation marks.
    ("([«“‘„]|[`]+)", " $1 "),
    (r#"^""#, "``"),
    ("(``)", " $1 "),
    (r#"([ (\[{<])("|'{2})"#, "$1 `` "),
    (r"(?i)(?<!\w)(')(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", "$1 "),
    // Punctuation.
    (r#"([^.])(\.)([\])}>"'»”’ ]*+)\s*$"#, "$1 $2 $3 "),
    (r"([:,])([^\d])", " $1 $2"),
    ("([:,])$", " $1 "),
    (r"\.{2,}", " $0 "),
    ("[;@#$%&]", " $0 "),
    (r"[\x{2012}-\x{2015}]", " $0 "),
    (r#"([^.])(\.)([\])}>"']*)\s*$"#, "$1 $2$3 "),
    ("[?!]", " $0 "),
    ("([^'])' ", "$1 ' "),
    ("[*]", " $0 "),
    (r"[\]\[(){}<>]", " $0 "),
    ("--", " -- "),
];

/// What is replaced by what after that.
const OUTER: &[(&str, &str)] = &[
    // Closing quotation marks, and what is shortened to an apostrophe.
    ("([»”’])", " $1 "),
    ("''", " '' "),
    ("\"", " '' "),
    (r"\s+", " "),
    ("([^' ])('[sS]|'[mM]|'[dD]|') ", "$1 $2 "),
    ("([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", "$1 $2 "),
    // Two words that are written as one.
    (r"(?i)\b(can)(not)\b", " $1 $2 "),
    (r"(?i)\b(d)('ye)\b", " $1 $2 "),
    (r"(?i)\b(gim)(me)\b", " $1 $2 "),
    (r"(?i)\b(gon)(na)\b", " $1 $2 "),
    (r"(?i)\b(got)(ta)\b", " $1 $2 "),
    (r"(?i)\b(lem)(me)\b", " $1 $2 "),
    (r"(?i)\b(more)('n)\b", " $1 $2 "),
    (r"(?i)\b(wan)(na)(?=\s)", " $1 $2 "),
    (r"(?i) ('t)(is)\b", " $1 $2 "),
    (r"(?i) ('t)(was)\b", " $1 $2 "),
];

type Steps = Vec<(Regex, &'static str)>;

static STEPS: LazyLock<(Steps, Steps)> = LazyLock::new(|| {
    let compile = |steps: &[(&str, &'static str)]| -> Steps {
        let step = |(pattern, with): &(&str, &'static str)| {
            (Regex::new(pattern).expect("a pattern that a test compiles"), *with)
        };
        steps.iter().map(step).collect()
    };
    (compile(INNER), compile(OUTER))
});

/// The words and signs of a text.
pub(super) fn words(text: &str) -> Vec<String> {
    let (inner, outer) = &*STEPS;
    let of = |sentence: &str| {
        let text = replaced(sentence.to_owned(), inner);
        let text = replaced(format!(" {text} "), outer);
        text.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    sentences(text).into_iter().flat_map(of).collect()
}

fn replaced(text: String, steps: &Steps) -> String {
    steps.iter().fold(text, |text, (regex, with)| match regex.try_replacen(&text, 0, *with) {
        Ok(text) => text.into_owned(),
        Err(_) => text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_nltk() {
        // As `nltk.word_tokenize` has them.
        assert_eq!(
            words("\"I CAN'T go,\" she said (twice). It's $3.50 -- cannot!").join("|"),
            "``|I|CA|N'T|go|,|''|she|said|(|twice|)|.|It|'s|$|3.50|--|can|not|!"
        );
        assert_eq!(
            words("It won... 'TWAS 1,000: GIMME").join("|"),
            "It|won|...|'|TWAS|1,000|:|GIM|ME"
        );
        assert_eq!(words(" \n"), Vec::<String>::new());
    }
}
