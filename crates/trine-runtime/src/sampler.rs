//! From logits to the next id.
//!
//! In this order: repetition penalty, temperature, top-k, top-p, min-p, then one draw. Temperature
//! 0 is greedy: the largest logit, the lowest id among equals. The exponential is that of
//! [`trine_kernels::nn`], so that the same logits and seed give the same ids on every machine.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use trine_kernels::nn;

use crate::RuntimeError;

/// How to choose among the vocabulary. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerConfig {
    /// Logits are divided by it; 0 takes the largest logit.
    pub temperature: f32,
    /// Only the `k` likeliest ids; 0 takes all.
    pub top_k: usize,
    /// The likeliest ids that together reach this probability; 1 takes all.
    pub top_p: f32,
    /// Ids of at least this probability relative to the likeliest; 0 takes all.
    pub min_p: f32,
    /// Logits of ids that occurred are divided (or, below 0, multiplied) by it (CTRL, arXiv
    /// 1909.05858); 1 leaves them.
    pub repetition_penalty: f32,
    /// Seed of the draws: same seed, same logits, same ids.
    pub seed: u64,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

/// A source of ids.
pub struct Sampler {
    config: SamplerConfig,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler with its own random numbers.
    ///
    /// # Errors
    /// The setting that is out of range.
    pub fn new(config: SamplerConfig) -> Result<Self, RuntimeError> {
        let check = |name, holds: bool, expected, found| {
            if holds { Ok(()) } else { Err(RuntimeError::Setting { name, expected, found }) }
        };
        let SamplerConfig { temperature, top_p, min_p, repetition_penalty, .. } = config;
        let finite_from_zero = temperature >= 0.0 && temperature.is_finite();
        check("temperature", finite_from_zero, "a number of at least 0", temperature)?;
        check("top_p", top_p > 0.0 && top_p <= 1.0, "a share above 0, at most 1", top_p)?;
        check("min_p", (0.0..=1.0).contains(&min_p), "a share from 0 to 1", min_p)?;
        let positive = repetition_penalty > 0.0 && repetition_penalty.is_finite();
        check("repetition_penalty", positive, "a number above 0", repetition_penalty)?;
        Ok(Self { config, rng: ChaCha8Rng::seed_from_u64(config.seed) })
    }

    /// The next id given `logits` `(V,)` and the ids so far (for the repetition penalty).
    ///
    /// # Errors
    /// A NaN logit, or no logits.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, RuntimeError> {
        if logits.is_empty() {
            return Err(RuntimeError::Empty);
        }
        if let Some(id) = logits.iter().position(|l| l.is_nan()) {
            return Err(RuntimeError::NanLogit { id });
        }
        let mut candidates: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        self.penalize(&mut candidates, history);
        if self.config.temperature == 0.0 {
            let better = |best: (u32, f32), c: &(u32, f32)| if c.1 > best.1 { *c } else { best };
            return Ok(candidates.iter().fold(candidates[0], better).0);
        }
        self.keep_likely(&mut candidates);
        Ok(self.draw(&candidates))
    }

    fn penalize(&self, candidates: &mut [(u32, f32)], history: &[u32]) {
        let penalty = self.config.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut seen = vec![false; candidates.len()];
        for &id in history {
            if let Some(seen) = seen.get_mut(id as usize) {
                *seen = true;
            }
        }
        for ((_, logit), seen) in candidates.iter_mut().zip(seen) {
            if seen {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    /// Replaces logits by unnormalized probabilities (the likeliest has 1) and drops what top-k,
    /// top-p and min-p drop; at least one candidate stays.
    fn keep_likely(&self, candidates: &mut Vec<(u32, f32)>) {
        let SamplerConfig { temperature, top_k, top_p, min_p, .. } = self.config;
        let descending = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, descending);
            candidates.truncate(top_k);
        }
        candidates.sort_unstable_by(descending);
        let max = candidates[0].1;
        for (_, p) in candidates.iter_mut() {
            // An infinite maximum would give NaN; such an id simply has all the probability.
            *p = if *p == max { 1.0 } else { nn::exp((*p - max) / temperature) };
        }
        let total: f64 = candidates.iter().map(|c| f64::from(c.1)).sum();
        let mut mass = 0.0;
        let enough = candidates.iter().position(|c| {
            mass += f64::from(c.1);
            mass >= f64::from(top_p) * total
        });
        candidates.truncate(enough.map_or(candidates.len(), |last| last + 1));
        let likely = candidates.iter().position(|c| c.1 < min_p).unwrap_or(candidates.len());
        candidates.truncate(likely.max(1));
    }

    fn draw(&mut self, candidates: &[(u32, f32)]) -> u32 {
        let total: f64 = candidates.iter().map(|c| f64::from(c.1)).sum();
        let mut left = self.rng.random::<f64>() * total;
        for &(id, p) in candidates {
            left -= f64::from(p);
            if left < 0.0 {
                return id;
            }
        }
        candidates[candidates.len() - 1].0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(config: SamplerConfig, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(config).unwrap();
        (0..n).map(|_| sampler.sample(logits, &[]).unwrap()).collect()
    }

    const HOT: SamplerConfig = SamplerConfig {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed: 7,
    };

    #[test]
    fn greedy_takes_the_lowest_of_equal_maxima() {
        assert_eq!(ids(SamplerConfig::default(), &[0.0, 3.0, 3.0], 1), [1]);
        assert_eq!(ids(SamplerConfig::default(), &[f32::NEG_INFINITY; 2], 1), [0]);
    }

    #[test]
    fn same_seed_same_ids_other_seed_other_ids() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32 / 3.0).collect();
        assert_eq!(ids(HOT, &logits, 40), ids(HOT, &logits, 40));
        assert_ne!(ids(HOT, &logits, 40), ids(SamplerConfig { seed: 8, ..HOT }, &logits, 40));
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let drawn = ids(HOT, &[0.0, 2f32.ln(), 5f32.ln()], 8000);
        for (id, share) in [(0, 0.125), (1, 0.25), (2, 0.625)] {
            let seen = drawn.iter().filter(|d| **d == id).count() as f64 / 8000.0;
            assert!((seen - share).abs() < 0.02, "id {id}: {seen} instead of {share}");
        }
    }

    /// The C library's exponential differs from it in the last place here and there, and from one
    /// library to the next.
    #[test]
    fn probabilities_do_not_depend_on_the_c_library() {
        let sampler = Sampler::new(SamplerConfig { temperature: 0.7, ..HOT }).unwrap();
        let mut candidates: Vec<(u32, f32)> = (0..2000).map(|i| (i, i as f32 * -0.007)).collect();
        sampler.keep_likely(&mut candidates);
        assert_eq!(candidates.len(), 2000);
        for (id, p) in candidates {
            assert_eq!(p, nn::exp(id as f32 * -0.007 / 0.7), "id {id}");
        }
    }

    #[test]
    fn filters_keep_what_they_promise() {
        let logits = [0.0, 1.0, 2.0, 3.0];
        let seen = |config| {
            let mut seen = ids(config, &logits, 500);
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        assert_eq!(seen(HOT), [0, 1, 2, 3]);
        assert_eq!(seen(SamplerConfig { top_k: 2, ..HOT }), [2, 3]);
        // Probabilities .03 .09 .24 .64: the first to reach 0.8 are 3 and 2.
        assert_eq!(seen(SamplerConfig { top_p: 0.8, ..HOT }), [2, 3]);
        assert_eq!(seen(SamplerConfig { top_p: 1e-9, ..HOT }), [3]);
        // exp(-1) = .37, exp(-2) = .14.
        assert_eq!(seen(SamplerConfig { min_p: 0.3, ..HOT }), [2, 3]);
        assert_eq!(seen(SamplerConfig { temperature: 0.01, ..HOT }), [3]);
    }

    #[test]
    fn repetition_penalty_pushes_both_signs_down() {
        let config = SamplerConfig { repetition_penalty: 2.0, ..SamplerConfig::default() };
        let mut sampler = Sampler::new(config).unwrap();
        assert_eq!(sampler.sample(&[3.0, 2.0], &[0]).unwrap(), 1);
        assert_eq!(sampler.sample(&[-1.0, -1.5], &[0, 0, 9]).unwrap(), 1);
    }

    #[test]
    fn infinite_logits_are_drawn_and_nan_is_an_error() {
        assert_eq!(ids(HOT, &[0.0, f32::INFINITY], 20), [1; 20]);
        assert_eq!(ids(HOT, &[f32::NEG_INFINITY, 0.0], 20), [1; 20]);
        let mut sampler = Sampler::new(HOT).unwrap();
        let error = sampler.sample(&[0.0, f32::NAN], &[]).unwrap_err();
        assert!(matches!(error, RuntimeError::NanLogit { id: 1 }));
        assert!(matches!(sampler.sample(&[], &[]), Err(RuntimeError::Empty)));
    }

    #[test]
    fn settings_out_of_range_are_named() {
        for (config, name) in [
            (SamplerConfig { temperature: -1.0, ..HOT }, "temperature"),
            (SamplerConfig { temperature: f32::NAN, ..HOT }, "temperature"),
            (SamplerConfig { top_p: 0.0, ..HOT }, "top_p"),
            (SamplerConfig { min_p: 1.5, ..HOT }, "min_p"),
            (SamplerConfig { repetition_penalty: 0.0, ..HOT }, "repetition_penalty"),
        ] {
            let error = Sampler::new(config).err().unwrap().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
