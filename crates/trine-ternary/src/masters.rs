//! The way back: master weights that the definition turns into given trits and a given scale.
//!
//! absmean is not idempotent: quantizing `trit * scale` gives the trits again, but the scale times the
//! share of non-zeros. So weights to train on, or for programs that quantize on their own, are made
//! such that [`absmean`] and [`ternarize`] return exactly what was stored. Without weights to start
//! from, every non-zero is `scale / share of non-zeros`, so far from the rounding boundary at
//! `scale / 2` that no order of summation turns a trit. What numbers of 8 significant bits cannot
//! express is made up for by moving some weights to a neighbouring number, spread evenly, and by a
//! last small rest among the zeros.

use crate::weight::{absmean, ternarize};
use crate::{EPSILON, TernaryError, TernaryMatrix, error::check_len};

/// The numbers that master weights are to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32.
    F32,
    /// bfloat16: an f32 whose lower 16 bits are 0.
    Bf16,
}

impl Precision {
    /// How far apart the bits of neighbouring magnitudes are.
    fn step(self) -> u32 {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 1 << 16,
        }
    }

    /// The largest number up to `x`, for a finite `x` from 0 on.
    fn floor(self, x: f64) -> f32 {
        let nearest = x as f32;
        let bits = nearest.to_bits() - u32::from(f64::from(nearest) > x);
        f32::from_bits(bits & !(self.step() - 1))
    }

    /// The number nearest to `x`, for a finite `x` from 0 on.
    fn round(self, x: f32) -> f32 {
        let below = self.floor(x.into());
        let above = self.up(below);
        if x - below <= above - x { below } else { above }
    }

    fn up(self, x: f32) -> f32 {
        f32::from_bits(x.to_bits() + self.step())
    }

    fn down(self, x: f32) -> f32 {
        f32::from_bits(x.to_bits() - self.step())
    }
}

impl TernaryMatrix {
    /// Master weights, `(rows, cols)` row-major, of which [`TernaryMatrix::from_weights`] makes this
    /// matrix; all of them numbers of the given precision. A matrix of zeros, whose scale says
    /// nothing, gets masters of zeros.
    ///
    /// `start` are weights to stay close to, of the same shape: of the masters that the trits were
    /// made of, most are only rounded. Without them, all non-zeros are alike.
    ///
    /// # Errors
    /// [`TernaryError::Scale`] for a scale below [`EPSILON`], which no masters have, or so large that
    /// they overflow; [`TernaryError::Masters`] where the precision does not suffice, as for small
    /// matrices without zeros in bf16: f32 does; [`TernaryError::Length`] and
    /// [`TernaryError::NonFinite`] for a `start` that does not fit.
    pub fn to_masters(
        &self,
        start: Option<&[f32]>,
        precision: Precision,
    ) -> Result<Vec<f32>, TernaryError> {
        let trits = self.trits();
        let n = trits.len();
        if let Some(start) = start {
            check_len("weights", n, start.len())?;
            if let Some(index) = start.iter().position(|w| !w.is_finite()) {
                return Err(TernaryError::NonFinite { index, value: start[index] });
            }
        }
        let nonzeros = trits.iter().filter(|t| **t != 0).count();
        if nonzeros == 0 {
            return Ok(vec![0.0; n]);
        }
        let scale = self.scale();
        let uniform = f64::from(scale) * n as f64 / nonzeros as f64;
        if scale < EPSILON || uniform > f64::from(f32::MAX) / 4.0 {
            let expected = "at least 1e-5 and far below overflow, for master weights";
            return Err(TernaryError::Scale { expected, scale });
        }
        let bounds = Bounds::new(scale, precision);
        let near = |i: usize| start.map_or(uniform as f32, |start| start[i].abs());
        let mut magnitudes: Vec<f32> = trits
            .iter()
            .enumerate()
            .map(|(i, &trit)| match (trit, start) {
                (0, None) => 0.0,
                (0, Some(_)) => precision.round(near(i)).min(bounds.zero_max),
                _ => precision.round(near(i)).max(bounds.one_min),
            })
            .collect();
        fit(&mut magnitudes, &trits, scale, bounds, precision);
        let negative = |i: usize, trit: i8| match trit {
            0 => start.is_some_and(|start| start[i] < 0.0),
            trit => trit < 0,
        };
        for (i, (magnitude, &trit)) in magnitudes.iter_mut().zip(&trits).enumerate() {
            if negative(i, trit) {
                *magnitude = -*magnitude;
            }
        }
        // What was aimed at is now asked of the definition itself.
        let mut found = vec![0; n];
        let same = absmean(&magnitudes)? == scale;
        ternarize(&magnitudes, scale, &mut found)?;
        if same && found == trits { Ok(magnitudes) } else { Err(TernaryError::Masters { scale }) }
    }
}

/// Between which magnitudes the trit changes.
#[derive(Clone, Copy)]
struct Bounds {
    /// The largest magnitude whose trit is 0.
    zero_max: f32,
    /// The smallest one whose trit is not.
    one_min: f32,
}

impl Bounds {
    fn new(scale: f32, precision: Precision) -> Self {
        let inverse = 1.0 / scale;
        // Half to even: exactly one half is a 0.
        let mut zero_max = precision.floor(f64::from(scale) / 2.0);
        while precision.up(zero_max) * inverse <= 0.5 {
            zero_max = precision.up(zero_max);
        }
        while zero_max * inverse > 0.5 {
            zero_max = precision.down(zero_max);
        }
        Self { zero_max, one_min: precision.up(zero_max) }
    }
}

/// Moves magnitudes until their mean is `scale`, as far as the precision goes.
fn fit(magnitudes: &mut [f32], trits: &[i8], scale: f32, bounds: Bounds, precision: Precision) {
    let n = magnitudes.len() as f64;
    // The sums are exact or nearly so: magnitudes are of one order and have few bits.
    let mut missing = f64::from(scale) * n - magnitudes.iter().map(|&m| f64::from(m)).sum::<f64>();
    let is_fit = |missing: f64| ((f64::from(scale) * n - missing) / n) as f32 == scale;
    if is_fit(missing) {
        return;
    }
    // Steps to neighbours, evenly spread over the non-zeros that can take one.
    for _ in 0..4 {
        let up = missing > 0.0;
        let step = |m: f32| match up {
            true => precision.up(m) - m,
            false if m > bounds.one_min => m - precision.down(m),
            false => 0.0,
        };
        let nonzeros = |m: &[f32]| -> f64 {
            m.iter().zip(trits).filter(|(_, t)| **t != 0).map(|(&m, _)| f64::from(step(m))).sum()
        };
        let share = (missing.abs() / nonzeros(magnitudes).max(f64::MIN_POSITIVE)).min(1.0);
        let (mut owed, before) = (0.0, missing);
        for (m, _) in magnitudes.iter_mut().zip(trits).filter(|(_, t)| **t != 0) {
            let step = f64::from(step(*m));
            owed += share * step;
            if step > 0.0 && owed >= step && missing.abs() >= step {
                *m = if up { precision.up(*m) } else { precision.down(*m) };
                owed -= step;
                missing -= if up { step } else { -step };
            }
        }
        // What is missing now is less than a step, or the precision does not suffice.
        if missing == before || is_fit(missing) {
            break;
        }
    }
    // Of a rest below a step, zeros near 0 hold ever smaller parts; they only take what is missing.
    if missing < 0.0
        && !is_fit(missing)
        && let Some((m, _)) =
            magnitudes.iter_mut().zip(trits).find(|(m, t)| **t != 0 && **m > bounds.one_min)
    {
        let lower = precision.down(*m);
        missing += f64::from(*m) - f64::from(lower);
        *m = lower;
    }
    for (m, _) in magnitudes.iter_mut().zip(trits).filter(|(_, t)| **t == 0) {
        if is_fit(missing) || missing <= 0.0 {
            break;
        }
        let most = (f64::from(*m) + missing).min(bounds.zero_max.into());
        let moved = precision.floor(most);
        // A zero that is large already only has coarse neighbours.
        if moved > *m {
            missing -= f64::from(moved) - f64::from(*m);
            *m = moved;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deterministic numbers in -1..1.
    fn noise(seed: u32) -> impl Iterator<Item = f32> {
        let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
        std::iter::repeat_with(move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
    }

    fn check(matrix: &TernaryMatrix, start: Option<&[f32]>, precision: Precision) -> Vec<f32> {
        let masters = matrix.to_masters(start, precision).unwrap();
        assert_eq!(
            &TernaryMatrix::from_weights(&masters, matrix.rows(), matrix.cols()).unwrap(),
            matrix
        );
        let lower = precision.step() - 1;
        assert!(masters.iter().all(|w| w.to_bits() & lower == 0));
        masters
    }

    #[test]
    fn masters_of_packed_trits_quantize_to_the_same_trits_and_scale() {
        for (seed, n) in [(1, 64), (2, 4096), (3, 4095), (4, 70_001)] {
            for zeros in [0.01, 0.4, 0.97] {
                let mut random = noise(seed);
                let mut trits: Vec<i8> = (0..n)
                    .map(|_| {
                        let x = random.next().unwrap();
                        if x.abs() < zeros { 0 } else { 1i8.wrapping_sub(2 * i8::from(x < 0.0)) }
                    })
                    .collect();
                (trits[0], trits[1], trits[2]) = (1, 0, 0);
                for scale in [EPSILON, 0.012_345_678, 1.0, 0.333_333_34, 17.123_457] {
                    let matrix = TernaryMatrix::from_trits(&trits, 1, n, scale).unwrap();
                    for precision in [Precision::Bf16, Precision::F32] {
                        check(&matrix, None, precision);
                    }
                }
            }
        }
    }

    #[test]
    fn masters_stay_where_they_are_but_for_rounding() {
        let weights: Vec<f32> = noise(9).take(50_000).map(|x| x * x * x).collect();
        let matrix = TernaryMatrix::from_weights(&weights, 250, 200).unwrap();
        assert!(check(&matrix, Some(&weights), Precision::F32) == weights);
        let rounded = check(&matrix, Some(&weights), Precision::Bf16);
        for (a, b) in weights.iter().zip(&rounded) {
            // A half step of rounding and one step of fitting; the last rest lies among the zeros.
            let near = (a - b).abs() <= a.abs() / 64.0 || (a - b).abs() < 0.01 * matrix.scale();
            assert!(near && (a * b >= 0.0), "{a} became {b}");
        }
    }

    #[test]
    fn zeros_have_masters_of_zeros() {
        let matrix = TernaryMatrix::from_trits(&[0; 12], 3, 4, 0.7).unwrap();
        assert_eq!(matrix.to_masters(None, Precision::Bf16).unwrap(), [0.0; 12]);
    }

    #[test]
    fn what_no_masters_have_is_refused() {
        let ones = |scale| TernaryMatrix::from_trits(&[1, -1], 1, 2, scale).unwrap();
        for scale in [0.0, 1e-6, f32::MAX] {
            let error = ones(scale).to_masters(None, Precision::F32).unwrap_err();
            assert!(matches!(error, TernaryError::Scale { .. }), "{error}");
        }
        // Two numbers of 8 bits have no such mean, and there is no zero to hold a rest.
        let error = ones(0.333_333_34).to_masters(None, Precision::Bf16).unwrap_err();
        assert!(matches!(error, TernaryError::Masters { .. }), "{error}");
        check(&ones(0.333_333_34), None, Precision::F32);
        let short = ones(1.0).to_masters(Some(&[1.0]), Precision::F32);
        assert!(matches!(short, Err(TernaryError::Length { .. })));
    }
}
