//! How well logits predict what came: the cross entropy that training minimizes.

use trine_kernels::nn;

/// Sum over positions of `-ln softmax(logits)[target]`, in nats; divided by `targets.len()` it is
/// the loss, and `exp` of that the perplexity.
///
/// `logits` is `(T, vocab)`, those of [`Session::logits_of_all`](crate::Session::logits_of_all), and
/// `targets` `(T,)` the ids that came after each position. The sum over the vocabulary is that of
/// [`nn::exp_sum`], in f32; everything after it is f64.
///
/// # Panics
/// When `logits` is not `(T, vocab)`, or a target is not below `vocab`.
pub fn cross_entropy(logits: &[f32], vocab: usize, targets: &[u32]) -> f64 {
    assert_eq!(Some(logits.len()), targets.len().checked_mul(vocab), "logits are not (T, vocab)");
    let rows = logits.chunks_exact(vocab.max(1)).zip(targets);
    rows.map(|(row, &target)| log_sum_exp(row) - f64::from(row[target as usize])).sum()
}

/// `ln sum exp` of the logits `(vocab,)` of a position, in nats: a logit less this is the logarithm of
/// its probability.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let (max, sum) = nn::exp_sum(logits);
    f64::from(sum).ln() + f64::from(max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cross_entropy_is_the_formula_summed_over_positions() {
        let (vocab, targets) = (37, [0, 36, 5]);
        let logits: Vec<f32> = (0..3 * vocab).map(|i| ((i * 29) % 41) as f32 / 4.0 - 3.0).collect();
        let expected: f64 = logits
            .chunks_exact(vocab)
            .zip(targets)
            .map(|(row, target)| {
                let sum: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
                sum.ln() - f64::from(row[target as usize])
            })
            .sum();
        let found = cross_entropy(&logits, vocab, &targets);
        assert!((found - expected).abs() < 1e-5, "{found} instead of {expected}");
        let by_position: f64 = logits
            .chunks_exact(vocab)
            .zip(targets)
            .map(|(row, target)| cross_entropy(row, vocab, &[target]))
            .sum();
        assert_eq!(found, by_position);
    }

    #[test]
    fn known_cross_entropies() {
        assert!((cross_entropy(&[3.0; 8], 4, &[1, 2]) - 2.0 * 4f64.ln()).abs() < 1e-12);
        // Large logits do not overflow.
        assert_eq!(cross_entropy(&[0.0, 1e4], 2, &[1]), 0.0);
        assert_eq!(cross_entropy(&[0.0, 1e4], 2, &[0]), 1e4);
        assert_eq!(cross_entropy(&[], 5, &[]), 0.0);
    }

    #[test]
    #[should_panic(expected = "logits are not (T, vocab)")]
    fn a_missing_position_is_refused() {
        cross_entropy(&[0.0; 8], 4, &[1]);
    }
}
