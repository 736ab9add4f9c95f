//! When a text that a model writes ends, and what of it counts.

use trine_tokenizer::Tokenizer;

use crate::EvalError;

/// How a model is to write.
#[derive(Clone, Copy, Debug)]
pub struct Writing<'a> {
    /// Of the model.
    pub tokenizer: &'a Tokenizer,
    /// Most tokens of a text.
    pub max_tokens: usize,
    /// Texts that end one, and do not belong to it.
    pub until: &'a [String],
    /// Ids that do.
    pub stop_ids: &'a [u32],
}

impl Writing<'_> {
    /// Whether a text ends with its last id.
    ///
    /// # Errors
    /// Ids that are no text.
    pub fn is_done(&self, ids: &[u32]) -> Result<bool, EvalError> {
        if ids.last().is_some_and(|id| self.stop_ids.contains(id)) {
            return Ok(true);
        }
        if self.until.is_empty() {
            return Ok(false);
        }
        let text = self.tokenizer.decode(ids, true)?;
        Ok(self.until.iter().any(|stop| !stop.is_empty() && text.contains(&stop[..])))
    }

    /// The texts of ids, up to where each ends.
    ///
    /// # Errors
    /// Ids that are no text.
    pub fn texts(&self, all: Vec<Vec<u32>>) -> Result<Vec<String>, EvalError> {
        let text = |mut ids: Vec<u32>| {
            if ids.last().is_some_and(|id| self.stop_ids.contains(id)) {
                ids.pop();
            }
            Ok(self.cut(&self.tokenizer.decode(&ids, true)?).to_owned())
        };
        all.into_iter().map(text).collect()
    }

    /// A text up to the first of the texts that end it.
    pub fn cut<'t>(&self, text: &'t str) -> &'t str {
        let stops = self.until.iter().filter(|stop| !stop.is_empty());
        stops.fold(text, |text, stop| text.split(&stop[..]).next().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_ends_at_the_first_of_its_ends() {
        let tokenizer = Tokenizer::bytes();
        let until = ["Q:".to_owned(), "</s>".to_owned(), String::new()];
        let writing =
            Writing { tokenizer: &tokenizer, max_tokens: 9, until: &until, stop_ids: &[7] };
        assert_eq!(writing.cut("a</s>b Q: c"), "a");
        assert_eq!(writing.cut("all of it"), "all of it");
        let ids = tokenizer.encode("a Q:", false).unwrap();
        assert!(writing.is_done(&ids).unwrap() && !writing.is_done(&ids[..ids.len() - 1]).unwrap());
        assert_eq!(writing.texts(vec![ids]).unwrap(), ["a "]);
    }
}
