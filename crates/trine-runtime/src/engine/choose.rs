//! From a request's logits to its next id.

use std::collections::HashMap;

use trine_kernels::Largest;

use super::constraint::Constraint;
use super::logprobs::Logprob;
use super::request::{Request, Sampling, Token};
use crate::{RuntimeError, Sampler};

/// What one request needs for choosing ids.
pub(super) struct Chooser {
    sampler: Sampler,
    sampling: Sampling,
    constraint: Option<Box<dyn Constraint>>,
    logprobs: Option<usize>,
    /// How often ids were generated; only where penalties ask.
    counts: HashMap<u32, u32>,
}

impl Chooser {
    /// Takes what a request says about choosing out of it.
    pub(super) fn new(request: &mut Request) -> Result<Self, RuntimeError> {
        let sampling = std::mem::take(&mut request.sampling);
        let sampler = Sampler::new(sampling.sampler)?;
        let (constraint, logprobs) = (request.constraint.take(), request.logprobs);
        Ok(Self { sampler, sampling, constraint, logprobs, counts: HashMap::new() })
    }

    /// Which logits the next id depends on, if not on all; see [`Sampler::largest`].
    pub(super) fn largest(&self) -> Option<Largest> {
        let Sampling { presence_penalty, frequency_penalty, logit_bias, .. } = &self.sampling;
        let penalties = *presence_penalty >= 0.0 && *frequency_penalty >= 0.0;
        let lowers = penalties && logit_bias.iter().all(|(_, bias)| *bias <= 0.0);
        if !lowers || self.constraint.is_some() || self.logprobs.is_some() {
            return None;
        }
        // Those that are lowered may fall behind as many others.
        let largest = self.sampler.largest()?;
        Some(Largest { count: largest.count + self.counts.len() + logit_bias.len(), ..largest })
    }

    /// The next id, given logits `(V,)` and the text so far.
    pub(super) fn choose(&mut self, logits: &[f32], text: &[u32]) -> Result<Token, RuntimeError> {
        let Sampling { presence_penalty, frequency_penalty, logit_bias, .. } = &self.sampling;
        let constraint = &mut self.constraint;
        let id = if logit_bias.is_empty() && self.counts.is_empty() && constraint.is_none() {
            self.sampler.sample(logits, text)?
        } else {
            let mut moved = logits.to_vec();
            for (&id, &count) in &self.counts {
                moved[id as usize] -= presence_penalty + frequency_penalty * count as f32;
            }
            for &(id, bias) in logit_bias {
                moved[id as usize] += bias;
            }
            if let Some(constraint) = constraint {
                constraint.mask(&mut moved).map_err(RuntimeError::Constraint)?;
            }
            self.sampler.sample(&moved, text)?
        };
        if let Some(constraint) = constraint {
            constraint.accept(id).map_err(RuntimeError::Constraint)?;
        }
        if *presence_penalty != 0.0 || *frequency_penalty != 0.0 {
            *self.counts.entry(id).or_default() += 1;
        }
        let logprob = self.logprobs.map(|top| Logprob::new(logits, id, top));
        Ok(Token { id, logprob })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SamplerConfig;

    fn ids(sampling: Sampling, logits: &[f32], n: usize) -> Vec<u32> {
        let mut request = Request { sampling, ..Request::default() };
        let mut chooser = Chooser::new(&mut request).unwrap();
        (0..n).map(|_| chooser.choose(logits, &[]).unwrap().id).collect()
    }

    #[test]
    fn presence_counts_once_and_frequency_every_time() {
        let logits = [3.0, 2.5, 0.0];
        let presence = Sampling { presence_penalty: 1.0, ..Sampling::default() };
        assert_eq!(ids(presence, &logits, 4), [0, 1, 0, 0]);
        let frequency = Sampling { frequency_penalty: 1.0, ..Sampling::default() };
        assert_eq!(ids(frequency, &logits, 5), [0, 1, 0, 1, 0]);
    }

    #[test]
    fn biases_move_and_forbid() {
        let bias = |id, bias| Sampling { logit_bias: vec![(id, bias)], ..Sampling::default() };
        assert_eq!(ids(bias(2, 100.0), &[3.0, 2.5, 0.0], 1), [2]);
        assert_eq!(ids(bias(0, f32::NEG_INFINITY), &[3.0, 2.5, 0.0], 1), [1]);
    }

    /// Every id once, in order; then nothing.
    #[derive(Clone, Debug)]
    struct InOrder(u32);

    impl Constraint for InOrder {
        fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
            if self.0 as usize >= logits.len() {
                return Err("all were there".to_owned());
            }
            let next = self.0 as usize;
            let others = logits.iter_mut().enumerate().filter(|(id, _)| *id != next);
            others.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
            Ok(())
        }

        fn accept(&mut self, id: u32) -> Result<(), String> {
            self.0 = id + 1;
            Ok(())
        }

        fn boxed(&self) -> Box<dyn Constraint> {
            Box::new(self.clone())
        }
    }

    #[test]
    fn a_constraint_decides_among_all_ids_and_every_text_has_its_own() {
        let constraint: Option<Box<dyn Constraint>> = Some(Box::new(InOrder(0)));
        for temperature in [0.0, 1.0] {
            let sampler = SamplerConfig { temperature, ..SamplerConfig::default() };
            let sampling = Sampling { sampler, ..Sampling::default() };
            let constraint = constraint.clone();
            let request = Request { sampling, constraint, ..Request::default() };
            for _ in 0..2 {
                let mut chooser = Chooser::new(&mut request.clone()).unwrap();
                let mut next = || chooser.choose(&[0.0, 9.0, 1.0], &[]).map(|token| token.id);
                assert_eq!([next().unwrap(), next().unwrap(), next().unwrap()], [0, 1, 2]);
                assert!(next().unwrap_err().to_string().contains("all were there"));
            }
        }
    }

    #[test]
    fn log_probabilities_are_the_models_whatever_moved_the_choice() {
        let sampling = Sampling { logit_bias: vec![(1, 10.0)], ..Sampling::default() };
        let mut request = Request { sampling, logprobs: Some(1), ..Request::default() };
        let logprob = Chooser::new(&mut request).unwrap().choose(&[0.0, 0.0], &[]).unwrap().logprob;
        let Logprob { id, logprob, top } = logprob.unwrap();
        assert_eq!((id, top[0].0), (1, 0));
        assert!((logprob - 0.5f32.ln()).abs() < 1e-6);
    }
}
