//! Rounding half to even, in a form that every CPU vectorizes.
//!
//! `f32::round_ties_even` is a call into the C library on CPUs without a rounding instruction, which
//! is what a portable x86-64 build assumes. Adding 1.5 * 2^23 makes the CPU's own rounding mode,
//! half to even, do the work: the sum has no bits below 1, and its last byte is the integer.

/// 1.5 * 2^23: added to a number of magnitude below 2^22, it leaves no room for a fraction.
const MAGIC: f32 = 12_582_912.0;

/// `clamp(round_half_even(v), MIN, MAX)`; a NaN gives some value of the range.
///
/// The clamp comes first, which is the same because the bounds are integers.
#[inline(always)]
pub(crate) fn round_half_even<const MIN: i8, const MAX: i8>(v: f32) -> i8 {
    // Comparisons in this order turn a NaN into MIN.
    let at_least = if v > f32::from(MIN) { v } else { f32::from(MIN) };
    let clamped = if at_least < f32::from(MAX) { at_least } else { f32::from(MAX) };
    (clamped + MAGIC).to_bits() as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected(v: f32, min: f32, max: f32) -> i8 {
        v.round_ties_even().clamp(min, max) as i8
    }

    #[test]
    fn rounding_is_that_of_the_standard_library() {
        // Every float of 16 bits of precision and both signs: all ties are among them.
        for bits in 0..=u16::MAX {
            let v = f32::from_bits(u32::from(bits) << 16);
            for v in [v, v.next_up(), v.next_down()] {
                if !v.is_nan() {
                    assert_eq!(round_half_even::<-1, 1>(v), expected(v, -1.0, 1.0), "{v}");
                    assert_eq!(round_half_even::<-128, 127>(v), expected(v, -128.0, 127.0), "{v}");
                }
            }
        }
        for tie in -300..300 {
            let v = tie as f32 + 0.5;
            assert_eq!(round_half_even::<-128, 127>(v), expected(v, -128.0, 127.0), "{v}");
        }
    }

    #[test]
    fn nan_stays_in_range() {
        assert_eq!(round_half_even::<-1, 1>(f32::NAN), -1);
    }
}
