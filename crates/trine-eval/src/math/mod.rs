//! Answers in LaTeX, compared as Minerva does (Lewkowycz et al., 2022, appendix D).
//!
//! A port of `minerva_math` of lm-evaluation-harness up to the comparison, which is of normalised texts.
//! The harness then also asks a computer algebra system whether texts that differ are the same number
//! (1/2 and 0.5), and calls either `exact_match`. Here that is a score of its own, [`equivalent`], for which
//! values are compared exactly: what it accepts is equal, and what it cannot read it does not accept.

mod exact;
mod latex;

use std::sync::LazyLock;

use fancy_regex::Regex;
use latex::Value;

/// What stands for an answer that was not found.
const NOT_FOUND: &str = "[invalidanswer]";

const SUBSTITUTIONS: [(&str, &str); 10] = [
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
];

/// Units and words, which go with and without white space around them, and signs.
const REMOVED: [&str; 42] = [
    "square",
    "ways",
    "integers",
    "dollars",
    "mph",
    "inches",
    "ft",
    "hours",
    "km",
    "units",
    "\\ldots",
    "sue",
    "points",
    "feet",
    "minutes",
    "digits",
    "cents",
    "degrees",
    "cm",
    "gm",
    "pounds",
    "meters",
    "meals",
    "edges",
    "students",
    "childrentickets",
    "multiples",
    "\\text{s}",
    "\\text{.}",
    "\\text{\ns}",
    "\\text{}^2",
    "\\text{}^3",
    "\\text{\n}",
    "\\text{}",
    "\\mathrm{th}",
    "^\\circ",
    "^{\\circ}",
    "\\;",
    ",\\!",
    "{,}",
    "\"",
    "\\dots",
];

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a regular expression of ours")
}

static FINAL: LazyLock<Regex> =
    LazyLock::new(|| regex(r"Final Answer: The final answer is(.*?). I hope it is correct."));
static COMMAND: LazyLock<Regex> = LazyLock::new(|| regex(r"\\[a-zA-Z]+"));
static THOUSANDS: LazyLock<Regex> = LazyLock::new(|| regex(r"^-?\d{1,3}(,\d{3})+$"));
static UNITS: LazyLock<Vec<Regex>> = LazyLock::new(|| {
    let words = REMOVED.into_iter().filter(|text| is_word(text));
    words.map(|word| regex(&format!(r"(?<!\\)\b{word}\b"))).collect()
});
static FORMS: LazyLock<Vec<(Regex, &'static str)>> = LazyLock::new(|| {
    let forms = [
        (r"(.*?)(\$)(.*?)(\$)(.*)", "$$${3}$$"),
        (r"(\\text\{)(.*?)(\})", "${2}"),
        (r"(\\textbf\{)(.*?)(\})", "${2}"),
        (r"(\\overline\{)(.*?)(\})", "${2}"),
        (r"(\\boxed\{)(.*)(\})", "${2}"),
        // \frac12 is \frac{1}{2}, \sqrt2 is \sqrt{2}, \sqrt[3]2 is \sqrt[3]{2}.
        (r"(frac)([^{])(.)", "frac{${2}}{${3}}"),
        (r"(sqrt)(\[[^\]]*\])(\w)", "${1}${2}{${3}}"),
        (r"(sqrt)(?!\[)([^{])", "sqrt{${2}}"),
    ];
    forms.map(|(pattern, with)| (regex(pattern), with)).to_vec()
});

fn is_word(text: &str) -> bool {
    text.chars().all(char::is_alphabetic)
}

/// The normalised answer of a solution that ends as the examples do.
pub(crate) fn answer(text: &str) -> String {
    let text = format!("{text}I hope it is correct.");
    let found = FINAL.captures(&text).ok().flatten().and_then(|captures| captures.get(1));
    normalize(found.map_or(NOT_FOUND, |found| found.as_str().trim()))
}

/// Whether a final answer in LaTeX is `target` but for how it is written: normalised as Minerva does, the
/// same text, or surely the same value.
pub fn equivalent(answer: &str, target: &str) -> bool {
    is_equivalent(&normalize(answer), target)
}

/// [`equivalent`] of an answer that is normalised.
pub(crate) fn is_equivalent(answer: &str, target: &str) -> bool {
    let target = normalize(target);
    let value = || Some(Value::parse(answer)?.equals(&Value::parse(&target)?));
    answer == target || value().unwrap_or(false)
}

/// A final answer without what does not change its value.
pub(crate) fn normalize(answer: &str) -> String {
    let mut text = answer.rsplit('=').next().unwrap_or_default().to_owned();
    for unit in UNITS.iter() {
        text = unit.replace_all(&text, "").into_owned();
    }
    for (before, after) in SUBSTITUTIONS {
        text = text.replace(before, after);
    }
    for removed in REMOVED {
        text = match is_word(removed) {
            true => outside_commands(&text, removed),
            false => text.replace(removed, ""),
        };
    }
    for (form, with) in FORMS.iter() {
        text = form.replace_all(&text, *with).into_owned();
    }
    text = text.replace('$', "");
    if THOUSANDS.is_match(&text).unwrap_or(false) {
        text = text.replace(',', "");
    }
    text
}

/// Leaves out a word, but not a part of a LaTeX command: `\left` has no feet.
fn outside_commands(text: &str, word: &str) -> String {
    let mut out = String::new();
    let mut from = 0;
    for command in COMMAND.find_iter(text).flatten() {
        out.push_str(&text[from..command.start()].replace(word, ""));
        out.push_str(command.as_str());
        from = command.end();
    }
    out + &text[from..].replace(word, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_what_the_harness_makes_of_them() {
        // Left: `normalize_final_answer` of lm-evaluation-harness 0.4.13 gives what stands right.
        for (text, expected) in [
            ("x = \\frac12", "\\frac{1}{2}"),
            ("$2\\pi$ cm", "2\\pi"),
            ("\\left(3, \\frac{\\pi}{2}\\right)", "\\left(3,\\frac{\\pi}{2}\\right)"),
            ("12,345", "12345"),
            ("0,1", "0,1"),
            ("\\text{Evelyn}", "Evelyn"),
            ("\\sqrt2", "\\sqrt{2}"),
            ("\\sqrt[3]8", "\\sqrt[3]{8}"),
            ("90^\\circ", "90"),
            ("\\boxed{5 \\text{ dollars}}", "5"),
        ] {
            assert_eq!(normalize(text), expected, "{text}");
        }
    }

    #[test]
    fn an_answer_may_be_written_in_another_way() {
        for (text, target, expected) in [
            ("$0.5$", "\\frac12", true),
            ("$x(x+1)$", "x^2 + x", true),
            ("$\\sqrt{8}$ cm", "2 \\sqrt 2", true),
            ("(3, \\pi/2)", "\\left( 3, \\frac{\\pi}{2} \\right)", true),
            ("\\dfrac{17}{50}", "0.34", true),
            ("\\text{Evelyn}", "\\text{Evelyn}", true),
            ("\\text{Evelny}", "\\text{Evelyn}", false),
            ("0.333", "\\frac13", false),
            ("(\\pi/2, 3)", "\\left( 3, \\frac{\\pi}{2} \\right)", false),
        ] {
            assert_eq!(equivalent(text, target), expected, "{text} and {target}");
        }
    }

    #[test]
    fn an_answer_stands_where_the_examples_have_it() {
        let text = "So $x=2$.\nFinal Answer: The final answer is $\\frac34$. I hope it is correct.";
        assert_eq!(answer(text), "\\frac{3}{4}");
        assert_eq!(answer("It is 7."), normalize(NOT_FOUND));
    }
}
