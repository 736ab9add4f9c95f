//! Batches of training, a pure function of seed and step; windows of validation.
//!
//! A window is `seq_len` inputs and, one token further, `seq_len` targets. Windows of an epoch lie
//! side by side, so each token is a target once; they begin at an offset drawn anew for each epoch,
//! so that windows are cut elsewhere every time. Which window comes when is a keyed permutation
//! that is computed, not stored. Of a mixture, the source of a sample is computed from the sample's
//! number, and so is how many samples that source has had; each source has epochs of its own. Hence
//! [`Batches::batch`] has no state: a run resumes at a step by asking for that step, and no
//! checkpoint carries a data loader.

#[cfg(doc)]
use crate::IGNORED;
use crate::mixture::{Turns, check_sources};
use crate::{Boundaries, DataError, Shard};

/// Inputs and targets of one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Ids the model sees, (batch, seq_len).
    pub inputs: Vec<u32>,
    /// Ids it is to predict, (batch, seq_len): the inputs one token further, or [`IGNORED`].
    pub targets: Vec<u32>,
    /// For each input, the index in its sequence of the first token of its document, (batch,
    /// seq_len): position `t` may see `starts[t]..=t`. `None` where documents are not told apart.
    pub starts: Option<Vec<u32>>,
    /// Number of sequences.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
}

impl Batch {
    fn new(seq_len: usize) -> Self {
        Self { inputs: Vec::new(), targets: Vec::new(), starts: None, batch: 0, seq_len }
    }

    /// Adds the window of a text, or the row, that begins at `start`.
    fn push(
        &mut self,
        shard: &Shard,
        start: usize,
        boundaries: Option<Boundaries>,
    ) -> Result<(), DataError> {
        if shard.row().is_some() {
            return self.push_row(shard, start);
        }
        let before = self.inputs.len();
        shard.read(start, self.seq_len, &mut self.inputs)?;
        shard.read(start + 1, self.seq_len, &mut self.targets)?;
        self.batch += 1;
        let Some(boundaries) = boundaries else {
            if let Some(starts) = &mut self.starts {
                starts.resize(self.inputs.len(), 0);
            }
            return Ok(());
        };
        let starts = self.starts.get_or_insert_with(|| vec![0; before]);
        starts.extend(boundaries.starts(&self.inputs[before..]));
        Ok(())
    }
}

/// The batches of a training run.
#[derive(Debug)]
pub struct Batches {
    sources: Vec<Source>,
    turns: Turns,
    batch: usize,
    seq_len: usize,
    boundaries: Option<Boundaries>,
}

/// A shard and the order of its windows.
#[derive(Debug)]
struct Source {
    shard: Shard,
    seed: u64,
    /// Windows of an epoch.
    windows: usize,
}

impl Batches {
    /// Batches of `batch` sequences of `seq_len` tokens from one shard.
    ///
    /// # Errors
    /// [`DataError::EmptyBatch`], and [`DataError::TooShort`] for a shard without one window.
    pub fn new(shard: Shard, batch: usize, seq_len: usize, seed: u64) -> Result<Self, DataError> {
        Self::mixed([(shard, 1.0)], batch, seq_len, seed)
    }

    /// Batches from several shards, each with its weight: of any number of samples, each shard has
    /// its share, but for less than one sample for each of the shards.
    ///
    /// # Errors
    /// As [`Batches::new`]; [`DataError::Weight`] for a weight that is not positive,
    /// [`DataError::MixedTokenizers`], and [`DataError::NoSource`].
    pub fn mixed(
        shards: impl IntoIterator<Item = (Shard, f64)>,
        batch: usize,
        seq_len: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        let (shards, weights): (Vec<_>, Vec<_>) = shards.into_iter().unzip();
        check_sources(shards.iter().zip(weights.iter().copied()))?;
        let mut sources = Vec::with_capacity(shards.len());
        for (number, shard) in (0..).zip(shards) {
            check_window(&shard, batch, seq_len)?;
            let windows = match shard.row() {
                Some(row) => shard.len() / row,
                // Room for every offset, where there is more than one window.
                None => ((shard.len() - seq_len) / seq_len).max(1),
            };
            // Two shards of one length are not visited in step.
            let seed = if number == 0 { seed } else { mix(seed ^ mix(number)) };
            sources.push(Source { shard, seed, windows });
        }
        let turns = Turns::new(&weights);
        Ok(Self { sources, turns, batch, seq_len, boundaries: None })
    }

    /// The same batches with their documents told apart, see [`Batch::starts`].
    #[must_use]
    pub fn with_documents(mut self, boundaries: Boundaries) -> Self {
        self.boundaries = Some(boundaries);
        self
    }

    /// The batch of a step, from 0.
    ///
    /// # Errors
    /// [`DataError::Token`] when a shard holds an id outside its vocabulary.
    pub fn batch(&self, step: u64) -> Result<Batch, DataError> {
        self.sequences(u128::from(step) * self.batch as u128, self.batch)
    }

    /// `count` sequences from the `first` of the run on, for batches whose size changes.
    ///
    /// # Errors
    /// As [`Self::batch`].
    pub fn sequences(&self, first: u128, count: usize) -> Result<Batch, DataError> {
        let mut batch = Batch::new(self.seq_len);
        for sample in first..first + count as u128 {
            let (source, index) = self.turns.of(sample);
            let source = &self.sources[source];
            batch.push(&source.shard, source.window(index, self.seq_len), self.boundaries)?;
        }
        Ok(batch)
    }

    /// Windows of an epoch, the same number in each; of all shards together.
    pub fn windows(&self) -> usize {
        self.sources.iter().map(|source| source.windows).sum()
    }

    /// Tokens of all shards together.
    pub fn tokens(&self) -> usize {
        self.sources.iter().map(|source| source.shard.len()).sum()
    }

    /// The shards the batches are from.
    pub fn shards(&self) -> impl ExactSizeIterator<Item = &Shard> {
        self.sources.iter().map(|source| &source.shard)
    }
}

impl Source {
    /// First token of the window that is the shard's `sample`-th, from 0.
    fn window(&self, sample: u128, seq_len: usize) -> usize {
        // An epoch may end within a batch.
        let epoch = (sample / self.windows as u128) as u64;
        let index = (sample % self.windows as u128) as u64;
        let key = mix(self.seed ^ mix(epoch));
        if let Some(row) = self.shard.row() {
            return permute(index, self.windows as u64, key) as usize * row;
        }
        let spare = self.shard.len() - 1 - self.windows * seq_len;
        let offsets = spare.min(seq_len - 1) as u64 + 1;
        (mix(key) % offsets) as usize + permute(index, self.windows as u64, key) as usize * seq_len
    }
}

/// The windows of a validation text from its beginning, `(len - 1) / seq_len` of them, or all rows, in
/// batches of `batch` (the last may be smaller): the exact loss, not an estimate. Documents are told
/// apart by `boundaries`, if there are any.
///
/// # Errors
/// As [`Batches::new`]; a batch, as [`Batches::batch`].
pub fn eval_windows(
    shard: &Shard,
    batch: usize,
    seq_len: usize,
    boundaries: Option<Boundaries>,
) -> Result<impl ExactSizeIterator<Item = Result<Batch, DataError>> + '_, DataError> {
    check_window(shard, batch, seq_len)?;
    let (windows, step) = match shard.row() {
        Some(row) => (shard.len() / row, row),
        None => ((shard.len() - 1) / seq_len, seq_len),
    };
    Ok((0..windows.div_ceil(batch)).map(move |i| {
        let mut out = Batch::new(seq_len);
        for window in i * batch..windows.min((i + 1) * batch) {
            out.push(shard, window * step, boundaries)?;
        }
        Ok(out)
    }))
}

fn check_window(shard: &Shard, batch: usize, seq_len: usize) -> Result<(), DataError> {
    if batch == 0 || seq_len == 0 {
        return Err(DataError::EmptyBatch { batch, seq_len });
    }
    if let Some(row) = shard.row() {
        let sequence = seq_len.saturating_add(1);
        if row != sequence && row != sequence.saturating_mul(2) {
            return Err(DataError::RowLength { path: shard.path().to_owned(), row, seq_len });
        }
    }
    if shard.len() <= seq_len {
        let (path, tokens) = (shard.path().to_owned(), shard.len());
        return Err(DataError::TooShort { path, tokens, needed: seq_len.saturating_add(1) });
    }
    Ok(())
}

/// SplitMix64's finalizer (Steele, Lea, Flood 2014): every bit of the input reaches every bit of
/// the output.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A permutation of `0..n`: a Feistel network over the next even number of bits, walked along its
/// cycle until it is back below `n`, four steps at most on average.
fn permute(index: u64, n: u64, key: u64) -> u64 {
    let half = (u64::BITS - (n - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1 << half) - 1;
    let mut x = index;
    loop {
        let (mut left, mut right) = (x >> half, x & mask);
        for round in 0..6 {
            (left, right) = (right, left ^ (mix(key ^ (right << 3 | round)) & mask));
        }
        x = left << half | right;
        if x < n {
            return x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutation_visits_everything_once() {
        for n in (1..70).chain([255, 256, 257, 1000]) {
            let mut seen: Vec<u64> = (0..n).map(|i| permute(i, n, 42)).collect();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..n), "{n}");
        }
    }

    #[test]
    fn permutation_looks_shuffled() {
        let order: Vec<u64> = (0..1000).map(|i| permute(i, 1000, 7)).collect();
        // A random permutation has one fixed point and no two neighbours in order, on average.
        let fixed = (0..).zip(&order).filter(|(i, x)| i == *x).count();
        let neighbours = order.windows(2).filter(|w| w[1] == w[0] + 1).count();
        assert!(fixed < 8 && neighbours < 8, "{fixed} {neighbours}");
    }
}
