//! How sure a score is, and whether two models differ.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Resamples of a bootstrap.
const RESAMPLES: usize = 10_000;

/// A mean and its standard error: the sample deviation over the root of the number, as in
/// lm-evaluation-harness; `None` of fewer than two.
pub fn mean(scores: &[f64]) -> (f64, Option<f64>) {
    let n = scores.len() as f64;
    let mean = scores.iter().sum::<f64>() / n;
    let squares: f64 = scores.iter().map(|score| (score - mean).powi(2)).sum();
    (mean, (scores.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt()))
}

/// A share of counts that come in clusters, `parts` of `wholes`, and its standard error: that of a
/// ratio whose clusters are independent and of which one's own counts may not be (Cochran, 1977,
/// "Sampling Techniques", 6.3). Of clusters of one, it is [`mean`]'s.
pub(crate) fn ratio(parts: &[f64], wholes: &[f64]) -> (f64, Option<f64>) {
    let (n, whole) = (parts.len() as f64, wholes.iter().sum::<f64>());
    let ratio = parts.iter().sum::<f64>() / whole;
    let residuals = parts.iter().zip(wholes).map(|(part, whole)| part - ratio * whole);
    let squares: f64 = residuals.map(|residual| residual.powi(2)).sum();
    (ratio, (parts.len() > 1).then(|| (squares * n / (n - 1.0)).sqrt() / whole))
}

/// Scores of two models on the same items.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// Mean of the second model's scores less the first's.
    pub mean: f64,
    /// Standard error of it, from the differences of the items.
    pub stderr: Option<f64>,
    /// Where it lies in 95 % of bootstrap resamples of the items.
    pub interval: (f64, f64),
    /// Twice the share of resamples in which it does not have its sign: how often a difference like
    /// it comes of chance, about.
    pub p: f64,
}

/// Compares paired scores by a bootstrap over items (Efron, 1979; paired as in Koehn, 2004), which is
/// the same for every call with the same scores and seed.
pub fn paired(first: &[f64], second: &[f64], seed: u64) -> Difference {
    let differences: Vec<f64> = first.iter().zip(second).map(|(a, b)| b - a).collect();
    let (centre, stderr) = mean(&differences);
    let n = differences.len();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut resample =
        |_| (0..n).map(|_| differences[rng.random_range(0..n)]).sum::<f64>() / n as f64;
    let mut means: Vec<f64> = (0..RESAMPLES).map(&mut resample).collect();
    means.sort_by(f64::total_cmp);
    let quantile = |q: f64| means[((RESAMPLES - 1) as f64 * q).round() as usize];
    let other = means.iter().filter(|mean| **mean * centre.signum() <= 0.0).count();
    let p = if centre == 0.0 { 1.0 } else { (2.0 * other as f64 / RESAMPLES as f64).min(1.0) };
    Difference { mean: centre, stderr, interval: (quantile(0.025), quantile(0.975)), p }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standard_error_is_that_of_a_share() {
        let scores = [[1.0; 30].as_slice(), &[0.0; 70]].concat();
        let (share, error) = mean(&scores);
        assert!((share - 0.3).abs() < 1e-12);
        assert!((error.unwrap() - (0.3f64 * 0.7 / 99.0).sqrt()).abs() < 1e-12);
        assert_eq!(mean(&[1.0]), (1.0, None));
    }

    #[test]
    fn the_error_of_a_ratio_is_that_of_a_mean_where_clusters_are_of_one() {
        let scores = [1.0, 0.0, 0.0, 1.0, 1.0];
        let (share, error) = mean(&scores);
        let found = ratio(&scores, &[1.0; 5]);
        assert!((found.0 - share).abs() < 1e-12);
        assert!((found.1.unwrap() - error.unwrap()).abs() < 1e-12);
    }

    #[test]
    fn pairs_see_what_two_means_would_not() {
        // Items differ much, models little, but always in the same way.
        let first: Vec<f64> = (0..200).map(|i| f64::from(i % 7)).collect();
        let second: Vec<f64> = first.iter().map(|score| score + 0.1).collect();
        let found = paired(&first, &second, 1);
        assert!((found.mean - 0.1).abs() < 1e-9 && found.p == 0.0);
        assert!(found.interval.0 > 0.099 && found.interval.1 < 0.101);
        assert_eq!(found, paired(&first, &second, 1));
    }

    #[test]
    fn the_interval_is_as_wide_as_the_error_says() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut scores =
            || (0..400).map(|_| f64::from(rng.random_range(0..2u8))).collect::<Vec<_>>();
        let found = paired(&scores(), &scores(), 0);
        let width = (found.interval.1 - found.interval.0) / (2.0 * 1.96);
        assert!((width / found.stderr.unwrap() - 1.0).abs() < 0.1, "{found:?}");
        assert_eq!(paired(&[1.0, 0.0], &[1.0, 0.0], 0).p, 1.0);
    }
}
