//! Dynamic codes: numbers of at most 1 in eight bits, finer where they are smaller.
//!
//! The "dynamic tree" of Dettmers et al. (arXiv 2110.02861, section 1.3) as bitsandbytes builds it:
//! seven decades, of which the upper ones have more fractions than the lower ones, each the middle
//! of its share of 0.1..1. Two things are ours: all values are divided by the largest, so that the
//! largest element of a block is kept exactly, and a sign is a bit of its own.

use std::sync::LazyLock;

/// Decades of a code.
const DECADES: u32 = 7;

/// Room for the upper bits of all numbers between half of the smallest value and 1.
const BUCKETS: usize = 1 << 12;

/// A code without signs: ascending values from 0 to 1. Arrays are as long as what their indices can
/// be, so that looking up needs no checks.
pub(crate) struct Code {
    /// What is beyond the last value is as it.
    values: [f32; 256],
    /// Where the next value becomes the nearer one; infinity from the last on.
    midpoints: [f32; 256],
    /// For the upper sixteen bits of a number, from [`Self::first`] on, the nearest value of the
    /// smallest number with these bits. A midpoint at most lies among those that share them.
    nearest: [u8; BUCKETS],
    first: u32,
}

/// 128 values: the magnitudes of numbers with a sign.
pub(crate) static SIGNED: LazyLock<Code> = LazyLock::new(|| Code::new(7));
/// 255 values: numbers without a sign.
pub(crate) static UNSIGNED: LazyLock<Code> = LazyLock::new(|| Code::new(8));

impl Code {
    fn new(bits: u32) -> Self {
        let mut exact = vec![0.0];
        for decade in 0..DECADES {
            let scale = 10f64.powi(decade as i32 - DECADES as i32 + 1);
            let fractions = 1u32 << (decade + bits - DECADES);
            let middle = |i: u32| 0.1 + 0.9 * (f64::from(i) + 0.5) / f64::from(fractions);
            exact.extend((0..fractions).map(|i| scale * middle(i)));
        }
        let (count, largest) = (exact.len(), exact[exact.len() - 1]);
        let (mut values, mut midpoints) = ([1.0; 256], [f32::INFINITY; 256]);
        for (value, exact) in values.iter_mut().zip(&exact) {
            *value = (exact / largest) as f32;
        }
        for i in 0..count - 1 {
            midpoints[i] = 0.5 * (values[i] + values[i + 1]);
        }
        // One bucket earlier, so that what is smaller than all of them can share it.
        let first = (midpoints[0].to_bits() >> 16) - 1;
        let below = |edge: f32| midpoints.iter().filter(|m| **m <= edge).count() as u8;
        let nearest =
            std::array::from_fn(|i| below(f32::from_bits((first + i as u32) << 16).min(1.0)));
        Self { values, midpoints, nearest, first }
    }

    /// The index of the value nearest to `x`, which is in 0..=1.
    fn index(&self, x: f32) -> u8 {
        let bucket = (x.to_bits() >> 16).saturating_sub(self.first) as usize;
        let index = self.nearest[bucket % BUCKETS];
        index + u8::from(x >= self.midpoints[usize::from(index)])
    }

    /// Encodes a number in -1..=1, the sign in the highest bit.
    pub(crate) fn encode_signed(&self, x: f32) -> u8 {
        self.index(x.abs()) | (u8::from(x.is_sign_negative()) << 7)
    }

    /// What [`Self::encode_signed`] encoded.
    pub(crate) fn decode_signed(&self, code: u8) -> f32 {
        let magnitude = self.values[usize::from(code & 0x7f)];
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    }

    /// Encodes a number in 0..=1; only 0 becomes 0.
    pub(crate) fn encode(&self, x: f32) -> u8 {
        self.index(x).max(u8::from(x > 0.0))
    }

    /// What [`Self::encode`] encoded.
    pub(crate) fn decode(&self, code: u8) -> f32 {
        self.values[usize::from(code)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_published_shape() {
        for (code, count) in [(&*SIGNED, 128), (&*UNSIGNED, 255)] {
            assert!(code.values[..count].windows(2).all(|v| v[0] < v[1]));
            assert_eq!((code.values[0], code.values[count - 1]), (0.0, 1.0));
            assert!(code.values[1] < 1e-6);
            assert_eq!(usize::from(code.index(1.0)), count - 1);
            assert!((1f32.to_bits() >> 16) - code.first < BUCKETS as u32);
        }
        // bitsandbytes' signed map, before our division by its largest value.
        let largest = 0.1 + 0.9 * 63.5 / 64.0;
        assert!((SIGNED.values[1] * largest - 5.5e-7).abs() < 1e-12);
        assert!((SIGNED.values[126] * largest - (0.1 + 0.9 * 62.5 / 64.0)).abs() < 1e-6);
    }

    #[test]
    fn every_number_gets_the_nearest_code() {
        for code in [&*SIGNED, &*UNSIGNED] {
            // All of 1e-8..1 in steps of less than the finest spacing, and every midpoint's edges.
            let steps = (0..200_000).map(|i| 10f32.powf(-8.0 * i as f32 / 200_000.0));
            let edges = code.midpoints.iter().filter(|m| m.is_finite());
            let edges = edges.flat_map(|m| [m.next_down(), *m, m.next_up()]);
            for x in steps.chain(edges).chain([0.0, 1.0]) {
                let distance = |v: &f32| (f64::from(*v) - f64::from(x)).abs();
                let nearest = code.values.iter().map(distance).fold(f64::INFINITY, f64::min);
                let found = distance(&code.values[usize::from(code.index(x))]);
                // A midpoint is rounded to f32.
                let tolerance = 2e-7 * f64::from(x);
                assert!(found <= nearest + tolerance, "{x}: {found}, not {nearest}");
            }
        }
    }

    #[test]
    fn signs_and_smallness_survive() {
        assert_eq!(SIGNED.decode_signed(SIGNED.encode_signed(-1.0)), -1.0);
        assert_eq!(SIGNED.decode_signed(SIGNED.encode_signed(-1e-9)), 0.0);
        assert_eq!(UNSIGNED.encode(0.0), 0);
        assert!(UNSIGNED.decode(UNSIGNED.encode(1e-20)) > 0.0);
    }
}
