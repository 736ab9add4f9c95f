//! Chains of products in registers; see `arch::peak`.

use std::arch::x86_64::*;
use std::hint::black_box;

use super::register::Register;
use super::{Avx2, Avx512, Avx512Vnni, AvxVnni};
use crate::isa::Isa;

/// Independent chains: more than the latency of an instruction times how many start in a cycle.
const CHAINS: usize = 12;

/// As [`int8`](super::super::peak::int8), where `isa` is one of x86-64.
pub(in crate::arch) fn int8(isa: Isa, steps: usize) -> Option<u64> {
    // SAFETY, of each: the proof exists, so the CPU has the instructions.
    match isa {
        // SAFETY: see above.
        Isa::Avx2 => Avx2::new().map(|_| unsafe { int8_avx2(steps) }),
        // SAFETY: see above.
        Isa::AvxVnni => AvxVnni::new().map(|_| unsafe { int8_avxvnni(steps) }),
        // SAFETY: see above.
        Isa::Avx512 => Avx512::new().map(|_| unsafe { int8_avx512(steps) }),
        Isa::Avx512Vnni | Isa::Avx512Vbmi => {
            // SAFETY: see above.
            Avx512Vnni::new().map(|_| unsafe { int8_avx512vnni(steps) })
        }
        _ => None,
    }
}

/// As [`f32`](super::super::peak::f32), where `isa` is one of x86-64.
pub(in crate::arch) fn f32(isa: Isa, steps: usize) -> Option<u64> {
    match isa {
        Isa::Avx2 | Isa::AvxVnni => {
            let has = Avx2::new().is_some() && is_x86_feature_detected!("fma");
            // SAFETY: the CPU has just said so.
            has.then(|| unsafe { f32_avx2(steps) })
        }
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Vbmi => {
            // SAFETY: the proof exists, so the CPU has AVX-512 F.
            Avx512::new().map(|_| unsafe { f32_avx512(steps) })
        }
        _ => None,
    }
}

#[target_feature(enable = "avx2")]
fn int8_avx2(steps: usize) -> u64 {
    // SAFETY: this function is compiled for the instructions.
    unsafe { int8_chains::<__m256i, false>(steps) }
}

#[target_feature(enable = "avx2,avxvnni")]
fn int8_avxvnni(steps: usize) -> u64 {
    // SAFETY: as above.
    unsafe { int8_chains::<__m256i, true>(steps) }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn int8_avx512(steps: usize) -> u64 {
    // SAFETY: as above.
    unsafe { int8_chains::<__m512i, false>(steps) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn int8_avx512vnni(steps: usize) -> u64 {
    // SAFETY: as above.
    unsafe { int8_chains::<__m512i, true>(steps) }
}

/// `vpdpbusd`, or `vpmaddubsw` and the addition that it cannot do without, of which the sums
/// saturate, which does not matter here.
///
/// # Safety
/// The caller is compiled for the instructions, and the CPU has them.
#[inline(always)]
unsafe fn int8_chains<V: Register, const VNNI: bool>(steps: usize) -> u64 {
    // SAFETY: as the caller promises.
    unsafe {
        let (codes, x) = (black_box(V::splat_i8(2)), black_box(V::splat_i8(1)));
        let mut sums = [x; CHAINS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = if VNNI {
                    sum.add_dot(codes, x)
                } else {
                    // Of the sum itself, or the product would be the same in every step and taken
                    // once.
                    x.add_i16(codes.multiply_u8_i8(*sum))
                };
            }
        }
        black_box(sums);
    }
    (steps * CHAINS * size_of::<V>()) as u64
}

#[target_feature(enable = "avx2,fma")]
fn f32_avx2(steps: usize) -> u64 {
    let (a, b) = (black_box(_mm256_set1_ps(0.5)), black_box(_mm256_set1_ps(1.5)));
    let mut sums = [_mm256_setzero_ps(); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, a, b);
        }
    }
    black_box(sums);
    (2 * steps * CHAINS * 8) as u64
}

#[target_feature(enable = "avx512f")]
fn f32_avx512(steps: usize) -> u64 {
    let (a, b) = (black_box(_mm512_set1_ps(0.5)), black_box(_mm512_set1_ps(1.5)));
    let mut sums = [_mm512_setzero_ps(); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, a, b);
        }
    }
    black_box(sums);
    (2 * steps * CHAINS * 16) as u64
}
