//! Five trits in a byte, so that tables of 128 bytes are enough to look them up.
//!
//! 243 codes need nearly all of a byte, and the largest table that one instruction reaches has 128
//! entries. In base 3 every digit but the highest depends on all eight bits. Here no digit does: a
//! byte is a bit `s`, six bits `m` and a bit `t`, from the lowest, and
//!
//! - digits 0 and 1, of the pair `p = c0 + 3 c1`, follow from `m` and `s`, the low seven bits;
//! - digits 2 and 3, of the pair `q = c2 + 3 c3`, from `m` and `t`, the high seven bits;
//! - digit 4 from `m` and `t`, but for its lowest bit, which may be `s`.
//!
//! Each `m` is a step `k` from 0 to 6 and a start `x` from 0 to 8. Modulo 9:
//!
//! | `k` | `t` | `q` | `p`, for `s` of 0 and 1 | `c4`, for `s` of 0 and 1 |
//! | --- | --- | --- | --- | --- |
//! | 0 to 4 | 0 | `k` | `x`, `x - 2 k` | 0, 1 |
//! | 0 to 4 | 1 | `x - k` | `x`, `x - 2 k` | 2, 2 |
//! | 5 | `t` | `5 + t` | `x`, `x` | 0, 1 |
//! | 6 | `t` | `7 + t` | `x`, `x` | 0, 1 |
//!
//! All codes are there. With `c4` below 2, each `q` has one `k` and `t`, in which `p` takes every
//! value as `x` does. With `c4 = 2`, `p` is `q + k` and `q - k`, and each of nine values is `q` plus
//! or minus one of 0 to 4. That counts `p = q` twice for its two `s`: `7 * 9 * 4 - 9 = 243`.

/// Digits of a byte.
pub(crate) const DIGITS: usize = 5;

/// The step and the start of a byte. Starts of 8 come last, so that the others are three bits each.
const fn step_and_start(byte: u8) -> (u8, u8) {
    let m = byte >> 1 & 63;
    if m < 56 { (m >> 3, m & 7) } else { (m & 7, 8) }
}

/// The digits of a byte, each at most 2; also of bytes that are no code.
pub(crate) const fn digits(byte: u8) -> [u8; DIGITS] {
    let (k, x) = step_and_start(byte);
    let (s, t) = (byte & 1, byte >> 7);
    let (p, q, c4) = match (k, t) {
        (0..5, 0) => ((x + 9 - 2 * k * s) % 9, k, s),
        (0..5, _) => ((x + 9 - 2 * k * s) % 9, (x + 9 - k) % 9, 2),
        (5, _) => (x, 5 + t, s),
        // A step of 7 is that of the two bytes for each `s` that are no code.
        _ => (x, 7 + t, s),
    };
    [p % 3, p / 3, q % 3, q / 3, c4]
}

/// The bytes of the 243 codes, by their digits in base 3 from the lowest.
pub(crate) static BYTES: [u8; 256] = {
    let mut bytes = [0; 256];
    let mut byte = u8::MAX;
    loop {
        let [c0, c1, c2, c3, c4] = digits(byte);
        let code = c0 as usize + 3 * c1 as usize + 9 * c2 as usize + 27 * c3 as usize;
        bytes[code + 81 * c4 as usize] = byte;
        if byte == 0 {
            break bytes;
        }
        byte -= 1;
    }
};

/// What instructions look up: two bytes, in which the digits have two bits each.
///
/// | bits | by the low seven bits | by the high seven bits |
/// | --- | --- | --- |
/// | 0 and 1 | digit 0 | digit 2 |
/// | 2 and 3 | digit 1 | digit 3 |
/// | 4 and 5 | 2, or 3 if `s` is 1 | digit 4, or 1 if that is `s` |
///
/// The last ones and-ed are digit 4.
#[cfg(target_arch = "x86_64")]
pub(crate) mod table {
    use super::{DIGITS, digits};

    /// By how many bits each digit is shifted to the left.
    pub(crate) const SHIFTS: [u32; DIGITS] = [0, 2, 0, 2, 4];

    /// 128 bytes, in two cache lines.
    #[repr(align(64))]
    pub(crate) struct Seven(pub(crate) [[u8; 64]; 2]);

    /// By the low seven bits.
    pub(crate) static LOW: Seven = {
        let mut table = Seven([[0; 64]; 2]);
        let mut i = 0;
        while i < 128 {
            let [c0, c1, ..] = digits(i as u8);
            table.0[i / 64][i % 64] = c0 | c1 << 2 | (2 | i as u8 & 1) << 4;
            i += 1;
        }
        table
    };

    /// By the high seven bits.
    pub(crate) static HIGH: Seven = {
        let mut table = Seven([[0; 64]; 2]);
        let mut i = 0;
        while i < 128 {
            // Of the larger `s`, with which digit 4 is not 0.
            let [.., c2, c3, c4] = digits(2 * i as u8 + 1);
            table.0[i / 64][i % 64] = c2 | c3 << 2 | c4 << 4;
            i += 1;
        }
        table
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_byte() {
        for (code, &byte) in BYTES[..243].iter().enumerate() {
            let expected = [1, 3, 9, 27, 81].map(|power| (code / power % 3) as u8);
            assert_eq!(digits(byte), expected, "byte {byte} of code {code}");
        }
        assert!((0..=255).all(|byte| digits(byte).iter().all(|&digit| digit <= 2)));
    }

    #[test]
    fn seven_bits_are_enough_for_a_digit() {
        for byte in 0..=255u8 {
            let [c0, c1, c2, c3, c4] = digits(byte);
            assert_eq!(digits(byte ^ 128)[..2], [c0, c1]);
            assert_eq!(digits(byte ^ 1)[2..4], [c2, c3]);
            let other = digits(byte ^ 1)[4];
            assert!(c4 == other || c4 == byte & 1 && other == c4 ^ 1);
        }
    }
}
