//! Dynamic codes: numbers of at most 1 in eight bits, finer where they are smaller.
//!
//! The "dynamic tree" of Dettmers et al. (arXiv 2110.02861, section 1.3) as bitsandbytes builds it:
//! seven decades, of which the upper ones have more fractions than the lower ones, each the middle
//! of its share of 0.1..1. Two things are ours: all values are divided by the largest, so that the
//! largest element of a block is kept exactly, and a sign is a bit of its own.

use std::sync::LazyLock;

/// Decades of a code.
const DECADES: u32 = 7;

/// A code without signs: ascending values from 0 to 1.
pub(crate) struct Code {
    values: Vec<f32>,
    /// Where the next value becomes the nearer one; infinity after the last.
    midpoints: Vec<f32>,
    /// For the upper sixteen bits of a number, from [`Self::first`] on, the nearest value of the
    /// smallest number with these bits. A midpoint at most lies among those that share them.
    nearest: Vec<u8>,
    first: u32,
}

/// 128 values: the magnitudes of numbers with a sign.
pub(crate) static SIGNED: LazyLock<Code> = LazyLock::new(|| Code::new(7));
/// 255 values: numbers without a sign.
pub(crate) static UNSIGNED: LazyLock<Code> = LazyLock::new(|| Code::new(8));

impl Code {
    fn new(bits: u32) -> Self {
        let mut values = vec![0.0];
        for decade in 0..DECADES {
            let scale = 10f64.powi(decade as i32 - DECADES as i32 + 1);
            let fractions = 1u32 << (decade + bits - DECADES);
            let middle = |i: u32| 0.1 + 0.9 * (f64::from(i) + 0.5) / f64::from(fractions);
            values.extend((0..fractions).map(|i| scale * middle(i)));
        }
        let largest = values[values.len() - 1];
        let values: Vec<f32> = values.into_iter().map(|v| (v / largest) as f32).collect();
        let mut midpoints: Vec<f32> = values.windows(2).map(|v| 0.5 * (v[0] + v[1])).collect();
        midpoints.push(f32::INFINITY);
        let first = midpoints[0].to_bits() >> 16;
        let below = |edge: f32| midpoints.iter().filter(|m| **m <= edge).count() as u8;
        let edges = first..=1f32.to_bits() >> 16;
        let nearest = edges.map(|upper| below(f32::from_bits(upper << 16))).collect();
        Self { values, midpoints, nearest, first }
    }

    /// The index of the value nearest to `x`, which is in 0..=1.
    fn index(&self, x: f32) -> u8 {
        let Some(at) = (x.to_bits() >> 16).checked_sub(self.first) else { return 0 };
        let index = self.nearest[(at as usize).min(self.nearest.len() - 1)];
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
        self.values[usize::from(code).min(self.values.len() - 1)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_published_shape() {
        for (code, count) in [(&*SIGNED, 128), (&*UNSIGNED, 255)] {
            assert_eq!(code.values.len(), count);
            assert!(code.values.windows(2).all(|v| v[0] < v[1]));
            assert_eq!((code.values[0], code.values[count - 1]), (0.0, 1.0));
            assert!(code.values[1] < 1e-6);
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
