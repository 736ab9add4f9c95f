//! Text from ids that arrive one at a time.
//!
//! A token may hold half a character (a byte-level vocabulary splits an emoji over up to four
//! tokens), so text is given out only up to where it is certain. What was given out, plus what
//! [`Detokenizer::finish`] gives, is [`Tokenizer::decode`] of all ids, whatever the ids.

use tokenizers::{DecoderWrapper, Tokenizer as HfTokenizer};

use crate::make::char_byte;
use crate::{Tokenizer, TokenizerError};

/// How a tokenizer's decoder joins tokens to text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Joining {
    /// Each character of a token spells a byte.
    Bytes,
    /// Tokens are text and stand next to each other.
    Text,
    /// By rules that may look at all tokens.
    Rules,
}

impl Joining {
    pub(crate) fn of(hf: &HfTokenizer) -> Self {
        match hf.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => Self::Bytes,
            Some(DecoderWrapper::Fuse(_)) => Self::Text,
            _ => Self::Rules,
        }
    }
}

/// The bytes that the characters of a token spell. An added token may have some that spell none: it is text
/// then.
pub(crate) fn spelled_bytes(token: String) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(char_byte).collect();
    bytes.unwrap_or_else(|| token.into_bytes())
}

/// A streaming decoder; see [`Tokenizer::detokenizer`].
#[derive(Debug, Clone)]
pub struct Detokenizer<'t> {
    tokenizer: &'t Tokenizer,
    skip_special_tokens: bool,
    /// Special tokens that are text nonetheless.
    shown: Vec<u32>,
    /// Bytes that may be the beginning of a character.
    pending: Vec<u8>,
    /// All ids so far; kept only for a decoder with rules.
    ids: Vec<u32>,
    /// Bytes of their text already given out.
    given: usize,
}

impl<'t> Detokenizer<'t> {
    pub(crate) fn new(tokenizer: &'t Tokenizer, skip_special_tokens: bool) -> Self {
        let (shown, pending, ids) = (Vec::new(), Vec::new(), Vec::new());
        Self { tokenizer, skip_special_tokens, shown, pending, ids, given: 0 }
    }

    /// The same, but some special tokens are text, whether special ones are skipped or not.
    #[must_use]
    pub fn showing(self, shown: Vec<u32>) -> Self {
        Self { shown, ..self }
    }

    /// Takes the next id and returns the text that is certain now, often one word, possibly none.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`]; the detokenizer is as before and can go on.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        let token = self.tokenizer.known(id)?;
        let hidden = || self.tokenizer.is_special(id) && !self.shown.contains(&id);
        if self.skip_special_tokens && hidden() {
            return Ok(String::new());
        }
        match self.tokenizer.joining() {
            Joining::Bytes => {
                self.pending.extend(spelled_bytes(token));
                Ok(self.take_complete())
            }
            Joining::Text => Ok(token),
            Joining::Rules => {
                self.ids.push(id);
                let text = self.tokenizer.decode(&self.ids, false)?;
                // A replacement character at the end may be the beginning of a real one.
                let complete = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
                let new = complete.get(self.given..).unwrap_or_default().to_owned();
                self.given += new.len();
                Ok(new)
            }
        }
    }

    /// The rest: what was held back, with U+FFFD for characters that never became whole.
    ///
    /// The detokenizer then begins a new text.
    pub fn finish(&mut self) -> String {
        let bytes = String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned();
        let ids = std::mem::take(&mut self.ids);
        let given = std::mem::take(&mut self.given);
        let text = self.tokenizer.decode(&ids, false).unwrap_or_default();
        bytes + text.get(given..).unwrap_or_default()
    }

    /// Takes from the pending bytes all but the beginning of a character at their end.
    ///
    /// `utf8_chunks` cuts invalid bytes as `from_utf8_lossy` does, which decoders call on the whole.
    fn take_complete(&mut self) -> String {
        let incomplete = match str::from_utf8(&self.pending) {
            Ok(_) => 0,
            Err(_) => self.pending.utf8_chunks().last().map_or(0, |chunk| {
                let tail = chunk.invalid();
                let may_go_on = str::from_utf8(tail).is_err_and(|e| e.error_len().is_none());
                if may_go_on { tail.len() } else { 0 }
            }),
        };
        let rest = self.pending.split_off(self.pending.len() - incomplete);
        let complete = std::mem::replace(&mut self.pending, rest);
        String::from_utf8_lossy(&complete).into_owned()
    }
}
