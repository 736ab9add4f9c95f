//! Documents of files of every form, and how each mistake in one is named.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use tempfile::TempDir;
use trine_data::{Corpus, DataError, Dataset, Progress, read_text};
use trine_tokenizer::Tokenizer;

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Compressed in several members, as tools that work in parallel write it.
    fn gzip(&self, name: &str, parts: &[&str]) -> PathBuf {
        let mut bytes = Vec::new();
        for part in parts {
            let mut encoder = GzEncoder::new(&mut bytes, Compression::fast());
            encoder.write_all(part.as_bytes()).unwrap();
            encoder.finish().unwrap();
        }
        self.write(name, &bytes)
    }
}

fn documents(corpus: &Corpus) -> Result<Vec<String>, DataError> {
    corpus.documents().collect()
}

fn message(corpus: &Corpus) -> String {
    documents(corpus).expect_err("an error").to_string()
}

fn split(path: PathBuf, separator: &str) -> Corpus {
    Corpus { split_on: Some(separator.to_owned()), ..Corpus::new([path]) }
}

#[test]
fn each_form_of_file_has_its_documents() {
    let files = Files::new();
    let corpus = Corpus::new([
        files.write("a.txt", b"one\n\ntwo"),
        files.write("b.jsonl", b"{\"text\": \"x\"}\n\n{\"id\": [1], \"text\": \"y\\n\"}\r\n"),
        files.gzip("c.txt.gz", &["thr", "ee"]),
        files.gzip("d.jsonl.gz", &["{\"text\": \"p\"}\n{\"text\"", ": \"q\"}"]),
    ]);
    assert_eq!(documents(&corpus).unwrap(), ["one\n\ntwo", "x", "y\n", "three", "p", "q"]);
    assert!(!corpus.is_one_text());
    // Texts are all of it, documents or not.
    assert_eq!(corpus.texts().map(Result::unwrap).collect::<String>(), "one\n\ntwoxy\nthreepq");
    let one = Corpus::new(&corpus.files[..1]);
    assert!(one.is_one_text() && Corpus::new(&corpus.files[2..3]).is_one_text());
    assert!(!Corpus::new(&corpus.files[1..2]).is_one_text());
    assert_eq!(one.texts().map(Result::unwrap).collect::<String>(), "one\n\ntwo");
    assert_eq!(one.bytes_on_disk().unwrap(), 8);
    assert_eq!(read_text(&corpus.files[2]).unwrap(), "three");
}

#[test]
fn another_key_may_hold_the_text() {
    let files = Files::new();
    let lines = files.write("a.jsonl", b"{\"text\": 1, \"content\": \"x\"}\n{\"content\": \"y\"}");
    let corpus = Corpus { text_key: "content".to_owned(), ..Corpus::new([lines]) };
    assert_eq!(documents(&corpus).unwrap(), ["x", "y"]);
    let other = Corpus { text_key: "body".to_owned(), ..corpus };
    assert!(message(&other).contains("a.jsonl: line 1: missing field `body`"));
}

#[test]
fn separators_cut_text_files_into_documents() {
    let files = Files::new();
    let path = files.write("a.txt", b"\none\ntwo\n\n\nthree\n\n \n\nfour\n\n\n\n");
    assert_eq!(documents(&split(path, "\n\n")).unwrap(), ["one\ntwo", "three", "four"]);
    let path = files.write("b.txt", "é\n<|endoftext|>\n b<|endoftext|>".as_bytes());
    let corpus = split(path.clone(), "<|endoftext|>");
    assert!(!corpus.is_one_text());
    assert_eq!(documents(&corpus).unwrap(), ["é", " b"]);
    // No separator is one that nobody wrote.
    assert_eq!(documents(&split(path.clone(), "none")).unwrap().len(), 1);
    assert!(split(path, "").is_one_text());
    assert!(documents(&split(files.write("empty.txt", b""), "x")).unwrap().is_empty());
}

#[test]
fn mistakes_in_files_are_named() {
    let files = Files::new();
    let lines: [(&[u8], &str); 7] = [
        (b"\n{\"txt\": 1}", "missing field `text`"),
        (b"\n{", "EOF"),
        (b"\n{\"text\": \"\xff\"}", "unicode"),
        (b"\n{\"text\": null}", "null"),
        (b"\n[\"text\"]", "an object with a text under `text`"),
        (b"\n{\"text\": \"a\", \"text\": \"b\"}", "duplicate field `text`"),
        (b"\n{\"text\": \"a\"} {}", "trailing"),
    ];
    for (bytes, cause) in lines {
        let error = message(&Corpus::new([files.write("bad.jsonl", bytes)]));
        assert!(error.contains("bad.jsonl: line 2: ") && error.contains(cause), "{error}");
    }
    let bad = split(files.write("bad.txt", b"good-b\xffd-good"), "-");
    let mut found = bad.documents();
    assert_eq!(found.next().unwrap().unwrap(), "good");
    let error = found.next().unwrap().unwrap_err().to_string();
    assert!(error.ends_with("bad.txt: not UTF-8 at byte 6"), "{error}");

    let missing = Corpus::new([PathBuf::from("no/such.txt")]);
    assert!(message(&missing).starts_with("no/such.txt: cannot read"));
    assert!(missing.texts().next().unwrap().is_err() && missing.bytes_on_disk().is_err());
    assert!(message(&Corpus::new([files.write("empty.txt", b"")])).ends_with("corpus is empty"));
}

#[test]
fn damaged_archives_are_refused() {
    let files = Files::new();
    let text = "some text, again and again. ".repeat(100);
    let whole = fs::read(files.gzip("whole.txt.gz", &[&text])).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() - 6] ^= 1;
    for bytes in [&whole[..whole.len() - 9], &flipped, b"no archive"] {
        let corpus = Corpus::new([files.write("bad.txt.gz", bytes)]);
        assert!(message(&corpus).contains("bad.txt.gz: cannot read"));
        assert!(corpus.texts().last().unwrap().is_err());
        let corpus = Corpus::new([files.write("bad.jsonl.gz", bytes)]);
        assert!(message(&corpus).contains("bad.jsonl.gz: "));
    }
}

fn prepare(dir: &Path, corpus: &Corpus, tokenizer: &Tokenizer) -> (Dataset, Progress) {
    let mut last = Progress::default();
    let made = Dataset::from_corpus(dir, tokenizer, corpus, 0.25, &mut |now| {
        assert!(now.bytes >= last.bytes && now.tokens >= last.tokens);
        last = now;
    });
    (made.unwrap(), last)
}

fn text(data: &Dataset, shard: &trine_data::Shard) -> String {
    let mut ids = Vec::new();
    shard.read(0, shard.len(), &mut ids).unwrap();
    data.tokenizer.decode(&ids, false).unwrap()
}

#[test]
fn one_text_is_cut_by_position_and_several_by_document() {
    let files = Files::new();
    let path = files.write("a.txt", "aé\n\nbc\n\nde\n\nfg".as_bytes());
    let tokenizer = Tokenizer::bytes();
    let (made, progress) =
        prepare(&files.0.path().join("one"), &Corpus::new([path.clone()]), &tokenizer);
    assert_eq!(text(&made, &made.train), "aé\n\nbc\n\nde");
    assert_eq!(text(&made, &made.val), "\n\nfg");
    assert_eq!((progress.bytes, progress.tokens), (15, 15));
    let (made, progress) = prepare(&files.0.path().join("many"), &split(path, "\n\n"), &tokenizer);
    let framed = |text: &str| format!("<|begin_of_text|>{text}<|end_of_text|>");
    assert_eq!(text(&made, &made.train), ["aé", "bc", "de"].map(framed).concat());
    assert_eq!(text(&made, &made.val), framed("fg"));
    assert_eq!((progress.bytes, progress.tokens), (9, 17));
}

#[cfg(not(feature = "parquet"))]
#[test]
fn a_build_without_parquet_says_what_reads_it() {
    let files = Files::new();
    let error = message(&Corpus::new([files.write("a.parquet", b"PAR1")]));
    assert!(error.contains("a.parquet: ") && error.contains("--features parquet"), "{error}");
    let error = trine_data::parquet_records(Path::new("a.parquet")).unwrap_err().to_string();
    assert!(error.contains("a.parquet: ") && error.contains("--features parquet"), "{error}");
}

#[cfg(feature = "parquet")]
mod parquet {
    use super::*;
    use proptest::prelude::*;
    use trine_data::parquet_records;

    /// Written by pyarrow, see the README there: row groups of two rows.
    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/parquet").join(name)
    }

    const ROWS: [&str; 5] = ["one\ntwo", "", "naïve 🙂", "again", "again"];

    fn column(path: PathBuf, key: &str) -> Corpus {
        Corpus { text_key: key.to_owned(), ..Corpus::new([path]) }
    }

    #[test]
    fn files_of_pyarrow_have_their_rows() {
        for name in ["snappy.parquet", "zstd.parquet", "gzip.parquet", "lz4.parquet"] {
            assert_eq!(documents(&Corpus::new([golden(name)])).unwrap(), ROWS, "{name}");
        }
        let nested = column(golden("snappy.parquet"), "meta.title");
        assert_eq!(documents(&nested).unwrap(), ["a", "b", "c", "d", "e"]);
    }

    #[test]
    fn columns_and_rows_without_a_text_are_named() {
        let path = || golden("snappy.parquet");
        for key in ["body", "number", "words"] {
            let error = message(&column(path(), key));
            assert!(error.contains(&format!("snappy.parquet: no column `{key}` of texts")));
            assert!(error.ends_with("there are: text, maybe, bytes, meta.title"), "{error}");
        }
        let error = message(&column(path(), "maybe"));
        assert!(error.ends_with("snappy.parquet: row 4: there is no text"), "{error}");
        let error = message(&column(path(), "bytes"));
        assert!(error.ends_with("snappy.parquet: row 2: the text is not UTF-8"), "{error}");
        let files = Files::new();
        for bytes in [&b""[..], b"PAR1", b"not parquet at all, but long enough"] {
            let error = message(&Corpus::new([files.write("bad.parquet", bytes)]));
            assert!(error.contains("bad.parquet: "), "{error}");
        }
    }

    #[test]
    fn whole_rows_are_records() {
        let records = parquet_records(&golden("test-00000-of-00002.parquet")).unwrap();
        let expected = serde_json::json!([
            { "question": "What is 1?", "choices": { "text": ["a", "b"], "label": ["A", "B"] },
              "answerKey": "B", "score": 0.5, "year": 1999, "right": true },
            { "question": "And 2?", "choices": { "text": ["c"], "label": ["A"] },
              "answerKey": "A", "score": 2.0, "year": null, "right": false },
        ]);
        assert_eq!(serde_json::json!(records), expected);
        let last = parquet_records(&golden("test-00001-of-00002.parquet")).unwrap();
        assert_eq!((last.len(), &last[0]["choices"]["text"]), (1, &serde_json::json!([])));
        let error = parquet_records(&golden("snappy.parquet")).unwrap_err().to_string();
        let expected = "snappy.parquet: row 2: column `bytes`: bytes that are not UTF-8";
        assert!(error.ends_with(expected), "{error}");
    }

    proptest! {
        #[test]
        fn damaged_files_end_in_an_error_or_in_texts(at in 0usize..4000, byte in any::<u8>(), cut in any::<bool>()) {
            let mut bytes = fs::read(golden("zstd.parquet")).unwrap();
            let at = at % bytes.len();
            if cut {
                bytes.truncate(at);
            } else {
                bytes[at] = byte;
            }
            let files = Files::new();
            let path = files.write("damaged.parquet", &bytes);
            let _ = documents(&Corpus::new([path.clone()]));
            let _ = parquet_records(&path);
        }
    }
}
