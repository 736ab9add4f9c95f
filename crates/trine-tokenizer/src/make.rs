//! Tokenizers made here: bytes, characters, byte-level BPE.
//!
//! Each is written as a tokenizer.json and then read like any other. The byte-level ones follow
//! LLaMA-3: the same split into words, the same spelling of bytes (GPT-2's: a visible character for
//! every byte), special tokens after the vocabulary, [`BOS`] put in front by the post-processor.

use std::collections::{BTreeSet, HashSet};

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::{ModelWrapper, PreTokenizerWrapper, Tokenizer as HfTokenizer, Trainer};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use crate::tokenizer::model_error;
use crate::{BOS, EOS, EOT, Tokenizer, TokenizerError};

const SPECIALS: [&str; 3] = [BOS, EOS, EOT];

/// How LLaMA-3 splits text into words: contractions, words with the sign before them, numbers of
/// up to three digits, punctuation, line breaks, other space.
const SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

impl Tokenizer {
    /// One token a byte, with the byte's value as its id, then [`BOS`], [`EOS`], [`EOT`].
    pub fn bytes() -> Self {
        let vocab = (0..=255).map(|b: u8| (byte_char(b).to_string(), json!(b))).collect();
        Self::made(&byte_level(bpe(vocab, json!([])), byte_level_step()))
    }

    /// One token per distinct character of a text, in the order of their code points; no others.
    ///
    /// This is nanoGPT's character level. A character that is not in the text cannot be encoded
    /// later; that is an error then.
    ///
    /// # Errors
    /// [`TokenizerError::EmptyAlphabet`] for an empty text.
    pub fn characters(text: &str) -> Result<Self, TokenizerError> {
        let alphabet: BTreeSet<char> = text.chars().collect();
        if alphabet.is_empty() {
            return Err(TokenizerError::EmptyAlphabet);
        }
        let vocab = alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
        Ok(Self::made(&json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": { "type": "Fuse" },
            "model": bpe(vocab, json!([])),
        })))
    }

    /// A byte-level BPE with LLaMA-3's split, learned from texts.
    ///
    /// The vocabulary is the 256 bytes, then merges in the order they were found, then [`BOS`],
    /// [`EOS`], [`EOT`]: `vocab_size` in all, or fewer when no pair of tokens occurs twice any
    /// more. The result is a function of the words of the texts and their counts, hence the same
    /// for any order of the texts and any number of threads. To report progress, let the iterator
    /// count. Words are held in memory, texts are not; counts are 31 bits wide, so a sample is
    /// enough beyond some 10 GB.
    ///
    /// # Errors
    /// [`TokenizerError::VocabSize`] when `vocab_size` cannot hold bytes and special tokens.
    pub fn train_bpe<S>(
        texts: impl Iterator<Item = S> + Send,
        vocab_size: usize,
    ) -> Result<Self, TokenizerError>
    where
        S: AsRef<str> + Send,
    {
        let minimum = 256 + SPECIALS.len();
        if vocab_size < minimum {
            return Err(TokenizerError::VocabSize { minimum, found: vocab_size });
        }
        let refuse = |e: tokenizers::Error| model_error("train", &e);
        let steps = json!({ "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": SPLIT }, "behavior": "Isolated", "invert": false },
            byte_level_step(),
        ] });
        let pre_tokenizer: PreTokenizerWrapper =
            serde_json::from_value(steps.clone()).map_err(|e| refuse(e.into()))?;
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(vocab_size - SPECIALS.len())
            .min_frequency(2)
            .initial_alphabet((0..=255).map(byte_char).collect::<HashSet<char>>())
            .build();
        let words = |text: &str| {
            let mut words = Vec::new();
            for piece in pieces(text, 64 * 1024) {
                let mut piece = PreTokenizedString::from(piece);
                pre_tokenizer.pre_tokenize(&mut piece)?;
                let splits = piece.get_splits(OffsetReferential::Normalized, OffsetType::None);
                words.extend(splits.into_iter().map(|(word, ..)| word.to_owned()));
            }
            Ok(words)
        };
        trainer.feed(texts, words).map_err(refuse)?;
        let mut model = BPE::default();
        trainer.train(&mut model).map_err(refuse)?;
        let mut model = serde_json::to_value(&model).map_err(|e| refuse(e.into()))?;
        let Value::Object(vocab) = model["vocab"].take() else { unreachable!("a BPE has a vocab") };
        Ok(Self::made(&byte_level(bpe(vocab, model["merges"].take()), steps)))
    }

    fn made(json: &Value) -> Self {
        let json = format!("{json:#}");
        Self::from_json(&json).expect("a tokenizer.json written here is read here")
    }
}

fn bpe(vocab: serde_json::Map<String, Value>, merges: Value) -> Value {
    json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
        "ignore_merges": false, "vocab": vocab, "merges": merges,
    })
}

/// The step that spells bytes as characters, as pre-tokenizer and as decoder.
fn byte_level_step() -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false })
}

fn byte_level(model: Value, pre_tokenizer: Value) -> Value {
    let size = model["vocab"].as_object().map_or(0, serde_json::Map::len);
    let added = |(i, name): (usize, &&str)| {
        json!({
            "id": size + i, "content": name, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        })
    };
    let special = |type_id: u8| json!({ "SpecialToken": { "id": BOS, "type_id": type_id } });
    let text = |name: &str, type_id: u8| json!({ "Sequence": { "id": name, "type_id": type_id } });
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": SPECIALS.iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [special(0), text("A", 0)],
            "pair": [special(0), text("A", 0), special(1), text("B", 1)],
            "special_tokens": { BOS: { "id": BOS, "ids": [size], "tokens": [BOS] } },
        },
        "decoder": byte_level_step(),
        "model": model,
    })
}

/// The character that spells a byte: GPT-2's table, printable Latin-1 as itself, the others from
/// U+0100 on.
pub(crate) fn byte_char(byte: u8) -> char {
    let code = u32::from(byte);
    let code = match byte {
        0x00..=0x20 => 0x100 + code,
        0x7f..=0xa0 => 0x121 + (code - 0x7f),
        0xad => 0x143,
        _ => code,
    };
    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The byte that a character spells.
pub(crate) fn char_byte(c: char) -> Option<u8> {
    let code = u32::from(c);
    let code = match code {
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        _ => return None,
    };
    u8::try_from(code).ok()
}

/// Whether [`pieces`] of a text have the ids of the whole text.
///
/// They have when no token can hold the end of a line and the visible character after it: with
/// LLaMA-3's split, with GPT-2's, and without merges. Other tokenizers are not cut.
pub(crate) fn cuts_at_lines(hf: &HfTokenizer) -> bool {
    let ModelWrapper::BPE(bpe) = hf.get_model() else { return false };
    let Ok(steps) = serde_json::to_value(hf.get_pre_tokenizer()) else { return false };
    let Ok(model) = serde_json::to_value(bpe) else { return false };
    let steps: Vec<&Value> = match steps["pretokenizers"].as_array() {
        Some(steps) => steps.iter().collect(),
        None if steps.is_null() => Vec::new(),
        None => vec![&steps],
    };
    let is_bytes = |step: &Value, regex: bool| {
        step["type"] == "ByteLevel"
            && step["add_prefix_space"] == false
            && step["use_regex"].as_bool().unwrap_or(true) == regex
    };
    let no_merges = model["merges"].as_array().is_some_and(Vec::is_empty) && !bpe.ignore_merges;
    hf.get_normalizer().is_none()
        && match steps[..] {
            [] => no_merges,
            [bytes] => is_bytes(bytes, true) || (no_merges && is_bytes(bytes, false)),
            [split, bytes] => split["pattern"]["Regex"] == SPLIT && is_bytes(bytes, false),
            _ => false,
        }
}

/// Cuts a text into pieces of about `size` bytes, each beginning with the visible first character
/// of a line; where there is no such place a piece is longer.
pub(crate) fn pieces(text: &str, size: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let starts = rest.as_bytes().iter().enumerate().skip(size.max(1));
        let mut starts = starts.filter(|(i, _)| rest.as_bytes()[i - 1] == b'\n').map(|(i, _)| i);
        let visible = |i: &usize| rest[*i..].starts_with(|c: char| !c.is_whitespace());
        let cut = starts.find(visible).unwrap_or(rest.len());
        let (piece, tail) = rest.split_at(cut);
        rest = tail;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_spell_all_bytes_as_gpt2_does() {
        let theirs = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        for byte in 0..=255 {
            assert!(theirs.contains(&byte_char(byte)), "{byte}");
            assert_eq!(char_byte(byte_char(byte)), Some(byte));
        }
        assert_eq!((byte_char(b' '), byte_char(b'\n'), byte_char(b'a')), ('Ġ', 'Ċ', 'a'));
        assert_eq!((char_byte(' '), char_byte('€')), (None, None));
    }

    #[test]
    fn pieces_have_the_ids_of_the_whole() {
        let text =
            "One line.\n  indented\n\n\nthree  \r\n \u{a0}odd\n'tis \n\t\n x\nlast\n".repeat(3);
        let bpe = Tokenizer::train_bpe([&text, "\n", "\n\n\n"].iter(), 300).unwrap();
        for tokenizer in [bpe, Tokenizer::bytes(), Tokenizer::characters(&text).unwrap()] {
            let whole = tokenizer.encode_plain(&text).unwrap();
            for size in [0, 1, 7, 20] {
                let cut: Vec<&str> = pieces(&text, size).collect();
                assert_eq!(cut.concat(), text);
                assert!(cut.len() > 4);
                assert_eq!(tokenizer.encode_plain_batch(&cut).unwrap().concat(), whole);
            }
        }
    }
}
