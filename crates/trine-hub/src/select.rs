//! Which files of a repository make a model, or an adapter of one.

use std::collections::BTreeSet;

use serde_json::Value;
use trine_format::peft;

use crate::HubError;
use crate::reference::is_plain_path;

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";

/// The file that says which tensors are in which shard.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// What else belongs to a model or an adapter, where the repository has it.
const COMPANIONS: [&str; 7] = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
];

/// A model in a repository.
#[derive(Debug, PartialEq)]
pub(crate) enum Choice {
    /// Files of a Hugging Face directory. Where [`INDEX`] is the last, its [`shards`] follow.
    Directory(Vec<String>),
    /// One file that is all of it: GGUF.
    File(String),
}

/// Finds the model among the names of a repository's files.
///
/// # Errors
/// What makes a model, and what is there instead.
pub(crate) fn choose(names: &[String]) -> Result<Choice, (String, String)> {
    let has = |name: &str| names.iter().any(|n| n == name);
    if let Some(weights) = [SINGLE, INDEX].into_iter().find(|name| has(name)) {
        if !has(CONFIG) {
            return Err((format!("{CONFIG} beside {weights}"), "none".into()));
        }
        let files = COMPANIONS.into_iter().filter(|name| has(name)).chain([weights]);
        return Ok(Choice::Directory(files.map(str::to_owned).collect()));
    }
    if has(peft::CONFIG) && has(peft::MATRICES) {
        let files = COMPANIONS.into_iter().filter(|name| has(name) && *name != CONFIG);
        let files = [peft::CONFIG].into_iter().chain(files).chain([peft::MATRICES]);
        return Ok(Choice::Directory(files.map(str::to_owned).collect()));
    }
    let ggufs: Vec<&String> = names.iter().filter(|name| is_gguf(name)).collect();
    match ggufs.as_slice() {
        [one] => Ok(Choice::File((*one).clone())),
        [] => Err((format!("{SINGLE}, {INDEX} or one .gguf file"), summary(names))),
        several => {
            let expected =
                "one .gguf file: name the one you want, as in hf://owner/name/file.gguf".into();
            Err((expected, summary(several)))
        }
    }
}

/// The shards that an index names.
///
/// # Errors
/// When it is no index, or names a file that is not beside it: a path out of the directory is an
/// attack.
pub(crate) fn shards(index: &str, what: &str) -> Result<BTreeSet<String>, HubError> {
    let expected = "JSON with file names under `weight_map`";
    let refuse = |found: String| HubError::answer(what, expected, found);
    let json: Value = serde_json::from_str(index).map_err(|e| refuse(e.to_string()))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| refuse("none".into()))?;
    let mut names = BTreeSet::new();
    for value in map.values() {
        let name = value.as_str().ok_or_else(|| refuse(value.to_string()))?;
        if !is_plain_path(name) || name.contains('/') || !name.ends_with(".safetensors") {
            return Err(refuse(format!("`{name}`")));
        }
        names.insert(name.to_owned());
    }
    Ok(names)
}

fn is_gguf(name: &str) -> bool {
    name.to_ascii_lowercase().ends_with(".gguf")
}

/// Names for a message: all of a few, the first of many.
pub(crate) fn summary<S: AsRef<str>>(names: &[S]) -> String {
    const SHOWN: usize = 12;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(AsRef::as_ref).collect();
    match names.len() {
        0 => "no files".into(),
        n if n > SHOWN => format!("{} and {} more", shown.join(", "), n - SHOWN),
        _ => shown.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn only_what_a_model_needs_is_chosen() {
        let repo = names(&[
            ".gitattributes",
            "README.md",
            "config.json",
            "model.gguf",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "tokenizer.json",
            "sub/config.json",
        ]);
        let files = names(&["config.json", "tokenizer.json", "model.safetensors"]);
        assert_eq!(choose(&repo), Ok(Choice::Directory(files)));
        let one = names(&["README.md", "config.json", "d/m.GGUF"]);
        assert_eq!(choose(&one), Ok(Choice::File("d/m.GGUF".into())));
    }

    #[test]
    fn an_adapter_is_chosen_where_there_is_no_model() {
        let mut repo = names(&["README.md", peft::CONFIG, peft::MATRICES, "tokenizer.json"]);
        let files = names(&[peft::CONFIG, "tokenizer.json", peft::MATRICES]);
        assert_eq!(choose(&repo), Ok(Choice::Directory(files)));
        repo.extend(names(&["config.json", "model.safetensors"]));
        let files = names(&["config.json", "tokenizer.json", "model.safetensors"]);
        assert_eq!(choose(&repo), Ok(Choice::Directory(files)));
    }

    #[test]
    fn no_model_or_several_are_told() {
        let (expected, found) = choose(&names(&["a.gguf", "b.gguf"])).unwrap_err();
        assert!(expected.contains("name the one") && found == "a.gguf, b.gguf");
        let (expected, found) = choose(&names(&["README.md"])).unwrap_err();
        assert!(expected.contains("model.safetensors") && found == "README.md");
        assert!(choose(&names(&["model.safetensors"])).unwrap_err().0.contains("config.json"));
    }

    #[test]
    fn an_index_leads_nowhere_else() {
        let index = |file: &str| format!(r#"{{"weight_map": {{"a": "{file}", "b": "{file}"}}}}"#);
        let found = shards(&index("model-1.safetensors"), "x").unwrap();
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["model-1.safetensors"]);
        for file in ["../m.safetensors", "/m.safetensors", "d/m.safetensors", "config.json", ""] {
            let error = shards(&index(file), "x").unwrap_err().to_string();
            assert!(error.contains("weight_map") && error.contains(file), "{error}");
        }
        for text in ["", "{}", r#"{"weight_map": 1}"#, r#"{"weight_map": {"a": 1}}"#] {
            assert!(shards(text, "x").is_err(), "{text}");
        }
    }
}
