//! What stands between the `tokenizers` library and a tokenizer.json that came with a model.
//!
//! The library trusts its files: it unwraps where a value is not what it expects, when reading and
//! again when encoding and decoding. Whatever panics there is an error here. What a panic is no
//! answer to is checked before.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::normalizers::Precompiled;

/// Most bytes that the steps of a tokenizer may make of one, where each multiplies what the others
/// left; those of models make 3 to 6.
const MOST_GROWTH: usize = 1 << 12;

/// Calls the library; where it panics, what it said is handed to `refuse`.
///
/// The message is on standard error as well, as that of every panic. A tokenizer stays usable: the
/// library holds no lock and no half-written value while it runs code that panics.
pub(crate) fn guarded<T, E>(
    call: impl FnOnce() -> Result<T, E>,
    refuse: impl FnOnce(String) -> E,
) -> Result<T, E> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|payload| {
        let said = payload.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| payload.downcast_ref::<&str>().copied());
        Err(refuse(format!("the tokenizers library panicked: {}", said.unwrap_or("silently"))))
    })
}

/// Reads the parts of a tokenizer.json in which the library panics or does worse where it should
/// return an error.
///
/// A decoder that is no valid JSON; a precompiled normalizer of which the same is true; the right
/// part of a merge without the prefix of continued words, which is cut off in the middle of a
/// character and taken for UTF-8 unchecked; steps that together make a text of any size from a short
/// one.
pub(crate) fn check_fragile_parts(json: &str) -> serde_json::Result<()> {
    #[derive(Deserialize)]
    struct Parts {
        #[serde(default)]
        normalizer: Value,
        #[serde(default)]
        pre_tokenizer: Value,
        #[serde(default)]
        post_processor: Value,
        #[serde(default)]
        decoder: Value,
        #[serde(default)]
        model: Value,
    }
    let parts: Parts = serde_json::from_str(json)?;
    check_normalizer(&parts.normalizer)?;
    check_merges(&parts.model)?;
    let before = growth(&parts.normalizer).saturating_mul(growth(&parts.pre_tokenizer));
    for found in [before, growth(&parts.post_processor), growth(&parts.decoder)] {
        if found > MOST_GROWTH {
            let message =
                format!("steps that make {found} bytes of one, expected up to {MOST_GROWTH}");
            return Err(serde::de::Error::custom(message));
        }
    }
    Ok(())
}

/// How many bytes a step, or a sequence of them, may make of one; what is added once does not count.
fn growth(step: &Value) -> usize {
    let sequences = ["normalizers", "pretokenizers", "processors", "decoders"];
    if let Some(steps) = sequences.iter().find_map(|name| step.get(name)?.as_array()) {
        return steps.iter().map(growth).fold(1, usize::saturating_mul);
    }
    let replacement = step.get("pattern").and(step.get("content")).and_then(Value::as_str);
    // A template may name the text more than once.
    let single = step.get("single").and_then(Value::as_array);
    let texts = single.map(|pieces| pieces.iter().filter(|p| p.get("Sequence").is_some()).count());
    // It spells a byte as a character of up to two.
    let spelled = step.get("type").and_then(Value::as_str).filter(|&kind| kind == "ByteLevel");
    replacement.map(str::len).or(texts).or(spelled.map(|_| 2)).unwrap_or(1).max(1)
}

fn check_normalizer(normalizer: &Value) -> serde_json::Result<()> {
    if normalizer.get("type").and_then(Value::as_str) == Some("Precompiled") {
        Precompiled::deserialize(normalizer)?;
    }
    let parts = normalizer.get("normalizers").and_then(Value::as_array);
    parts.into_iter().flatten().try_for_each(check_normalizer)
}

fn check_merges(model: &Value) -> serde_json::Result<()> {
    let prefix = model.get("continuing_subword_prefix").and_then(Value::as_str);
    let Some(prefix) = prefix.filter(|prefix| !prefix.is_empty()) else { return Ok(()) };
    // Files have merges as `left right` or as pairs.
    let right = |merge: &Value| match merge {
        Value::Array(pair) => pair.last().and_then(Value::as_str).map(str::to_owned),
        merge => merge.as_str()?.split_once(' ').map(|(_, right)| right.to_owned()),
    };
    let merges = model.get("merges").and_then(Value::as_array);
    match merges.into_iter().flatten().filter_map(right).find(|r| !r.starts_with(prefix)) {
        None => Ok(()),
        Some(right) => {
            let message = format!("a merge with {right:?}, which does not begin with {prefix:?}");
            Err(serde::de::Error::custom(message))
        }
    }
}
