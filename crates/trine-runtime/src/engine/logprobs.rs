//! Log-probabilities of ids, from the model's own logits: no temperature, no penalties. They are made
//! as [`cross_entropy`](crate::cross_entropy) is.

use trine_kernels::nn;

/// The log-probability of an id, and the likeliest ids at its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprob {
    /// The id.
    pub id: u32,
    /// Its log-probability, to base e.
    pub logprob: f32,
    /// The likeliest ids and their log-probabilities, falling.
    pub top: Vec<(u32, f32)>,
}

impl Logprob {
    /// Of `id`, given `logits` `(V,)`, with the `top` likeliest.
    pub(super) fn new(logits: &[f32], id: u32, top: usize) -> Self {
        let (max, sum) = nn::exp_sum(logits);
        let normalizer = f64::from(sum).ln() + f64::from(max);
        let logprob = |logit: f32| (f64::from(logit) - normalizer) as f32;
        let top = likeliest(logits, top).into_iter();
        Self {
            id,
            logprob: logprob(logits[id as usize]),
            top: top.map(|(id, logit)| (id, logprob(logit))).collect(),
        }
    }
}

/// The `n` largest logits, falling; the lower id first among equals.
fn likeliest(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(n + 1);
    for (id, &logit) in (0..).zip(logits) {
        if top.len() == n && top.last().is_none_or(|(_, least)| logit <= *least) {
            continue;
        }
        let at = top.partition_point(|(_, other)| *other >= logit);
        top.insert(at, (id, logit));
        top.truncate(n);
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_the_softmax() {
        let logits = [0.0, 2f32.ln(), 5f32.ln(), f32::NEG_INFINITY];
        let Logprob { id, logprob, top } = Logprob::new(&logits, 1, 3);
        assert_eq!(id, 1);
        assert!((logprob - 0.25f32.ln()).abs() < 1e-6);
        let ids: Vec<u32> = top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [2, 1, 0]);
        assert!((top[0].1 - 0.625f32.ln()).abs() < 1e-6);
        assert!(Logprob::new(&logits, 3, 0).logprob == f32::NEG_INFINITY);
    }

    #[test]
    fn the_lower_id_comes_first_among_equals() {
        assert_eq!(likeliest(&[1.0, 3.0, 1.0, 3.0, 2.0], 3), [(1, 3.0), (3, 3.0), (4, 2.0)]);
        assert_eq!(likeliest(&[1.0], 5), [(0, 1.0)]);
        assert!(likeliest(&[1.0, 2.0], 0).is_empty());
    }
}
