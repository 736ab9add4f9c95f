//! Shards, datasets and batches: what is promised, and how each mistake is named.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;
use trine_data::{Batches, DataError, Dataset, Shard, ShardWriter, eval_windows, read_text};
use trine_tokenizer::Tokenizer;

/// A shard of the ids 0, 1, 2, ... of a vocabulary that is just large enough.
fn counting(dir: &TempDir, len: usize) -> Shard {
    let alphabet: String = ('\u{4e00}'..).take(len.max(1)).collect();
    let path = dir.path().join(format!("{len}.bin"));
    let mut writer =
        ShardWriter::create(&path, &Tokenizer::characters(&alphabet).unwrap()).unwrap();
    let ids: Vec<u32> = (0..len as u32).collect();
    ids.chunks(7).for_each(|chunk| writer.push(chunk).unwrap());
    assert_eq!(writer.finish().unwrap(), len);
    Shard::open(&path).unwrap()
}

fn message(result: Result<impl Sized, DataError>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn shard_keeps_tokens() {
    let dir = TempDir::new().unwrap();
    let shard = counting(&dir, 1000);
    assert_eq!((shard.len(), shard.vocab_size(), shard.is_empty()), (1000, 1000, false));
    let mut out = vec![77];
    shard.read(990, 10, &mut out).unwrap();
    assert_eq!(out, [77, 990, 991, 992, 993, 994, 995, 996, 997, 998, 999]);
    assert!(message(shard.read(991, 10, &mut out)).contains("tokens 991..1001"));
    assert!(shard.read(usize::MAX, 2, &mut out).is_err());
    assert!(counting(&dir, 0).is_empty());
}

#[test]
fn large_vocabularies_take_four_bytes() {
    let dir = TempDir::new().unwrap();
    let alphabet: String = ('\u{10000}'..).take(70_000).collect();
    let tokenizer = Tokenizer::characters(&alphabet).unwrap();
    let path = dir.path().join("wide.bin");
    let mut writer = ShardWriter::create(&path, &tokenizer).unwrap();
    writer.push(&[69_999, 0, 65_536]).unwrap();
    writer.finish().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 64 + 3 * 4 + 16);
    let mut out = Vec::new();
    Shard::open(&path).unwrap().read(0, 3, &mut out).unwrap();
    assert_eq!(out, [69_999, 0, 65_536]);
}

#[test]
fn unfinished_shards_do_not_appear() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.bin");
    let mut writer = ShardWriter::create(&path, &Tokenizer::bytes()).unwrap();
    let refused = message(writer.push(&[1, 259]));
    assert!(refused.ends_with("token 1 is 259, the vocabulary has 259"), "{refused}");
    drop(writer);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// Opens a shard whose bytes were changed.
fn opened(dir: &TempDir, change: impl FnOnce(&mut Vec<u8>)) -> Result<Shard, DataError> {
    let mut bytes = fs::read(counting(dir, 100).path()).unwrap();
    change(&mut bytes);
    let path = dir.path().join("hostile.bin");
    fs::write(&path, bytes).unwrap();
    Shard::open(&path)
}

#[test]
fn hostile_shards_are_refused() {
    let dir = TempDir::new().unwrap();
    let refused = |change: fn(&mut Vec<u8>), expected: &str| {
        let found = message(opened(&dir, change));
        assert!(found.contains("hostile.bin") && found.contains(expected), "{found}");
    };
    refused(|b| b.clear(), "magic");
    refused(|b| b[0] = b'X', "magic is \"XRINETOK\"");
    refused(|b| b.truncate(70), "70 bytes long, expected 80");
    refused(|b| b[8] = 2, "version is 2, expected 1");
    refused(|b| b[12] = 4, "token width is 4, expected 2");
    refused(|b| b[16] = 0, "vocabulary size is 0");
    refused(|b| b[24] = 1, "reserved field");
    refused(|b| b[20] = 1, "row length");
    refused(|b| b.truncate(200), "end mark");
    refused(|b| b[264] = 99, "280 bytes long, expected 278");
    refused(|b| b[264..272].fill(0xff), "280 bytes long");
    refused(|b| drop(b.drain(100..102)), "278 bytes long, expected 280");
    assert!(message(Shard::open(Path::new("no/such.bin"))).contains("no/such.bin"));
    // Ids are checked where they are read.
    let shard = opened(&dir, |b| b[64 + 2 * 50..][..2].fill(0xff)).unwrap();
    let mut out = Vec::new();
    shard.read(0, 50, &mut out).unwrap();
    let refused = message(shard.read(40, 20, &mut out));
    assert!(refused.contains("token 50 is 65535, the vocabulary has 100"), "{refused}");
    assert_eq!(out.len(), 50);
}

proptest! {
    #[test]
    fn damaged_shards_never_panic(at in 0usize..280, byte in any::<u8>(), cut in 0usize..280) {
        let dir = TempDir::new().unwrap();
        let damaged = opened(&dir, |bytes| {
            bytes[at] = byte;
            if cut % 3 == 0 {
                bytes.truncate(cut);
            }
        });
        if let Ok(shard) = damaged {
            let _ = shard.read(0, shard.len(), &mut Vec::new());
        }
    }

    #[test]
    fn an_epoch_visits_every_window_once(len in 2usize..300, seq_len in 1usize..40, seed in any::<u64>()) {
        prop_assume!(len > seq_len);
        let dir = TempDir::new().unwrap();
        let batches = Batches::new(counting(&dir, len), 1, seq_len, seed).unwrap();
        let windows = batches.windows();
        // All but the windows that offset and remainder cost.
        prop_assert!(windows + 1 >= (len - 1) / seq_len && windows >= 1);
        for epoch in 0..3 {
            let mut starts = Vec::new();
            for step in 0..windows {
                let batch = batches.batch((epoch * windows + step) as u64).unwrap();
                let start = batch.inputs[0];
                prop_assert!(batch.inputs.iter().copied().eq(start..start + seq_len as u32));
                prop_assert!(batch.targets.iter().copied().eq(start + 1..=start + seq_len as u32));
                starts.push(start as usize);
            }
            starts.sort_unstable();
            prop_assert!(starts[0] < seq_len.max(len - seq_len));
            prop_assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == seq_len));
        }
    }
}

/// First tokens of windows as an independent program computed them: runs that were begun with an
/// earlier version go on with the batches they would have had.
#[test]
fn batches_of_a_seed_are_pinned() {
    let dir = TempDir::new().unwrap();
    let batches = Batches::new(counting(&dir, 1000), 8, 16, 1).unwrap();
    let firsts = |step| -> Vec<u32> {
        batches.batch(step).unwrap().inputs.chunks_exact(16).map(|window| window[0]).collect()
    };
    assert_eq!(firsts(0), [528, 48, 912, 768, 480, 576, 864, 544]);
    assert_eq!(firsts(50), [506, 970, 890, 634, 826, 858, 122, 266]);
}

#[test]
fn batches_are_a_function_of_seed_and_step() {
    let dir = TempDir::new().unwrap();
    let of = |seed| Batches::new(counting(&dir, 1000), 4, 16, seed).unwrap();
    let (one, same, other) = (of(1), of(1), of(2));
    let sequential: Vec<_> = (0..60).map(|step| one.batch(step).unwrap()).collect();
    for step in (0..60).rev() {
        assert_eq!(same.batch(step).unwrap(), sequential[step as usize]);
    }
    assert!((0..60).all(|step| other.batch(step).unwrap() != sequential[step as usize]));
    assert_eq!((sequential[0].batch, sequential[0].seq_len), (4, 16));
    assert_eq!((sequential[0].inputs.len(), sequential[0].targets.len()), (64, 64));
    // Windows of another epoch begin elsewhere.
    let offset = |batch: usize| sequential[batch].inputs[0] % 16;
    assert!((16..60).any(|later| offset(later) != offset(0)));
    one.batch(u64::MAX).unwrap();
}

#[test]
fn validation_covers_the_text_in_order() {
    let dir = TempDir::new().unwrap();
    let shard = counting(&dir, 100);
    let batches: Vec<_> =
        eval_windows(&shard, 4, 9, None).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(batches.iter().map(|batch| batch.batch).collect::<Vec<_>>(), [4, 4, 3]);
    assert!(batches.iter().flat_map(|batch| &batch.inputs).copied().eq(0..99));
    assert!(batches.iter().flat_map(|batch| &batch.targets).copied().eq(1..100));
}

#[test]
fn too_short_a_text_is_refused() {
    let dir = TempDir::new().unwrap();
    let refused = message(Batches::new(counting(&dir, 16), 1, 16, 0));
    assert!(refused.ends_with("16.bin: 16 tokens, too short for one window of 17"), "{refused}");
    assert!(Batches::new(counting(&dir, 17), 1, 16, 0).is_ok());
    assert!(eval_windows(&counting(&dir, 16), 1, 16, None).is_err());
    assert!(matches!(
        Batches::new(counting(&dir, 17), 0, 16, 0),
        Err(DataError::EmptyBatch { .. })
    ));
}

fn tokens(shard: &Shard) -> Vec<u32> {
    let mut out = Vec::new();
    shard.read(0, shard.len(), &mut out).unwrap();
    out
}

#[test]
fn a_text_is_cut_by_position() {
    let dir = TempDir::new().unwrap();
    let text = "aébcdefghi".repeat(10);
    let tokenizer = Tokenizer::characters(&text).unwrap();
    let made = Dataset::from_text(&dir.path().join("d"), &tokenizer, &text, 0.1).unwrap();
    let read = Dataset::open(&dir.path().join("d")).unwrap();
    for dataset in [made, read] {
        let text_of = |shard| dataset.tokenizer.decode(&tokens(shard), false).unwrap();
        assert_eq!(text_of(&dataset.train), text[..99]);
        assert_eq!(text_of(&dataset.val), text[99..]);
    }
}

#[test]
fn documents_are_closed_and_dealt_out() {
    let dir = TempDir::new().unwrap();
    let documents: Vec<String> = (0..10).map(|i| format!("{i}<|eot_id|>")).collect();
    let items = documents.iter().map(|document| Ok(document.clone()));
    let dataset = Dataset::from_documents(dir.path(), &Tokenizer::bytes(), items, 0.2).unwrap();
    let text = |shard| dataset.tokenizer.decode(&tokens(shard), false).unwrap();
    let framed = |i: &[usize]| -> String {
        i.iter().map(|i| format!("<|begin_of_text|>{}<|end_of_text|>", documents[*i])).collect()
    };
    assert_eq!(text(&dataset.train), framed(&[0, 1, 2, 3, 5, 6, 7, 8]));
    assert_eq!(text(&dataset.val), framed(&[4, 9]));
    // What looks like a special token in a document is not one.
    let eot = dataset.tokenizer.eot_id().unwrap();
    assert!(!tokens(&dataset.train).contains(&eot));
}

#[test]
fn parts_must_belong_together() {
    let dir = TempDir::new().unwrap();
    Dataset::from_text(dir.path(), &Tokenizer::bytes(), "some text", 0.5).unwrap();
    let other = Tokenizer::characters("some text").unwrap();
    fs::write(dir.path().join("tokenizer.json"), other.json()).unwrap();
    let refused = message(Dataset::open(dir.path()));
    assert!(refused.contains("train.bin: made with the tokenizer of hash"), "{refused}");
}

/// A preparation that dies between two of its renames leaves train.bin and val.bin of two corpora.
#[test]
fn a_mixture_of_two_preparations_is_refused() {
    let dir = TempDir::new().unwrap();
    let (tokenizer, val) = (Tokenizer::bytes(), dir.path().join("val.bin"));
    Dataset::from_text(dir.path(), &tokenizer, "the first corpus", 0.5).unwrap();
    let old = fs::read(&val).unwrap();
    // A directory that comes up under the name of the second shard ends the work there.
    let documents = ["one", "two"].map(|document| {
        move |val: &Path| {
            if document == "two" {
                fs::remove_file(val).unwrap();
                fs::create_dir(val).unwrap();
            }
            Ok(document.to_owned())
        }
    });
    let documents = documents.into_iter().map(|document| document(&val));
    assert!(Dataset::from_documents(dir.path(), &tokenizer, documents, 0.5).is_err());
    fs::remove_dir(&val).unwrap();
    fs::write(&val, old).unwrap();
    let refused = message(Dataset::open(dir.path()));
    assert!(refused.contains("tokenizer.json"), "{refused}");
    // Prepared once more, it is whole.
    Dataset::from_text(dir.path(), &tokenizer, "the third corpus", 0.5).unwrap();
    Dataset::open(dir.path()).unwrap();
}

#[test]
fn files_are_read_and_mistakes_named() {
    let dir = TempDir::new().unwrap();
    let file = |name: &str, bytes: &[u8]| -> PathBuf {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    assert!(message(read_text(&file("empty", b""))).ends_with("empty: the corpus is empty"));
    assert!(
        message(read_text(&file("latin1", b"caf\xe9"))).ends_with("latin1: not UTF-8 at byte 3")
    );
    assert!(message(read_text(Path::new("no/such"))).starts_with("no/such: cannot read"));

    let nothing = Dataset::from_documents(dir.path(), &Tokenizer::bytes(), [], 0.1);
    assert!(message(nothing).ends_with("the corpus is empty"));
    let nothing = Dataset::from_text(dir.path(), &Tokenizer::bytes(), "", 0.1);
    assert!(matches!(nothing, Err(DataError::EmptyCorpus { .. })));
    let all = Dataset::from_text(dir.path(), &Tokenizer::bytes(), "x", 1.0);
    assert!(message(all).contains("validation fraction is 1"));
}
