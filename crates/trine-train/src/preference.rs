//! Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290): of two answers to a question, the
//! better one is to gain on the worse one, compared with the model that the run began with.
//!
//! With log-probabilities of a pair in training, `c` and `r`, and of the same pair in the beginning, `c0` and
//! `r0`, the loss is `-ln sigmoid(beta ((c - c0) - (r - r0)))`.

use serde::Serialize;

/// What preferences say of a model, as means over pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Preferences {
    /// The loss, in nats.
    pub loss: f64,
    /// Share of the pairs of which the better answer gained.
    pub accuracy: f64,
    /// `beta ((c - c0) - (r - r0))`.
    pub margin: f64,
}

impl Preferences {
    /// Of sequences that are better and worse in turn: log-probabilities now, and in the beginning.
    pub fn of(now: &[f64], reference: &[f64], beta: f64) -> Self {
        let margins: Vec<f64> = margins(now, reference, beta).collect();
        let mean = |of: &dyn Fn(f64) -> f64| {
            margins.iter().map(|margin| of(*margin)).sum::<f64>() / margins.len().max(1) as f64
        };
        Self {
            loss: mean(&|margin| softplus(-margin)),
            accuracy: mean(&|margin| f64::from(u8::from(margin > 0.0))),
            margin: mean(&|margin| margin),
        }
    }

    /// Adds what some more pairs say; `share` is theirs of all.
    #[must_use]
    pub fn plus(self, other: Self, share: f64) -> Self {
        Self {
            loss: self.loss + share * other.loss,
            accuracy: self.accuracy + share * other.accuracy,
            margin: self.margin + share * other.margin,
        }
    }
}

/// By how much the sum of the pairs' losses rises when the log-probability of a sequence falls, for each.
pub fn weights(now: &[f64], reference: &[f64], beta: f64) -> Vec<f64> {
    let slopes = margins(now, reference, beta).map(|margin| beta * sigmoid(-margin));
    slopes.flat_map(|slope| [slope, -slope]).collect()
}

fn margins<'a>(now: &'a [f64], reference: &'a [f64], beta: f64) -> impl Iterator<Item = f64> + 'a {
    let gain = |now: &[f64], before: &[f64]| (now[0] - before[0]) - (now[1] - before[1]);
    let pairs = now.chunks_exact(2).zip(reference.chunks_exact(2));
    pairs.map(move |(now, before)| beta * gain(now, before))
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `ln(1 + exp(x))`, without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_and_its_slopes_are_those_of_the_paper() {
        let (now, before) = ([-3.0, -4.0, -2.0, -9.0], [-3.5, -3.0, -2.0, -9.0]);
        let found = Preferences::of(&now, &before, 0.1);
        // Margins of 0.15 and 0.
        let expected = ((1.0 + f64::exp(-0.15)).ln() + 2f64.ln()) / 2.0;
        assert!((found.loss - expected).abs() < 1e-12);
        assert_eq!(found.accuracy, 0.5);
        assert!((found.margin - 0.075).abs() < 1e-12);
        let sum = |now: &[f64]| 2.0 * Preferences::of(now, &before, 0.1).loss;
        for (i, weight) in weights(&now, &before, 0.1).into_iter().enumerate() {
            let mut less = now;
            less[i] -= 1e-5;
            let slope = (sum(&less) - sum(&now)) / 1e-5;
            assert!((slope - weight).abs() < 1e-6, "{i}: {slope}, not {weight}");
        }
        assert!(Preferences::of(&[-1e4, 0.0], &[0.0, 0.0], 1.0).loss.is_finite());
    }
}
