//! Learning rate and weight decay over a run.
//!
//! `two-stage` is the BitNet recipe ("The Era of 1-bit LLMs: Training Tips, Code and FAQ"; 2B4T
//! report, section 2.2): a cosine from a high peak to the end of the run; part of the way through, an
//! abrupt drop to the cosine of a lower peak; weight decay follows a cosine from its peak to zero in
//! the first stage and stays zero in the second.
//!
//! `wsd` keeps the peak and lets the rate fall at the end (MiniCPM, arXiv 2404.06395; Hägele et al.,
//! arXiv 2405.18392), so that one run can be prolonged from before its fall.

use std::f64::consts::PI;

use crate::config::{DecayShape, OptimizerConfig, ScheduleConfig, ScheduleKind};

/// Learning rate and weight decay of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// The rates of step `step` (from 0) of `steps`.
pub fn rates(
    optimizer: &OptimizerConfig,
    schedule: &ScheduleConfig,
    step: usize,
    steps: usize,
) -> Rates {
    let (peak, decay) = (optimizer.learning_rate, optimizer.weight_decay);
    let floor = schedule.min_learning_rate;
    let (start, end) = (schedule.warmup_steps as f64, steps as f64);
    // How much of the way from `from` to `to` this step has gone, from 0 to 1.
    let progress =
        |from: f64, to: f64| ((step as f64 - from) / (to - from).max(1.0)).clamp(0.0, 1.0);
    // The share of the rate that the warm-up allows at this step.
    let warm = ((step + 1) as f64 / (start + 1.0)).min(1.0);
    let (learning_rate, weight_decay) = match schedule.kind {
        ScheduleKind::Constant => (peak, decay),
        ScheduleKind::Cosine => (cosine(peak, floor, progress(start, end)), decay),
        ScheduleKind::Linear => (peak + (floor - peak) * progress(start, end), decay),
        ScheduleKind::Wsd => {
            let fall = progress(end - (end * schedule.decay_fraction).round(), end);
            let left = match schedule.decay_shape {
                DecayShape::Linear => 1.0 - fall,
                DecayShape::OneMinusSqrt => 1.0 - fall.sqrt(),
            };
            (floor + (peak - floor) * left, decay)
        }
        ScheduleKind::TwoStage => {
            let switch = (end * schedule.switch_at).round();
            if (step as f64) < switch {
                (
                    cosine(peak, floor, progress(start, end)),
                    cosine(decay, 0.0, progress(start, switch)),
                )
            } else {
                (cosine(schedule.second_learning_rate, floor, progress(start, end)), 0.0)
            }
        }
    };
    Rates { learning_rate: learning_rate * warm, weight_decay }
}

fn cosine(from: f64, to: f64, progress: f64) -> f64 {
    to + 0.5 * (1.0 + (PI * progress).cos()) * (from - to)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn optimizer() -> OptimizerConfig {
        OptimizerConfig { learning_rate: 1e-3, weight_decay: 0.1, ..OptimizerConfig::default() }
    }

    fn schedule(kind: ScheduleKind) -> ScheduleConfig {
        ScheduleConfig {
            kind,
            warmup_steps: 10,
            min_learning_rate: 1e-4,
            switch_at: 0.5,
            second_learning_rate: 5e-4,
            ..ScheduleConfig::default()
        }
    }

    #[test]
    fn warmup_rises_to_the_peak_and_cosine_falls_to_the_floor() {
        let at =
            |step| rates(&optimizer(), &schedule(ScheduleKind::Cosine), step, 100).learning_rate;
        assert!((at(0) - 1e-3 / 11.0).abs() < 1e-12);
        assert_eq!(at(10), 1e-3);
        assert!((at(55) - 5.5e-4).abs() < 1e-12);
        assert!((at(100) - 1e-4).abs() < 1e-12);
        assert!((0..99).all(|step| step < 10 || at(step + 1) < at(step)));
    }

    #[test]
    fn two_stage_drops_and_stops_decaying_weights() {
        let at = |step| rates(&optimizer(), &schedule(ScheduleKind::TwoStage), step, 100);
        let (before, after) = (at(49).learning_rate, at(50).learning_rate);
        assert!(after < 0.65 * before, "{before} to {after}");
        assert!((50..99).all(|step| at(step + 1).learning_rate < at(step).learning_rate));
        assert!((at(100).learning_rate - 1e-4).abs() < 1e-12);
        assert_eq!(at(10).weight_decay, 0.1);
        assert!(at(49).weight_decay < 1e-3);
        assert_eq!(at(50).weight_decay, 0.0);
    }

    #[test]
    fn wsd_is_stable_then_falls_to_the_floor() {
        for (shape, halfway) in [
            (DecayShape::Linear, 0.5),
            (DecayShape::OneMinusSqrt, 1.0 - std::f64::consts::FRAC_1_SQRT_2),
        ] {
            let mut schedule = schedule(ScheduleKind::Wsd);
            (schedule.decay_fraction, schedule.decay_shape) = (0.4, shape);
            let at = |step| rates(&optimizer(), &schedule, step, 100).learning_rate;
            assert!(at(9) < 1e-3);
            assert!((10..=60).all(|step| at(step) == 1e-3));
            assert!((60..99).all(|step| at(step + 1) < at(step)));
            assert!((at(80) - (1e-4 + 9e-4 * halfway)).abs() < 1e-12, "{shape:?}");
            assert!((at(100) - 1e-4).abs() < 1e-12);
        }
    }
}
