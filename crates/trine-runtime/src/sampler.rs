//! From logits to the next id.
//!
//! In this order: repetition penalty, temperature, top-k, top-p, min-p, then one draw. Temperature
//! 0 is greedy: the largest logit, the lowest id among equals. The exponential is that of
//! [`trine_kernels::nn`], so that the same logits and seed give the same ids on every machine.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use trine_kernels::{Largest, nn};

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
    /// Logits after the repetition penalty; kept for the next call, as the other two.
    penalized: Vec<f32>,
    /// Unnormalized probabilities of all ids; the likeliest has 1.
    weights: Vec<f32>,
    /// The likeliest of them, in order.
    sorted: Vec<(u32, f32)>,
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
        let rng = ChaCha8Rng::seed_from_u64(config.seed);
        Ok(Self { config, rng, penalized: Vec::new(), weights: Vec::new(), sorted: Vec::new() })
    }

    /// Which logits the next id depends on, if not on all: any other may be `-inf`, and the id is the same,
    /// as are those after it.
    ///
    /// It depends on all of them with a repetition penalty, and where neither top-k nor min-p alone bounds
    /// what is left: top-p is a share of the sum over all.
    pub fn largest(&self) -> Option<Largest> {
        let SamplerConfig { temperature, top_k, top_p, min_p, repetition_penalty, .. } =
            self.config;
        // Of logits that differ by less, roundings and the exponential may make the same probability, and
        // then the lower id comes first. Below the exponential's range all are alike: 0.
        let same = temperature * 2f32.powi(-14);
        match temperature {
            _ if repetition_penalty != 1.0 => None,
            0.0 => Some(Largest::ONE),
            _ if top_k > 0 => Some(Largest { count: top_k, within: same }),
            _ if top_p == 1.0 && min_p > 0.0 => {
                Some(Largest { count: 1, within: same - temperature * min_p.ln() })
            }
            _ => None,
        }
    }

    /// The next id given `logits` `(V,)` and the ids so far (for the repetition penalty).
    ///
    /// # Errors
    /// A NaN logit, or no logits.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, RuntimeError> {
        if logits.is_empty() {
            return Err(RuntimeError::Empty);
        }
        // In chunks, so that all of a chunk are looked at together.
        let nan = |chunk: &[f32]| chunk.iter().fold(false, |nan, logit| nan | logit.is_nan());
        if logits.chunks(64).any(nan) {
            let id = logits.iter().position(|logit| logit.is_nan()).unwrap_or_default();
            return Err(RuntimeError::NanLogit { id });
        }
        let SamplerConfig { temperature, repetition_penalty, .. } = self.config;
        let logits = if repetition_penalty == 1.0 {
            logits
        } else {
            penalize(&mut self.penalized, logits, history, repetition_penalty);
            &self.penalized
        };
        let max = nn::largest(logits);
        if temperature == 0.0 {
            return Ok(logits.iter().position(|logit| *logit == max).unwrap_or_default() as u32);
        }
        weigh(&mut self.weights, logits, max, temperature);
        let mut candidates = Descending::new(&self.weights, &mut self.sorted);
        let kept = keep_likely(self.config, &mut candidates);
        Ok(candidates.pick(kept, self.rng.random::<f64>()))
    }
}

/// Makes `penalized` the logits after the repetition penalty.
fn penalize(penalized: &mut Vec<f32>, logits: &[f32], history: &[u32], penalty: f32) {
    penalized.clear();
    penalized.extend_from_slice(logits);
    let mut seen = vec![false; logits.len()];
    for id in history.iter().map(|&id| id as usize) {
        if id < logits.len() && !std::mem::replace(&mut seen[id], true) {
            let logit = &mut penalized[id];
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
}

/// Makes `weights` the unnormalized probabilities `exp((logit - max) / temperature)`.
fn weigh(weights: &mut Vec<f32>, logits: &[f32], max: f32, temperature: f32) {
    weights.clear();
    weights.extend(logits.iter().map(|&logit| {
        let weight = nn::exp((logit - max) / temperature);
        // An infinite maximum would give NaN; such an id simply has all the probability.
        if logit == max { 1.0 } else { weight }
    }));
}

/// What top-k, top-p and min-p leave: the likeliest candidates.
#[derive(Clone, Copy, Debug)]
struct Kept {
    /// How many; at least 1.
    count: usize,
    /// The sum of their weights.
    mass: f64,
}

fn keep_likely(config: SamplerConfig, candidates: &mut Descending<'_>) -> Kept {
    let SamplerConfig { top_k, top_p, min_p, .. } = config;
    let all = candidates.weights.len();
    let count = if top_k == 0 { all } else { top_k.min(all) };
    let mass = if count == all { sum(candidates.weights) } else { candidates.mass(count) };
    if top_p == 1.0 && min_p == 0.0 {
        return Kept { count, mass };
    }
    let enough = f64::from(top_p) * mass;
    let mut kept = Kept { count: 0, mass: 0.0 };
    while let Some((_, weight)) = candidates.get(kept.count).filter(|_| kept.count < count) {
        // Of all with `top_p` 1, rounding might leave some out.
        let reached = top_p < 1.0 && kept.mass >= enough;
        if kept.count > 0 && (reached || weight < min_p) {
            break;
        }
        kept = Kept { count: kept.count + 1, mass: kept.mass + f64::from(weight) };
    }
    kept
}

/// Eight lanes: one after another, additions of f64 would take longer than the exponentials.
fn sum(weights: &[f32]) -> f64 {
    let mut lanes = [0.0; 8];
    for chunk in weights.chunks(8) {
        lanes.iter_mut().zip(chunk).for_each(|(lane, weight)| *lane += f64::from(*weight));
    }
    lanes.iter().sum()
}

/// Share of the largest weight not sorted yet from which on weights are sorted next.
const BAND: f32 = 1.0 / 128.0;

/// Candidates by falling weight, the lower id first among equals. They are sorted only as far as
/// they are asked for: to sort a vocabulary takes longer than a layer of the model, and nearly all
/// of the probability lies with a few.
struct Descending<'a> {
    /// Between 0 and 1, where the largest is.
    weights: &'a [f32],
    sorted: &'a mut Vec<(u32, f32)>,
    /// The weights of at least so much are in `sorted`.
    floor: f32,
}

impl<'a> Descending<'a> {
    fn new(weights: &'a [f32], sorted: &'a mut Vec<(u32, f32)>) -> Self {
        sorted.clear();
        Self { weights, sorted, floor: f32::INFINITY }
    }

    /// The candidate with so many before it.
    fn get(&mut self, index: usize) -> Option<(u32, f32)> {
        while index >= self.sorted.len() && self.floor > 0.0 {
            self.sort_more();
        }
        self.sorted.get(index).copied()
    }

    fn sort_more(&mut self) {
        let ceiling = self.floor;
        let floor = ceiling.min(1.0) * BAND;
        // After a few bands, the rest at once.
        self.floor = if floor < 1e-9 { 0.0 } else { floor };
        let start = self.sorted.len();
        let band = self.floor..ceiling;
        let within = (0..).zip(self.weights).filter(|(_, weight)| band.contains(*weight));
        self.sorted.extend(within.map(|(id, weight)| (id, *weight)));
        self.sorted[start..].sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    }

    /// The sum of the first `count` weights.
    fn mass(&mut self, count: usize) -> f64 {
        (0..count).filter_map(|index| self.get(index)).map(|c| f64::from(c.1)).sum()
    }

    /// The candidate at `point`, from 0 to below 1, when those kept lie side by side, each as long
    /// as its probability.
    fn pick(&mut self, kept: Kept, point: f64) -> u32 {
        let mut left = point * kept.mass;
        let mut last = 0;
        for index in 0..kept.count {
            let Some((id, weight)) = self.get(index) else { break };
            (last, left) = (id, left - f64::from(weight));
            if left < 0.0 {
                break;
            }
        }
        last
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
        let logits: Vec<f32> = (0..2000).map(|i| i as f32 * -0.007).collect();
        let mut weights = Vec::new();
        weigh(&mut weights, &logits, 0.0, 0.7);
        assert_eq!(weights.len(), 2000);
        for (id, weight) in weights.into_iter().enumerate() {
            assert_eq!(weight, nn::exp(id as f32 * -0.007 / 0.7), "id {id}");
        }
    }

    /// Weights of every size, many of them equal, some 0.
    fn weights(seed: u32, n: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        let mut weights: Vec<f32> = (0..n).map(|_| nn::exp(-((next() % 120) as f32))).collect();
        weights[next() as usize % n] = 1.0;
        weights
    }

    /// What the filters leave, from their definition: everything sorted, then cut three times.
    fn by_definition(config: SamplerConfig, weights: &[f32]) -> Vec<(u32, f32)> {
        let mut all: Vec<(u32, f32)> = (0..).zip(weights.iter().copied()).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        all.truncate(if config.top_k == 0 { weights.len() } else { config.top_k });
        let total: f64 = all.iter().map(|c| f64::from(c.1)).sum();
        let mut mass = 0.0;
        let before = |c: &(u32, f32)| {
            let before = mass;
            mass += f64::from(c.1);
            before
        };
        let before: Vec<f64> = all.iter().map(before).collect();
        let within = |(c, before): (&(u32, f32), f64)| {
            let cut =
                before > 0.0 && config.top_p < 1.0 && before >= f64::from(config.top_p) * total;
            (!cut && (before == 0.0 || c.1 >= config.min_p)).then_some(*c)
        };
        all.iter().zip(before).map_while(within).collect()
    }

    #[test]
    fn filters_keep_what_their_definitions_keep() {
        for (seed, n) in [(1, 1), (2, 2), (3, 63), (4, 500), (5, 3000)] {
            let weights = weights(seed, n);
            for top_k in [0, 1, 5, 400] {
                for top_p in [1e-9, 0.3, 0.7, 0.95, 0.999_999, 1.0] {
                    for min_p in [0.0, 1e-6, 0.05, 1.0] {
                        let config = SamplerConfig { top_k, top_p, min_p, ..HOT };
                        let expected = by_definition(config, &weights);
                        let mut sorted = Vec::new();
                        let mut candidates = Descending::new(&weights, &mut sorted);
                        let kept = keep_likely(config, &mut candidates);
                        let found: Vec<_> =
                            (0..kept.count).map(|i| candidates.get(i).unwrap()).collect();
                        assert_eq!(found, expected, "{n} weights, {config:?}");
                        let mass: f64 = expected.iter().map(|c| f64::from(c.1)).sum();
                        assert!((kept.mass / mass - 1.0).abs() < 1e-12);
                    }
                }
            }
        }
    }

    /// An id takes as much of the line from 0 to 1 as it has probability. So keeping a guess `x` when
    /// the id drawn is `x`, as speculative decoding does, keeps it with probability `p(x)`, and where
    /// it is not kept, another id `y` is drawn with probability `p(y) / (1 - p(x))`.
    #[test]
    fn a_guess_is_kept_with_its_probability_and_replaced_by_the_others_with_theirs() {
        const POINTS: usize = 100_000;
        let weights = [0.25, 1.0, 0.5, 0.125, 0.5, 0.001];
        for config in [HOT, SamplerConfig { top_k: 4, min_p: 0.2, ..HOT }] {
            let kept = by_definition(config, &weights);
            let total: f64 = kept.iter().map(|c| f64::from(c.1)).sum();
            let p = |id: u32| {
                kept.iter().filter(|c| c.0 == id).map(|c| f64::from(c.1)).sum::<f64>() / total
            };
            let mut sorted = Vec::new();
            let mut candidates = Descending::new(&weights, &mut sorted);
            let kept = keep_likely(config, &mut candidates);
            let drawn: Vec<u32> =
                (0..POINTS).map(|i| candidates.pick(kept, i as f64 / POINTS as f64)).collect();
            let share =
                |of: &[u32], id| of.iter().filter(|d| **d == id).count() as f64 / of.len() as f64;
            for guess in 0..weights.len() as u32 {
                let (found, expected) = (share(&drawn, guess), p(guess));
                assert!((found - expected).abs() < 1e-4, "{guess}: {found}, {expected}");
                let others: Vec<u32> = drawn.iter().copied().filter(|d| *d != guess).collect();
                for id in (0..weights.len() as u32).filter(|id| *id != guess) {
                    let (found, expected) = (share(&others, id), p(id) / (1.0 - p(guess)));
                    assert!((found - expected).abs() < 1e-4, "{id}: {found}, {expected}");
                }
            }
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

    /// Logits of which many differ in their last bits only, or not at all.
    fn close(seed: u32, n: usize, apart: f32) -> Vec<f32> {
        let mut state = seed;
        let mut next = |n: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % n
        };
        let logit = |_| next(9) as f32 * 1.7 - 4.0 + next(60) as f32 * apart;
        (0..n).map(logit).collect()
    }

    #[test]
    fn ids_depend_on_no_other_logits_than_the_sampler_says() {
        let settings = [
            SamplerConfig { temperature: 0.0, ..HOT },
            SamplerConfig { top_k: 3, ..HOT },
            SamplerConfig { top_k: 3, temperature: 0.01, ..HOT },
            SamplerConfig { top_k: 40, temperature: 30.0, ..HOT },
            SamplerConfig { top_k: 90, top_p: 0.7, min_p: 0.1, temperature: 0.3, ..HOT },
            SamplerConfig { top_k: 1000, ..HOT },
            SamplerConfig { min_p: 0.03, temperature: 1.3, ..HOT },
            SamplerConfig { min_p: 1.0, temperature: 1.3, ..HOT },
        ];
        let mut spared = 0;
        for config in settings {
            let (mut all, mut some) =
                (Sampler::new(config).unwrap(), Sampler::new(config).unwrap());
            let Largest { count, within } = all.largest().unwrap();
            for (seed, apart) in (0..300).zip([0.0, 1e-7, 5e-7, 1e-6, 1e-5, 0.02].repeat(50)) {
                let logits = close(seed, 500, apart);
                let mut sorted = logits.clone();
                sorted.sort_by(|a, b| b.total_cmp(a));
                let least = sorted[count.min(500) - 1] - within;
                let keep = |logit: &f32| if *logit < least { f32::NEG_INFINITY } else { *logit };
                let kept: Vec<f32> = logits.iter().map(keep).collect();
                spared += kept.iter().filter(|logit| **logit == f32::NEG_INFINITY).count();
                for _ in 0..5 {
                    let expected = all.sample(&logits, &[]).unwrap();
                    assert_eq!(some.sample(&kept, &[]).unwrap(), expected, "{config:?}, {apart}");
                }
            }
        }
        assert!(spared > 300_000, "{spared}");
        for config in [
            HOT,
            SamplerConfig { top_p: 0.9, min_p: 0.1, ..HOT },
            SamplerConfig { temperature: 0.0, repetition_penalty: 0.9, ..HOT },
        ] {
            assert_eq!(Sampler::new(config).unwrap().largest(), None, "{config:?}");
        }
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
