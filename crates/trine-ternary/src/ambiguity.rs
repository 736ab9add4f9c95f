//! Weights whose trit another implementation of the same formulas may round the other way.
//!
//! All variants agree except near the one boundary at half the scale, and each of them has its own
//! smallest magnitude that is not 0. So the weights in question are those between two such
//! magnitudes, and counting them is two comparisons a weight.

use crate::EPSILON;

/// How many weights of a matrix are 0 in one implementation and not in another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ambiguity {
    /// By rounding: half to even (transformers, and the definition here), half away from zero or up
    /// (onebitllms, C), dividing by the scale instead of multiplying by its reciprocal.
    pub ties: u64,
    /// By rounding the scale to bf16 before it is used, as an implementation that computes in bf16
    /// does.
    pub bf16_scale: u64,
}

impl Ambiguity {
    /// Counts the weights of a matrix whose scale is `scale`, which the definition can round with.
    pub fn of(weights: &[f32], scale: f32) -> Self {
        Self::counter(scale)(weights)
    }

    /// As [`Self::of`], for a matrix that comes in parts: what is returned counts one of them.
    pub fn counter(scale: f32) -> impl Fn(&[f32]) -> Self {
        let inverse = 1.0 / scale;
        let ours = boundary(scale, |w| w * inverse > 0.5);
        let variants = [
            boundary(scale, |w| w * inverse >= 0.5),
            boundary(scale, |w| w / scale > 0.5),
            boundary(scale, |w| w / scale >= 0.5),
        ];
        let coarse = 1.0 / bf16(scale).max(EPSILON);
        let coarse = boundary(scale, |w| w * coarse > 0.5);
        let ties = variants.iter().fold((ours, ours), |(a, b), &v| (a.min(v), b.max(v)));
        let bf16_scale = (ours.min(coarse), ours.max(coarse));
        move |weights| {
            let part = |part: &[f32]| {
                let count = |(from, to): (f32, f32)| {
                    let inside = |w: &f32| u32::from(w.abs() >= from && w.abs() < to);
                    u64::from(part.iter().map(inside).sum::<u32>())
                };
                Self { ties: count(ties), bf16_scale: count(bf16_scale) }
            };
            // Few are near the boundary, so most stretches are passed over by one comparison.
            let (from, to) = (ties.0.min(bf16_scale.0), ties.1.max(bf16_scale.1));
            let inside = |any, w: &f32| any | (w.abs() >= from && w.abs() < to);
            weights.chunks(64).filter(|c| c.iter().fold(false, inside)).map(part).sum()
        }
    }
}

impl std::iter::Sum for Ambiguity {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::default(), |a, b| Self {
            ties: a.ties + b.ties,
            bf16_scale: a.bf16_scale + b.bf16_scale,
        })
    }
}

/// The smallest magnitude for which `nonzero` holds, which is one near half the scale.
fn boundary(scale: f32, nonzero: impl Fn(f32) -> bool) -> f32 {
    // bf16 moves it by up to 2^-8, which is 2^15 steps of an f32 up and twice that down.
    let middle = (scale / 2.0).to_bits();
    let (mut low, mut high) = (middle.saturating_sub(1 << 18), middle + (1 << 18));
    while high - low > 1 {
        let between = low + (high - low) / 2;
        if nonzero(f32::from_bits(between)) {
            high = between;
        } else {
            low = between;
        }
    }
    f32::from_bits(high)
}

/// The nearest bfloat16, half to even.
fn bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Trits by any rounding of any quotient, one weight at a time.
    fn differ(weights: &[f32], ours: impl Fn(f32) -> f32, other: impl Fn(f32) -> f32) -> u64 {
        let trit = |x: f32| x.clamp(-1.0, 1.0);
        weights.iter().filter(|w| trit(ours(**w)) != trit(other(**w))).count() as u64
    }

    #[test]
    fn counts_are_those_of_rounding_every_weight_in_every_way() {
        for scale in [1.0f32, 0.3, 0.012_345_679, 17.3, EPSILON] {
            // Every f32 near the boundary, and ordinary weights.
            let middle = (scale / 2.0).to_bits();
            let mut weights: Vec<f32> =
                (middle - 70_000..middle + 70_000).map(f32::from_bits).collect();
            weights.extend((0..1000).map(|i| (i as f32 / 250.0 - 2.0) * scale));
            weights.extend([0.5 * scale, -0.5 * scale, 1.5 * scale, -f32::MAX, 0.0]);
            let inverse = 1.0 / scale;
            let ours = |w: f32| (w * inverse).round_ties_even();
            let found = Ambiguity::of(&weights, scale);
            let coarse = 1.0 / bf16(scale);
            assert_eq!(
                found.bf16_scale,
                differ(&weights, ours, |w| (w * coarse).round_ties_even())
            );
            // The ties are all those that any of the variants rounds otherwise.
            let variants: [&dyn Fn(f32) -> f32; 3] =
                [&|w| (w * inverse).round(), &|w| (w / scale).round_ties_even(), &|w| {
                    (w / scale).round()
                }];
            let any = weights
                .iter()
                .filter(|w| variants.iter().any(|v| differ(&[**w], ours, v) > 0))
                .count() as u64;
            assert_eq!(found.ties, any, "{scale}");
            assert!(found.ties >= 2 || scale != 1.0);
        }
    }
}
