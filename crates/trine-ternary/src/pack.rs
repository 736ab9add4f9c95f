//! The canonical packings: how trits lie in bytes.
//!
//! | packing | trits a byte | byte | bits a trit |
//! | --- | --- | --- | --- |
//! | 2-bit | 4 | `c0 + 4 c1 + 16 c2 + 64 c3` | 2 |
//! | 1.6-bit | 5 | `c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4` | 1.6 |
//!
//! A code is `c = trit + 1`, so 0, 1, 2; the first trit is the lowest digit. Packing works on one
//! row; the last byte of a row is filled up with trit 0 (code 1), so equal trits always have equal
//! bytes. Unpacking refuses bytes that no packing produces (a 2-bit code 3, a byte of 243 or more,
//! a non-zero trit in the padding): a flipped bit is found rather than turned into a weight.

use std::slice::from_mut;

use crate::{TernaryError, error::check_len};

/// Trits in a byte of the 2-bit packing.
pub const TRITS_PER_BYTE_2BIT: usize = 4;
/// Trits in a byte of the 1.6-bit packing.
pub const TRITS_PER_BYTE_BASE3: usize = 5;

/// A 2-bit code in each byte of an integer.
const FOUR_CODES: u32 = 0x0303_0303;

/// Bytes that a row of `cols` trits takes at 2 bits a trit.
pub const fn row_bytes_2bit(cols: usize) -> usize {
    cols.div_ceil(TRITS_PER_BYTE_2BIT)
}

/// Bytes that a row of `cols` trits takes at 1.6 bits a trit.
pub const fn row_bytes_base3(cols: usize) -> usize {
    cols.div_ceil(TRITS_PER_BYTE_BASE3)
}

/// Position of the first byte that holds a 2-bit code 3, which stands for no trit; of any packing
/// with four codes `trit + 1` in a byte, whatever their order.
pub fn find_code_three(bytes: &[u8]) -> Option<usize> {
    const CHUNK: usize = 4096;
    let three = |byte: u8| byte & byte >> 1 & 0b01_01_01_01;
    // Whole chunks without a branch for each byte, as nearly all hold none.
    let chunk =
        bytes.chunks(CHUNK).position(|c| c.iter().fold(0, |any, &b| any | three(b)) != 0)?;
    let start = chunk * CHUNK;
    bytes[start..].iter().position(|&byte| three(byte) != 0).map(|at| start + at)
}

/// Packs one row of trits at 2 bits each; `out` has [`row_bytes_2bit`] bytes.
///
/// # Errors
/// [`TernaryError::Trit`] for a value outside -1..=1, [`TernaryError::Length`] for a wrong `out`.
pub fn pack_2bit(trits: &[i8], out: &mut [u8]) -> Result<(), TernaryError> {
    check_len("packed row", row_bytes_2bit(trits.len()), out.len())?;
    check_trits(trits)?;
    // Four trits at a time in one integer, which compilers turn into vectors. The two low bits of a
    // trit are one less than its code; no sum carries into the next byte.
    let (groups, rest) = trits.as_chunks::<TRITS_PER_BYTE_2BIT>();
    for (byte, group) in out.iter_mut().zip(groups) {
        let low = u32::from_le_bytes(group.map(|trit| trit as u8)) & FOUR_CODES;
        let codes = (low + 0x0101_0101) & FOUR_CODES;
        *byte = (codes | codes >> 6 | codes >> 12 | codes >> 18) as u8;
    }
    match out.last_mut() {
        Some(last) if !rest.is_empty() => pack::<TRITS_PER_BYTE_2BIT, 4>(rest, from_mut(last)),
        _ => Ok(()),
    }
}

/// Unpacks one row of trits packed by [`pack_2bit`].
///
/// # Errors
/// [`TernaryError::Code`] for a byte that encodes no trits, [`TernaryError::Length`] when `packed`
/// does not have [`row_bytes_2bit`]`(out.len())` bytes.
pub fn unpack_2bit(packed: &[u8], out: &mut [i8]) -> Result<(), TernaryError> {
    check_len("packed row", row_bytes_2bit(out.len()), packed.len())?;
    if let Some(index) = find_code_three(packed) {
        return Err(TernaryError::Code { index, byte: packed[index] });
    }
    let (groups, rest) = out.as_chunks_mut::<TRITS_PER_BYTE_2BIT>();
    for (group, &byte) in groups.iter_mut().zip(packed) {
        let byte = u32::from(byte);
        let codes = (byte | byte << 6 | byte << 12 | byte << 18) & FOUR_CODES;
        *group = codes.to_le_bytes().map(|code| code as i8 - 1);
    }
    match packed {
        [before @ .., last] if !rest.is_empty() => unpack::<TRITS_PER_BYTE_2BIT, 4>(&[*last], rest)
            .map_err(|e| match e {
                TernaryError::Code { byte, .. } => TernaryError::Code { index: before.len(), byte },
                other => other,
            }),
        _ => Ok(()),
    }
}

/// Checks that values are trits.
fn check_trits(trits: &[i8]) -> Result<(), TernaryError> {
    let largest_code = trits.iter().fold(0, |max, &trit| (trit as u8).wrapping_add(1).max(max));
    if largest_code <= 2 {
        return Ok(());
    }
    let index = trits.iter().position(|t| !(-1..=1).contains(t)).unwrap_or(0);
    Err(TernaryError::Trit { index, value: trits[index] })
}

/// Packs one row of trits at five a byte; `out` has [`row_bytes_base3`] bytes.
///
/// # Errors
/// As [`pack_2bit`].
pub fn pack_base3(trits: &[i8], out: &mut [u8]) -> Result<(), TernaryError> {
    pack::<TRITS_PER_BYTE_BASE3, 3>(trits, out)
}

/// Unpacks one row of trits packed by [`pack_base3`].
///
/// # Errors
/// As [`unpack_2bit`].
pub fn unpack_base3(packed: &[u8], out: &mut [i8]) -> Result<(), TernaryError> {
    unpack::<TRITS_PER_BYTE_BASE3, 3>(packed, out)
}

/// `N` digits a byte in base `BASE`, lowest digit first.
fn pack<const N: usize, const BASE: u8>(trits: &[i8], out: &mut [u8]) -> Result<(), TernaryError> {
    check_len("packed row", trits.len().div_ceil(N), out.len())?;
    check_trits(trits)?;
    for (byte, group) in out.iter_mut().zip(trits.chunks(N)) {
        let code = |i| group.get(i).map_or(1, |&trit| (trit + 1) as u8);
        *byte = (0..N).rev().fold(0, |byte, i| byte * BASE + code(i));
    }
    Ok(())
}

fn unpack<const N: usize, const BASE: u8>(
    packed: &[u8],
    out: &mut [i8],
) -> Result<(), TernaryError> {
    check_len("packed row", out.len().div_ceil(N), packed.len())?;
    for (index, (&byte, group)) in packed.iter().zip(out.chunks_mut(N)).enumerate() {
        let mut rest = byte;
        let mut digits = [0i8; N];
        for digit in &mut digits {
            *digit = (rest % BASE) as i8 - 1;
            rest /= BASE;
        }
        let (used, padding) = digits.split_at(group.len());
        if rest != 0 || used.iter().any(|&d| d > 1) || padding.iter().any(|&d| d != 0) {
            return Err(TernaryError::Code { index, byte });
        }
        group.copy_from_slice(used);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_as_specified() {
        let mut byte = [0];
        pack_2bit(&[-1, 0, 1, -1], &mut byte).unwrap();
        assert_eq!(byte, [0b00_10_01_00]);
        pack_base3(&[-1, 0, 1, 1, -1], &mut byte).unwrap();
        assert_eq!(byte, [3 + 2 * 9 + 2 * 27]);
        pack_base3(&[1; 5], &mut byte).unwrap();
        assert_eq!(byte, [242]);
    }

    #[test]
    fn padding_is_trit_zero() {
        let mut byte = [0];
        pack_2bit(&[1], &mut byte).unwrap();
        assert_eq!(byte, [0b01_01_01_10]);
        pack_base3(&[1], &mut byte).unwrap();
        assert_eq!(byte, [2 + 3 + 9 + 27 + 81]);
    }

    #[test]
    fn bytes_that_encode_no_trits_are_refused() {
        let mut out = [0; 4];
        for byte in 0..=255u8 {
            let valid = (0..4).all(|i| byte >> (2 * i) & 3 != 3);
            assert_eq!(unpack_2bit(&[byte], &mut out).is_ok(), valid, "{byte:#x}");
            assert_eq!(unpack_base3(&[byte], &mut [0; 5]).is_ok(), byte < 243, "{byte}");
        }
        // Valid digits, but the padding holds a weight.
        assert_eq!(
            unpack_2bit(&[0b01_01_10_01], &mut [0]),
            Err(TernaryError::Code { index: 0, byte: 0b01_01_10_01 })
        );
    }

    #[test]
    fn values_that_are_no_trits_are_refused() {
        assert_eq!(pack_2bit(&[0, 1, 2], &mut [0]), Err(TernaryError::Trit { index: 2, value: 2 }));
    }

    #[test]
    fn lengths_are_checked() {
        assert!(matches!(pack_2bit(&[0; 5], &mut [0]), Err(TernaryError::Length { .. })));
        assert!(matches!(unpack_base3(&[121; 2], &mut [0; 5]), Err(TernaryError::Length { .. })));
    }
}
