//! AArch64: NEON, with widening multiplications or with `sdot`.
//!
//! Unsafe blocks rest on the arguments that `x86_64` names.

#![allow(unsafe_code)]

mod neon;
pub(super) mod peak;

/// NEON, which every CPU of the kind has.
pub(super) type Neon = neon::Arm<false>;

/// NEON and the dot products of ARMv8.2 (`FEAT_DotProd`).
pub(super) type NeonDot = neon::Arm<true>;
