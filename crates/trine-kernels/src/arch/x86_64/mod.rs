//! x86-64: registers of 256 bits (AVX2) and of 512 (AVX-512), each with and without VNNI.
//!
//! `register` names the instructions, `avx2` and `avx512` supply them, `simd` builds the operations
//! of the kernels from them. So a rung is a type: a register, how many make a line, and whether
//! there are VNNI and VBMI.
//!
//! Every unsafe block rests on one of two arguments. Either the CPU has the instructions, because
//! the proof, a value of the rung's type, exists; or a load stays inside an array, because the
//! array's length is in its type. What is called within it carries no `target_feature` of its own:
//! all is inlined into the function of `run`, which does.

#![allow(unsafe_code)]

mod avx2;
mod avx512;
pub(super) mod bfloat;
pub(super) mod peak;
mod register;
mod simd;

use std::arch::x86_64::{__cpuid, __m256i, __m512i};

use simd::X86;

/// AVX2, and F16C.
pub(super) type Avx2 = X86<__m256i, 2, false, false>;

/// AVX2 and AVX-VNNI.
pub(super) type AvxVnni = X86<__m256i, 2, true, false>;

/// AVX-512 F, BW, DQ and VL.
pub(super) type Avx512 = X86<__m512i, 1, false, false>;

/// AVX-512 as [`Avx512`], and VNNI.
pub(super) type Avx512Vnni = X86<__m512i, 1, true, false>;

/// AVX-512 as [`Avx512Vnni`], and VBMI.
pub(super) type Avx512Vbmi = X86<__m512i, 1, true, true>;

/// Whether this processor is one of AMD's.
pub(super) fn is_of_amd() -> bool {
    // SAFETY: every x86-64 has the instruction; newer versions of Rust need not be told.
    #[allow(unused_unsafe)]
    let vendor = unsafe { __cpuid(0) };
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == *b"AuthenticAMD"
}
