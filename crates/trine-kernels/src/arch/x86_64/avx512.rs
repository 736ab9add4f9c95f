//! AVX-512 with VNNI: 64 bytes at a time, `vpdpbusd` straight into 32-bit sums.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::super::{Kernel, LANES, Simd};
use crate::activations::CodeBlock;
use crate::packed::WeightBlock;

/// Proof that the CPU has AVX-512 F, BW, DQ, VL and VNNI.
///
/// The kernels need F, BW and VNNI; DQ and VL, which every CPU with VNNI has, leave the compiler
/// free to choose in the plain Rust around them.
#[derive(Clone, Copy)]
pub(in crate::arch) struct Avx512Vnni(());

impl Avx512Vnni {
    /// The proof, where the CPU has the instructions.
    #[inline]
    pub(in crate::arch) fn new() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        all.then_some(Self(()))
    }
}

/// Bytes in a vector: a quarter of a block's columns.
const WIDTH: usize = 64;

impl Simd for Avx512Vnni {
    type Acc = __m512i;

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        fn compiled_for_avx512<K: Kernel>(simd: Avx512Vnni, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists, so the CPU has these features.
        unsafe { compiled_for_avx512(self, kernel) }
    }

    #[inline(always)]
    fn zero(self) -> __m512i {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_setzero_si512() }
    }

    /// `vpdpbusd` adds four products of an unsigned with a signed byte to a 32-bit sum and wraps;
    /// nothing in between is narrower, so there is nothing to overflow.
    #[inline(always)]
    fn step<const R: usize, const T: usize>(
        self,
        acc: &mut [[__m512i; T]; R],
        weights: [&WeightBlock; R],
        codes: [&CodeBlock; T],
    ) {
        // SAFETY: `self` exists, so the CPU has AVX-512 F, BW and VNNI; the loads end at byte 64 of
        // a weight block's 64 and at byte 4 * 64 of a code block's 256.
        unsafe {
            let mask = _mm512_set1_epi8(3);
            let mut packed = [_mm512_setzero_si512(); R];
            for r in 0..R {
                packed[r] = _mm512_loadu_si512(weights[r].as_ptr().cast());
            }
            // One quarter after another, so that accumulators, packed rows and the codes of one
            // quarter fit into the 32 registers: 16 + 4 + 4 for a tile of 4 x 4.
            for quarter in 0..4 {
                let mut unpacked = [_mm512_setzero_si512(); R];
                for r in 0..R {
                    unpacked[r] = _mm512_and_si512(packed[r], mask);
                    packed[r] = _mm512_srli_epi16::<2>(packed[r]);
                }
                for t in 0..T {
                    let x = _mm512_loadu_si512(codes[t].as_ptr().add(quarter * WIDTH).cast());
                    for r in 0..R {
                        acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], unpacked[r], x);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn sum(self, acc: __m512i) -> i32 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_reduce_add_epi32(acc) }
    }

    type Lanes = __m512;

    #[inline(always)]
    fn load_f32(self, from: &[f32; LANES]) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F; the load is the array.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F; the load is the array.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_bf16(self, from: &[bf16; LANES]) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F; the load is the array.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    fn multiply_add(self, acc: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_add_ps(acc, _mm512_mul_ps(a, b)) }
    }

    #[inline(always)]
    fn to_array(self, lanes: __m512) -> [f32; LANES] {
        let mut array = [0.0; LANES];
        // SAFETY: `self` exists, so the CPU has AVX-512 F; the store is the array.
        unsafe { _mm512_storeu_ps(array.as_mut_ptr(), lanes) };
        array
    }
}
