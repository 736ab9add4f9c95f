//! Any bytes as a token shard; what opens is read whole, in windows, and in batches.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use trine_data::{Batch, Batches, DataError, IGNORED, Shard, eval_windows};
use trine_fuzz::{Scratch, check_message};

static SCRATCH: LazyLock<Scratch> = LazyLock::new(Scratch::new);

fuzz_target!(|bytes: &[u8]| {
    let path = SCRATCH.write("train.bin", bytes);
    let shard = match Shard::open(&path) {
        Ok(shard) => shard,
        Err(error) => return check_message(&error, &path),
    };
    let mut ids = vec![7];
    match shard.read(0, shard.len(), &mut ids) {
        Ok(()) => assert!(ids[1..].iter().all(|&id| (id as usize) < shard.vocab_size())),
        Err(error) => {
            check_message(&error, &path);
            assert_eq!(ids, [7]);
        }
    }
    for (start, len) in [(0, shard.len() + 1), (shard.len(), 1), (1, usize::MAX), (usize::MAX, 1)] {
        check_message(&shard.read(start, len, &mut ids).unwrap_err(), &path);
    }
    shard.read(shard.len(), 0, &mut ids).unwrap();
    assert!(shard.check_tokenizer(shard.tokenizer_hash()).is_ok());
    windows(shard, bytes.len());
});

/// A window is never longer than the shard, whatever is asked for.
fn windows(shard: Shard, size: usize) {
    let (batch, seq_len) = (size % 3 + 1, size / 3 % 7 + 1);
    if let Ok(batches) = eval_windows(&shard, batch, seq_len, None) {
        for found in batches {
            check(found, batch, seq_len, &shard);
        }
    }
    let Ok(batches) = Batches::new(shard, batch, seq_len, size as u64) else { return };
    let Some(shard) = batches.shards().next() else { return };
    for step in [0, 1, batches.windows() as u64, u64::MAX] {
        check(batches.batch(step), batch, seq_len, shard);
    }
    for (batch, seq_len) in [(0, 1), (1, 0), (1, usize::MAX), (usize::MAX, 1)] {
        let _ = eval_windows(shard, batch, seq_len, None).map(|_| ());
    }
}

fn check(found: Result<Batch, DataError>, batch: usize, seq_len: usize, shard: &Shard) {
    match found {
        Ok(found) => {
            assert!(found.inputs.len() <= batch * seq_len);
            assert_eq!(found.inputs.len(), found.targets.len());
            let targets = found.targets.iter().filter(|target| **target != IGNORED);
            let ids = found.inputs.iter().chain(targets);
            assert!(ids.into_iter().all(|&id| (id as usize) < shard.vocab_size()));
        }
        Err(error) => check_message(&error, shard.path()),
    }
}
