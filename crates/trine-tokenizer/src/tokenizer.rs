//! A tokenizer: the text of its tokenizer.json and what that text means.
//!
//! The way from text to ids is that of the `tokenizers` crate, step by step (added tokens,
//! normalizer, pre-tokenizer, model, post-processor), because two of its habits have to be kept
//! out between the steps: a BPE without an unknown token drops what it cannot express, and special
//! tokens are found in any text, whoever wrote it.

use std::path::Path;

use rayon::prelude::*;
use serde::Deserialize;
use tokenizers::{
    Model, ModelWrapper, Normalizer, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer, Tokenizer as HfTokenizer,
};

use crate::detokenizer::{Detokenizer, Joining, spelled_bytes};
use crate::guard::{check_fragile_parts, guarded};
use crate::{BOS, EOS, EOT, TokenizerError, make};

/// Bytes of text encoded as one piece, where a tokenizer allows cutting at lines.
const PIECE: usize = 64 * 1024;

/// Text to ids and back, as a tokenizer.json says.
///
/// Cheap to share between threads by reference; every method takes `&self`.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    json: String,
    hf: HfTokenizer,
    vocab_size: usize,
    /// Whether some characters may be missing from the vocabulary, so that every text is checked.
    partial: bool,
    /// Whether no token reaches over a line break into a following visible character.
    cuts_at_lines: bool,
    joining: Joining,
}

/// How to read the names of special tokens in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Specials {
    Parsed,
    Text,
}

impl Tokenizer {
    /// Reads the text of a tokenizer.json.
    ///
    /// # Errors
    /// [`TokenizerError::Json`] for a text that is none, [`TokenizerError::AddedToken`] when the
    /// ids of its added tokens contradict the vocabulary.
    pub fn from_json(json: &str) -> Result<Self, TokenizerError> {
        Self::parse(json, "tokenizer.json")
    }

    /// Reads a tokenizer.json file.
    ///
    /// # Errors
    /// As [`Tokenizer::from_json`], naming the file, and [`TokenizerError::Read`].
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let json = std::fs::read_to_string(path)
            .map_err(|source| TokenizerError::Read { path: path.to_owned(), source })?;
        Self::parse(&json, &path.display().to_string())
    }

    fn parse(json: &str, origin: &str) -> Result<Self, TokenizerError> {
        let refuse = |cause: String| TokenizerError::Json { origin: origin.to_owned(), cause };
        guarded(|| Self::parse_trusting(json, refuse), refuse)
    }

    /// As [`Tokenizer::parse`], where the library may panic.
    fn parse_trusting(
        json: &str,
        refuse: impl Fn(String) -> TokenizerError,
    ) -> Result<Self, TokenizerError> {
        check_fragile_parts(json).map_err(|e| refuse(format!("{e}")))?;
        let mut hf: HfTokenizer = json.parse().map_err(|e| refuse(format!("{e}")))?;
        hf.with_padding(None);
        hf.with_truncation(None).map_err(|e| refuse(format!("{e}")))?;
        check_added_tokens(json, &hf).map_err(|e| refuse(format!("{e}")))??;
        let highest = hf.get_vocab(true).into_values().max();
        let highest = highest.ok_or_else(|| refuse("the vocabulary is empty".to_owned()))?;
        Ok(Self {
            json: json.to_owned(),
            vocab_size: highest as usize + 1,
            partial: is_partial(&hf),
            cuts_at_lines: make::cuts_at_lines(&hf),
            joining: Joining::of(&hf),
            hf,
        })
    }

    /// The tokenizer.json, exactly the text this tokenizer was made from.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// BLAKE3 hash of [`Tokenizer::json`]; token files carry it.
    pub fn hash(&self) -> [u8; 32] {
        *blake3::hash(self.json.as_bytes()).as_bytes()
    }

    /// Highest id plus one: the least number of rows an embedding needs.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Ids of a text as Hugging Face gives them: names of special tokens in it become those tokens.
    ///
    /// For a prompt or a rendered template. `add_special_tokens` lets the post-processor add its
    /// own (usually [`BOS`] in front). For text that somebody wrote, see
    /// [`Tokenizer::encode_plain`].
    ///
    /// # Errors
    /// [`TokenizerError::Inexpressible`] for a character that the vocabulary has no token for.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        self.ids(text, Specials::Parsed, add_special_tokens)
    }

    /// Ids of a text to continue: [`Tokenizer::encode`] with special tokens, and of an empty text the
    /// token that begins a document or, where there is none, ends the one before.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`]; [`TokenizerError::NoPrompt`] for an empty text without such a token.
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode(text, true)?;
        if ids.is_empty() {
            ids.extend(self.bos_id().or(self.eos_id()));
        }
        if ids.is_empty() { Err(TokenizerError::NoPrompt) } else { Ok(ids) }
    }

    /// Ids of a text in which the names of special tokens are just text, and nothing is added.
    ///
    /// For documents and for what users write: whatever the text says, no special token comes out.
    /// Long texts are encoded in parallel where that gives the same ids.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        if !self.cuts_at_lines || text.len() <= PIECE {
            return self.ids(text, Specials::Text, false);
        }
        let pieces: Vec<&str> = make::pieces(text, PIECE).collect();
        let ids: Result<Vec<_>, _> =
            pieces.par_iter().map(|piece| self.ids(piece, Specials::Text, false)).collect();
        Ok(ids?.concat())
    }

    /// [`Tokenizer::encode_plain`] of many texts, in parallel.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`], for the first text that has one.
    pub fn encode_plain_batch<S>(&self, texts: &[S]) -> Result<Vec<Vec<u32>>, TokenizerError>
    where
        S: AsRef<str> + Sync,
    {
        texts.par_iter().map(|text| self.encode_plain(text.as_ref())).collect()
    }

    /// Whether a text may be cut before a visible character that begins a line: the ids of the
    /// parts, by [`Tokenizer::encode_plain`], are those of the whole then.
    pub fn cuts_at_lines(&self) -> bool {
        self.cuts_at_lines
    }

    fn ids(
        &self,
        text: &str,
        specials: Specials,
        add_special_tokens: bool,
    ) -> Result<Vec<u32>, TokenizerError> {
        let refuse = |cause| TokenizerError::Model { operation: "encode", cause };
        guarded(|| self.ids_trusting(text, specials, add_special_tokens), refuse)
    }

    /// As [`Tokenizer::ids`], where the library may panic.
    fn ids_trusting(
        &self,
        text: &str,
        specials: Specials,
        add_special_tokens: bool,
    ) -> Result<Vec<u32>, TokenizerError> {
        let refuse = |e: tokenizers::Error| model_error("encode", &e);
        let normalizer = self.hf.get_normalizer();
        let mut pieces = match specials {
            Specials::Parsed => {
                self.hf.get_added_vocabulary().extract_and_normalize(normalizer, text)
            }
            Specials::Text => {
                let mut whole = PreTokenizedString::from(text);
                if let Some(normalizer) = normalizer {
                    whole.normalize(|part| normalizer.normalize(part)).map_err(refuse)?;
                }
                whole
            }
        };
        if let Some(pre_tokenizer) = self.hf.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(refuse)?;
        }
        if self.partial {
            self.check_expressible(text, &pieces)?;
        }
        self.hf.get_model().tokenize_in_pretokenized(&mut pieces, None).map_err(refuse)?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None).map_err(refuse)?;
        let encoding = self.hf.post_process(encoding, None, add_special_tokens).map_err(refuse)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Finds the first character that the model would drop.
    fn check_expressible(
        &self,
        text: &str,
        pieces: &PreTokenizedString,
    ) -> Result<(), TokenizerError> {
        let model = self.hf.get_model();
        let known = |token: &str| model.token_to_id(token).is_some();
        let mut utf8 = [0; 4];
        for (piece, (from, to), tokens) in
            pieces.get_splits(OffsetReferential::Original, OffsetType::Byte)
        {
            // A piece that has tokens already is an added token.
            if tokens.is_some() {
                continue;
            }
            let missing = piece.chars().position(|c| !known(c.encode_utf8(&mut utf8)));
            let Some(at) = missing.filter(|_| !known(piece)) else { continue };
            let character = piece.chars().nth(at).unwrap_or_default();
            let context = text.get(from..to).unwrap_or(text);
            let context = context.chars().skip(at.saturating_sub(10)).take(21).collect();
            return Err(TokenizerError::Inexpressible { character, context });
        }
        Ok(())
    }

    /// Text of ids.
    ///
    /// Bytes that are not UTF-8 become U+FFFD. `skip_special_tokens` leaves out the special ones.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`] for an id outside the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        for &id in ids {
            self.known(id)?;
        }
        let refuse = |cause| TokenizerError::Model { operation: "decode", cause };
        let decode = || self.hf.decode(ids, skip_special_tokens);
        guarded(|| decode().map_err(|e| model_error("decode", &e)), refuse)
    }

    /// A decoder for ids that arrive one at a time.
    pub fn detokenizer(&self, skip_special_tokens: bool) -> Detokenizer<'_> {
        Detokenizer::new(self, skip_special_tokens)
    }

    /// The token of an id, as the vocabulary spells it (a byte-level BPE spells a space `Ġ`).
    pub fn token(&self, id: u32) -> Option<String> {
        self.hf.id_to_token(id)
    }

    /// The bytes that an id adds to a text; none of a special token, and of one that there is not.
    pub fn bytes_of(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.token(id).filter(|_| !self.is_special(id)) else {
            return Vec::new();
        };
        match self.joining {
            Joining::Bytes => spelled_bytes(token),
            Joining::Text => token.into_bytes(),
            // As SentencePiece spells a byte, and a space.
            Joining::Rules => {
                let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => vec![byte],
                    None => token.replace('\u{2581}', " ").into_bytes(),
                }
            }
        }
    }

    /// The id of a token, as the vocabulary spells it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.hf.token_to_id(token)
    }

    /// Whether an id is a special token: control, not text.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.hf.get_added_vocabulary();
        added.get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }

    /// The special tokens, in the order of their ids.
    pub fn special_tokens(&self) -> Vec<(u32, String)> {
        let added = self.hf.get_added_vocabulary().get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special);
        let mut tokens: Vec<_> = special.map(|(id, token)| (*id, token.content.clone())).collect();
        tokens.sort_unstable();
        tokens
    }

    /// The token that opens a document: [`BOS`], or what other families call it.
    pub fn bos_id(&self) -> Option<u32> {
        [BOS, "<s>", "<bos>"].iter().find_map(|name| self.id(name))
    }

    /// The token that closes a document: [`EOS`], or what other families call it.
    pub fn eos_id(&self) -> Option<u32> {
        [EOS, "</s>", "<|endoftext|>", "<eos>"].iter().find_map(|name| self.id(name))
    }

    /// The token that closes a turn of a conversation: [`EOT`], or what other families call it.
    pub fn eot_id(&self) -> Option<u32> {
        [EOT, "<|im_end|>", "<end_of_turn>"].iter().find_map(|name| self.id(name))
    }

    /// Whether [`Tokenizer::encode`] with special tokens puts [`Tokenizer::bos_id`] in front.
    pub fn adds_bos(&self) -> bool {
        let added = self.encode("", true).unwrap_or_default();
        added.first().is_some_and(|id| Some(*id) == self.bos_id())
    }

    /// The token of an id in the form its decoder reads.
    pub(crate) fn known(&self, id: u32) -> Result<String, TokenizerError> {
        let unknown = TokenizerError::UnknownId { id, vocab_size: self.vocab_size };
        self.hf.id_to_token(id).ok_or(unknown)
    }

    pub(crate) fn joining(&self) -> Joining {
        self.joining
    }
}

pub(crate) fn model_error(operation: &'static str, cause: &tokenizers::Error) -> TokenizerError {
    TokenizerError::Model { operation, cause: cause.to_string() }
}

/// The `tokenizers` crate numbers added tokens itself and only warns when a file says otherwise.
fn check_added_tokens(
    json: &str,
    hf: &HfTokenizer,
) -> Result<Result<(), TokenizerError>, serde_json::Error> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        added_tokens: Vec<Added>,
    }
    #[derive(Deserialize)]
    struct Added {
        id: u32,
        content: String,
    }
    let file: File = serde_json::from_str(json)?;
    for Added { id: expected, content } in file.added_tokens {
        let found = hf.token_to_id(&content);
        if found != Some(expected) {
            return Ok(Err(TokenizerError::AddedToken { token: content, expected, found }));
        }
    }
    Ok(Ok(()))
}

/// Whether the model would drop characters it has no token for.
///
/// Only a BPE does; the other models have an unknown token or refuse by themselves.
fn is_partial(hf: &HfTokenizer) -> bool {
    let ModelWrapper::BPE(bpe) = hf.get_model() else { return false };
    let known = |token: &str| bpe.token_to_id(token).is_some();
    if bpe.unk_token.as_deref().is_some_and(known)
        || bpe.byte_fallback && (0..=255).all(|b| known(&format!("<0x{b:02X}>")))
    {
        return false;
    }
    let steps = serde_json::to_string(&(hf.get_normalizer(), hf.get_pre_tokenizer()));
    let byte_level = steps.is_ok_and(|steps| steps.contains("\"ByteLevel\""));
    !(byte_level && (0..=255).all(|b| known(&make::byte_char(b).to_string())))
}
