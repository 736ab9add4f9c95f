//! AVX2: 32 bytes at a time, `vpmaddubsw` into 16-bit pairs.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::super::{Kernel, LANES, Simd};
use crate::activations::CodeBlock;
use crate::packed::{BLOCK, WeightBlock};

/// Proof that the CPU has AVX2, and F16C, which every CPU with AVX2 has.
#[derive(Clone, Copy)]
pub(in crate::arch) struct Avx2(());

impl Avx2 {
    /// The proof, where the CPU has the instructions.
    #[inline]
    pub(in crate::arch) fn new() -> Option<Self> {
        let all = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
        all.then_some(Self(()))
    }
}

/// Bytes in a vector.
const WIDTH: usize = 32;

impl Simd for Avx2 {
    type Acc = __m256i;

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,f16c")]
        fn compiled_for_avx2<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists, so the CPU has AVX2 and F16C.
        unsafe { compiled_for_avx2(self, kernel) }
    }

    #[inline(always)]
    fn zero(self) -> __m256i {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_setzero_si256() }
    }

    /// `vpmaddubsw` adds two products in 16 bits and saturates, which must never happen: a code is
    /// at most 2 and an activation at least -128, so a pair is within 512, and the eight pairs that
    /// are added before widening are within 4096, far from 32767.
    #[inline(always)]
    fn step<const R: usize, const T: usize>(
        self,
        acc: &mut [[__m256i; T]; R],
        weights: [&WeightBlock; R],
        codes: [&CodeBlock; T],
    ) {
        // SAFETY: `self` exists, so the CPU has AVX2; the loads end at byte 2 * 32 of a weight
        // block's 64 and at byte 8 * 32 of a code block's 256.
        unsafe {
            let mask = _mm256_set1_epi8(3);
            let ones = _mm256_set1_epi16(1);
            for r in 0..R {
                // In the order of the columns: vector i holds the codes of columns 32 i.. .
                let mut unpacked = [_mm256_setzero_si256(); BLOCK / WIDTH];
                for half in 0..2 {
                    let mut packed =
                        _mm256_loadu_si256(weights[r].as_ptr().add(half * WIDTH).cast());
                    for quarter in 0..4 {
                        unpacked[2 * quarter + half] = _mm256_and_si256(packed, mask);
                        packed = _mm256_srli_epi16::<2>(packed);
                    }
                }
                for t in 0..T {
                    let mut pairs = _mm256_setzero_si256();
                    for (i, &w) in unpacked.iter().enumerate() {
                        let x = _mm256_loadu_si256(codes[t].as_ptr().add(i * WIDTH).cast());
                        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w, x));
                    }
                    let widened = _mm256_madd_epi16(pairs, ones);
                    acc[r][t] = _mm256_add_epi32(acc[r][t], widened);
                }
            }
        }
    }

    #[inline(always)]
    fn sum(self, acc: __m256i) -> i32 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe {
            let four =
                _mm_add_epi32(_mm256_castsi256_si128(acc), _mm256_extracti128_si256::<1>(acc));
            let two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
            let one = _mm_add_epi32(two, _mm_shuffle_epi32::<1>(two));
            _mm_cvtsi128_si32(one)
        }
    }

    /// Lanes 0 to 7 and 8 to 15.
    type Lanes = [__m256; 2];

    #[inline(always)]
    fn load_f32(self, from: &[f32; LANES]) -> [__m256; 2] {
        let from = from.as_ptr();
        // SAFETY: `self` exists, so the CPU has AVX2; the two loads are the array.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> [__m256; 2] {
        let from: *const __m128i = from.as_ptr().cast();
        // SAFETY: `self` exists, so the CPU has AVX2 and F16C; the two loads are the array.
        unsafe {
            [_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from.add(1)))]
        }
    }

    #[inline(always)]
    fn load_bf16(self, from: &[bf16; LANES]) -> [__m256; 2] {
        let from: *const __m128i = from.as_ptr().cast();
        // SAFETY: `self` exists, so the CPU has AVX2; the two loads are the array.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(1)));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
        }
    }

    #[inline(always)]
    fn multiply_add(self, acc: [__m256; 2], a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe {
            [
                _mm256_add_ps(acc[0], _mm256_mul_ps(a[0], b[0])),
                _mm256_add_ps(acc[1], _mm256_mul_ps(a[1], b[1])),
            ]
        }
    }

    #[inline(always)]
    fn to_array(self, lanes: [__m256; 2]) -> [f32; LANES] {
        let mut array = [0.0; LANES];
        // SAFETY: `self` exists, so the CPU has AVX2; the two stores are the array.
        unsafe {
            _mm256_storeu_ps(array.as_mut_ptr(), lanes[0]);
            _mm256_storeu_ps(array.as_mut_ptr().add(8), lanes[1]);
        }
        array
    }
}
