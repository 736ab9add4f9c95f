//! From full-precision weights to a scale and trits.

use crate::{EPSILON, TernaryError, error::check_len, round::round_half_even};

/// Number of independent partial sums in [`absmean`].
const LANES: usize = 16;

/// The absmean scale of a matrix: `max(mean(|w|), 1e-5)`.
///
/// Order of the sum: element `i` goes to the f64 partial sum `i % 16`; the partial sums are added
/// in index order, divided by the count, and rounded to f32. An empty slice has scale 1e-5.
///
/// # Errors
/// [`TernaryError::NonFinite`] when a weight is NaN or infinite.
pub fn absmean(weights: &[f32]) -> Result<f32, TernaryError> {
    let mut sum = AbsSum::default();
    sum.add(weights);
    sum.absmean().ok_or_else(|| first_non_finite(weights))
}

/// The sum behind [`absmean`], of weights that come in parts.
#[derive(Default)]
pub(crate) struct AbsSum {
    lanes: [f64; LANES],
    count: usize,
}

impl AbsSum {
    /// Adds the weights that follow those added before.
    pub(crate) fn add(&mut self, weights: &[f32]) {
        let lane = self.count % LANES;
        self.count += weights.len();
        // Up to a whole number of rounds, then rounds, then what is left.
        let (first, weights) = weights.split_at(((LANES - lane) % LANES).min(weights.len()));
        let (rounds, rest) = weights.as_chunks::<LANES>();
        for (sum, w) in self.lanes[lane..].iter_mut().zip(first) {
            *sum += f64::from(w.abs());
        }
        for round in rounds {
            for (sum, w) in self.lanes.iter_mut().zip(round) {
                *sum += f64::from(w.abs());
            }
        }
        for (sum, w) in self.lanes.iter_mut().zip(rest) {
            *sum += f64::from(w.abs());
        }
    }

    /// The scale, or `None` where a weight was not finite.
    pub(crate) fn absmean(&self) -> Option<f32> {
        let total: f64 = self.lanes.iter().sum();
        // A finite f32 is below 2^128, so only NaN or infinity can make the f64 sum non-finite.
        let mean = total / self.count.max(1) as f64;
        total.is_finite().then(|| (mean as f32).max(EPSILON))
    }
}

/// The trits of a matrix for a given scale: `clamp(round_half_even(w * (1 / scale)), -1, 1)`.
///
/// `out` has the length of `weights`.
///
/// # Errors
/// [`TernaryError::NonFinite`] for a weight that is NaN or infinite, [`TernaryError::Scale`] for a
/// scale that is not positive with a finite reciprocal, [`TernaryError::Length`] when `out` does not match.
pub fn ternarize(weights: &[f32], scale: f32, out: &mut [i8]) -> Result<(), TernaryError> {
    check_len("trits", weights.len(), out.len())?;
    let inverse = 1.0 / scale;
    if !(scale > 0.0 && scale.is_finite() && inverse.is_finite()) {
        let expected = "a finite number above 0 whose reciprocal is finite";
        return Err(TernaryError::Scale { expected, scale });
    }
    let mut all_finite = true;
    for (trit, w) in out.iter_mut().zip(weights) {
        all_finite &= w.is_finite();
        *trit = round_half_even::<-1, 1>(w * inverse);
    }
    if all_finite { Ok(()) } else { Err(first_non_finite(weights)) }
}

pub(crate) fn first_non_finite(weights: &[f32]) -> TernaryError {
    let index = weights.iter().position(|w| !w.is_finite()).unwrap_or(0);
    TernaryError::NonFinite { index, value: weights[index] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trits(weights: &[f32]) -> Vec<i8> {
        let mut out = vec![9; weights.len()];
        ternarize(weights, absmean(weights).unwrap(), &mut out).unwrap();
        out
    }

    #[test]
    fn ties_round_to_even() {
        // absmean is exactly 1, so 0.5 is a tie (to 0) and 1.5 a tie (to 2, clamped to 1).
        assert_eq!(trits(&[0.5, -0.5, 1.5, -1.5]), [0, 0, 1, -1]);
    }

    #[test]
    fn zero_matrix_has_the_epsilon_scale_and_zero_trits() {
        assert_eq!(absmean(&[0.0; 7]).unwrap(), EPSILON);
        assert_eq!(trits(&[0.0, -0.0, 0.0]), [0, 0, 0]);
        assert_eq!(absmean(&[]).unwrap(), EPSILON);
    }

    #[test]
    fn denormals_are_ordinary_numbers() {
        let tiny = f32::from_bits(1);
        assert_eq!(trits(&[tiny, -tiny, 1e-34]), [0, 0, 0]);
        let w = [tiny; 3];
        let mut out = [0; 3];
        // 1 / tiny overflows: such a scale is refused rather than turned into infinity.
        let error = ternarize(&w, tiny, &mut out).unwrap_err();
        assert!(matches!(error, TernaryError::Scale { scale, .. } if scale == tiny));
    }

    #[test]
    fn largest_weights_do_not_overflow() {
        let w = [f32::MAX, -f32::MAX, f32::MAX, 0.0];
        assert_eq!(trits(&w), [1, -1, 1, 0]);
    }

    #[test]
    fn non_finite_weights_are_refused_by_index() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut w = vec![1.0; 40];
            w[37] = bad;
            let is_37 = |e| matches!(e, TernaryError::NonFinite { index: 37, .. });
            assert!(is_37(absmean(&w).unwrap_err()));
            assert!(is_37(ternarize(&w, 1.0, &mut [0; 40]).unwrap_err()));
        }
    }

    #[test]
    fn bad_scales_are_refused() {
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let error = ternarize(&[1.0], scale, &mut [0]).unwrap_err();
            assert!(matches!(error, TernaryError::Scale { .. }));
            assert!(error.to_string().contains("above 0"), "{error}");
        }
    }
}
