//! x86-64: AVX2, and AVX-512 with VNNI.
//!
//! All unsafe code of the crate is here, and every block rests on one of two arguments. Either the
//! CPU has the instructions, because `self` exists; or a load stays inside an array, because the
//! array's length is in its type.
//!
//! The operations of a [`Simd`](super::Simd) carry no `target_feature` of their own: they are
//! inlined into the function of `run`, which does.

#![allow(unsafe_code)]

mod avx2;
mod avx512;
pub(super) mod peak;

pub(super) use avx2::Avx2;
pub(super) use avx512::Avx512Vnni;

use crate::packed::Line;

/// Asks memory for the line that lies `bytes` after `line`. Where nothing is, nothing happens.
#[inline(always)]
fn prefetch(line: &Line, bytes: usize) {
    let at = line.as_ptr().wrapping_add(bytes);
    // SAFETY: x86-64 has the instruction, and it never faults, whatever the address.
    unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast()) };
}
