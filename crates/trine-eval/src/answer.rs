//! From what a model wrote to the answer in it, as the filters and `exact_match` of
//! lm-evaluation-harness.

use fancy_regex::{Captures, Regex};

use crate::math;
use crate::task::{Extract, Generation};

/// What stands for an answer that was not found.
const NOT_FOUND: &str = "[invalid]";

/// The answers in a text, each with its name: one for every extraction, or the text itself.
pub(crate) fn extract(text: &str, generation: &Generation) -> Vec<(String, String)> {
    if generation.math {
        return vec![(String::new(), math::answer(text))];
    }
    if generation.extract.is_empty() {
        return vec![(String::new(), text.trim().to_owned())];
    }
    let found = |extract: &Extract| {
        let answer = find(text, extract).unwrap_or_else(|| NOT_FOUND.to_owned());
        (extract.name.clone(), answer)
    };
    generation.extract.iter().map(found).collect()
}

fn find(text: &str, extract: &Extract) -> Option<String> {
    let regex = Regex::new(&extract.pattern).ok()?;
    let matches: Vec<Captures<'_>> = regex.captures_iter(text).flatten().collect();
    let index = match extract.which {
        which if which < 0 => matches.len().checked_sub(which.unsigned_abs() as usize)?,
        which => which as usize,
    };
    let captures = matches.get(index)?;
    // The whole match where there are no groups, else the first group that is not empty.
    let groups = if captures.len() == 1 { 0..1 } else { 1..captures.len() };
    let groups = groups.filter_map(|group| captures.get(group)).map(|group| group.as_str());
    let found = groups.into_iter().find(|group| !group.is_empty())?;
    Some(found.trim().to_owned())
}

/// Whether an answer is one of `targets`.
pub(crate) fn is_one_of(answer: &str, targets: &[String], generation: &Generation) -> bool {
    let answer = plain(answer, generation);
    targets.iter().any(|target| match generation.math {
        true => math::normalize(target) == answer,
        false => plain(target, generation) == answer,
    })
}

/// A text without what does not count.
fn plain(text: &str, generation: &Generation) -> String {
    let without = |text: String, pattern: &String| match Regex::new(pattern) {
        Ok(regex) => regex.replace_all(&text, "").into_owned(),
        Err(_) => text,
    };
    let mut text = generation.ignore.iter().fold(text.to_owned(), without);
    if generation.ignore_case {
        text = text.to_lowercase();
    }
    if generation.ignore_punctuation {
        text.retain(|c| !c.is_ascii_punctuation());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gsm8k() -> Generation {
        toml::from_str(
            r#"
            max_tokens = 9
            until = ["Q:", "</s>"]
            ignore = [",", '\$', '(?s).*#### ', '\.$']
            ignore_case = true
            [[extract]]
            name = "strict"
            pattern = 'The answer is (\-?[0-9\.\,]+).'
            [[extract]]
            name = "flexible"
            pattern = '(-?[$0-9.,]{2,})|(-?[0-9]+)'
            which = -1
            "#,
        )
        .unwrap()
    }

    #[test]
    fn answers_are_found_strictly_and_flexibly() {
        let generation = gsm8k();
        let found = |text: &str| extract(text, &generation);
        let names = |a: &str, b: &str| [("strict".into(), a.into()), ("flexible".into(), b.into())];
        assert_eq!(found(" 3 + 4 = 7. The answer is 7."), names("7", "7."));
        assert_eq!(found("It costs $1,200.50 then, 8"), names("[invalid]", "8"));
        assert_eq!(found("none"), names("[invalid]", "[invalid]"));
    }

    #[test]
    fn what_does_not_count_is_left_out_on_both_sides() {
        let generation = gsm8k();
        let right = |answer, target: &str| is_one_of(answer, &[target.to_owned()], &generation);
        assert!(right("$1,200.", "so\n#### 1200"));
        assert!(!right("1201", "1200"));
        let loose = Generation { ignore_punctuation: true, ..generation };
        assert!(is_one_of("O'Neill!", &["x".into(), "oneill".into()], &loose));
    }
}
