//! Stochastic rounding to bf16: up or down by chance, so that on average nothing is lost.
//!
//! Steps of an optimizer are mostly smaller than half of bf16's spacing, and rounding to nearest
//! would undo each of them. The chance is a hash of seed, update, parameter and element, so that a
//! resumed run rounds as an uninterrupted one does and threads do not matter.

/// The chance of one parameter in one update.
#[derive(Clone, Copy)]
pub(crate) struct Rounding {
    key: u64,
}

impl Rounding {
    pub(crate) fn new(seed: u64, update: usize, parameter: usize) -> Self {
        Self { key: mix(Self::of_update(seed, update) ^ parameter as u64) }
    }

    /// What the chances of all parameters in one update are made of.
    pub(crate) fn of_update(seed: u64, update: usize) -> u64 {
        mix(mix(seed) ^ update as u64)
    }

    /// Rounds the elements of a parameter from `start` on, a multiple of four. Numbers that bf16
    /// has stay as they are.
    pub(crate) fn apply(self, start: usize, values: &mut [f32]) {
        for (i, four) in values.chunks_mut(4).enumerate() {
            let chance = mix(self.key ^ (start / 4 + i) as u64);
            for (j, value) in four.iter_mut().enumerate() {
                let chance = (chance >> (16 * j)) as u32 & 0xffff;
                // The sixteen bits that fall away are the chance of a carry into those that stay.
                if value.is_finite() {
                    *value = f32::from_bits((value.to_bits() + chance) & 0xffff_0000);
                }
            }
        }
    }
}

/// Rounds half to even, as bf16 numbers are made everywhere else.
pub(crate) fn to_nearest(value: f32) -> f32 {
    let bits = value.to_bits();
    let even = 0x7fff + ((bits >> 16) & 1);
    if value.is_finite() { f32::from_bits((bits + even) & 0xffff_0000) } else { value }
}

/// SplitMix64's finalizer (Steele, Lea, Flood 2014): every bit of the input reaches every bit of
/// the output.
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_goes_to_a_neighbour_and_is_right_on_average() {
        for exact in [1.0f32 + 1.0 / 512.0, -0.3, 3.3e-5] {
            let below = f32::from_bits(exact.to_bits() & 0xffff_0000);
            let above = f32::from_bits((exact.to_bits() & 0xffff_0000) + 0x1_0000);
            let mut values = vec![exact; 1 << 16];
            Rounding::new(1, 2, 3).apply(0, &mut values);
            assert!(values.iter().all(|v| *v == below || *v == above));
            let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
            let spacing = f64::from(above - below).abs();
            // Four standard deviations of the mean of 65536 coin throws.
            let error = (mean - f64::from(exact)).abs();
            assert!(error < 4.0 * 0.5 * spacing / 256.0, "{exact}: {mean}");
        }
    }

    #[test]
    fn numbers_of_bf16_stay_and_chance_depends_on_everything() {
        let mut values = vec![1.5f32, -0.0, 0.0, 2f32.powi(-130), f32::INFINITY];
        let before: Vec<u32> = values.iter().map(|v| v.to_bits()).collect();
        Rounding::new(0, 1, 2).apply(0, &mut values);
        assert_eq!(values.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), before);

        let rounded = |seed, update, parameter, start| {
            let mut values = vec![1.003f32; 64];
            Rounding::new(seed, update, parameter).apply(start, &mut values);
            values
        };
        let one = rounded(1, 2, 3, 0);
        assert_eq!(rounded(1, 2, 3, 0), one);
        for other in [rounded(2, 2, 3, 0), rounded(1, 3, 3, 0), rounded(1, 2, 4, 0)] {
            assert_ne!(other, one);
        }
        // A chunk of its own is rounded as if it were part of the whole.
        assert_eq!(rounded(1, 2, 3, 32)[..32], one[32..]);
    }

    #[test]
    fn nearest_is_what_bf16_conversion_gives() {
        for bits in (0..u32::MAX).step_by(65_521 * 7) {
            let value = f32::from_bits(bits);
            // The last binade rounds to infinity in both.
            let expected = half_even(value);
            assert_eq!(to_nearest(value).to_bits(), expected.to_bits(), "{value:e}");
        }
    }

    /// Of the two neighbours, the nearer one, in f64; at equal distance that with an even last bit.
    fn half_even(value: f32) -> f32 {
        if !value.is_finite() {
            return value;
        }
        let (down, rest) = (value.to_bits() & 0xffff_0000, value.to_bits() & 0xffff);
        let up = down + 0x1_0000;
        let odd = down & 0x1_0000 != 0;
        f32::from_bits(if rest > 0x8000 || rest == 0x8000 && odd { up } else { down })
    }
}
