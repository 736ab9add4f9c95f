//! The tokenizers of llama2.c, as its program writes them from a SentencePiece model.
//!
//! A u32, the length of the longest piece, then for every id its score (f32), its length (i32) and
//! as many bytes, in which spaces are spaces. The ids 0, 1 and 2 are what is unknown, begins and ends
//! a text, whatever their bytes; 3 to 258 are the bytes `<0x00>` to `<0xFF>`.

use std::path::Path;

use serde_json::json;
use trine_format::{FormatError, Piece, PieceKind, SentencePieceBpe, TokenizerFiles, map_file};

/// Reads a tokenizer.
///
/// # Errors
/// A file that ends inside of a piece or has other bytes than those above; pieces that are not
/// UTF-8 or make no tokenizer.
pub fn tokenizer(path: &Path) -> Result<TokenizerFiles, FormatError> {
    let map = map_file(path)?;
    let refuse = |what: &str, expected: &str, found: String| FormatError::Malformed {
        path: path.to_owned(),
        what: what.to_owned(),
        expected: expected.to_owned(),
        found,
    };
    let mut rest = map.get(4..).ok_or_else(|| {
        refuse("tokenizer of llama2.c", "a length of 4 bytes", format!("{} bytes", map.len()))
    })?;
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let id = pieces.len();
        let cut = || refuse(&format!("token {id}"), "a whole one", format!("{} bytes", rest.len()));
        let Some((&[a, b, c, d, e, f, g, h], after)) = rest.split_first_chunk() else {
            return Err(cut());
        };
        let (score, length) = (f32::from_le_bytes([a, b, c, d]), [e, f, g, h]);
        let length = usize::try_from(i32::from_le_bytes(length)).map_err(|_| cut())?;
        let (bytes, after) = after.split_at_checked(length).ok_or_else(cut)?;
        rest = after;
        let text = std::str::from_utf8(bytes)
            .map_err(|e| refuse(&format!("token {id}"), "UTF-8", e.to_string()))?;
        let (text, kind) = match id {
            0 => ("<unk>".to_owned(), PieceKind::Unknown),
            1 => ("<s>".to_owned(), PieceKind::Control),
            2 => ("</s>".to_owned(), PieceKind::Control),
            3..259 => {
                let expected = format!("<0x{:02X}>", id - 3);
                if text != expected {
                    return Err(refuse(&format!("token {id}"), &expected, format!("{text:.20?}")));
                }
                (expected, PieceKind::Byte)
            }
            _ => (text.replace(' ', "\u{2581}"), PieceKind::Normal),
        };
        pieces.push(Piece { text, score, kind });
    }
    if pieces.len() < 259 {
        return Err(refuse("number of tokens", "at least 259", pieces.len().to_string()));
    }
    let spm = SentencePieceBpe { pieces, bos: Some(1), eos: None, add_space_prefix: true };
    let tokenizer_json = spm.tokenizer_json().map_err(|e| refuse(e.part, &e.expected, e.found))?;
    Ok(TokenizerFiles {
        tokenizer_json,
        tokenizer_config: Some(json!({
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            "add_bos_token": true, "add_eos_token": false,
        })),
    })
}
