//! A tile of products of bfloats, where the CPU has an instruction for them; see `crate::bf16`.

use crate::bf16::{COLS, Pair, ROWS};

/// Whether this CPU has the instruction.
pub(crate) fn has() -> bool {
    #[cfg(target_arch = "x86_64")]
    return super::x86_64::bfloat::Avx512Bf16::new().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Sums of the products of twelve rows `a` `(pairs, 12)`, in steps of sixteen pairs by row if `BY_ROWS`,
/// and of thirty-two columns `b` `(pairs, 32)`.
///
/// # Panics
/// Where the CPU lacks the instruction; when the sides differ in pairs, or these are no whole steps.
#[inline]
pub(crate) fn tile<const BY_ROWS: bool>(a: &[Pair], b: &[Pair], sums: &mut [[f32; COLS]; ROWS]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(cpu) = super::x86_64::bfloat::Avx512Bf16::new() {
        return cpu.tile::<BY_ROWS>(a, b, sums);
    }
    let _ = (a, b, sums);
    panic!("this CPU does not have products of bfloats")
}
