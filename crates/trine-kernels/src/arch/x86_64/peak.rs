//! Chains of products in registers; see `arch::peak`.

use std::arch::x86_64::*;
use std::hint::black_box;

use super::{Avx2, Avx512Vnni};
use crate::isa::Isa;

/// Independent chains: more than the latency of an instruction times how many start in a cycle.
const CHAINS: usize = 12;

/// As [`int8`](super::super::peak::int8), where `isa` is more than generic.
pub(in crate::arch) fn int8(isa: Isa, steps: usize) -> Option<u64> {
    match isa {
        Isa::Generic => None,
        // SAFETY: the proof exists, so the CPU has AVX2.
        Isa::Avx2 => Avx2::new().map(|_| unsafe { int8_avx2(steps) }),
        // SAFETY: the proof exists, so the CPU has AVX-512 F and VNNI.
        Isa::Avx512Vnni => Avx512Vnni::new().map(|_| unsafe { int8_avx512(steps) }),
    }
}

/// As [`f32`](super::super::peak::f32), where `isa` is more than generic.
pub(in crate::arch) fn f32(isa: Isa, steps: usize) -> Option<u64> {
    match isa {
        Isa::Generic => None,
        Isa::Avx2 => {
            let has = Avx2::new().is_some() && is_x86_feature_detected!("fma");
            // SAFETY: the CPU has just said so.
            has.then(|| unsafe { f32_avx2(steps) })
        }
        // SAFETY: the proof exists, so the CPU has AVX-512 F.
        Isa::Avx512Vnni => Avx512Vnni::new().map(|_| unsafe { f32_avx512(steps) }),
    }
}

/// `vpmaddubsw` and the addition that it cannot do without; sums saturate and do not matter.
#[target_feature(enable = "avx2")]
fn int8_avx2(steps: usize) -> u64 {
    let (codes, x) = (black_box(_mm256_set1_epi8(2)), black_box(_mm256_set1_epi8(1)));
    let mut sums = [x; CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            // Of the sum itself, or the product would be the same in every step and taken once.
            *sum = _mm256_add_epi16(x, _mm256_maddubs_epi16(codes, *sum));
        }
    }
    black_box(sums);
    (steps * CHAINS * 32) as u64
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn int8_avx512(steps: usize) -> u64 {
    let (codes, x) = (black_box(_mm512_set1_epi8(2)), black_box(_mm512_set1_epi8(-3)));
    let mut sums = [_mm512_setzero_si512(); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, codes, x);
        }
    }
    black_box(sums);
    (steps * CHAINS * 64) as u64
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
