//! Rows: pieces of a fixed length, each with one or more conversations, one after the other.
//!
//! ```text
//! codes     a0 a1 a2+ a3+ | b0 b1+ b2+ | -  -        seq_len + 1 of them; + to be predicted
//! inputs    a0 a1 a2  a3    b0 b1  b2    -
//! targets   .  a2 a3  .     b1 b2  .     .           . not counted
//! starts    0  0  0   0     4  4   4     7
//! ```
//!
//! A row may also hold two such sequences, one after the other, each with one conversation: a better answer
//! and a worse one.
//!
//! No conversation sees another, and none is cut to fill a row: a row ends with padding that nothing is
//! learned from. Conversations are laid into rows as they come, each into the one of some open rows
//! in which it leaves the least room.

use trine_tokenizer::Turns;

use crate::{Batch, DataError, Shard, ShardWriter};

/// In place of a target that is not to be predicted.
pub const IGNORED: u32 = u32::MAX;

/// Rows that wait for a conversation that fits.
const OPEN: usize = 256;

/// What a code says beside the id of a token.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    Read = 0,
    /// To be predicted.
    Learned = 1,
    /// The first token of a conversation, or of the padding.
    First = 2,
}

/// Lays conversations into rows and writes them.
pub(crate) struct RowWriter {
    shard: ShardWriter,
    vocab_size: usize,
    /// Codes of a sequence.
    sequence: usize,
    open: Vec<Vec<u32>>,
}

impl RowWriter {
    /// Rows for sequences of `seq_len` inputs.
    pub(crate) fn new(shard: ShardWriter, vocab_size: usize, seq_len: usize) -> Self {
        Self { shard, vocab_size, sequence: seq_len + 1, open: Vec::new() }
    }

    /// Adds a conversation of at most a sequence's ids to a row that has room. Its first id is never
    /// learned, as nothing comes before it.
    pub(crate) fn push(&mut self, turns: &Turns) -> Result<(), DataError> {
        let room = |row: &Vec<u32>| self.sequence - row.len();
        let fits = self.open.iter().enumerate().filter(|(_, row)| room(row) >= turns.ids.len());
        let best = match fits.min_by_key(|(at, row)| (room(row), *at)) {
            Some((at, _)) => at,
            None => {
                if self.open.len() == OPEN {
                    let fullest = (0..OPEN).min_by_key(|at| (room(&self.open[*at]), *at));
                    let row = self.open.remove(fullest.unwrap_or(0));
                    self.write(row)?;
                }
                self.open.push(Vec::with_capacity(self.sequence));
                self.open.len() - 1
            }
        };
        let codes = self.codes(turns);
        self.open[best].extend(codes);
        Ok(())
    }

    /// Adds sequences of one conversation each as a row.
    pub(crate) fn push_row(&mut self, sequences: &[Turns]) -> Result<(), DataError> {
        for turns in sequences {
            self.write(self.codes(turns))?;
        }
        Ok(())
    }

    fn codes(&self, turns: &Turns) -> Vec<u32> {
        let code = |(i, (id, learned)): (usize, (&u32, &bool))| {
            let mark = match (i, learned) {
                (0, _) => Mark::First,
                (_, true) => Mark::Learned,
                (_, false) => Mark::Read,
            };
            mark as u32 * self.vocab_size as u32 + id
        };
        turns.ids.iter().zip(&turns.learned).enumerate().map(code).collect()
    }

    fn write(&mut self, mut row: Vec<u32>) -> Result<(), DataError> {
        if row.len() < self.sequence {
            row.push(Mark::First as u32 * self.vocab_size as u32);
        }
        row.resize(self.sequence, 0);
        self.shard.push(&row)
    }

    /// Ends the shard. Returns the number of rows.
    pub(crate) fn finish(mut self) -> Result<usize, DataError> {
        for row in std::mem::take(&mut self.open) {
            self.write(row)?;
        }
        let row = self.shard.row();
        Ok(self.shard.finish()? / row)
    }
}

impl Batch {
    /// Adds the sequences of the row at `start` of a shard of rows.
    pub(crate) fn push_row(&mut self, shard: &Shard, start: usize) -> Result<(), DataError> {
        let before = self.inputs.len();
        let starts = self.starts.get_or_insert_with(|| vec![0; before]);
        let mut codes = Vec::new();
        shard.read(start, shard.row().unwrap_or_default(), &mut codes)?;
        let vocab_size = shard.vocab_size() as u32;
        let is = |code: u32, mark: Mark| code / vocab_size == mark as u32;
        for sequence in codes.chunks_exact(self.seq_len + 1) {
            let mut first = 0;
            for (at, pair) in sequence.windows(2).enumerate() {
                if is(pair[0], Mark::First) {
                    first = at as u32;
                }
                starts.push(first);
                self.inputs.push(pair[0] % vocab_size);
                let learned = is(pair[1], Mark::Learned);
                self.targets.push(if learned { pair[1] % vocab_size } else { IGNORED });
            }
            self.batch += 1;
        }
        Ok(())
    }

    /// Number of targets that are to be predicted.
    pub fn learned(&self) -> usize {
        self.targets.iter().filter(|target| **target != IGNORED).count()
    }
}
