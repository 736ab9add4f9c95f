//! A tile of products of bfloats, where the CPU has an instruction for them; see `crate::bf16`.

use std::ops::Range;

use crate::bf16::{GROUP, Pair, ROWS, STEP, To, Two};

const MISSING: &str = "this CPU does not have products of bfloats";

/// Whether this CPU has the instruction.
pub(crate) fn has() -> bool {
    #[cfg(target_arch = "x86_64")]
    return super::x86_64::bfloat::Avx512Bf16::new().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether the instruction, where there is one, multiplies more in a second than those of f32: twice as much
/// on AMD's processors (Zen 4, Zen 5), half as much on Intel's (Sapphire Rapids), whose bfloats are for AMX.
pub(crate) fn is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return super::x86_64::is_of_amd();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Rounds a row `(k,)` to bfloats, and puts its pairs to `to`, sixteen together and the
/// next sixteen `every` further on; what is left of `to` becomes 0. False where the CPU lacks the
/// instruction: then nothing is done.
#[inline]
pub(crate) fn join_row(row: &[f32], to: &mut [Pair], every: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    if let Some(cpu) = super::x86_64::bfloat::Avx512Bf16::new() {
        cpu.join_row(row, to, every);
        return true;
    }
    let _ = (row, to, every);
    false
}

/// Rounds two lines to bfloats, and puts pairs of them to `to`, `W` together and the next `W` `every`
/// further on, as far as there is room. False as of [`join_row`].
#[inline]
pub(crate) fn join_lines<const W: usize>(
    lines: [&[f32; GROUP]; 2],
    to: &mut [Pair],
    every: usize,
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if let Some(cpu) = super::x86_64::bfloat::Avx512Bf16::new() {
        cpu.join_lines::<W>(lines, to, every);
        return true;
    }
    let _ = (lines, to, every);
    false
}

/// The largest of `x`, -inf of nothing; NaNs are passed over.
///
/// # Panics
/// As [`tile`].
#[inline]
pub(crate) fn largest(x: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if let Some(cpu) = super::x86_64::bfloat::Avx512Bf16::new() {
        return cpu.largest(x);
    }
    let _ = x;
    panic!("{MISSING}")
}

/// `exp(scale (x - largest))` of two rows, rounded, from column `at` on, as many as are joined; they are
/// added to `sums`, of which each takes every sixteenth column.
///
/// # Panics
/// As [`tile`], and when a row sees what it has not, or there is too little room.
#[inline]
pub(crate) fn join_exps(
    two: Two<'_>,
    largest: [f32; 2],
    scale: f32,
    at: usize,
    to: To<'_>,
    sums: &mut [[f32; STEP]; 2],
) {
    #[cfg(target_arch = "x86_64")]
    if let Some(cpu) = super::x86_64::bfloat::Avx512Bf16::new() {
        return cpu.join_exps(two, largest, scale, at, to, sums);
    }
    let _ = (two, largest, scale, at, to, sums);
    panic!("{MISSING}")
}

/// `e (x - mean)` of two rows, rounded, from column `at` on, as many as are joined; `e` is what is in the
/// steps of the two rows in `exps`, from that column on.
///
/// # Panics
/// As [`join_exps`].
#[inline]
pub(crate) fn join_slopes(two: Two<'_>, exps: &[Pair], means: [f32; 2], at: usize, to: To<'_>) {
    #[cfg(target_arch = "x86_64")]
    if let Some(cpu) = super::x86_64::bfloat::Avx512Bf16::new() {
        return cpu.join_slopes(two, exps, means, at, to);
    }
    let _ = (two, exps, means, at, to);
    panic!("{MISSING}")
}

/// The product of the row whose steps lie in `exps` with `x`, over what is seen.
///
/// # Panics
/// As [`join_exps`].
#[inline]
pub(crate) fn product(exps: &[Pair], x: &[f32], seen: Range<usize>) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if let Some(cpu) = super::x86_64::bfloat::Avx512Bf16::new() {
        return cpu.product(exps, x, seen);
    }
    let _ = (exps, x, seen);
    panic!("{MISSING}")
}

/// What becomes of a tile's sums: row by row, at most thirty-two of each.
pub(crate) struct Target<'a> {
    /// The rows of the output; those that do not exist are empty.
    pub(crate) rows: [&'a mut [f32]; ROWS],
    /// What the sums of each are multiplied by.
    pub(crate) scales: [f32; ROWS],
    /// Whether they are added to what is there.
    pub(crate) add: bool,
}

/// The products of twelve rows `a` `(pairs, 12)`, in steps of sixteen pairs by row if `BY_ROWS`,
/// and of thirty-two columns `b` `(pairs, 32)`.
///
/// # Panics
/// Where the CPU lacks the instruction; when the sides differ in pairs, or these are no whole steps.
#[inline]
pub(crate) fn tile<const BY_ROWS: bool>(a: &[Pair], b: &[Pair], to: &mut Target<'_>) {
    #[cfg(target_arch = "x86_64")]
    if let Some(cpu) = super::x86_64::bfloat::Avx512Bf16::new() {
        return cpu.tile::<BY_ROWS>(a, b, to);
    }
    let _ = (a, b, to);
    panic!("{MISSING}")
}
