//! The file of a task: its keys, and whether they go together.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::Doc;

/// How an answer is had from a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Which of several continuations is the likeliest.
    MultipleChoice,
    /// How likely one continuation is.
    Continuation,
    /// How likely a whole text is, in windows where it is longer than the context.
    Document,
    /// What the model writes.
    Generation,
}

impl Kind {
    /// Its name in task files.
    pub fn name(self) -> &'static str {
        match self {
            Self::MultipleChoice => "multiple_choice",
            Self::Continuation => "continuation",
            Self::Document => "document",
            Self::Generation => "generation",
        }
    }
}

/// What an item is scored by, as lm-evaluation-harness defines it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Whether the likeliest option is right; of a continuation, whether it is the greedy one.
    Acc,
    /// As `Acc`, with log-likelihoods divided by the number of characters of the option.
    AccNorm,
    /// Probability of the right options together, among that of all.
    Mc2,
    /// `exp` of the mean loss of the continuations.
    Perplexity,
    /// `exp` of the loss of a word, all documents being one text.
    WordPerplexity,
    /// `exp` of the loss of a byte.
    BytePerplexity,
    /// The loss of a byte in bits.
    BitsPerByte,
    /// Whether what was extracted from the text is the answer.
    ExactMatch,
    /// As `ExactMatch`, or whether both are surely the same value: of answers in LaTeX.
    Equivalent,
    /// Whether the text follows instructions: four scores, strictly and loosely, of prompts whose
    /// instructions are all followed and of single instructions.
    Instructions,
    /// Whether a program with the text in it comes to its end.
    #[serde(rename = "pass@1")]
    Pass,
}

impl Metric {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Acc => "acc",
            Self::AccNorm => "acc_norm",
            Self::Mc2 => "mc2",
            Self::Perplexity => "perplexity",
            Self::WordPerplexity => "word_perplexity",
            Self::BytePerplexity => "byte_perplexity",
            Self::BitsPerByte => "bits_per_byte",
            Self::ExactMatch => "exact_match",
            Self::Equivalent => "equivalent",
            Self::Instructions => "instructions",
            Self::Pass => "pass@1",
        }
    }

    /// Whether a metric of this name is a share, from 0 to 1, of which more is better; otherwise it is a
    /// loss or a perplexity.
    pub fn is_share(name: &str) -> bool {
        !name.ends_with("perplexity") && name != Self::BitsPerByte.name()
    }

    fn kinds(self) -> &'static [Kind] {
        match self {
            Self::Acc => &[Kind::MultipleChoice, Kind::Continuation],
            Self::AccNorm | Self::Mc2 => &[Kind::MultipleChoice],
            Self::Perplexity => &[Kind::Continuation],
            Self::WordPerplexity | Self::BytePerplexity | Self::BitsPerByte => &[Kind::Document],
            Self::ExactMatch | Self::Equivalent | Self::Instructions | Self::Pass => {
                &[Kind::Generation]
            }
        }
    }
}

/// A task file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Spec {
    pub(super) name: String,
    pub(super) version: u32,
    /// Name of the task of lm-evaluation-harness that asks the same.
    pub(super) harness: Option<String>,
    pub(super) kind: Kind,
    pub(super) metrics: Vec<Metric>,
    /// Names that the file of items may have.
    pub(super) files: Vec<String>,
    /// Expression of Python's `datasets` that has them.
    pub(super) source: Option<String>,
    /// Field by which items are also reported apart.
    pub(super) group: Option<String>,
    /// Template of what stands before everything else.
    #[serde(default)]
    pub(super) description: String,
    /// Between a prompt and its answer.
    #[serde(default = "space")]
    pub(super) delimiter: String,
    #[serde(default)]
    pub(super) shots: Shots,
    pub(super) generation: Option<Generation>,
    pub(super) form: Vec<Form>,
}

fn space() -> String {
    " ".to_owned()
}

/// Answered examples before the question.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Shots {
    /// How many there are unless told otherwise.
    pub(super) count: usize,
    /// Names that a file of them may have.
    pub(super) files: Vec<String>,
    pub(super) source: Option<String>,
    /// Field that an example has in common with the item.
    pub(super) same: Option<String>,
    /// Examples that stand in the task file.
    pub(super) examples: Vec<Doc>,
}

/// What to do with what the model writes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Texts that end it.
    pub until: Vec<String>,
    /// Ways to find the answer in it, each with a score of its own.
    #[serde(default)]
    pub extract: Vec<Extract>,
    /// Expressions of which all matches are left out before texts are compared.
    #[serde(default)]
    pub ignore: Vec<String>,
    /// Capitals are the same as small letters.
    #[serde(default)]
    pub ignore_case: bool,
    /// Punctuation (ASCII) is left out.
    #[serde(default)]
    pub ignore_punctuation: bool,
    /// Answers are LaTeX, which is normalised as Minerva does.
    #[serde(default)]
    pub math: bool,
    /// The prompt is what a user says: it goes through the chat template of a model that has one.
    #[serde(default)]
    pub chat: bool,
}

/// How to find an answer in a text.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extract {
    /// Part of the score's name.
    pub name: String,
    /// A regular expression; the first of its groups that matched is the answer.
    pub pattern: String,
    /// Which match: 0 the first, -1 the last.
    #[serde(default)]
    pub which: i64,
}

/// How records of one form become texts.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Form {
    /// Fields of such a record.
    pub(super) needs: Vec<String>,
    /// Template of the question.
    pub(super) prompt: Option<String>,
    /// Expression: the question with each option in it, instead of `prompt` and `choices`.
    pub(super) contexts: Option<String>,
    /// Expression: the options.
    pub(super) choices: Option<String>,
    /// Expression: number of the right option, the option, or a list of numbers.
    pub(super) gold: Option<String>,
    /// Template of the answer, where there are no options.
    pub(super) target: Option<String>,
    /// Expression: a list of answers that are right, where there is more than one.
    pub(super) targets: Option<String>,
    /// Expression: a list of the names of instructions that the answer should follow.
    pub(super) instructions: Option<String>,
    /// Expression: a list with an object for each of them.
    pub(super) arguments: Option<String>,
    /// Template of a program in Python with the answer, `completion`, in it.
    pub(super) program: Option<String>,
    /// Template of a text that is predicted as a whole.
    pub(super) document: Option<String>,
    /// Template of the text of which words and bytes are counted, where it is another one.
    pub(super) counted: Option<String>,
}

/// What the types of a task file do not say.
pub(super) fn check(spec: &Spec) -> Result<(), String> {
    let name_fits = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if spec.name.is_empty() || spec.name.starts_with('.') || !spec.name.chars().all(name_fits) {
        return Err(format!("`name`: expected letters, digits, _ and -, found `{}`", spec.name));
    }
    let kind = spec.kind.name();
    if spec.metrics.is_empty() {
        return Err("`metrics`: expected at least one, found none".to_owned());
    }
    if let Some(metric) = spec.metrics.iter().find(|metric| !metric.kinds().contains(&spec.kind)) {
        return Err(format!("`metrics`: `{}` is no metric of the kind `{kind}`", metric.name()));
    }
    let alone = |metric: &&Metric| matches!(metric, Metric::Instructions | Metric::Pass);
    if let Some(metric) = spec.metrics.iter().find(alone).filter(|_| spec.metrics.len() > 1) {
        return Err(format!("`metrics`: `{}` stands alone", metric.name()));
    }
    let math = spec.generation.as_ref().is_some_and(|generation| generation.math);
    if spec.metrics.contains(&Metric::Equivalent) && !math {
        return Err("`metrics`: `equivalent` is for tasks with `generation.math`".to_owned());
    }
    if spec.files.is_empty() {
        return Err("`files`: expected at least one name, found none".to_owned());
    }
    if spec.generation.is_some() != (spec.kind == Kind::Generation) {
        return Err(format!(
            "`generation`: a task has it if it is of the kind `generation`; this is `{kind}`"
        ));
    }
    if spec.form.is_empty() {
        return Err("`form`: expected at least one, found none".to_owned());
    }
    for (index, form) in spec.form.iter().enumerate() {
        let has = BTreeMap::from([
            ("prompt", form.prompt.is_some()),
            ("contexts", form.contexts.is_some()),
            ("choices", form.choices.is_some()),
            ("gold", form.gold.is_some()),
            ("target", form.target.is_some()),
            ("targets", form.targets.is_some()),
            ("instructions", form.instructions.is_some()),
            ("arguments", form.arguments.is_some()),
            ("program", form.program.is_some()),
            ("document", form.document.is_some()),
            ("counted", form.counted.is_some()),
        ]);
        let has: Vec<_> = has.into_iter().filter_map(|(name, has)| has.then_some(name)).collect();
        let accepted: &[&[&str]] = match spec.kind {
            Kind::MultipleChoice => {
                &[&["choices", "gold", "prompt"], &["contexts", "gold", "target"]]
            }
            Kind::Continuation => &[&["prompt", "target"]],
            Kind::Document => &[&["document"], &["counted", "document"]],
            Kind::Generation if spec.metrics == [Metric::Instructions] => {
                &[&["arguments", "instructions", "prompt"]]
            }
            Kind::Generation if spec.metrics == [Metric::Pass] => &[&["program", "prompt"]],
            Kind::Generation => {
                &[&["prompt", "target"], &["prompt", "targets"], &["prompt", "target", "targets"]]
            }
        };
        if !accepted.contains(&&has[..]) {
            let expected: Vec<_> = accepted.iter().map(|names| names.join(", ")).collect();
            let (number, expected, found) = (index + 1, expected.join("; or "), has.join(", "));
            return Err(format!("`form` {number}: a {kind} has {expected}; found {found}"));
        }
    }
    Ok(())
}

impl Spec {
    /// All templates, with where they stand.
    pub(super) fn templates(&self) -> Vec<(String, &'static str, &str)> {
        let mut all = vec![(String::new(), "description", &self.description[..])];
        for (index, form) in self.form.iter().enumerate() {
            let at = format!("`form` {}, ", index + 1);
            for (name, text) in [
                ("prompt", &form.prompt),
                ("target", &form.target),
                ("program", &form.program),
                ("document", &form.document),
                ("counted", &form.counted),
            ] {
                all.extend(text.iter().map(|text| (at.clone(), name, &text[..])));
            }
        }
        all
    }

    /// All expressions, with where they stand.
    pub(super) fn expressions(&self) -> Vec<(String, &'static str, &str)> {
        let mut all = Vec::new();
        for (index, form) in self.form.iter().enumerate() {
            let at = format!("`form` {}, ", index + 1);
            for (name, text) in [
                ("contexts", &form.contexts),
                ("choices", &form.choices),
                ("gold", &form.gold),
                ("targets", &form.targets),
                ("instructions", &form.instructions),
                ("arguments", &form.arguments),
            ] {
                all.extend(text.iter().map(|text| (at.clone(), name, &text[..])));
            }
        }
        all
    }

    /// All regular expressions.
    pub(super) fn patterns(&self) -> Vec<(&'static str, &str)> {
        let Some(generation) = &self.generation else { return Vec::new() };
        let extract = generation.extract.iter().map(|e| ("generation.extract", &e.pattern[..]));
        let ignore = generation.ignore.iter().map(|pattern| ("generation.ignore", &pattern[..]));
        extract.chain(ignore).collect()
    }
}
