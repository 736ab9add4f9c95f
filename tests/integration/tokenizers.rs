//! Tokenizers that SentencePiece made, on their way through GGUF: the ids stay.

use std::path::Path;

use serde_json::Value as Json;
use trine_format::{Piece, PieceKind, SentencePieceBpe};
use trine_tokenizer::Tokenizer;

/// The model and the ids of `scripts/fixtures/make_sentencepiece.py`.
struct Golden {
    spm: SentencePieceBpe,
    cases: Vec<(String, Vec<u32>)>,
}

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tokenizers/sentencepiece.json");
    let json: Json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let piece = |row: &Json| Piece {
        text: row[0].as_str().unwrap().to_owned(),
        score: row[1].as_f64().unwrap() as f32,
        kind: PieceKind::from_number(row[2].as_i64().unwrap() as i32).unwrap(),
    };
    let pieces = json["pieces"].as_array().unwrap().iter().map(piece).collect();
    let case = |row: &Json| {
        let ids = row[1].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32);
        (row[0].as_str().unwrap().to_owned(), ids.collect())
    };
    let cases = json["cases"].as_array().unwrap().iter().map(case).collect();
    let spm = SentencePieceBpe { pieces, bos: Some(1), eos: None, add_space_prefix: true };
    Golden { spm, cases }
}

#[test]
fn a_tokenizer_json_of_sentencepiece_gives_its_ids() {
    let Golden { spm, cases } = golden();
    let tokenizer = Tokenizer::from_json(&spm.tokenizer_json().unwrap()).unwrap();
    assert!(cases.len() > 200);
    for (text, expected) in &cases {
        assert_eq!(&tokenizer.encode_plain(text).unwrap(), expected, "{text:?}");
        let decoded = tokenizer.decode(expected, false).unwrap();
        assert_eq!(&decoded.replace('\u{2581}', " "), &text.replace('\u{2581}', " "));
    }
    assert_eq!(tokenizer.encode("", true).unwrap(), [1]);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
    assert!(tokenizer.is_special(0) && tokenizer.is_special(2) && !tokenizer.is_special(3));
}

/// Scores that count down by the order of the merges do what the trained ones did.
#[test]
fn scores_come_back_from_merges() {
    let Golden { spm, .. } = golden();
    let text = spm.tokenizer_json().unwrap();
    let json: Json = serde_json::from_str(&text).unwrap();
    let again = SentencePieceBpe::from_tokenizer_json(&json, spm.pieces.len()).unwrap();
    let parts = |spm: &SentencePieceBpe| -> Vec<_> {
        spm.pieces.iter().map(|piece| (piece.text.clone(), piece.kind)).collect()
    };
    assert_eq!(parts(&again), parts(&spm));
    assert_eq!((again.bos, again.eos, again.add_space_prefix), (Some(1), None, true));
    assert_eq!(again.tokenizer_json().unwrap(), text);
    assert!(again.pieces.iter().any(|piece| piece.score < -100.0));
    // Rows past the vocabulary are fillers; a vocabulary past the rows is none.
    let more = SentencePieceBpe::from_tokenizer_json(&json, spm.pieces.len() + 8).unwrap();
    assert_eq!(more.pieces.last().unwrap().kind, PieceKind::Unused);
    assert_eq!(more.tokenizer_json().unwrap(), text);
    assert_eq!(SentencePieceBpe::from_tokenizer_json(&json, spm.pieces.len() - 1), None);

    // Merges that no scores express are not taken for such a tokenizer.
    let whole =
        |merge: &Json| format!("{}{}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap());
    for change in ["apart", "fewer", "byte", "space"] {
        let mut other = json.clone();
        let merges = other["model"]["merges"].as_array_mut().unwrap();
        match change {
            // Two ways to make a piece, with others between them.
            "apart" => {
                let at = merges.windows(2).position(|m| whole(&m[0]) == whole(&m[1])).unwrap();
                let merge = merges.remove(at);
                merges.push(merge);
            }
            "fewer" => drop(merges.pop()),
            "byte" => drop(other["model"]["vocab"].as_object_mut().unwrap().remove("<0x80>")),
            _ => other["normalizer"] = Json::Null,
        }
        let taken = SentencePieceBpe::from_tokenizer_json(&other, spm.pieces.len());
        assert_eq!(taken, None, "{change}");
    }
}
