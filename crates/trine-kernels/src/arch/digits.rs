//! The digits of five trits in a byte (see `trits5`), where the largest table has sixteen entries.

#![allow(unsafe_code)]

use crate::trits5::DIGITS;

/// A vector register as bytes.
///
/// # Safety
/// Of every method: the CPU has the instructions.
pub(super) trait Bytes: Copy {
    unsafe fn splat_i8(value: i8) -> Self;
    unsafe fn and(self, other: Self) -> Self;
    /// `self & mask | other`.
    unsafe fn and_or(self, mask: Self, other: Self) -> Self;
    unsafe fn sub_i8(self, other: Self) -> Self;
    unsafe fn min_u8(self, other: Self) -> Self;

    /// Shifted right by 1 and 4 bits; what comes into the high bits of a byte may be of the next one.
    unsafe fn shift_1(self) -> Self;
    unsafe fn shift_4(self) -> Self;

    /// The entries of a table at the indices, of which each is at most 15.
    unsafe fn look_up(self, table: &[u8; 16]) -> Self;
}

/// By the upper three bits of `m`: what they and the lower three tell of step and start. Of each, the
/// mask of the lower bits, and what there is beside them.
static STEP: [[u8; 16]; 2] = [first([0, 0, 0, 0, 0, 0, 0, 255]), first([0, 1, 2, 3, 4, 5, 6, 0])];
static START: [[u8; 16]; 2] =
    [first([255, 255, 255, 255, 255, 255, 255, 0]), first([0, 0, 0, 0, 0, 0, 0, 8])];

/// By the step: what `p` is less than the start, if `s` is 1.
static TWICE: [u8; 16] = first([0, 2, 4, 6, 8, 0, 0, 0]);

/// By `s`: its bit, everywhere.
static ALL: [u8; 16] = first([0, 255, 0, 0, 0, 0, 0, 0]);

/// By the step and, in the fourth bit, `t`: the mask of the start in `q`, and what `q` is less than
/// that, modulo 9.
static MOVES: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 0, 0, 0];
static LESS: [u8; 16] = [0, 8, 7, 6, 5, 4, 2, 2, 0, 1, 2, 3, 4, 3, 1, 1];

/// By the same: digit 4, or 1 if that is `s`.
static LAST: [u8; 16] = [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 1, 1, 1];

/// By a pair of digits: each of them.
static PAIR: [[u8; 16]; 2] = [
    [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0],
];

/// A table of which the second half is not used.
const fn first(half: [u8; 8]) -> [u8; 16] {
    let mut table = [0; 16];
    table.split_at_mut(8).0.copy_from_slice(&half);
    table
}

/// The digits of every byte, the lowest of each first.
///
/// # Safety
/// As [`Bytes`].
#[inline(always)]
pub(super) unsafe fn digits<B: Bytes>(packed: B) -> [B; DIGITS] {
    // SAFETY: as the caller promises; all indices are of three or four bits, or a number modulo 9.
    unsafe {
        let (seven, upper) = (B::splat_i8(7), packed.shift_4());
        let (high, low) = (upper.and(seven), packed.shift_1().and(seven));
        let step = low.and_or(high.look_up(&STEP[0]), high.look_up(&STEP[1]));
        let start = low.and_or(high.look_up(&START[0]), high.look_up(&START[1]));

        let s = packed.and(B::splat_i8(1));
        let p = modulo_9(start.sub_i8(step.look_up(&TWICE).and(s.look_up(&ALL))));
        let both = upper.and_or(B::splat_i8(8), step);
        let q = modulo_9(start.and(both.look_up(&MOVES)).sub_i8(both.look_up(&LESS)));
        let last = both.look_up(&LAST);
        [
            p.look_up(&PAIR[0]),
            p.look_up(&PAIR[1]),
            q.look_up(&PAIR[0]),
            q.look_up(&PAIR[1]),
            last.and(s.and_or(B::splat_i8(1), B::splat_i8(2))),
        ]
    }
}

/// Of numbers from -9 to 8.
///
/// # Safety
/// As [`Bytes`].
#[inline(always)]
unsafe fn modulo_9<B: Bytes>(difference: B) -> B {
    // SAFETY: as the caller promises.
    unsafe { difference.min_u8(difference.sub_i8(B::splat_i8(-9))) }
}
