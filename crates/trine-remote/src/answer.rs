//! What completions answer.

use serde::Deserialize;
use serde_json::{Map, Value};
use trine_eval::Likelihood;

/// An answer, of which only this is read.
#[derive(Deserialize)]
pub(crate) struct Completion {
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    logprobs: Option<Logprobs>,
}

/// OpenAI's lists: one element for each token, of which the first has nothing before it.
#[derive(Deserialize)]
struct Logprobs {
    #[serde(default)]
    token_logprobs: Vec<Option<f64>>,
    #[serde(default)]
    top_logprobs: Option<Vec<Option<Map<String, Value>>>>,
}

/// The text of the only choice.
pub(crate) fn text(answer: Value) -> Result<String, String> {
    let choice = only(answer)?;
    choice.text.ok_or_else(|| "expected `text` in the choice, found none".to_owned())
}

/// How likely the last `scored` of the `prompt` tokens of a prompt are that was repeated.
///
/// The likeliest token is told from its log-probability, since several may have the same text.
///
/// # Errors
/// `Err(found)`: what stands where the log-probabilities should.
pub(crate) fn likelihood(
    answer: Value,
    prompt: usize,
    scored: usize,
) -> Result<Likelihood, String> {
    let Some(Logprobs { token_logprobs, top_logprobs }) = only(answer)?.logprobs else {
        return Err("`logprobs` is null".to_owned());
    };
    if token_logprobs.len() < prompt {
        let found = token_logprobs.len();
        return Err(format!("`token_logprobs` has {found} elements for {prompt} tokens"));
    }
    let top = top_logprobs.ok_or("`top_logprobs` is null")?;
    let (mut log, mut greedy) = (0.0, true);
    for at in prompt - scored..prompt {
        let own = token_logprobs[at].ok_or_else(|| format!("token {at} has none"))?;
        let top = top.get(at).and_then(Option::as_ref);
        let top = top.ok_or_else(|| format!("`top_logprobs` has nothing for token {at}"))?;
        let largest = top.values().filter_map(Value::as_f64).fold(f64::NEG_INFINITY, f64::max);
        log += own;
        greedy &= own >= largest;
    }
    Ok(Likelihood { log, greedy })
}

fn only(answer: Value) -> Result<Choice, String> {
    let answer: Completion = serde_json::from_value(answer)
        .map_err(|error| format!("expected a completion: {error}"))?;
    answer.choices.into_iter().next().ok_or_else(|| "no choices".to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn answer() -> Value {
        json!({ "choices": [{ "text": "abc", "logprobs": {
            "token_logprobs": [null, -1.0, -2.5, -0.5, -9.0],
            "top_logprobs": [null, { "x": -0.7 }, { "b": -2.5 }, { "c": -0.5, "d": -3.0 }, { "e": -9.0 }],
        } }] })
    }

    #[test]
    fn only_what_is_scored_counts_and_not_what_was_generated() {
        let of = |scored| likelihood(answer(), 4, scored).unwrap();
        assert_eq!(of(1), Likelihood { log: -0.5, greedy: true });
        assert_eq!(of(2), Likelihood { log: -3.0, greedy: true });
        assert_eq!(of(3), Likelihood { log: -4.0, greedy: false });
        assert_eq!(text(answer()).unwrap(), "abc");
    }

    #[test]
    fn what_is_missing_is_named() {
        let of = |answer: Value| likelihood(answer, 3, 2).unwrap_err();
        assert!(of(json!({ "choices": [] })).contains("no choices"));
        assert!(of(json!({ "choices": [{ "text": "a" }] })).contains("`logprobs` is null"));
        assert!(of(json!({})).contains("missing field `choices`"));
        let short = json!({ "choices": [{ "logprobs": { "token_logprobs": [-1.0] } }] });
        assert_eq!(of(short), "`token_logprobs` has 1 elements for 3 tokens");
        let none = json!({ "choices": [{ "logprobs": { "token_logprobs": [null, -1.0, -1.0] } }] });
        assert_eq!(of(none), "`top_logprobs` is null");
        let null = json!({ "choices": [{ "logprobs": { "token_logprobs": [null, null, -1.0], "top_logprobs": [] } }] });
        assert_eq!(of(null), "token 1 has none");
    }
}
