//! AVX-512 with VNNI: 64 bytes at a time, `vpdpbusd` straight into 32-bit sums.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::super::{Kernel, LANES, Simd};
use crate::packed::{Line, PANEL};

/// For every byte of [`Packing::Trits5`](crate::Packing::Trits5), its four lower digits in two bits
/// each.
static DIGITS: Table = {
    let mut table = [[0; 64]; 4];
    let mut byte = 0;
    while byte < 243 {
        let digit = [byte % 3, byte / 3 % 3, byte / 9 % 3, byte / 27 % 3];
        let digits = digit[0] + 4 * digit[1] + 16 * digit[2] + 64 * digit[3];
        table[byte / 64][byte % 64] = digits as u8;
        byte += 1;
    }
    Table(table)
};

#[repr(align(64))]
struct Table([[u8; 64]; 4]);

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
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512vbmi");
        all.then_some(Self(()))
    }

    /// The four pairs of bits of every byte, from the low ones up.
    #[inline(always)]
    fn bit_pairs(self, packed: __m512i) -> [__m512i; 4] {
        // SAFETY: `self` exists, so the CPU has AVX-512 F and BW.
        unsafe {
            let mask = _mm512_set1_epi8(3);
            [
                _mm512_and_si512(packed, mask),
                _mm512_and_si512(_mm512_srli_epi16::<2>(packed), mask),
                _mm512_and_si512(_mm512_srli_epi16::<4>(packed), mask),
                _mm512_and_si512(_mm512_srli_epi16::<6>(packed), mask),
            ]
        }
    }
}

impl Simd for Avx512Vnni {
    type Codes = __m512i;
    type Sums = __m512i;

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
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

    #[inline(always)]
    fn to_i32(self, sums: __m512i) -> [i32; PANEL] {
        let mut array = [0; PANEL];
        // SAFETY: `self` exists, so the CPU has AVX-512 F; the store is the array.
        unsafe { _mm512_storeu_si512(array.as_mut_ptr().cast(), sums) };
        array
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; PANEL]) -> __m512i {
        // SAFETY: `self` exists, so the CPU has AVX-512 F; the load is the array.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn splat_i32(self, sum: i32) -> __m512i {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_set1_epi32(sum) }
    }

    #[inline(always)]
    fn add_scaled(self, sums: __m512i, terms: __m512i, scales: &[u8; PANEL]) -> __m512i {
        // SAFETY: `self` exists, so the CPU has AVX-512 F; the load is the array.
        unsafe {
            let scales = _mm512_cvtepi8_epi32(_mm_loadu_si128(scales.as_ptr().cast()));
            _mm512_add_epi32(sums, _mm512_mullo_epi32(terms, scales))
        }
    }

    #[inline(always)]
    fn no_codes(self) -> __m512i {
        self.zero()
    }

    #[inline(always)]
    fn load_codes(self, from: &Line) -> __m512i {
        // SAFETY: `self` exists, so the CPU has AVX-512 F; the load is the line.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_codes(self, codes: __m512i, to: &mut Line) {
        // SAFETY: `self` exists, so the CPU has AVX-512 F; the store is the line.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), codes) };
    }

    #[inline(always)]
    fn unpack_bits(self, line: &Line) -> [__m512i; 4] {
        let packed = self.load_codes(line);
        self.bit_pairs(packed)
    }

    #[inline(always)]
    fn unpack_nibbles(self, line: &Line) -> [__m512i; 2] {
        let packed = self.load_codes(line);
        // SAFETY: `self` exists, so the CPU has AVX-512 F and BW.
        unsafe {
            let mask = _mm512_set1_epi8(15);
            [_mm512_and_si512(packed, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(packed), mask)]
        }
    }

    #[inline(always)]
    fn unpack_sixes(self, low: [&Line; 2], high: &Line) -> [__m512i; 4] {
        /// `a & b | c`
        const AND_OR: i32 = 0b1110_1010;
        let [[c0, c1], [c2, c3]] = low.map(|line| self.unpack_nibbles(line));
        let high = self.load_codes(high);
        // SAFETY: `self` exists, so the CPU has AVX-512 F and BW.
        unsafe {
            let mask = _mm512_set1_epi8(0x30);
            [
                _mm512_ternarylogic_epi32::<AND_OR>(_mm512_slli_epi16::<4>(high), mask, c0),
                _mm512_ternarylogic_epi32::<AND_OR>(_mm512_slli_epi16::<2>(high), mask, c1),
                _mm512_ternarylogic_epi32::<AND_OR>(high, mask, c2),
                _mm512_ternarylogic_epi32::<AND_OR>(_mm512_srli_epi16::<2>(high), mask, c3),
            ]
        }
    }

    /// The four lower digits of every byte are looked up as four pairs of bits, in a table of 256
    /// bytes of which each look-up reaches half; the fifth is what two comparisons say.
    #[inline(always)]
    fn unpack_trits(self, line: &Line) -> [__m512i; 5] {
        let packed = self.load_codes(line);
        // SAFETY: `self` exists, so the CPU has AVX-512 F, BW and VBMI; the loads are the tables.
        unsafe {
            let table: [__m512i; 4] =
                std::array::from_fn(|i| _mm512_load_si512(DIGITS.0[i].as_ptr().cast()));
            let low = _mm512_permutex2var_epi8(table[0], packed, table[1]);
            let high = _mm512_permutex2var_epi8(table[2], packed, table[3]);
            let [c0, c1, c2, c3] =
                self.bit_pairs(_mm512_mask_blend_epi8(_mm512_movepi8_mask(packed), low, high));
            let one = _mm512_cmpge_epu8_mask(packed, _mm512_set1_epi8(81));
            let two = _mm512_cmpge_epu8_mask(packed, _mm512_set1_epi8(162_u8 as i8));
            let c4 = _mm512_maskz_mov_epi8(one, _mm512_set1_epi8(1));
            [c0, c1, c2, c3, _mm512_mask_mov_epi8(c4, two, _mm512_set1_epi8(2))]
        }
    }

    /// `vpdpbusd` adds four products of an unsigned with a signed byte to a 32-bit sum and wraps;
    /// nothing in between is narrower, so there is nothing to overflow.
    #[inline(always)]
    fn multiply(self, sums: __m512i, codes: __m512i, x: &[i8; 4]) -> __m512i {
        // SAFETY: `self` exists, so the CPU has AVX-512 F and VNNI.
        unsafe {
            let x = _mm512_set1_epi32(i32::from_le_bytes(x.map(|x| x as u8)));
            _mm512_dpbusd_epi32(sums, codes, x)
        }
    }

    #[inline(always)]
    fn multiply_wide(self, sums: __m512i, codes: __m512i, x: &[i8; 4]) -> __m512i {
        self.multiply(sums, codes, x)
    }

    #[inline(always)]
    fn multiply_signed(self, sums: __m512i, values: __m512i, x: &[u8; 4]) -> __m512i {
        // SAFETY: `self` exists, so the CPU has AVX-512 F and VNNI.
        unsafe {
            let x = _mm512_set1_epi32(i32::from_le_bytes(*x));
            _mm512_dpbusd_epi32(sums, x, values)
        }
    }

    #[inline(always)]
    fn prefetch(self, line: &Line, bytes: usize) {
        super::prefetch(line, bytes);
    }

    type Lanes = __m512;

    #[inline(always)]
    fn load_f32(self, from: &[f32; LANES]) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F; the load is the array.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn splat_f32(self, value: f32) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn sums_to_f32(self, sums: __m512i) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_cvtepi32_ps(sums) }
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
    fn multiply_f32(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn to_array(self, lanes: __m512) -> [f32; LANES] {
        let mut array = [0.0; LANES];
        // SAFETY: `self` exists, so the CPU has AVX-512 F; the store is the array.
        unsafe { _mm512_storeu_ps(array.as_mut_ptr(), lanes) };
        array
    }
}
