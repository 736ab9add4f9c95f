//! Instructions that a program can check: "no commas", "at least 300 words", "all in capitals".
//!
//! They are the 25 of IFEval (Zhou et al., 2023, arXiv 2311.07911), under the names and with the
//! arguments of its data set, and each decides as its namesake in lm-evaluation-harness does: what a
//! word is, which bullet counts, off by one or not. Where the original draws a missing argument by
//! chance, ours is an error. Which sentences a text has is our own judgement ([`sentences`]).
//!
//! | module | instructions |
//! | --- | --- |
//! | `keywords` | words and letters that have to be there, or not, or so often |
//! | `length` | sentences, paragraphs, words |
//! | `content` | placeholders, postscripts |
//! | `format` | bullets, highlights, sections, titles, JSON, fixed answers |
//! | `combination` | two answers, the request repeated |
//! | `case` | capitals, small letters |
//! | `language` | the language of the answer |
//! | `edges` | how it begins and ends, and commas |

mod arguments;
mod case;
mod combination;
mod content;
mod edges;
mod format;
mod keywords;
mod language;
mod length;
mod python;
mod sentences;
mod words;

use std::fmt;
use std::sync::Arc;

use arguments::Arguments;

use crate::task::Doc;

/// Whether a text does what it should.
type Check = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// Makes a check of its arguments.
type Maker = fn(&Arguments<'_>) -> Result<Check, String>;

/// Names, as in the data set, and how their checks are made.
const INSTRUCTIONS: &[(&str, Maker)] = &[
    ("keywords:existence", keywords::existence),
    ("keywords:frequency", keywords::frequency),
    ("keywords:forbidden_words", keywords::forbidden_words),
    ("keywords:letter_frequency", keywords::letter_frequency),
    ("language:response_language", language::response_language),
    ("length_constraints:number_sentences", length::number_sentences),
    ("length_constraints:number_paragraphs", length::number_paragraphs),
    ("length_constraints:number_words", length::number_words),
    ("length_constraints:nth_paragraph_first_word", length::nth_paragraph_first_word),
    ("detectable_content:number_placeholders", content::number_placeholders),
    ("detectable_content:postscript", content::postscript),
    ("detectable_format:number_bullet_lists", format::number_bullet_lists),
    ("detectable_format:constrained_response", format::constrained_response),
    ("detectable_format:number_highlighted_sections", format::number_highlighted_sections),
    ("detectable_format:multiple_sections", format::multiple_sections),
    ("detectable_format:json_format", format::json_format),
    ("detectable_format:title", format::title),
    ("combination:two_responses", combination::two_responses),
    ("combination:repeat_prompt", combination::repeat_prompt),
    ("startend:end_checker", edges::end_checker),
    ("startend:quotation", edges::quotation),
    ("punctuation:no_comma", edges::no_comma),
    ("change_case:capital_word_frequency", case::capital_word_frequency),
    ("change_case:english_capital", case::english_capital),
    ("change_case:english_lowercase", case::english_lowercase),
];

/// An instruction with its arguments.
#[derive(Clone)]
pub struct Instruction {
    name: String,
    arguments: Doc,
    check: Check,
}

impl Instruction {
    /// The instruction `name` of IFEval. Arguments that are `null` count as absent: in the hub's form
    /// of the data every instruction has the keys of all.
    ///
    /// # Errors
    /// A name that is none, an argument that is missing or of the wrong type, in words.
    pub fn new(name: &str, arguments: &Doc) -> Result<Self, String> {
        let known = INSTRUCTIONS.iter().find(|(known, _)| *known == name);
        let Some((_, make)) = known else {
            let all: Vec<_> = INSTRUCTIONS.iter().map(|(name, _)| *name).collect();
            return Err(format!("`{name}`: expected one of {}", all.join(", ")));
        };
        let check = make(&Arguments(arguments)).map_err(|cause| format!("{name}, {cause}"))?;
        Ok(Self { name: name.to_owned(), arguments: arguments.clone(), check })
    }

    /// Whether `answer` follows it to the letter. An empty answer follows nothing.
    pub fn followed(&self, answer: &str) -> bool {
        !python::strip(answer).is_empty() && (self.check)(answer)
    }

    /// Whether some form of `answer` follows it: without its first line (which may say "Sure:"),
    /// without its last, without both; each also without asterisks, which may be Markdown's.
    pub fn followed_loosely(&self, answer: &str) -> bool {
        let lines: Vec<&str> = answer.split('\n').collect();
        let part = |from: usize, to: usize| {
            let lines = lines.get(from..to.max(from)).unwrap_or_default();
            python::strip(&lines.join("\n")).to_owned()
        };
        let last = lines.len() - 1;
        let forms = [answer.to_owned(), part(1, lines.len()), part(0, last), part(1, last)];
        forms.iter().any(|form| self.followed(form) || self.followed(&form.replace('*', "")))
    }
}

impl PartialEq for Instruction {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.arguments == other.arguments
    }
}

impl fmt::Debug for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.name, self.arguments)
    }
}

/// Makes an instruction of a test.
#[cfg(test)]
fn instruction(name: &str, arguments: serde_json::Value) -> Instruction {
    Instruction::new(name, arguments.as_object().unwrap()).unwrap()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_preface_and_markdown_are_forgiven_only_loosely() {
        let quoted = instruction("startend:quotation", json!({}));
        let answer = "Sure, here it is:\n\"All of it.\"";
        assert!(!quoted.followed(answer) && quoted.followed_loosely(answer));
        let answer = "**\"All of it.\"**\n\nAnything else?";
        assert!(!quoted.followed(answer) && quoted.followed_loosely(answer));
        let answer = "Well:\n\"All of it.\"\nBye";
        assert!(!quoted.followed(answer) && quoted.followed_loosely(answer));
        assert!(!quoted.followed_loosely("Sure:\nnothing"));
    }

    #[test]
    fn an_empty_answer_follows_nothing() {
        let no_comma = instruction("punctuation:no_comma", json!({}));
        assert!(no_comma.followed("a"));
        assert!(!no_comma.followed(" \n") && !no_comma.followed_loosely(""));
        // Without its only line there is nothing left that could follow.
        assert!(!no_comma.followed_loosely("a, b"));
    }

    #[test]
    fn what_is_no_instruction_is_named() {
        let refused = |name: &str, arguments: serde_json::Value| {
            Instruction::new(name, arguments.as_object().unwrap()).unwrap_err()
        };
        assert!(
            refused("keywords:rhyme", json!({}))
                .starts_with("`keywords:rhyme`: expected one of keywords:existence,")
        );
        assert_eq!(
            refused(
                "length_constraints:number_words",
                json!({ "num_words": null, "relation": "at least" })
            ),
            "length_constraints:number_words, `num_words`: expected a number from 0, found nothing"
        );
        assert_eq!(
            refused(
                "length_constraints:number_words",
                json!({ "num_words": 3, "relation": "at most" })
            ),
            "length_constraints:number_words, `relation`: expected \"less than\" or \"at least\", found \"at most\""
        );
        assert!(refused("keywords:existence", json!({ "keywords": ["("] })).contains("`(?i)(`"));
    }
}
