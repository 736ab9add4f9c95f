//! Mixtures of datasets, and documents told apart in their batches.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;
use trine_data::{
    Batches, Boundaries, DataError, Dataset, Mixture, Shard, ShardWriter, eval_windows,
};
use trine_tokenizer::Tokenizer;

/// A shard of ids.
fn shard(dir: &TempDir, name: &str, tokenizer: &Tokenizer, ids: &[u32]) -> Shard {
    let path = dir.path().join(name);
    let mut writer = ShardWriter::create(&path, tokenizer).unwrap();
    writer.push(ids).unwrap();
    writer.finish().unwrap();
    Shard::open(&path).unwrap()
}

/// Shards of the given lengths, of ids that say where they are from: no two hold the same.
fn shards(dir: &TempDir, lengths: &[usize]) -> Vec<Shard> {
    let alphabet: String = ('\u{4e00}'..).take(lengths.iter().sum()).collect();
    let tokenizer = Tokenizer::characters(&alphabet).unwrap();
    let mut first = 0;
    let shard = |(i, len): (usize, &usize)| {
        let ids: Vec<u32> = (first..first + *len as u32).collect();
        first += *len as u32;
        shard(dir, &format!("{i}.bin"), &tokenizer, &ids)
    };
    lengths.iter().enumerate().map(shard).collect()
}

/// First ids of the samples `0..samples`.
fn firsts(batches: &Batches, batch: usize, seq_len: usize, samples: usize) -> Vec<u32> {
    let steps = samples.div_ceil(batch) as u64;
    let inputs = (0..steps).flat_map(|step| batches.batch(step).unwrap().inputs);
    inputs.step_by(seq_len).take(samples).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Each source is visited as if it were alone: every window once an epoch, in order of nothing
    /// but its own samples, whatever the others are and however large a batch is.
    #[test]
    fn a_source_has_its_share_and_its_epochs(
        lengths in proptest::collection::vec(20usize..90, 1..4),
        weights in proptest::collection::vec(0.1f64..5.0, 4),
        batch in 1usize..6,
        seed in any::<u64>(),
    ) {
        let (dir, seq_len, samples) = (TempDir::new().unwrap(), 7, 200);
        let weights = &weights[..lengths.len()];
        let mixed = Batches::mixed(
            shards(&dir, &lengths).into_iter().zip(weights.iter().copied()), batch, seq_len, seed,
        ).unwrap();
        let firsts = firsts(&mixed, batch, seq_len, samples);
        let (mut begin, total) = (0, weights.iter().sum::<f64>());
        for (len, weight) in lengths.iter().zip(weights) {
            let end = begin + *len as u32;
            let own: Vec<u32> = firsts.iter().copied().filter(|id| (begin..end).contains(id)).collect();
            let share = samples as f64 * weight / total;
            prop_assert!((own.len() as f64 - share).abs() < lengths.len() as f64);
            let windows = ((len - seq_len) / seq_len).max(1);
            for epoch in own.chunks(windows) {
                let mut epoch = epoch.to_vec();
                epoch.sort_unstable();
                let distinct = epoch.windows(2).all(|pair| (pair[1] - pair[0]) % seq_len as u32 == 0 && pair[0] < pair[1]);
                prop_assert!(distinct, "{:?}", epoch);
            }
            begin = end;
        }
        // The first source goes through its windows as it does alone.
        let alone = Batches::new(shards(&dir, &lengths).remove(0), 1, seq_len, seed).unwrap();
        let own = firsts.iter().copied().filter(|id| *id < lengths[0] as u32);
        for (step, first) in own.enumerate() {
            prop_assert_eq!(alone.batch(step as u64).unwrap().inputs[0], first);
        }
    }

    /// What a window says of its documents is what the whole stream says.
    #[test]
    fn starts_are_those_of_the_stream(
        documents in proptest::collection::vec(0usize..9, 1..12),
        (has_begin, has_end) in prop_oneof![Just((true, true)), Just((true, false)), Just((false, true))],
        seq_len in 1usize..20,
    ) {
        const TEXT: u32 = 65;
        let (begin, end) = (has_begin.then_some(256), has_end.then_some(257));
        let (mut ids, mut start_of) = (Vec::new(), Vec::new());
        for len in documents {
            let start = ids.len();
            ids.extend(begin);
            ids.extend(std::iter::repeat_n(TEXT, len));
            ids.extend(end);
            start_of.resize(ids.len(), start);
        }
        let boundaries = Boundaries { begin, end };
        for (at, window) in ids.windows(seq_len).enumerate() {
            let starts: Vec<u32> = boundaries.starts(window).collect();
            let expected = (at..at + seq_len).map(|t| start_of[t].saturating_sub(at) as u32);
            prop_assert!(starts.iter().copied().eq(expected), "{at}: {window:?} {starts:?}");
        }
    }
}

#[test]
fn batches_of_training_and_validation_carry_starts() {
    let dir = TempDir::new().unwrap();
    let tokenizer = Tokenizer::bytes();
    let documents = (0..60).map(|i| Ok("ab".repeat(i % 5 + 1)));
    let data = Dataset::from_documents(dir.path(), &tokenizer, documents, 0.2).unwrap();
    let boundaries = Boundaries::of(&tokenizer);
    assert_eq!(boundaries, Boundaries { begin: tokenizer.bos_id(), end: tokenizer.eos_id() });
    let plain = Batches::new(data.train, 3, 10, 1).unwrap();
    let train = Shard::open(&dir.path().join("train.bin")).unwrap();
    let marked = Batches::new(train, 3, 10, 1).unwrap().with_documents(boundaries);
    for step in 0..20 {
        let (plain, marked) = (plain.batch(step).unwrap(), marked.batch(step).unwrap());
        assert_eq!(
            (&plain.inputs, &plain.targets, plain.starts),
            (&marked.inputs, &marked.targets, None)
        );
        let starts = marked.starts.unwrap();
        assert_eq!(starts.len(), 30);
        let begins = |(at, id): (usize, &u32)| boundaries.begin == Some(*id) || at % 10 == 0;
        for (at, (start, id)) in starts.iter().zip(&marked.inputs).enumerate() {
            let begins = begins((at, id));
            assert_eq!(*start as usize == at % 10, begins, "{at}");
        }
    }
    let batch = eval_windows(&data.val, 2, 8, Some(boundaries)).unwrap().next().unwrap().unwrap();
    assert_eq!(batch.starts.unwrap().len(), 16);
    let none = Boundaries::of(&Tokenizer::characters("ab").unwrap());
    assert!(none.is_none() && none.starts(&[0, 1, 0]).eq([0, 0, 0]));
}

/// A dataset of one text in a directory of that name.
fn dataset(dir: &TempDir, name: &str, tokenizer: &Tokenizer) -> PathBuf {
    let path = dir.path().join(name);
    Dataset::from_text(&path, tokenizer, &"some text. ".repeat(20), 0.2).unwrap();
    path
}

#[test]
fn datasets_of_one_tokenizer_are_opened_together() {
    let dir = TempDir::new().unwrap();
    let tokenizer = Tokenizer::bytes();
    let [a, b] = ["a", "b"].map(|name| dataset(&dir, name, &tokenizer));
    let mixture = Mixture::open(&[(&a, 3.0), (&b, 1.0)]).unwrap();
    let weights: Vec<f64> = mixture.sources.iter().map(|source| source.weight).collect();
    assert_eq!(weights, [3.0, 1.0]);
    assert_eq!((mixture.train_tokens(), mixture.val_tokens()), (352, 88));
    let one = Mixture::from(Dataset::open(&a).unwrap());
    assert_eq!((one.sources.len(), one.train_tokens()), (1, 176));
}

#[test]
fn mixtures_with_mistakes_are_refused_by_source() {
    let dir = TempDir::new().unwrap();
    let a = dataset(&dir, "a", &Tokenizer::bytes());
    let b = dataset(&dir, "b", &Tokenizer::characters("some text. ").unwrap());
    let refused = |sources: &[(&Path, f64)]| Mixture::open(sources).unwrap_err().to_string();
    let error = refused(&[(&a, 1.0), (&b, 1.0)]);
    let (a_bin, b_bin) = (a.join("train.bin"), b.join("train.bin"));
    assert!(error.starts_with(&*b_bin.to_string_lossy()), "{error}");
    assert!(error.contains(&*a_bin.to_string_lossy()), "{error}");
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = refused(&[(&a, 1.0), (&a, weight)]);
        assert!(error.contains("train.bin: its weight is "), "{error}");
    }
    assert!(refused(&[(&a, 1.0), (&dir.path().join("none"), 1.0)]).contains("none"));
    assert!(matches!(Mixture::open(&[] as &[(&Path, f64)]), Err(DataError::NoSource)));
    assert!(matches!(Batches::mixed([], 1, 4, 0), Err(DataError::NoSource)));
    // Each source needs a window.
    let shards = shards(&dir, &[50, 4]).into_iter().map(|shard| (shard, 1.0));
    let error = Batches::mixed(shards, 1, 4, 0).unwrap_err().to_string();
    assert!(error.contains("1.bin: 4 tokens, too short"), "{error}");
}
