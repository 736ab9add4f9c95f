//! Registers of 512 bits: AVX-512 F, BW, DQ and VL, with or without VNNI, and VBMI beside it.
//!
//! The kernels need F and BW; DQ and VL, which every CPU with BW has, leave the compiler free to
//! choose in the plain Rust around them.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::super::digits::{Bytes, digits};
use super::super::{Kernel, LANES, Simd};
use super::register::{BYTE_PAIRS, Register, intrinsics};
use crate::trits5::DIGITS;
use crate::trits5::table::{HIGH, LOW, Seven};

impl Bytes for __m512i {
    intrinsics! {
        splat_i8(value: i8) -> Self = _mm512_set1_epi8;
        and(self: Self, other: Self) -> Self = _mm512_and_si512;
        sub_i8(self: Self, other: Self) -> Self = _mm512_sub_epi8;
        min_u8(self: Self, other: Self) -> Self = _mm512_min_epu8;
        shift_1(self: Self) -> Self = _mm512_srli_epi16::<1>;
        shift_4(self: Self) -> Self = _mm512_srli_epi16::<4>;
    }

    #[inline(always)]
    unsafe fn and_or(self, mask: Self, other: Self) -> Self {
        // SAFETY: as the caller promises.
        unsafe { _mm512_ternarylogic_epi32::<0b1110_1010>(self, mask, other) }
    }

    #[inline(always)]
    unsafe fn look_up(self, table: &[u8; 16]) -> Self {
        // SAFETY: as the caller promises; the load is the array.
        unsafe {
            let table = _mm_loadu_si128(table.as_ptr().cast());
            _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), self)
        }
    }
}

impl Register for __m512i {
    type Floats = __m512;

    #[inline]
    fn detected<const VNNI: bool, const VBMI: bool>() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && (!VNNI || is_x86_feature_detected!("avx512vnni"))
            && (!VBMI || is_x86_feature_detected!("avx512vbmi"))
    }

    #[inline(always)]
    unsafe fn run<S: Simd, K: Kernel, const VNNI: bool, const VBMI: bool>(
        simd: S,
        kernel: K,
    ) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512<S: Simd, K: Kernel>(simd: S, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        fn vnni<S: Simd, K: Kernel>(simd: S, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
        fn vbmi<S: Simd, K: Kernel>(simd: S, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        const { assert!(VNNI || !VBMI, "VBMI is a rung above VNNI") };
        // SAFETY: the CPU has these features, as the caller promises.
        unsafe {
            if VBMI {
                vbmi(simd, kernel)
            } else if VNNI {
                vnni(simd, kernel)
            } else {
                avx512(simd, kernel)
            }
        }
    }

    intrinsics! {
        zero() -> Self = _mm512_setzero_si512;
        splat_i16(value: i16) -> Self = _mm512_set1_epi16;
        splat_i32(value: i32) -> Self = _mm512_set1_epi32;
        add_i16(self: Self, other: Self) -> Self = _mm512_add_epi16;
        add_i32(self: Self, other: Self) -> Self = _mm512_add_epi32;
        multiply_i32(self: Self, other: Self) -> Self = _mm512_mullo_epi32;
        to_f32(self: Self) -> __m512 = _mm512_cvtepi32_ps;
        shift_left_2(self: Self) -> Self = _mm512_slli_epi16::<2>;
        shift_left_4(self: Self) -> Self = _mm512_slli_epi16::<4>;
        shift_2(self: Self) -> Self = _mm512_srli_epi16::<2>;
        shift_6(self: Self) -> Self = _mm512_srli_epi16::<6>;
        shift_7(self: Self) -> Self = _mm512_srli_epi16::<7>;
        multiply_u8_i8(self: Self, signed: Self) -> Self = _mm512_maddubs_epi16;
        multiply_i16(self: Self, other: Self) -> Self = _mm512_madd_epi16;
        add_dot(self: Self, unsigned: Self, signed: Self) -> Self = _mm512_dpbusd_epi32;
        load_f32(from: *const f32) -> __m512 = _mm512_loadu_ps;
        splat_f32(value: f32) -> __m512 = _mm512_set1_ps;
        bits_of(floats: __m512) -> Self = _mm512_castps_si512;
        as_floats(self: Self) -> __m512 = _mm512_castsi512_ps;
        max_u32(self: Self, other: Self) -> Self = _mm512_max_epu32;
        shift_left_23(self: Self) -> Self = _mm512_slli_epi32::<23>;
        sub_f32(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps;
        max_f32(a: __m512, b: __m512) -> __m512 = _mm512_max_ps;
        add_f32(a: __m512, b: __m512) -> __m512 = _mm512_add_ps;
        multiply_f32(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps;
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: as the caller promises.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: as the caller promises.
        unsafe { _mm512_storeu_si512(to.cast(), self) }
    }

    #[inline(always)]
    unsafe fn join_words(self, other: Self) -> (Self, Self) {
        // SAFETY: as the caller promises.
        unsafe {
            let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
            (
                _mm512_permutex2var_epi32(self, low, other),
                _mm512_permutex2var_epi32(self, high, other),
            )
        }
    }

    #[inline(always)]
    unsafe fn byte_pairs(self) -> Self {
        // SAFETY: as the caller promises; the load is the array.
        unsafe {
            let order = _mm_loadu_si128(BYTE_PAIRS.as_ptr().cast());
            _mm512_shuffle_epi8(self, _mm512_broadcast_i32x4(order))
        }
    }

    #[inline(always)]
    unsafe fn zero_where_less(y: __m512, x: __m512, bound: __m512) -> __m512 {
        // SAFETY: as the caller promises.
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, bound);
            _mm512_maskz_mov_ps(keep, y)
        }
    }

    #[inline(always)]
    unsafe fn load_i8_to_i32(from: *const i8) -> Self {
        // SAFETY: as the caller promises.
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn digits<const VBMI: bool>(self) -> [Self; DIGITS] {
        // SAFETY: as the caller promises.
        unsafe {
            if !VBMI {
                return digits(self);
            }
            let ([low, high], mask) = (look_up_halves(self), Self::splat_i8(3));
            [
                low.and(mask),
                low.shift_2().and(mask),
                high.and(mask),
                high.shift_2().and(mask),
                low.and(high).shift_4().and(mask),
            ]
        }
    }

    #[inline(always)]
    unsafe fn fields<const VBMI: bool>(self) -> [Self; DIGITS] {
        // SAFETY: as the caller promises.
        unsafe {
            if !VBMI {
                return digits(self);
            }
            let [low, high] = look_up_halves(self);
            let [first, second, last] = [3, 3 << 2, 3 << 4].map(|mask| Self::splat_i8(mask));
            [
                low.and(first),
                low.and(second),
                high.and(first),
                high.and(second),
                low.and(high).and(last),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> __m512 {
        // SAFETY: as the caller promises.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> __m512 {
        // SAFETY: as the caller promises.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    /// Halves of two registers are brought together in two, and these added: that leaves one for two,
    /// four times. What stands in the lanes at the end are the columns of a 4 by 4 matrix of registers,
    /// so its rows are taken for them.
    #[inline(always)]
    unsafe fn sum_each(registers: [__m512; LANES]) -> [f32; LANES] {
        let mut sums = registers;
        // SAFETY: as the caller promises; the store is the array.
        unsafe {
            for i in 0..8 {
                let (a, b) = (2 * i, 2 * i + 1);
                let (a, b) = (registers[a % 4 * 4 + a / 4], registers[b % 4 * 4 + b / 4]);
                let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
                let high = _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b);
                sums[i] = _mm512_add_ps(low, high);
            }
            for i in 0..4 {
                let (a, b) = (sums[2 * i], sums[2 * i + 1]);
                let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
                let high = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
                sums[i] = _mm512_add_ps(low, high);
            }
            for i in 0..2 {
                let (a, b) = (sums[2 * i], sums[2 * i + 1]);
                let low = _mm512_shuffle_ps::<0b01_00_01_00>(a, b);
                let high = _mm512_shuffle_ps::<0b11_10_11_10>(a, b);
                sums[i] = _mm512_add_ps(low, high);
            }
            let low = _mm512_shuffle_ps::<0b10_00_10_00>(sums[0], sums[1]);
            let high = _mm512_shuffle_ps::<0b11_01_11_01>(sums[0], sums[1]);
            let mut array = [0.0; LANES];
            _mm512_storeu_ps(array.as_mut_ptr(), _mm512_add_ps(low, high));
            array
        }
    }

    #[inline(always)]
    unsafe fn store_f32(floats: __m512, to: *mut f32) {
        // SAFETY: as the caller promises.
        unsafe { _mm512_storeu_ps(to, floats) }
    }
}

/// The bytes of [`table`](crate::trits5::table), by the low and by the high seven bits; the eighth,
/// which for the high ones is one of the next byte, is ignored.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VBMI.
#[inline(always)]
unsafe fn look_up_halves(packed: __m512i) -> [__m512i; 2] {
    // SAFETY: as the caller promises.
    unsafe { [look_up_seven(packed, &LOW), look_up_seven(packed.shift_1(), &HIGH)] }
}

/// The entries of a table by the low seven bits of every byte.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VBMI.
#[inline(always)]
unsafe fn look_up_seven(index: __m512i, table: &Seven) -> __m512i {
    // SAFETY: as the caller promises; the loads are the table.
    unsafe {
        let [low, high] = &table.0;
        let (low, high) = (__m512i::load(low.as_ptr()), __m512i::load(high.as_ptr()));
        _mm512_permutex2var_epi8(low, index, high)
    }
}
