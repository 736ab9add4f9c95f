//! `tokenizer.ggml.model = llama`: SentencePiece's BPE with byte fallback.
//!
//! Keys that are not there mean what llama.cpp takes them for: a space and the beginning of text in
//! front, no end of text behind.

use std::collections::HashSet;

use serde_json::{Value as Json, json};

use super::{ADD_BOS, ADD_EOS, CHAT_TEMPLATE, PRE, SCORES, TOKEN_TYPE, TOKENS, UNK_ID};
use crate::gguf::{Array, Gguf, Value};
use crate::sentencepiece::byte;
use crate::{FormatError, Piece, PieceKind, SentencePieceBpe, TokenizerFiles};

const ADD_SPACE: &str = "tokenizer.ggml.add_space_prefix";
/// Two habits of SentencePiece that LLaMA's tokenizers do without.
const REMOVE_SPACES: &str = "tokenizer.ggml.remove_extra_whitespaces";
const CHARSMAP: &str = "tokenizer.ggml.precompiled_charsmap";

/// The keys of a tokenizer of this kind, but for those that every kind has.
pub(super) fn encode(spm: &SentencePieceBpe) -> Vec<(&'static str, Value)> {
    let unknown = spm.pieces.iter().position(|piece| piece.kind == PieceKind::Unknown);
    let pieces = || spm.pieces.iter();
    let mut keys = vec![
        (PRE, "default".into()),
        (TOKENS, Value::Array(Array::String(pieces().map(|p| p.text.clone()).collect()))),
        (SCORES, Value::Array(Array::F32(pieces().map(|p| p.score).collect()))),
        (TOKEN_TYPE, Value::Array(Array::I32(pieces().map(|p| p.kind as i32).collect()))),
        (ADD_SPACE, spm.add_space_prefix.into()),
    ];
    keys.extend(unknown.map(|id| (UNK_ID, Value::U32(id as u32))));
    keys
}

/// A `tokenizer.json` and what belongs to it, from the keys of a file.
pub(super) fn decode(gguf: &Gguf) -> Result<TokenizerFiles, FormatError> {
    let refuse = |key: &str, expected: &str, found: &str| {
        FormatError::key(gguf.path(), key, expected, found)
    };
    if super::flag(gguf, REMOVE_SPACES)? == Some(true) {
        return Err(refuse(REMOVE_SPACES, "false, for the tokenizer `llama`", "true"));
    }
    if gguf.get(CHARSMAP).is_some() {
        return Err(refuse(CHARSMAP, "none, for the tokenizer `llama`", "one"));
    }
    let tokens = super::strings(gguf, TOKENS)?;
    let scores = match gguf.get(SCORES) {
        Some(Value::Array(Array::F32(scores))) if scores.len() == tokens.len() => scores,
        other => return Err(super::mismatch(gguf, SCORES, "f32", tokens.len(), other)),
    };
    let (bos, eos) = (super::bos_id(gguf)?, super::eos_ids(gguf)?);
    let marked: HashSet<u32> = bos.iter().chain(&eos).copied().collect();
    let unknown = super::id(gguf, UNK_ID)?;
    let kinds = super::token_types(gguf, tokens.len())?;
    let kind = |id: usize, text: &str| {
        let is = |marked: &u32| *marked as usize == id;
        let stated = match kinds.get(id) {
            None if unknown.iter().any(is) => PieceKind::Unknown,
            None if byte(text).is_some() => PieceKind::Byte,
            None => PieceKind::Normal,
            Some(&number) => PieceKind::from_number(number).ok_or_else(|| {
                refuse(TOKEN_TYPE, "a type of 1 to 6 for every token", &number.to_string())
            })?,
        };
        let marked = u32::try_from(id).is_ok_and(|id| marked.contains(&id));
        let marked = marked && stated != PieceKind::Unknown;
        Ok(if marked { PieceKind::Control } else { stated })
    };
    let pieces =
        tokens.iter().zip(scores).enumerate().map(|(id, (text, &score))| {
            Ok(Piece { text: text.clone(), score, kind: kind(id, text)? })
        });
    let first_eos = eos.first().copied();
    let add_bos = super::flag(gguf, ADD_BOS)?.unwrap_or(true);
    let add_eos = super::flag(gguf, ADD_EOS)?.unwrap_or(false);
    let spm = SentencePieceBpe {
        pieces: pieces.collect::<Result<_, FormatError>>()?,
        bos: bos.filter(|_| add_bos),
        eos: first_eos.filter(|_| add_eos),
        add_space_prefix: super::flag(gguf, ADD_SPACE)?.unwrap_or(true),
    };
    let tokenizer_json = spm
        .tokenizer_json()
        .map_err(|e| refuse(&format!("tokenizer.ggml.{}", e.part), &e.expected, &e.found))?;
    let token = |id: Option<u32>| id.and_then(|id| tokens.get(id as usize));
    let unknown = spm.pieces.iter().find(|piece| piece.kind == PieceKind::Unknown);
    let tokenizer_config = json!({
        "bos_token": token(bos), "eos_token": token(first_eos),
        "unk_token": unknown.map(|piece| &piece.text),
        "add_bos_token": spm.bos.is_some(), "add_eos_token": spm.eos.is_some(),
        "chat_template": super::text(gguf, CHAT_TEMPLATE)?,
    });
    Ok(TokenizerFiles { tokenizer_json, tokenizer_config: Some(without_nulls(tokenizer_config)) })
}

/// transformers reads a null as a token without a name.
fn without_nulls(mut config: Json) -> Json {
    if let Json::Object(map) = &mut config {
        map.retain(|_, value| !value.is_null());
    }
    config
}
