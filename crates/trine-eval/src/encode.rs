//! Texts to ids, with the boundaries of lm-evaluation-harness.
//!
//! A continuation has the ids of context and continuation together, without as many of them as the
//! context has alone (`_encode_pair` of its `api/model.py`). White space at the end of the context
//! goes to the continuation first: tokens usually begin with their space.

use trine_tokenizer::{Tokenizer, TokenizerError};

use crate::model::Continuation;

/// The token before a text that has nothing before it: the one that begins a document, or else the
/// one that ends one.
pub fn prefix_id(tokenizer: &Tokenizer) -> Option<u32> {
    tokenizer.bos_id().or(tokenizer.eos_id())
}

/// The ids of a context and its continuation; `None` where nothing is left to predict, or nothing
/// stands before it.
///
/// # Errors
/// A character that the tokenizer has no token for.
pub fn encode_pair(
    tokenizer: &Tokenizer,
    context: &str,
    continuation: &str,
) -> Result<Option<Continuation>, TokenizerError> {
    let trimmed = context.trim_end();
    if trimmed.is_empty() {
        // All of the context is white space, which belongs to what follows.
        let text = format!("{context}{continuation}");
        let mut ids = tokenizer.encode(&text, false)?;
        let prefix = prefix_id(tokenizer);
        let context = match prefix.filter(|prefix| ids.first() != Some(prefix)) {
            Some(prefix) => vec![prefix],
            None => ids.drain(..ids.len().min(1)).collect(),
        };
        return Ok(pair(context, ids));
    }
    let context_ids = encode(tokenizer, trimmed)?;
    let whole = encode(tokenizer, &format!("{context}{continuation}"))?;
    let ids = whole.get(context_ids.len()..).unwrap_or_default().to_vec();
    Ok(pair(context_ids, ids))
}

/// The ids of a prompt: with what the tokenizer puts before a text, unless the text says it itself.
///
/// # Errors
/// As [`encode_pair`].
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, TokenizerError> {
    let prefix = prefix_id(tokenizer).and_then(|id| tokenizer.token(id));
    let says_it = prefix.is_some_and(|prefix| text.starts_with(&prefix));
    tokenizer.encode(text, !says_it)
}

fn pair(context: Vec<u32>, ids: Vec<u32>) -> Option<Continuation> {
    (!context.is_empty() && !ids.is_empty()).then_some(Continuation { context, ids })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        let fixture = "../../tests/data/fixtures/tied-h64/bf16/tokenizer.json";
        Tokenizer::from_file(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(fixture))
            .unwrap()
    }

    #[test]
    fn white_space_between_them_belongs_to_the_continuation() {
        let tokenizer = tokenizer();
        let apart = encode_pair(&tokenizer, "the cat", " sat").unwrap().unwrap();
        assert_eq!(encode_pair(&tokenizer, "the cat ", "sat").unwrap().unwrap(), apart);
        assert_eq!(tokenizer.decode(&apart.ids, false).unwrap(), " sat");
        let lines = encode_pair(&tokenizer, "the cat \n", "sat").unwrap().unwrap();
        assert_eq!(lines.context, apart.context);
        assert_eq!(tokenizer.decode(&lines.ids, false).unwrap(), " \nsat");
    }

    #[test]
    fn a_continuation_is_what_the_whole_has_beyond_the_context() {
        // A word that goes on has other ids than its two parts.
        let tokenizer = tokenizer();
        let whole = encode(&tokenizer, "the cat").unwrap();
        let split = encode_pair(&tokenizer, "the c", "at").unwrap().unwrap();
        let context = encode(&tokenizer, "the c").unwrap();
        assert_eq!(split.context, context);
        assert_eq!(split.ids, whole[context.len()..]);
    }

    #[test]
    fn nothing_stands_before_a_text_but_the_token_that_begins_one() {
        let tokenizer = tokenizer();
        let bos = tokenizer.bos_id().unwrap();
        let text = encode_pair(&tokenizer, "", "the cat").unwrap().unwrap();
        assert_eq!(text.context, [bos]);
        assert_eq!(text.ids, tokenizer.encode("the cat", false).unwrap());
        let said = encode_pair(&tokenizer, "", "<|begin_of_text|>the cat").unwrap().unwrap();
        assert_eq!(said, text);
        assert_eq!(encode_pair(&tokenizer, "the cat", "").unwrap(), None);
    }
}
