//! `tokenizer.ggml.model = gpt2`: a byte-level BPE, with a name for how texts are cut into words.

use std::collections::HashSet;

use serde_json::{Value as Json, json};

use super::{ADD_BOS, ADD_EOS, CHAT_TEMPLATE, MERGES, PRE, TOKEN_TYPE, TOKENS};
use crate::gguf::{Array, Gguf, Value};
use crate::tokenizer::{AddedToken, BpeJson, BpeModel, steps, template};
use crate::{FormatError, PieceKind, TokenizerFiles};

/// LLaMA-3's words.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen2's: LLaMA-3's with every digit on its own.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-2's, which the `ByteLevel` step has built in.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// A step that cuts a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// At what a regular expression finds, which stays as a piece of its own.
    Split(&'static str),
    /// At every digit.
    Digits,
    /// Into GPT-2's words, by the step that spells bytes.
    Gpt2,
}

/// What a name in `tokenizer.ggml.pre` stands for in llama.cpp.
#[derive(Debug)]
struct Pre {
    /// The name that is written first; all are read.
    names: &'static [&'static str],
    cuts: &'static [Cut],
    /// Whether a word that is a token is taken whole.
    ignore_merges: bool,
    /// Whether a text begins with the beginning of text where nothing else is said.
    add_bos: bool,
    /// Whether the models' own tokenizers compose characters first, which llama.cpp leaves out.
    nfc: bool,
}

const PRES: [Pre; 6] = [
    Pre {
        // Falcon3 and Falcon-E, ternary ones among them, are `falcon3` and bitnet.cpp's `falcon_e`.
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "falcon_e", "lfm2"],
        cuts: &[Cut::Split(LLAMA3)],
        ignore_merges: true,
        add_bos: true,
        nfc: false,
    },
    Pre {
        names: &["smaug-bpe", "dbrx"],
        cuts: &[Cut::Split(LLAMA3)],
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
    Pre {
        names: &["qwen2"],
        cuts: &[Cut::Split(QWEN2)],
        ignore_merges: false,
        add_bos: false,
        nfc: true,
    },
    Pre {
        names: &["smollm"],
        cuts: &[Cut::Digits, Cut::Gpt2],
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
    Pre { names: &["gpt-2"], cuts: &[Cut::Gpt2], ignore_merges: false, add_bos: false, nfc: false },
    Pre {
        names: &["default"],
        cuts: &[
            Cut::Split(r"[\p{P}\$\+<=>\^~\|]+"),
            Cut::Split(GPT2),
            Cut::Split(r"\p{N}+"),
            Cut::Split("[0-9][0-9][0-9]"),
        ],
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
];

impl Cut {
    /// The cut that a step of a pre-tokenizer makes, if it is one of those known here.
    fn of(step: &Json) -> Option<Self> {
        match step["type"].as_str()? {
            "Split" if step["behavior"] == "Isolated" && step["invert"] != true => {
                let pattern = step["pattern"]["Regex"].as_str()?;
                let known = PRES.iter().flat_map(|pre| pre.cuts);
                known.copied().find(|cut| matches!(cut, Self::Split(p) if *p == pattern))
            }
            "Digits" if step["individual_digits"] == true => Some(Self::Digits),
            "ByteLevel" if step["use_regex"] != false => Some(Self::Gpt2),
            _ => None,
        }
    }

    fn json(self) -> Json {
        match self {
            Self::Split(pattern) => json!({
                "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                "invert": false,
            }),
            Self::Digits => json!({"type": "Digits", "individual_digits": true}),
            Self::Gpt2 => byte_level(true),
        }
    }
}

/// The step that spells bytes as characters.
fn byte_level(use_regex: bool) -> Json {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": use_regex,
    })
}

/// Whether a `tokenizer.json` is of this kind.
pub(super) fn is_byte_level(json: &Json) -> bool {
    let pre = steps(&json["pre_tokenizer"], "pretokenizers");
    json["model"]["type"] == "BPE" && pre.iter().any(|step| step["type"] == "ByteLevel")
}

/// The keys of a tokenizer of this kind, but for those that every kind has.
///
/// # Errors
/// Ids past the vocabulary.
pub(super) fn encode(json: &Json, size: usize) -> Result<Vec<(&'static str, Value)>, String> {
    let (tokens, types) = vocabulary(json, size)?;
    Ok(vec![
        (PRE, name(json).into()),
        (TOKENS, Value::Array(Array::String(tokens))),
        (TOKEN_TYPE, Value::Array(Array::I32(types))),
        (MERGES, Value::Array(Array::String(merges(json)))),
    ])
}

/// llama.cpp's name of how the text is cut before merging.
fn name(json: &Json) -> &'static str {
    let steps = steps(&json["pre_tokenizer"], "pretokenizers");
    let plain = |step: &&&Json| step["type"] == "ByteLevel" && step["use_regex"] == false;
    let cuts: Option<Vec<Cut>> =
        steps.iter().filter(|step| !plain(step)).map(|step| Cut::of(step)).collect();
    let whole = json["model"]["ignore_merges"] == true;
    let same = |pre: &&Pre| Some(pre.cuts) == cuts.as_deref() && pre.ignore_merges == whole;
    PRES.iter().find(same).map_or("default", |pre| pre.names[0])
}

/// Tokens and their types by id; ids without a token get a placeholder, as llama.cpp expects.
fn vocabulary(json: &Json, size: usize) -> Result<(Vec<String>, Vec<i32>), String> {
    let mut tokens: Vec<String> = (0..size).map(|id| format!("[PAD{id}]")).collect();
    let mut types = vec![PieceKind::Unused as i32; size];
    let mut put = |token: &str, id: Option<u64>, kind: PieceKind| {
        let id = id.filter(|&id| id < size as u64).ok_or_else(|| {
            format!("token {token:?} has the id {id:?}, but the model has {size} tokens")
        })? as usize;
        tokens[id] = token.to_owned();
        types[id] = kind as i32;
        Ok::<(), String>(())
    };
    for (token, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        put(token, id.as_u64(), PieceKind::Normal)?;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let special = added["special"] == true;
        let kind = if special { PieceKind::Control } else { PieceKind::UserDefined };
        put(added["content"].as_str().unwrap_or_default(), added["id"].as_u64(), kind)?;
    }
    Ok((tokens, types))
}

/// Merges as `left right`; files have them so or as pairs.
fn merges(json: &Json) -> Vec<String> {
    let merge = |merge: &Json| match merge {
        Json::Array(pair) => pair.iter().filter_map(Json::as_str).collect::<Vec<_>>().join(" "),
        other => other.as_str().unwrap_or_default().to_owned(),
    };
    json["model"]["merges"].as_array().into_iter().flatten().map(merge).collect()
}

/// A `tokenizer.json` and what belongs to it, from the keys of a file.
pub(super) fn decode(gguf: &Gguf) -> Result<TokenizerFiles, FormatError> {
    let refuse = |key: &str, expected: &str, found: String| {
        FormatError::key(gguf.path(), key, expected, found)
    };
    let (tokens, merges) = (super::strings(gguf, TOKENS)?, super::strings(gguf, MERGES)?);
    let types = super::token_types(gguf, tokens.len())?;
    let (bos, eos) = (super::bos_id(gguf)?, super::eos_ids(gguf)?);
    let marked: HashSet<u32> = bos.iter().chain(&eos).copied().collect();
    const NORMAL: i32 = PieceKind::Normal as i32;
    const CONTROL: i32 = PieceKind::Control as i32;
    const USER_DEFINED: i32 = PieceKind::UserDefined as i32;
    const UNUSED: i32 = PieceKind::Unused as i32;
    let mut known = HashSet::new();
    let mut vocab = Vec::new();
    let mut added = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let marked = u32::try_from(id).is_ok_and(|id| marked.contains(&id));
        let kind = types.get(id).copied().unwrap_or(NORMAL);
        if kind == UNUSED && !marked {
            continue;
        }
        // Special tokens too: those that are not in the vocabulary are numbered behind it.
        if !known.insert(token) {
            let found = format!("two, the second with the id {id}");
            return Err(refuse(TOKENS, &format!("one token {token:?}"), found));
        }
        vocab.push((token.as_str(), id));
        if marked || kind == CONTROL || kind == USER_DEFINED {
            added.push(AddedToken::new(id, token, marked || kind == CONTROL));
        }
    }
    // 2B4T's published file names no pre-tokenizer; its vocabulary is LLaMA-3's.
    let name = super::text(gguf, PRE)?.unwrap_or(PRES[0].names[0]);
    let Some(pre) = PRES.iter().find(|pre| pre.names.contains(&name)) else {
        let known: Vec<&str> = PRES.iter().flat_map(|pre| pre.names).copied().collect();
        let expected = format!("one of {}, or a tokenizer.huggingface.json", known.join(", "));
        return Err(refuse(PRE, &expected, name.to_owned()));
    };
    let mut steps: Vec<Json> = pre.cuts.iter().map(|cut| cut.json()).collect();
    if !pre.cuts.contains(&Cut::Gpt2) {
        steps.push(byte_level(false));
    }
    let token = |id: Option<u32>| id.and_then(|id| tokens.get(id as usize));
    let around = |id: Option<u32>| id.zip(token(id)).map(|(id, text)| (text.as_str(), id));
    let first_eos = eos.first().copied();
    let add_bos = super::flag(gguf, ADD_BOS)?.unwrap_or(pre.add_bos);
    let add_eos = super::flag(gguf, ADD_EOS)?.unwrap_or(false);
    let (before, behind) = (bos.filter(|_| add_bos), first_eos.filter(|_| add_eos));
    let post_processor = match template(around(before), around(behind)) {
        Json::Null => byte_level(false),
        template => template,
    };
    let tokenizer_json = BpeJson {
        version: "1.0",
        truncation: (),
        padding: (),
        added_tokens: added,
        normalizer: if pre.nfc { json!({"type": "NFC"}) } else { Json::Null },
        pre_tokenizer: json!({"type": "Sequence", "pretokenizers": steps}),
        post_processor,
        decoder: byte_level(false),
        model: BpeModel {
            r#type: "BPE",
            dropout: (),
            unk_token: None,
            continuing_subword_prefix: (),
            end_of_word_suffix: (),
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: pre.ignore_merges,
            vocab,
            merges,
        },
    };
    let tokenizer_config = json!({
        "bos_token": token(bos), "eos_token": token(first_eos),
        "chat_template": super::text(gguf, CHAT_TEMPLATE)?,
    });
    Ok(TokenizerFiles {
        tokenizer_json: tokenizer_json.text(),
        tokenizer_config: Some(tokenizer_config),
    })
}
