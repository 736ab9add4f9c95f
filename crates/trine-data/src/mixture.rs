//! Several prepared corpora that are trained on together, each with its share of the samples.

use std::path::Path;

use trine_tokenizer::Tokenizer;

use crate::{DataError, Dataset, Shard};

/// Prepared corpora with one tokenizer and weights. A [`Dataset`] is a mixture of one.
#[derive(Debug)]
pub struct Mixture {
    /// The tokenizer of all sources.
    pub tokenizer: Tokenizer,
    /// The sources, at least one.
    pub sources: Vec<Source>,
}

/// One corpus of a mixture.
#[derive(Debug)]
pub struct Source {
    /// Its share of the samples, relative to the weights of the others.
    pub weight: f64,
    /// Tokens to train on.
    pub train: Shard,
    /// Tokens to validate on.
    pub val: Shard,
}

impl Mixture {
    /// Opens datasets, each with its weight.
    ///
    /// # Errors
    /// As [`Dataset::open`]; [`DataError::MixedTokenizers`], [`DataError::Weight`] for one that is
    /// not positive, and [`DataError::NoSource`].
    pub fn open(sources: &[(impl AsRef<Path>, f64)]) -> Result<Self, DataError> {
        let mut sources = sources.iter();
        let (dir, weight) = sources.next().ok_or(DataError::NoSource)?;
        let mut mixture = Self::from(Dataset::open(dir.as_ref())?);
        mixture.sources[0].weight = *weight;
        for (dir, weight) in sources {
            let Dataset { train, val, .. } = Dataset::open(dir.as_ref())?;
            mixture.sources.push(Source { weight: *weight, train, val });
        }
        check_sources(mixture.sources.iter().map(|source| (&source.train, source.weight)))?;
        Ok(mixture)
    }

    /// Tokens to train on, of all sources.
    pub fn train_tokens(&self) -> usize {
        self.sources.iter().map(|source| source.train.len()).sum()
    }

    /// Tokens to validate on, of all sources.
    pub fn val_tokens(&self) -> usize {
        self.sources.iter().map(|source| source.val.len()).sum()
    }
}

impl From<Dataset> for Mixture {
    fn from(Dataset { tokenizer, train, val }: Dataset) -> Self {
        Self { tokenizer, sources: vec![Source { weight: 1.0, train, val }] }
    }
}

/// That weights are positive and ids mean the same text.
pub(crate) fn check_sources<'a>(
    sources: impl Iterator<Item = (&'a Shard, f64)>,
) -> Result<(), DataError> {
    let mut first: Option<&Shard> = None;
    for (shard, weight) in sources {
        let path = || shard.path().to_owned();
        if !(weight > 0.0 && weight.is_finite()) {
            return Err(DataError::Weight { path: path(), found: weight });
        }
        let first = first.get_or_insert(shard);
        if first.tokenizer_hash() != shard.tokenizer_hash() {
            return Err(DataError::MixedTokenizers {
                path: path(),
                first: first.path().to_owned(),
            });
        }
    }
    if first.is_none() { Err(DataError::NoSource) } else { Ok(()) }
}

/// Which source a sample is from, a function of the sample's number alone.
///
/// Sources take turns as evenly as their shares allow: of the first `n` samples, the first source
/// has `n` times its share, rounded to the nearest whole number; of those that are left, the second
/// has its share of the rest, and so on. Hence the counts have a closed form, a run that resumes
/// counts nothing again, and every batch is as close to the mixture as it can be.
#[derive(Debug)]
pub(crate) struct Turns {
    /// For each source but the last, its share of what it and later sources have, times 2^32.
    shares: Vec<u64>,
}

impl Turns {
    /// The turns of sources with positive weights.
    pub(crate) fn new(weights: &[f64]) -> Self {
        let shares = (0..weights.len().saturating_sub(1)).map(|i| {
            // Relative to the largest, so that no sum is infinite.
            let largest = weights[i..].iter().copied().fold(0.0, f64::max);
            let rest: f64 = weights[i..].iter().map(|weight| weight / largest).sum();
            let share = weights[i] / largest / rest * ONE as f64;
            // A source of a tiny weight has a sample now and then, not none.
            (share.round() as u64).clamp(1, ONE - 1)
        });
        Self { shares: shares.collect() }
    }

    /// The source of a sample, from 0, and how many samples before it were from that source.
    pub(crate) fn of(&self, sample: u128) -> (usize, u128) {
        let mut index = sample;
        for (source, &share) in self.shares.iter().enumerate() {
            let before = part(index, share);
            if part(index + 1, share) > before {
                return (source, before);
            }
            index -= before;
        }
        (self.shares.len(), index)
    }
}

/// A share of everything.
const ONE: u64 = 1 << 32;

/// `n * share / 2^32`, rounded to the nearest whole number, without overflow.
fn part(n: u128, share: u64) -> u128 {
    let (share, one) = (u128::from(share), u128::from(ONE));
    n / one * share + ((n % one) * share + one / 2) / one
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn counts_follow_from_the_sample_alone(weights in proptest::collection::vec(0.001f64..10.0, 1..6)) {
            let turns = Turns::new(&weights);
            let total: f64 = weights.iter().sum();
            let mut counts = vec![0u128; weights.len()];
            for sample in 0..2000 {
                let (source, index) = turns.of(sample);
                prop_assert_eq!(index, counts[source]);
                counts[source] += 1;
                for (count, weight) in counts.iter().zip(&weights) {
                    let exact = (sample + 1) as f64 * weight / total;
                    prop_assert!((*count as f64 - exact).abs() < weights.len() as f64);
                }
            }
        }

        #[test]
        fn far_samples_have_neighbours(start in any::<u64>(), weights in proptest::collection::vec(1e-300f64..1e300, 1..5)) {
            let turns = Turns::new(&weights);
            let first = u128::from(start) << 20;
            let mut next = std::collections::HashMap::new();
            for sample in first..first + 50 {
                let (source, index) = turns.of(sample);
                let expected = next.insert(source, index + 1);
                prop_assert!(expected.is_none_or(|expected| expected == index));
            }
        }
    }

    #[test]
    fn two_equal_sources_alternate_and_one_has_all() {
        let order = |weights: &[f64]| -> Vec<usize> {
            let turns = Turns::new(weights);
            (0..8).map(|sample| turns.of(sample).0).collect()
        };
        assert_eq!(order(&[2.0, 2.0]), [0, 1, 0, 1, 0, 1, 0, 1]);
        assert_eq!(order(&[1.0, 3.0]), [1, 0, 1, 1, 1, 0, 1, 1]);
        assert_eq!(order(&[5.0]), [0; 8]);
        assert_eq!(Turns::new(&[1.0]).of(u128::MAX), (0, u128::MAX));
    }
}
