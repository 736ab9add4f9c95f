//! Registers of 256 bits: AVX2, with or without VNNI.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::super::digits::Bytes;
use super::super::{Kernel, LANES, Simd};
use super::register::{BYTE_PAIRS, Register, intrinsics};

impl Bytes for __m256i {
    intrinsics! {
        splat_i8(value: i8) -> Self = _mm256_set1_epi8;
        and(self: Self, other: Self) -> Self = _mm256_and_si256;
        sub_i8(self: Self, other: Self) -> Self = _mm256_sub_epi8;
        min_u8(self: Self, other: Self) -> Self = _mm256_min_epu8;
        shift_1(self: Self) -> Self = _mm256_srli_epi16::<1>;
        shift_4(self: Self) -> Self = _mm256_srli_epi16::<4>;
    }

    #[inline(always)]
    unsafe fn and_or(self, mask: Self, other: Self) -> Self {
        // SAFETY: as the caller promises.
        unsafe { _mm256_or_si256(_mm256_and_si256(self, mask), other) }
    }

    #[inline(always)]
    unsafe fn look_up(self, table: &[u8; 16]) -> Self {
        // SAFETY: as the caller promises; the load is the array.
        unsafe {
            let table = _mm_loadu_si128(table.as_ptr().cast());
            _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), self)
        }
    }
}

impl Register for __m256i {
    type Floats = __m256;

    /// F16C is asked for too; every CPU with AVX2 has it.
    #[inline]
    fn detected<const VNNI: bool, const VBMI: bool>() -> bool {
        !VBMI
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("f16c")
            && (!VNNI || is_x86_feature_detected!("avxvnni"))
    }

    #[inline(always)]
    unsafe fn run<S: Simd, K: Kernel, const VNNI: bool, const VBMI: bool>(
        simd: S,
        kernel: K,
    ) -> K::Output {
        #[target_feature(enable = "avx2,f16c")]
        fn avx2<S: Simd, K: Kernel>(simd: S, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        #[target_feature(enable = "avx2,f16c,avxvnni")]
        fn vnni<S: Simd, K: Kernel>(simd: S, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: the CPU has these features, as the caller promises.
        unsafe { if VNNI { vnni(simd, kernel) } else { avx2(simd, kernel) } }
    }

    intrinsics! {
        zero() -> Self = _mm256_setzero_si256;
        splat_i16(value: i16) -> Self = _mm256_set1_epi16;
        splat_i32(value: i32) -> Self = _mm256_set1_epi32;
        add_i16(self: Self, other: Self) -> Self = _mm256_add_epi16;
        add_i32(self: Self, other: Self) -> Self = _mm256_add_epi32;
        multiply_i32(self: Self, other: Self) -> Self = _mm256_mullo_epi32;
        to_f32(self: Self) -> __m256 = _mm256_cvtepi32_ps;
        shift_left_2(self: Self) -> Self = _mm256_slli_epi16::<2>;
        shift_left_4(self: Self) -> Self = _mm256_slli_epi16::<4>;
        shift_2(self: Self) -> Self = _mm256_srli_epi16::<2>;
        shift_6(self: Self) -> Self = _mm256_srli_epi16::<6>;
        shift_7(self: Self) -> Self = _mm256_srli_epi16::<7>;
        multiply_u8_i8(self: Self, signed: Self) -> Self = _mm256_maddubs_epi16;
        multiply_i16(self: Self, other: Self) -> Self = _mm256_madd_epi16;
        add_dot(self: Self, unsigned: Self, signed: Self) -> Self = _mm256_dpbusd_avx_epi32;
        load_f32(from: *const f32) -> __m256 = _mm256_loadu_ps;
        splat_f32(value: f32) -> __m256 = _mm256_set1_ps;
        bits_of(floats: __m256) -> Self = _mm256_castps_si256;
        as_floats(self: Self) -> __m256 = _mm256_castsi256_ps;
        max_u32(self: Self, other: Self) -> Self = _mm256_max_epu32;
        shift_left_23(self: Self) -> Self = _mm256_slli_epi32::<23>;
        sub_f32(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps;
        max_f32(a: __m256, b: __m256) -> __m256 = _mm256_max_ps;
        add_f32(a: __m256, b: __m256) -> __m256 = _mm256_add_ps;
        multiply_f32(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps;
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: as the caller promises.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: as the caller promises.
        unsafe { _mm256_storeu_si256(to.cast(), self) }
    }

    #[inline(always)]
    unsafe fn join_words(self, other: Self) -> (Self, Self) {
        // SAFETY: as the caller promises.
        unsafe {
            let (low, high) =
                (_mm256_unpacklo_epi32(self, other), _mm256_unpackhi_epi32(self, other));
            (
                _mm256_permute2x128_si256::<0x20>(low, high),
                _mm256_permute2x128_si256::<0x31>(low, high),
            )
        }
    }

    #[inline(always)]
    unsafe fn byte_pairs(self) -> Self {
        // SAFETY: as the caller promises; the load is the array.
        unsafe {
            let order = _mm_loadu_si128(BYTE_PAIRS.as_ptr().cast());
            _mm256_shuffle_epi8(self, _mm256_broadcastsi128_si256(order))
        }
    }

    #[inline(always)]
    unsafe fn zero_where_less(y: __m256, x: __m256, bound: __m256) -> __m256 {
        // SAFETY: as the caller promises.
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x, bound), y) }
    }

    #[inline(always)]
    unsafe fn load_i8_to_i32(from: *const i8) -> Self {
        // SAFETY: as the caller promises.
        unsafe { _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> __m256 {
        // SAFETY: as the caller promises.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> __m256 {
        // SAFETY: as the caller promises.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }

    /// Halves of two registers are brought together in two, and these added: that leaves one for two,
    /// three times. Of every eight sums, the lanes at the end have first those of even numbers, so
    /// registers are taken in an order that makes up for it.
    #[inline(always)]
    unsafe fn sum_each(registers: [__m256; LANES]) -> [f32; LANES] {
        let mut sums = registers;
        // SAFETY: as the caller promises; both stores are the array.
        unsafe {
            for i in 0..8 {
                let (a, b) = (i / 4 * 8 + i % 4, i / 4 * 8 + i % 4 + 4);
                let (a, b) = (registers[a], registers[b]);
                let low = _mm256_permute2f128_ps::<0x20>(a, b);
                let high = _mm256_permute2f128_ps::<0x31>(a, b);
                sums[i] = _mm256_add_ps(low, high);
            }
            for i in 0..4 {
                let (a, b) = (sums[2 * i], sums[2 * i + 1]);
                let low = _mm256_shuffle_ps::<0b01_00_01_00>(a, b);
                let high = _mm256_shuffle_ps::<0b11_10_11_10>(a, b);
                sums[i] = _mm256_add_ps(low, high);
            }
            let mut array = [0.0; LANES];
            for i in 0..2 {
                let (a, b) = (sums[2 * i], sums[2 * i + 1]);
                let low = _mm256_shuffle_ps::<0b10_00_10_00>(a, b);
                let high = _mm256_shuffle_ps::<0b11_01_11_01>(a, b);
                _mm256_storeu_ps(array.as_mut_ptr().add(8 * i), _mm256_add_ps(low, high));
            }
            array
        }
    }

    #[inline(always)]
    unsafe fn store_f32(floats: __m256, to: *mut f32) {
        // SAFETY: as the caller promises.
        unsafe { _mm256_storeu_ps(to, floats) }
    }
}
