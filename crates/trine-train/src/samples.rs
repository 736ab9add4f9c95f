//! Texts that a model in training writes, from the same prompts every time.
//!
//! The trainer's own forward pass makes them, so they need neither a checkpoint nor an export and
//! work for everything that can be trained. There is no key-value cache: every token is a pass over
//! the texts so far, all prompts together. That is for a few short texts every few hundred steps.

use candle_core::{Device, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use trine_tokenizer::Tokenizer;

use crate::config::require;
use crate::{Bitnet, TrainError};

/// Texts written during training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [samples]")]
pub struct SamplesConfig {
    /// Updates between samples, the last update is always one; 0 turns them off.
    pub every: usize,
    /// What the texts begin with; an empty one begins a document.
    pub prompts: Vec<String>,
    /// Most tokens written after a prompt.
    pub max_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
}

impl Default for SamplesConfig {
    fn default() -> Self {
        Self { every: 0, prompts: vec![String::new()], max_tokens: 64, temperature: 0.8 }
    }
}

impl SamplesConfig {
    pub(crate) fn check(&self) -> Result<(), TrainError> {
        require(self.max_tokens > 0, "samples.max_tokens", "at least 1", self.max_tokens)?;
        let t = self.temperature;
        require(t >= 0.0 && t.is_finite(), "samples.temperature", "a number of at least 0", t)
    }
}

/// A prompt and what a model wrote after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sample {
    /// The beginning.
    pub prompt: String,
    /// The continuation alone.
    pub text: String,
}

/// Writes samples; knows the prompts as ids.
pub struct Sampler {
    config: SamplesConfig,
    tokenizer: Tokenizer,
    prompts: Vec<Vec<u32>>,
    /// Most ids of a text.
    positions: usize,
    seed: u64,
}

impl Sampler {
    /// A sampler for models with so many positions. The same `seed` draws the same random numbers
    /// in every call, so that texts differ by the model alone.
    ///
    /// # Errors
    /// A prompt that leaves no position free, or an empty one where no token begins a text.
    pub fn new(
        config: SamplesConfig,
        tokenizer: Tokenizer,
        positions: usize,
        seed: u64,
    ) -> Result<Self, TrainError> {
        let prompts = match config.every {
            0 => Vec::new(),
            _ => config
                .prompts
                .iter()
                .map(|prompt| encode(prompt, &tokenizer, positions))
                .collect::<Result<_, _>>()?,
        };
        Ok(Self { config, tokenizer, prompts, positions, seed })
    }

    /// Whether samples are written after `step` of `steps`.
    pub fn is_due(&self, step: usize, steps: usize) -> bool {
        let every = self.config.every;
        every > 0 && !self.prompts.is_empty() && (step.is_multiple_of(every) || step == steps)
    }

    /// One text for every prompt.
    ///
    /// # Errors
    /// Masters that are not finite.
    pub fn write(&self, model: &Bitnet) -> Result<Vec<Sample>, TrainError> {
        let mut texts = self.prompts.clone();
        let mut ended = vec![false; texts.len()];
        let stream = |i| {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(i as u64);
            rng
        };
        let mut rngs: Vec<ChaCha8Rng> = (0..texts.len()).map(stream).collect();
        for _ in 0..self.config.max_tokens {
            let open: Vec<usize> = (0..texts.len())
                .filter(|&i| !ended[i] && texts[i].len() < self.positions)
                .collect();
            if open.is_empty() {
                break;
            }
            let logits = next_logits(model, open.iter().map(|&i| texts[i].as_slice()))?;
            for (&i, logits) in open.iter().zip(&logits) {
                let id = choose(logits, self.config.temperature, &mut rngs[i]);
                ended[i] = self.ends(id);
                texts[i].push(id);
            }
        }
        let sample = |((prompt, ids), text): ((&String, &Vec<u32>), &Vec<u32>)| {
            let text = self.tokenizer.decode(&text[ids.len()..], true)?;
            Ok(Sample { prompt: prompt.clone(), text })
        };
        self.config.prompts.iter().zip(&self.prompts).zip(&texts).map(sample).collect()
    }

    fn ends(&self, id: u32) -> bool {
        Some(id) == self.tokenizer.eos_id() || Some(id) == self.tokenizer.eot_id()
    }
}

/// The ids of a prompt; of an empty one the token that begins a text or ended the one before.
fn encode(prompt: &str, tokenizer: &Tokenizer, positions: usize) -> Result<Vec<u32>, TrainError> {
    let mut ids = tokenizer.encode(prompt, true)?;
    if ids.is_empty() {
        ids.extend(tokenizer.bos_id().or(tokenizer.eos_id()));
    }
    let expected = "prompts that are not empty, as no token of the tokenizer begins a text";
    require(!ids.is_empty(), "samples.prompts", expected, format!("{prompt:?}"))?;
    let (expected, n) = (format!("prompts of fewer than {positions} tokens"), ids.len());
    require(n < positions, "samples.prompts", &expected, format!("{prompt:?}, which has {n}"))?;
    Ok(ids)
}

/// The logits after each of the texts, `(V,)` each.
///
/// Shorter texts are filled up behind, where attention does not look.
fn next_logits<'a>(
    model: &Bitnet,
    texts: impl ExactSizeIterator<Item = &'a [u32]> + Clone,
) -> Result<Vec<Vec<f32>>, TrainError> {
    let (rows, longest) = (texts.len(), texts.clone().map(<[u32]>::len).max().unwrap_or(0));
    let mut ids = Vec::with_capacity(rows * longest);
    for text in texts.clone() {
        ids.extend_from_slice(text);
        ids.resize(ids.len().next_multiple_of(longest), 0);
    }
    let ids = Tensor::from_vec(ids, (rows, longest), &Device::Cpu)?;
    let last: Vec<usize> = texts.map(|text| text.len() - 1).collect();
    Ok(model.logits_at(&ids, &last)?.to_vec2()?)
}

/// The likeliest id, or one drawn with the probabilities of the logits.
fn choose(logits: &[f32], temperature: f64, rng: &mut ChaCha8Rng) -> u32 {
    let likeliest = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
    if temperature == 0.0 {
        return likeliest as u32;
    }
    let weight = |logit: f32| (f64::from(logit - logits[likeliest]) / temperature).exp();
    let mut left = rng.random::<f64>() * logits.iter().map(|l| weight(*l)).sum::<f64>();
    for (id, logit) in logits.iter().enumerate() {
        left -= weight(*logit);
        if left < 0.0 {
            return id as u32;
        }
    }
    likeliest as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_drawn_with_their_probabilities() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let logits = [0.0, 3f32.ln(), f32::NEG_INFINITY];
        assert_eq!(choose(&logits, 0.0, &mut rng), 1);
        let drawn: Vec<u32> = (0..4000).map(|_| choose(&logits, 1.0, &mut rng)).collect();
        let ones = drawn.iter().filter(|id| **id == 1).count();
        assert!((2850..3150).contains(&ones) && !drawn.contains(&2), "{ones} of 4000");
    }

    #[test]
    fn prompts_that_cannot_be_continued_are_named() {
        let tokenizer = Tokenizer::characters("abc").unwrap();
        assert_eq!(encode("cab", &tokenizer, 4).unwrap().len(), 3);
        let error = encode("cab", &tokenizer, 3).unwrap_err().to_string();
        assert!(error.contains("samples.prompts") && error.contains("cab"), "{error}");
    }
}
