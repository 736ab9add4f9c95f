//! SentencePiece's BPE with byte fallback, the tokenizer of LLaMA-2, as a `tokenizer.json` and back.
//!
//! SentencePiece joins the neighbours whose concatenation is the piece of the highest score until
//! none is left, then spells what is no piece in bytes. A `tokenizer.json` lists pairs in the order
//! of their use instead, so every way to cut a piece into two pieces becomes a merge, ordered by the
//! piece's score. Both then do the same, but where two pieces have one score: SentencePiece takes
//! what stands first in the text, we the piece of the lower id. (Trained scores are all different.)
//!
//! Pieces that no text may become are no merges: SentencePiece does not find control pieces and
//! bytes in text either. Like transformers and llama.cpp, and other than SentencePiece, a text after
//! a special or user-defined piece gets a space in front as the first one does.

use std::collections::{HashMap, HashSet};

use serde_json::{Value as Json, json};

use crate::tokenizer::{AddedToken, BpeJson, BpeModel, around, steps, template};

/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";
/// Longest normal piece in bytes; trained ones have some dozens. Bounds the cost of cutting pieces.
const MAX_PIECE: usize = 512;
/// What a piece costs beside its text, in bytes of a file: length, score, kind.
const PIECE_BYTES: usize = 16;
/// What a merge costs beside its text: two borrowed parts, and how JSON writes them.
const MERGE_BYTES: usize = 48;
/// Bytes of merges for a byte of pieces; LLaMA-2, with two merges a piece, has 5.
const MAX_GROWTH: usize = 16;
/// Bytes of merges that any vocabulary may have: small ones may be made of runs of spaces alone.
const FREE_BYTES: usize = 1 << 18;

/// What a piece is for; the numbers are those of SentencePiece and of GGUF's `token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceKind {
    /// Text.
    Normal = 1,
    /// What no piece covers.
    Unknown = 2,
    /// Found in no text: begin, end, padding.
    Control = 3,
    /// Text that is always one piece.
    UserDefined = 4,
    /// An id without a use.
    Unused = 5,
    /// `<0xNN>`, a byte of what no piece covers.
    Byte = 6,
}

impl PieceKind {
    /// The kind of that number.
    pub fn from_number(number: i32) -> Option<Self> {
        [Self::Normal, Self::Unknown, Self::Control, Self::UserDefined, Self::Unused, Self::Byte]
            .into_iter()
            .find(|&kind| kind as i32 == number)
    }
}

/// A piece; its place in [`SentencePieceBpe::pieces`] is its id.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// Its text, with U+2581 for spaces.
    pub text: String,
    /// The higher, the sooner it is made of two others.
    pub score: f32,
    /// What it is for.
    pub kind: PieceKind,
}

/// A tokenizer as SentencePiece describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct SentencePieceBpe {
    /// All pieces, by id.
    pub pieces: Vec<Piece>,
    /// Put before a text.
    pub bos: Option<u32>,
    /// Put behind a text.
    pub eos: Option<u32>,
    /// Whether a text gets a space in front, so that its first word is like others.
    pub add_space_prefix: bool,
}

/// Pieces that make no tokenizer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{part}: expected {expected}, found {found}")]
pub struct PieceError {
    /// `tokens` or `scores`.
    pub part: &'static str,
    /// What could be used.
    pub expected: String,
    /// What is there.
    pub found: String,
}

fn refuse(part: &'static str, expected: impl Into<String>, found: impl Into<String>) -> PieceError {
    PieceError { part, expected: expected.into(), found: found.into() }
}

/// A text for a message, cut where a hostile file would fill the screen.
fn brief(text: &str) -> String {
    format!("{:?}", text.chars().take(40).collect::<String>())
}

impl SentencePieceBpe {
    /// The text of the `tokenizer.json`, in the form of Hugging Face's LLaMA-2.
    ///
    /// # Errors
    /// A piece that is there twice or is empty or too long to be text; a score that is no number;
    /// pieces that are made of each other in more ways than any trained vocabulary's.
    pub fn tokenizer_json(&self) -> Result<String, PieceError> {
        let mut known = HashSet::new();
        let mut vocab = Vec::new();
        let mut added = Vec::new();
        let mut unknown = None;
        for (id, &Piece { ref text, score, kind }) in self.pieces.iter().enumerate() {
            if score.is_nan() {
                return Err(refuse("scores", "numbers", format!("NaN for {}", brief(text))));
            }
            if kind == PieceKind::Unused {
                continue;
            }
            if !known.insert(text) {
                let found = format!("a second with the id {id}");
                return Err(refuse("tokens", format!("one token {}", brief(text)), found));
            }
            vocab.push((text.as_str(), id));
            if kind == PieceKind::Unknown && unknown.is_none() {
                unknown = Some(text.as_str());
            }
            if !matches!(kind, PieceKind::Normal | PieceKind::Byte) {
                added.push(AddedToken::new(id, text, kind != PieceKind::UserDefined));
            }
        }
        let mut normalizers = vec![json!({
            "type": "Replace", "pattern": {"String": " "}, "content": SPACE,
        })];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.add_space_prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        drop(known);
        let merges = self.merges()?;
        let text = |id: u32| self.pieces.get(id as usize).map(|piece| (piece.text.as_str(), id));
        let json = BpeJson {
            version: "1.0",
            truncation: (),
            padding: (),
            added_tokens: added,
            normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
            pre_tokenizer: Json::Null,
            post_processor: template(self.bos.and_then(text), self.eos.and_then(text)),
            decoder: json!({"type": "Sequence", "decoders": decoders}),
            model: BpeModel {
                r#type: "BPE",
                dropout: (),
                unk_token: unknown,
                continuing_subword_prefix: (),
                end_of_word_suffix: (),
                fuse_unk: true,
                byte_fallback: true,
                ignore_merges: false,
                vocab,
                merges: &merges,
            },
        };
        Ok(json.text())
    }

    /// Every way to cut a normal piece into two: by falling score of the piece, then by its id, then
    /// the longer left part first.
    fn merges(&self) -> Result<Vec<(&str, &str)>, PieceError> {
        let normal = |piece: &&Piece| piece.kind == PieceKind::Normal;
        let texts: HashSet<&str> =
            self.pieces.iter().filter(normal).map(|piece| piece.text.as_str()).collect();
        let mut order: Vec<&Piece> = self.pieces.iter().filter(normal).collect();
        // The sort is stable, so that ids decide among equal scores.
        order.sort_by(|a, b| b.score.total_cmp(&a.score));
        let bytes: usize = texts.iter().map(|text| text.len() + PIECE_BYTES).sum();
        let mut left = bytes.saturating_mul(MAX_GROWTH).saturating_add(FREE_BYTES);
        let mut merges = Vec::new();
        for Piece { text, .. } in order {
            if text.is_empty() || text.len() > MAX_PIECE {
                let found = format!("{} with {} bytes", brief(text), text.len());
                return Err(refuse("tokens", format!("1 to {MAX_PIECE} bytes of text"), found));
            }
            for (at, _) in text.char_indices().skip(1).collect::<Vec<_>>().into_iter().rev() {
                let (l, r) = text.split_at(at);
                if texts.contains(l) && texts.contains(r) {
                    left = left.checked_sub(text.len() + MERGE_BYTES).ok_or_else(|| {
                        let expected = "pieces that few pairs make";
                        refuse("tokens", expected, format!("too many pairs at {}", brief(text)))
                    })?;
                    merges.push((l, r));
                }
            }
        }
        Ok(merges)
    }

    /// The pieces of a `tokenizer.json` with `size` ids, when it is of the form that
    /// [`Self::tokenizer_json`] writes or that transformers makes of a SentencePiece model, and its
    /// merges are those that scores can express. Scores count down in the order of the merges.
    ///
    /// `None` for any other, also for one without a piece for every byte: llama.cpp needs them.
    pub fn from_tokenizer_json(json: &Json, size: usize) -> Option<Self> {
        let model = &json["model"];
        if model["type"] != "BPE"
            || model["byte_fallback"] != true
            || model["ignore_merges"] == true
        {
            return None;
        }
        let add_space_prefix = space_prefix(json)?;
        let mut pieces: Vec<Piece> = (0..size)
            .map(|id| Piece { text: format!("[PAD{id}]"), score: 0.0, kind: PieceKind::Unused })
            .collect();
        let place = |id: &Json| id.as_u64().and_then(|id| usize::try_from(id).ok());
        for (text, id) in model["vocab"].as_object()? {
            let kind = match byte(text) {
                Some(_) => PieceKind::Byte,
                None if model["unk_token"].as_str() == Some(text) => PieceKind::Unknown,
                None => PieceKind::Normal,
            };
            *pieces.get_mut(place(id)?)? = Piece { text: text.clone(), score: 0.0, kind };
        }
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let piece = pieces.get_mut(place(&added["id"])?)?;
            piece.text = added["content"].as_str()?.to_owned();
            if piece.kind != PieceKind::Unknown {
                let special = added["special"] == true;
                piece.kind = if special { PieceKind::Control } else { PieceKind::UserDefined };
            }
        }
        let bytes = pieces.iter().filter(|piece| piece.kind == PieceKind::Byte).count();
        if bytes < 256 {
            return None;
        }
        let id =
            |token: &str| pieces.iter().position(|piece| piece.text == token).map(|id| id as u32);
        let around = around(&json["post_processor"]);
        let (bos, eos) = (around.0.and_then(id), around.1.and_then(id));
        let mut made = Self { pieces, bos, eos, add_space_prefix };
        made.rank(&model["merges"])?;
        Some(made)
    }

    /// Takes scores from merges in the order of their use; `None` where scores cannot express it.
    fn rank(&mut self, merges: &Json) -> Option<()> {
        let ids: HashMap<String, usize> = (self.pieces.iter().enumerate())
            .filter(|(_, piece)| piece.kind == PieceKind::Normal)
            .map(|(id, piece)| (piece.text.clone(), id))
            .collect();
        let mut pairs = HashSet::new();
        let mut order = Vec::new();
        for merge in merges.as_array()? {
            let (l, r) = match merge {
                Json::Array(pair) => (pair.first()?.as_str()?, pair.get(1)?.as_str()?),
                other => other.as_str()?.split_once(' ')?,
            };
            // What makes or takes a control piece never happens in a text.
            let Some(&id) = ids.get(&format!("{l}{r}")) else { continue };
            if ids.contains_key(l) && ids.contains_key(r) {
                pairs.insert((l, r));
                if order.last() != Some(&id) {
                    order.push(id);
                }
            }
        }
        // Pieces that nothing makes come last, whatever their score.
        for piece in self.pieces.iter_mut().filter(|piece| piece.kind == PieceKind::Normal) {
            piece.score = -(ids.len() as f32);
        }
        for (rank, &id) in order.iter().enumerate() {
            self.pieces[id].score = -(rank as f32);
        }
        let distinct = order.iter().collect::<HashSet<_>>().len();
        let derived: HashSet<_> = self.merges().ok()?.into_iter().collect();
        // f32 counts exactly up to 2^24.
        (distinct == order.len() && order.len() < 1 << 24 && derived == pairs).then_some(())
    }
}

/// The byte of a piece `<0xNN>`.
pub(crate) fn byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let plain = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// Whether a text gets a space in front; `None` where spaces are not written as SentencePiece does.
fn space_prefix(json: &Json) -> Option<bool> {
    let normalizers = steps(&json["normalizer"], "normalizers");
    let replace = |step: &Json| {
        step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == SPACE
    };
    let prepend = |step: &Json| step["type"] == "Prepend" && step["prepend"] == SPACE;
    let pre = &json["pre_tokenizer"];
    match normalizers[..] {
        [a, b] if prepend(a) && replace(b) && pre.is_null() => Some(true),
        [a] if replace(a) && pre.is_null() => Some(false),
        [a] if a.is_null() && pre["type"] == "Metaspace" && pre["split"] == false => {
            let same = pre["replacement"] == SPACE;
            match pre["prepend_scheme"].as_str() {
                Some("first" | "always") if same => Some(true),
                Some("never") if same => Some(false),
                _ => None,
            }
        }
        _ => None,
    }
}
