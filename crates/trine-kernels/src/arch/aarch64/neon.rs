//! Registers of 128 bits, of which four are a line.

use std::arch::aarch64::*;
use std::arch::asm;

use half::{bf16, f16};

use super::super::digits::{Bytes, digits};
use super::super::{Kernel, LANES, Simd};
use crate::packed::{Line, PANEL};
use crate::trits5::DIGITS;

/// Registers of a line.
const N: usize = 4;

/// Proof that the CPU has NEON, and `sdot` if `DOT`.
#[derive(Clone, Copy)]
pub(in crate::arch) struct Arm<const DOT: bool>(());

impl<const DOT: bool> Arm<DOT> {
    /// The proof, where the CPU has the instructions.
    #[inline]
    pub(in crate::arch) fn new() -> Option<Self> {
        use std::arch::is_aarch64_feature_detected as has;
        (has!("neon") && (!DOT || has!("dotprod"))).then_some(Self(()))
    }

    /// Four numbers in every 32 bits.
    #[inline(always)]
    fn broadcast(self, x: [u8; 4]) -> int8x16_t {
        // SAFETY: `self` exists.
        unsafe { vreinterpretq_s8_s32(vdupq_n_s32(i32::from_le_bytes(x))) }
    }
}

/// `sdot`: adds four products of signed bytes to 32 bits, which wrap. Its intrinsic is unstable.
///
/// # Safety
/// The CPU has it, and the function into which this is inlined is compiled for it.
#[inline(always)]
pub(super) unsafe fn sdot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as the caller promises; the instruction touches nothing but its registers.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Adds the products of four bytes to each of four sums; two products must fit 16 bits.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn add_pairs(sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as the caller promises.
    unsafe {
        let low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
        vpadalq_s16(sums, vpaddq_s16(low, vmull_high_s8(a, b)))
    }
}

impl Bytes for uint8x16_t {
    #[inline(always)]
    unsafe fn splat_i8(value: i8) -> Self {
        // SAFETY: as the caller promises.
        unsafe { vdupq_n_u8(value as u8) }
    }

    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        // SAFETY: as the caller promises.
        unsafe { vandq_u8(self, other) }
    }

    #[inline(always)]
    unsafe fn and_or(self, mask: Self, other: Self) -> Self {
        // SAFETY: as the caller promises.
        unsafe { vorrq_u8(vandq_u8(self, mask), other) }
    }

    #[inline(always)]
    unsafe fn sub_i8(self, other: Self) -> Self {
        // SAFETY: as the caller promises.
        unsafe { vsubq_u8(self, other) }
    }

    #[inline(always)]
    unsafe fn min_u8(self, other: Self) -> Self {
        // SAFETY: as the caller promises.
        unsafe { vminq_u8(self, other) }
    }

    #[inline(always)]
    unsafe fn shift_1(self) -> Self {
        // SAFETY: as the caller promises.
        unsafe { vshrq_n_u8::<1>(self) }
    }

    #[inline(always)]
    unsafe fn shift_4(self) -> Self {
        // SAFETY: as the caller promises.
        unsafe { vshrq_n_u8::<4>(self) }
    }

    #[inline(always)]
    unsafe fn look_up(self, table: &[u8; 16]) -> Self {
        // SAFETY: as the caller promises; the load is the array.
        unsafe { vqtbl1q_u8(vld1q_u8(table.as_ptr()), self) }
    }
}

/// Asks for the line at an address, by a kind of `prfm`.
macro_rules! prefetch {
    ($kind:literal, $at:expr) => {
        // SAFETY: a hint, which never faults, whatever the address.
        unsafe {
            asm!(
                concat!("prfm ", $kind, ", [{at}]"),
                at = in(reg) $at,
                options(readonly, nostack, preserves_flags),
            );
        }
    };
}

impl<const DOT: bool> Simd for Arm<DOT> {
    /// Codes above 127, of which there are only in [`Simd::multiply_wide`], as what their bits say.
    type Codes = [int8x16_t; N];
    type Sums = [int32x4_t; N];

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon")]
        fn neon<S: Simd, K: Kernel>(simd: S, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        #[target_feature(enable = "neon,dotprod")]
        fn dot<S: Simd, K: Kernel>(simd: S, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists, so the CPU has these features.
        unsafe { if DOT { dot(self, kernel) } else { neon(self, kernel) } }
    }

    #[inline(always)]
    fn zero(self) -> [int32x4_t; N] {
        // SAFETY: `self` exists.
        unsafe { [vdupq_n_s32(0); N] }
    }

    #[inline(always)]
    fn to_i32(self, sums: [int32x4_t; N]) -> [i32; PANEL] {
        let mut array = [0; PANEL];
        for n in 0..N {
            // SAFETY: `self` exists; all stores together are the array.
            unsafe { vst1q_s32(array.as_mut_ptr().add(4 * n), sums[n]) };
        }
        array
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; PANEL]) -> [int32x4_t; N] {
        let mut sums = self.zero();
        for n in 0..N {
            // SAFETY: `self` exists; all loads together are the array.
            sums[n] = unsafe { vld1q_s32(from.as_ptr().add(4 * n)) };
        }
        sums
    }

    #[inline(always)]
    fn splat_i32(self, sum: i32) -> [int32x4_t; N] {
        // SAFETY: `self` exists.
        unsafe { [vdupq_n_s32(sum); N] }
    }

    #[inline(always)]
    fn add_scaled(
        self,
        mut sums: [int32x4_t; N],
        terms: [int32x4_t; N],
        scales: &[u8; PANEL],
    ) -> [int32x4_t; N] {
        for half in 0..2 {
            // SAFETY: `self` exists; both loads together are the array.
            unsafe {
                let scales = vmovl_s8(vld1_s8(scales.as_ptr().add(8 * half).cast()));
                let (low, high) = (vmovl_s16(vget_low_s16(scales)), vmovl_high_s16(scales));
                let n = 2 * half;
                sums[n] = vmlaq_s32(sums[n], terms[n], low);
                sums[n + 1] = vmlaq_s32(sums[n + 1], terms[n + 1], high);
            }
        }
        sums
    }

    #[inline(always)]
    fn no_codes(self) -> [int8x16_t; N] {
        // SAFETY: `self` exists.
        unsafe { [vdupq_n_s8(0); N] }
    }

    #[inline(always)]
    fn load_codes(self, from: &Line) -> [int8x16_t; N] {
        let mut codes = self.no_codes();
        for n in 0..N {
            // SAFETY: `self` exists; all loads together are the line.
            codes[n] = unsafe { vld1q_s8(from.as_ptr().add(16 * n).cast()) };
        }
        codes
    }

    #[inline(always)]
    fn store_codes(self, codes: [int8x16_t; N], to: &mut Line) {
        for n in 0..N {
            // SAFETY: `self` exists; all stores together are the line.
            unsafe { vst1q_s8(to.as_mut_ptr().add(16 * n).cast(), codes[n]) };
        }
    }

    #[inline(always)]
    fn unpack_bits(self, line: &Line) -> [[int8x16_t; N]; 4] {
        let packed = self.load_codes(line);
        let mut codes = [packed; 4];
        for n in 0..N {
            // SAFETY: `self` exists.
            unsafe {
                let (packed, mask) = (vreinterpretq_u8_s8(packed[n]), vdupq_n_u8(3));
                codes[0][n] = vreinterpretq_s8_u8(vandq_u8(packed, mask));
                codes[1][n] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8::<2>(packed), mask));
                codes[2][n] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8::<4>(packed), mask));
                codes[3][n] = vreinterpretq_s8_u8(vshrq_n_u8::<6>(packed));
            }
        }
        codes
    }

    #[inline(always)]
    fn unpack_nibbles(self, line: &Line) -> [[int8x16_t; N]; 2] {
        let packed = self.load_codes(line);
        let mut codes = [packed; 2];
        for n in 0..N {
            // SAFETY: `self` exists.
            unsafe {
                let packed = vreinterpretq_u8_s8(packed[n]);
                codes[0][n] = vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15)));
                codes[1][n] = vreinterpretq_s8_u8(vshrq_n_u8::<4>(packed));
            }
        }
        codes
    }

    #[inline(always)]
    fn unpack_sixes(self, low: [&Line; 2], high: &Line) -> [[int8x16_t; N]; 4] {
        let [mut c0, mut c1] = self.unpack_nibbles(low[0]);
        let [mut c2, mut c3] = self.unpack_nibbles(low[1]);
        let high = self.unpack_bits(high);
        for n in 0..N {
            // SAFETY: `self` exists.
            unsafe {
                c0[n] = vorrq_s8(c0[n], vshlq_n_s8::<4>(high[0][n]));
                c1[n] = vorrq_s8(c1[n], vshlq_n_s8::<4>(high[1][n]));
                c2[n] = vorrq_s8(c2[n], vshlq_n_s8::<4>(high[2][n]));
                c3[n] = vorrq_s8(c3[n], vshlq_n_s8::<4>(high[3][n]));
            }
        }
        [c0, c1, c2, c3]
    }

    #[inline(always)]
    fn unpack_threes(self, low: [&Line; 2], high: &Line) -> [[[int8x16_t; N]; 4]; 2] {
        let mut codes = [self.unpack_bits(low[0]), self.unpack_bits(low[1])];
        let high = self.load_codes(high);
        for n in 0..N {
            // SAFETY: `self` exists.
            unsafe {
                let (high, mask) = (vreinterpretq_u8_s8(high[n]), vdupq_n_u8(4));
                let bits = [high, vshrq_n_u8::<1>(high)];
                for g in 0..2 {
                    let high = [
                        vshlq_n_u8::<2>(bits[g]),
                        bits[g],
                        vshrq_n_u8::<2>(bits[g]),
                        vshrq_n_u8::<4>(bits[g]),
                    ];
                    for q in 0..4 {
                        let high = vreinterpretq_s8_u8(vandq_u8(high[q], mask));
                        codes[g][q][n] = vorrq_s8(codes[g][q][n], high);
                    }
                }
            }
        }
        codes
    }

    #[inline(always)]
    fn unpack_trits(self, line: &Line) -> [[int8x16_t; N]; DIGITS] {
        let packed = self.load_codes(line);
        let mut codes = [packed; DIGITS];
        for n in 0..N {
            // SAFETY: `self` exists.
            unsafe {
                let digits = digits(vreinterpretq_u8_s8(packed[n]));
                for d in 0..DIGITS {
                    codes[d][n] = vreinterpretq_s8_u8(digits[d]);
                }
            }
        }
        codes
    }

    #[inline(always)]
    fn multiply(self, sums: [int32x4_t; N], codes: [int8x16_t; N], x: &[i8; 4]) -> [int32x4_t; N] {
        let mut sums = [[sums]];
        self.multiply_rows(&mut sums, &[[codes]], [x]);
        sums[0][0]
    }

    /// Without `sdot`, products are added in 16 bits, in pairs at last: with a code of at most 2 and
    /// five products, within 2560. For [`Self::multiply`], with a code of at most 63 and one
    /// product, the pair is within 16128.
    #[inline(always)]
    fn multiply_rows<const D: usize, const R: usize, const K: usize>(
        self,
        sums: &mut [[[int32x4_t; N]; R]; K],
        codes: &[[[int8x16_t; N]; D]; R],
        x: [&[i8; 4]; D],
    ) {
        // SAFETY: `self` exists.
        unsafe {
            let mut broadcast = [vdupq_n_s8(0); D];
            for d in 0..D {
                broadcast[d] = self.broadcast(x[d].map(|x| x as u8));
            }
            for r in 0..R {
                for n in 0..N {
                    if DOT {
                        for d in 0..D {
                            sums[d % K][r][n] =
                                sdot(sums[d % K][r][n], codes[r][d][n], broadcast[d]);
                        }
                        continue;
                    }
                    let (mut low, mut high) = (vdupq_n_s16(0), vdupq_n_s16(0));
                    for d in 0..D {
                        let (codes, x) = (codes[r][d][n], broadcast[d]);
                        low = vmlal_s8(low, vget_low_s8(codes), vget_low_s8(x));
                        high = vmlal_high_s8(high, codes, x);
                    }
                    sums[0][r][n] = vpadalq_s16(sums[0][r][n], vpaddq_s16(low, high));
                }
            }
        }
    }

    /// Codes as signed numbers are too small by 256 where the high bit is set, so that bit is
    /// turned: they are then too small by 128 everywhere.
    #[inline(always)]
    fn multiply_wide(
        self,
        mut sums: [int32x4_t; N],
        codes: [int8x16_t; N],
        x: &[i8; 4],
    ) -> [int32x4_t; N] {
        let total: i32 = x.iter().map(|&x| i32::from(x)).sum();
        let x = self.broadcast(x.map(|x| x as u8));
        for n in 0..N {
            // SAFETY: `self` exists.
            unsafe {
                let low = veorq_s8(codes[n], vdupq_n_s8(-128));
                sums[n] = vaddq_s32(sums[n], vdupq_n_s32(128 * total));
                sums[n] = if DOT {
                    sdot(sums[n], low, x)
                } else {
                    // Products of -128 with -128 are 16384, of which a pair does not fit 16 bits.
                    let first = vmull_s8(vget_low_s8(low), vget_low_s8(x));
                    let last = vmull_high_s8(low, x);
                    let pairs = vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(last));
                    vaddq_s32(sums[n], pairs)
                };
            }
        }
        sums
    }

    /// Without `sdot`, a pair of products is within 2 * 127 * 128 = 32512.
    #[inline(always)]
    fn multiply_signed(
        self,
        mut sums: [int32x4_t; N],
        values: [int8x16_t; N],
        x: &[u8; 4],
    ) -> [int32x4_t; N] {
        let x = self.broadcast(*x);
        for n in 0..N {
            // SAFETY: `self` exists.
            unsafe {
                sums[n] = if DOT {
                    sdot(sums[n], values[n], x)
                } else {
                    add_pairs(sums[n], values[n], x)
                };
            }
        }
        sums
    }

    #[inline(always)]
    fn prefetch<T>(self, at: *const T, bytes: usize) {
        prefetch!("pldl1keep", at.cast::<i8>().wrapping_add(bytes));
    }

    #[inline(always)]
    fn prefetch_far<T>(self, at: *const T, bytes: usize) {
        prefetch!("pldl2keep", at.cast::<i8>().wrapping_add(bytes));
    }

    /// Lanes 0 to 3, and so on.
    type Lanes = [float32x4_t; N];

    #[inline(always)]
    fn load_f32(self, from: &[f32; LANES]) -> [float32x4_t; N] {
        let mut lanes = self.splat_f32(0.0);
        for n in 0..N {
            // SAFETY: `self` exists; all loads together are the array.
            lanes[n] = unsafe { vld1q_f32(from.as_ptr().add(4 * n)) };
        }
        lanes
    }

    #[inline(always)]
    fn splat_f32(self, value: f32) -> [float32x4_t; N] {
        // SAFETY: `self` exists.
        unsafe { [vdupq_n_f32(value); N] }
    }

    #[inline(always)]
    fn sums_to_f32(self, sums: [int32x4_t; N]) -> [float32x4_t; N] {
        let mut lanes = self.splat_f32(0.0);
        for n in 0..N {
            // SAFETY: `self` exists.
            lanes[n] = unsafe { vcvtq_f32_s32(sums[n]) };
        }
        lanes
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> [float32x4_t; N] {
        let mut lanes = self.splat_f32(0.0);
        for n in 0..N {
            // SAFETY: `self` exists; all loads together are the array. The intrinsic of `fcvtl` is
            // younger than the Rust that we ask for.
            unsafe {
                let bits = vld1_u16(from.as_ptr().add(4 * n).cast());
                asm!(
                    "fcvtl {wide:v}.4s, {half:v}.4h",
                    wide = lateout(vreg) lanes[n],
                    half = in(vreg) bits,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
        lanes
    }

    #[inline(always)]
    fn load_bf16(self, from: &[bf16; LANES]) -> [float32x4_t; N] {
        let mut lanes = self.splat_f32(0.0);
        for n in 0..N {
            // SAFETY: `self` exists; all loads together are the array.
            unsafe {
                let bits = vld1_u16(from.as_ptr().add(4 * n).cast());
                lanes[n] = vreinterpretq_f32_u32(vshll_n_u16::<16>(bits));
            }
        }
        lanes
    }

    #[inline(always)]
    fn multiply_add(
        self,
        mut acc: [float32x4_t; N],
        a: [float32x4_t; N],
        b: [float32x4_t; N],
    ) -> [float32x4_t; N] {
        for n in 0..N {
            // SAFETY: `self` exists.
            acc[n] = unsafe { vaddq_f32(acc[n], vmulq_f32(a[n], b[n])) };
        }
        acc
    }

    #[inline(always)]
    fn multiply_f32(self, mut a: [float32x4_t; N], b: [float32x4_t; N]) -> [float32x4_t; N] {
        for n in 0..N {
            // SAFETY: `self` exists.
            a[n] = unsafe { vmulq_f32(a[n], b[n]) };
        }
        a
    }

    #[inline(always)]
    fn to_array(self, lanes: [float32x4_t; N]) -> [f32; LANES] {
        let mut array = [0.0; LANES];
        for n in 0..N {
            // SAFETY: `self` exists; all stores together are the array.
            unsafe { vst1q_f32(array.as_mut_ptr().add(4 * n), lanes[n]) };
        }
        array
    }
}
