//! Numbers that are not finite and losses that leap: found before they reach a parameter.
//!
//! A loss is a spike when it lies more than so many standard deviations above the mean of the losses
//! before it, as in OLMo-core's `SkipStepOptimizer`. Spikes count among the losses that later ones
//! are compared with, so that a lasting change, of the data for instance, is soon taken for normal.

use std::collections::{BTreeMap, VecDeque};

use crate::Bitnet;
use crate::config::TrainConfig;

/// The least standard deviation, as a share of the mean loss: a run that hardly varies is not to be
/// alarmed by little.
const LEAST_DEVIATION: f64 = 0.01;

/// A batch that nothing was updated with.
#[derive(Clone, Debug, PartialEq)]
pub struct Anomaly {
    /// The step that was to be made, from 1.
    pub step: usize,
    /// Its loss in nats.
    pub loss: f32,
    /// What was wrong, and where.
    pub what: String,
    /// The parameter whose gradient is not finite, that nearest to the loss, where it began; else
    /// that of the largest gradient norm.
    pub parameter: String,
    /// What was done about it.
    pub action: Action,
}

/// What was done about an [`Anomaly`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The batch was left out.
    Skipped,
    /// The run went back to a step and leaves out the batches in between.
    Rewound {
        /// The step of the checkpoint; 0 where there is none yet.
        to: usize,
    },
}

/// What is wrong with a step's loss and global gradient norm, given the losses before it.
pub(crate) fn judge(
    recent: &VecDeque<f32>,
    loss: f32,
    grad_norm: f64,
    train: &TrainConfig,
) -> Option<String> {
    if !loss.is_finite() {
        return Some(format!("the loss became {loss}"));
    }
    if !grad_norm.is_finite() {
        return Some(format!("the gradient norm became {grad_norm} at a loss of {loss}"));
    }
    if train.spike_sigmas == 0.0 || recent.len() < train.spike_window {
        return None;
    }
    let n = recent.len() as f64;
    let mean = recent.iter().map(|l| f64::from(*l)).sum::<f64>() / n;
    let squares = recent.iter().map(|l| (f64::from(*l) - mean).powi(2)).sum::<f64>();
    let deviation = (squares / n).sqrt().max(LEAST_DEVIATION * mean.abs());
    let sigmas = (f64::from(loss) - mean) / deviation;
    (sigmas > train.spike_sigmas).then(|| {
        format!(
            "the loss leapt to {loss:.4}, {sigmas:.1} standard deviations above the mean {mean:.4} \
             of the {n} steps before"
        )
    })
}

/// Adds a loss to those that later ones are judged by.
pub(crate) fn remember(recent: &mut VecDeque<f32>, loss: f32, window: usize) {
    if loss.is_finite() {
        recent.push_back(loss);
    }
    while recent.len() > window {
        recent.pop_front();
    }
}

/// The parameter to blame, given the norms of gradients: the one nearest to the loss whose gradient is not
/// finite, since all before it inherit that in the backward pass; else the one of the largest norm.
pub(crate) fn culprit(model: &Bitnet, norms: &BTreeMap<String, f64>) -> (String, f64) {
    let forward = model.config().tensor_ids().into_iter().map(|id| id.canonical());
    let forward: Vec<String> = forward.collect();
    // What is no tensor of the configuration is looked at last.
    let others = norms.keys().filter(|name| !forward.contains(name));
    let mut largest = (String::new(), f64::NEG_INFINITY);
    for name in forward.iter().rev().chain(others) {
        let Some(norm) = norms.get(name).copied() else { continue };
        if !norm.is_finite() {
            return (name.clone(), norm);
        }
        if norm > largest.1 {
            largest = (name.clone(), norm);
        }
    }
    largest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train() -> TrainConfig {
        TrainConfig { spike_window: 20, spike_sigmas: 4.0, ..TrainConfig::default() }
    }

    /// Losses around 2 with a deviation of 0.1.
    fn recent(n: usize) -> VecDeque<f32> {
        (0..n).map(|i| if i % 2 == 0 { 1.9 } else { 2.1 }).collect()
    }

    #[test]
    fn a_leap_is_found_and_noise_is_not() {
        assert_eq!(judge(&recent(20), 2.39, 1.0, &train()), None);
        assert_eq!(judge(&recent(20), 0.1, 1.0, &train()), None);
        let what = judge(&recent(20), 2.5, 1.0, &train()).unwrap();
        assert!(what.contains("2.5000") && what.contains("5.0 standard deviations"), "{what}");
        // Too short a history, or nobody asked.
        assert_eq!(judge(&recent(19), 9.0, 1.0, &train()), None);
        let off = TrainConfig { spike_sigmas: 0.0, ..train() };
        assert_eq!(judge(&recent(20), 9.0, 1.0, &off), None);
        // A constant loss does not make the smallest change a spike.
        assert_eq!(judge(&VecDeque::from([2.0; 20]), 2.07, 1.0, &train()), None);
    }

    #[test]
    fn what_is_not_finite_is_found_without_history() {
        assert!(judge(&VecDeque::new(), f32::NAN, 1.0, &train()).unwrap().contains("NaN"));
        assert!(judge(&VecDeque::new(), 1.0, f64::INFINITY, &train()).unwrap().contains("inf"));
    }

    #[test]
    fn a_lasting_change_becomes_normal() {
        let mut recent = recent(20);
        let mut spikes = 0;
        for _ in 0..20 {
            spikes += usize::from(judge(&recent, 2.6, 1.0, &train()).is_some());
            remember(&mut recent, 2.6, 20);
            remember(&mut recent, f32::NAN, 20);
            assert_eq!(recent.len(), 20);
        }
        assert!((1..10).contains(&spikes), "{spikes}");
    }
}
