//! From likelihoods to scores, as lm-evaluation-harness defines them.

use crate::task::Metric;

/// Scores of an item with options: of equals, the first counts as the likeliest.
pub(crate) fn choice(
    metrics: &[Metric],
    logs: &[f64],
    chars: &[usize],
    gold: &[usize],
) -> Vec<(&'static str, f64)> {
    let normed: Vec<f64> = logs.iter().zip(chars).map(|(log, n)| log / *n as f64).collect();
    let right = |logs: &[f64]| f64::from(u8::from(gold.contains(&likeliest(logs))));
    let score = |metric: &Metric| match metric {
        Metric::AccNorm => right(&normed),
        Metric::Mc2 => mass(logs, gold),
        _ => right(logs),
    };
    metrics.iter().map(|metric| (metric.name(), score(metric))).collect()
}

/// What a model that knows nothing scores: the share of right options.
pub(crate) fn chance(options: usize, gold: &[usize]) -> f64 {
    gold.len() as f64 / options as f64
}

/// The first of the largest. A number that is none (an empty option has no mean) counts as the
/// largest, as in NumPy.
fn likeliest(logs: &[f64]) -> usize {
    let mut best = 0;
    for (index, log) in logs.iter().enumerate() {
        if logs[best].is_nan() {
            break;
        }
        if log.is_nan() || *log > logs[best] {
            best = index;
        }
    }
    best
}

/// Probability of the right options together, when those of all sum to 1.
fn mass(logs: &[f64], gold: &[usize]) -> f64 {
    // Only ratios matter; the largest becomes 1, so that nothing vanishes.
    let max = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let all: f64 = logs.iter().map(|log| (log - max).exp()).sum();
    gold.iter().map(|index| (logs[*index] - max).exp()).sum::<f64>() / all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acc_takes_the_sum_and_acc_norm_the_mean_of_a_character() {
        let metrics = [Metric::Acc, Metric::AccNorm];
        let scores = choice(&metrics, &[-6.0, -5.0], &[12, 2], &[0]);
        assert_eq!(scores, [("acc", 0.0), ("acc_norm", 1.0)]);
        let ties = choice(&metrics, &[-6.0, -6.0], &[3, 3], &[0]);
        assert_eq!(ties, [("acc", 1.0), ("acc_norm", 1.0)]);
    }

    #[test]
    fn mc2_is_a_share_of_the_probability() {
        let logs = [1f64, 2.0, 3.0, 4.0].map(|p| p.ln() - 900.0);
        let score = choice(&[Metric::Mc2], &logs, &[1; 4], &[1, 3])[0].1;
        assert!((score - 0.6).abs() < 1e-12);
        assert_eq!(chance(4, &[1, 3]), 0.5);
    }
}
