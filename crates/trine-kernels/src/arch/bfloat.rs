//! A tile of products of bfloats, where the CPU has an instruction for them; see `crate::bf16`.

use crate::bf16::{GROUP, Pair, ROWS};

/// Whether this CPU has the instruction.
pub(crate) fn has() -> bool {
    #[cfg(target_arch = "x86_64")]
    return super::x86_64::bfloat::Avx512Bf16::new().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Rounds a row `(k,)` times `scale` to bfloats, and puts its pairs to `to`, sixteen together and the
/// next sixteen `every` further on; what is left of `to` becomes 0. False where the CPU lacks the
/// instruction: then nothing is done.
#[inline]
pub(crate) fn join_row(row: &[f32], scale: f32, to: &mut [Pair], every: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    if let Some(cpu) = super::x86_64::bfloat::Avx512Bf16::new() {
        cpu.join_row(row, scale, to, every);
        return true;
    }
    let _ = (row, scale, to, every);
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

/// What becomes of a tile's sums: row by row, at most thirty-two of each.
pub(crate) struct Target<'a> {
    /// The rows of the output; those that do not exist are empty.
    pub(crate) rows: [&'a mut [f32]; ROWS],
    /// Sums are multiplied by it.
    pub(crate) scale: f32,
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
    panic!("this CPU does not have products of bfloats")
}
