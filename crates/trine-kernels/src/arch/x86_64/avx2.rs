//! AVX2: 32 bytes at a time, `vpmaddubsw` into 16-bit pairs.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::super::{Kernel, LANES, Simd};
use crate::packed::{Line, PANEL};

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

/// Bytes in a vector: half of a line.
const WIDTH: usize = 32;

impl Simd for Avx2 {
    type Codes = [__m256i; 2];
    type Sums = [__m256i; 2];

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
    fn zero(self) -> [__m256i; 2] {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    fn to_i32(self, sums: [__m256i; 2]) -> [i32; PANEL] {
        let mut array = [0; PANEL];
        // SAFETY: `self` exists, so the CPU has AVX2; the two stores are the array.
        unsafe {
            _mm256_storeu_si256(array.as_mut_ptr().cast(), sums[0]);
            _mm256_storeu_si256(array.as_mut_ptr().add(8).cast(), sums[1]);
        }
        array
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; PANEL]) -> [__m256i; 2] {
        let from = from.as_ptr();
        // SAFETY: `self` exists, so the CPU has AVX2; the two loads are the array.
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(8).cast())] }
    }

    #[inline(always)]
    fn splat_i32(self, sum: i32) -> [__m256i; 2] {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { [_mm256_set1_epi32(sum); 2] }
    }

    #[inline(always)]
    fn add_scaled(
        self,
        sums: [__m256i; 2],
        terms: [__m256i; 2],
        scales: &[u8; PANEL],
    ) -> [__m256i; 2] {
        // SAFETY: `self` exists, so the CPU has AVX2; the load is the array.
        unsafe {
            let scales = _mm_loadu_si128(scales.as_ptr().cast());
            let scales = [scales, _mm_unpackhi_epi64(scales, scales)];
            std::array::from_fn(|half| {
                let scales = _mm256_cvtepi8_epi32(scales[half]);
                _mm256_add_epi32(sums[half], _mm256_mullo_epi32(terms[half], scales))
            })
        }
    }

    #[inline(always)]
    fn no_codes(self) -> [__m256i; 2] {
        self.zero()
    }

    #[inline(always)]
    fn load_codes(self, from: &Line) -> [__m256i; 2] {
        let from = from.as_ptr();
        // SAFETY: `self` exists, so the CPU has AVX2; the two loads are the line.
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(WIDTH).cast())] }
    }

    #[inline(always)]
    fn store_codes(self, codes: [__m256i; 2], to: &mut Line) {
        let to = to.as_mut_ptr();
        // SAFETY: `self` exists, so the CPU has AVX2; the two stores are the line.
        unsafe {
            _mm256_storeu_si256(to.cast(), codes[0]);
            _mm256_storeu_si256(to.add(WIDTH).cast(), codes[1]);
        }
    }

    #[inline(always)]
    fn unpack_bits(self, line: &Line) -> [[__m256i; 2]; 4] {
        let packed = self.load_codes(line);
        let mut codes = [[packed[0]; 2]; 4];
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe {
            let mask = _mm256_set1_epi8(3);
            for half in 0..2 {
                let mut packed = packed[half];
                for quarter in 0..4 {
                    codes[quarter][half] = _mm256_and_si256(packed, mask);
                    packed = _mm256_srli_epi16::<2>(packed);
                }
            }
        }
        codes
    }

    #[inline(always)]
    fn unpack_nibbles(self, line: &Line) -> [[__m256i; 2]; 2] {
        let packed = self.load_codes(line);
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            [
                packed.map(|packed| _mm256_and_si256(packed, mask)),
                packed.map(|packed| _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask)),
            ]
        }
    }

    #[inline(always)]
    fn unpack_sixes(self, low: [&Line; 2], high: &Line) -> [[__m256i; 2]; 4] {
        let [[mut c0, mut c1], [mut c2, mut c3]] = low.map(|line| self.unpack_nibbles(line));
        let high = self.load_codes(high);
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe {
            let mask = _mm256_set1_epi8(0x30);
            let join = |code: &mut __m256i, high| {
                *code = _mm256_or_si256(*code, _mm256_and_si256(high, mask));
            };
            for half in 0..2 {
                join(&mut c0[half], _mm256_slli_epi16::<4>(high[half]));
                join(&mut c1[half], _mm256_slli_epi16::<2>(high[half]));
                join(&mut c2[half], high[half]);
                join(&mut c3[half], _mm256_srli_epi16::<2>(high[half]));
            }
        }
        [c0, c1, c2, c3]
    }

    /// Digit by digit from the highest: it is how often its power can be subtracted. Where a power
    /// is too large, subtracting it wraps around to something larger, so the minimum is what was.
    #[inline(always)]
    fn unpack_trits(self, line: &Line) -> [[__m256i; 2]; 5] {
        let packed = self.load_codes(line);
        let mut codes = [[packed[0]; 2]; 5];
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe {
            for half in 0..2 {
                let mut rest = packed[half];
                for (digit, power) in [(4, 81), (3, 27), (2, 9), (1, 3)] {
                    let power = _mm256_set1_epi8(power);
                    // -1 for each time that it could not be subtracted.
                    let mut kept = _mm256_set1_epi8(2);
                    for _ in 0..2 {
                        let less = _mm256_min_epu8(rest, _mm256_sub_epi8(rest, power));
                        kept = _mm256_add_epi8(kept, _mm256_cmpeq_epi8(less, rest));
                        rest = less;
                    }
                    codes[digit][half] = kept;
                }
                // A byte above 242 leaves more than 2.
                codes[0][half] = _mm256_min_epu8(rest, _mm256_set1_epi8(2));
            }
        }
        codes
    }

    #[inline(always)]
    fn multiply(self, sums: [__m256i; 2], codes: [__m256i; 2], x: &[i8; 4]) -> [__m256i; 2] {
        let mut sums = [sums];
        self.multiply_rows(&mut sums, &[[codes]], [x]);
        sums[0]
    }

    /// `vpmaddubsw` adds two products in 16 bits and saturates, which must never happen: with a code
    /// of at most 2 and an activation of at least -128 a pair is within 512, and what is added
    /// before widening, at most five of them, within 2560, far from 32767. For [`Self::multiply`],
    /// with a code of at most 63, the pair is within 16128.
    #[inline(always)]
    fn multiply_rows<const D: usize, const R: usize>(
        self,
        sums: &mut [[__m256i; 2]; R],
        codes: &[[[__m256i; 2]; D]; R],
        x: [&[i8; 4]; D],
    ) {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let mut pairs = [[_mm256_setzero_si256(); 2]; R];
            for d in 0..D {
                let x = _mm256_set1_epi32(i32::from_le_bytes(x[d].map(|x| x as u8)));
                for r in 0..R {
                    for half in 0..2 {
                        let products = _mm256_maddubs_epi16(codes[r][d][half], x);
                        pairs[r][half] = _mm256_add_epi16(pairs[r][half], products);
                    }
                }
            }
            for r in 0..R {
                for half in 0..2 {
                    let widened = _mm256_madd_epi16(pairs[r][half], ones);
                    sums[r][half] = _mm256_add_epi32(sums[r][half], widened);
                }
            }
        }
    }

    #[inline(always)]
    fn multiply_one<const D: usize>(
        self,
        sums: &mut [[__m256i; 2]; D],
        codes: &[[__m256i; 2]; D],
        x: [&[i8; 4]; D],
    ) {
        // Only the addition waits for the one before, and that is quick.
        let mut sum = [sums[0]];
        self.multiply_rows(&mut sum, &[*codes], x);
        sums[0] = sum[0];
    }

    /// The low seven bits, of which a pair of products is within 32512, and the high bit apart.
    #[inline(always)]
    fn multiply_wide(self, sums: [__m256i; 2], codes: [__m256i; 2], x: &[i8; 4]) -> [__m256i; 2] {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe {
            let x = _mm256_set1_epi32(i32::from_le_bytes(x.map(|x| x as u8)));
            std::array::from_fn(|half| {
                let low = _mm256_and_si256(codes[half], _mm256_set1_epi8(127));
                let high =
                    _mm256_and_si256(_mm256_srli_epi16::<7>(codes[half]), _mm256_set1_epi8(1));
                let low = _mm256_maddubs_epi16(low, x);
                let low = _mm256_madd_epi16(low, _mm256_set1_epi16(1));
                let high = _mm256_maddubs_epi16(high, x);
                let high = _mm256_madd_epi16(high, _mm256_set1_epi16(128));
                _mm256_add_epi32(sums[half], _mm256_add_epi32(low, high))
            })
        }
    }

    /// A pair of products is within 2 * 127 * 128 = 32512.
    #[inline(always)]
    fn multiply_signed(
        self,
        sums: [__m256i; 2],
        values: [__m256i; 2],
        x: &[u8; 4],
    ) -> [__m256i; 2] {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe {
            let x = _mm256_set1_epi32(i32::from_le_bytes(*x));
            std::array::from_fn(|half| {
                let pairs = _mm256_maddubs_epi16(x, values[half]);
                let products = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                _mm256_add_epi32(sums[half], products)
            })
        }
    }

    #[inline(always)]
    fn prefetch(self, line: &Line, bytes: usize) {
        super::prefetch(line, bytes);
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
    fn splat_f32(self, value: f32) -> [__m256; 2] {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn sums_to_f32(self, sums: [__m256i; 2]) -> [__m256; 2] {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { [_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1])] }
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
    fn multiply_f32(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
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
