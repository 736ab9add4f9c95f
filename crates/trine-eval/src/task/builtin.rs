//! The tasks that are part of the program.

macro_rules! tasks {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../tasks/", $name, ".toml")))),*]
    };
}

/// Names and files.
const TASKS: &[(&str, &str)] = tasks![
    "arc_easy",
    "arc_challenge",
    "hellaswag",
    "piqa",
    "winogrande",
    "boolq",
    "openbookqa",
    "commonsense_qa",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
    "mmlu",
    "lambada_openai",
    "wikitext",
    "gsm8k_cot",
    "gsm8k",
    "math_500",
    "triviaqa",
    "ifeval",
    "humaneval",
];

/// Names of the built-in tasks.
pub fn names() -> impl Iterator<Item = &'static str> {
    TASKS.iter().map(|(name, _)| *name)
}

/// The file of a built-in task.
pub(super) fn text(name: &str) -> Option<&'static str> {
    TASKS.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Task;

    #[test]
    fn every_task_is_one_and_has_the_name_of_its_file() {
        for name in names() {
            let task = Task::open(name).unwrap();
            assert_eq!(task.name(), name);
            assert!(task.harness().is_some() && task.source().is_some(), "{name}");
        }
    }
}
