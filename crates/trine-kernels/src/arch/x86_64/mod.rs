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
