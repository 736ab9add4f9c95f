//! What a register of 256 bits and one of 512 bits have in common: the instructions, by one name.
//!
//! A [`Register`] gives names to intrinsics and nothing else, so that `simd` can be written once.
//! Products of bytes are the exception, which come in two ways: `vpdpbusd` where the CPU has VNNI,
//! and pairs in 16 bits where it does not.

use half::{bf16, f16};

use super::super::digits::{Bytes, digits};
use super::super::{Kernel, LANES, Simd};
use crate::trits5::DIGITS;

/// A vector register, and the instructions on it that the kernels use.
///
/// # Safety
/// Of every method: the CPU has what [`Self::detected`] asks for, with the same constants.
pub(in crate::arch) trait Register: Bytes + Send + Sync {
    /// The same register as floats.
    type Floats: Copy;

    /// Whether the CPU has the instructions, those of VNNI and of VBMI only if they are asked for.
    fn detected<const VNNI: bool, const VBMI: bool>() -> bool;

    /// Runs `kernel` in a function compiled for the instructions that [`Self::detected`] names.
    unsafe fn run<S: Simd, K: Kernel, const VNNI: bool, const VBMI: bool>(
        simd: S,
        kernel: K,
    ) -> K::Output;

    unsafe fn zero() -> Self;
    unsafe fn load(from: *const u8) -> Self;
    unsafe fn store(self, to: *mut u8);
    unsafe fn splat_i16(value: i16) -> Self;
    unsafe fn splat_i32(value: i32) -> Self;
    unsafe fn add_i16(self, other: Self) -> Self;
    unsafe fn add_i32(self, other: Self) -> Self;
    /// The low 32 bits of the products.
    unsafe fn multiply_i32(self, other: Self) -> Self;
    /// Loads and widens to 32 bits as many bytes as there are such numbers in a register.
    unsafe fn load_i8_to_i32(from: *const i8) -> Self;
    /// 32-bit numbers, rounded.
    unsafe fn to_f32(self) -> Self::Floats;

    /// The larger 32-bit numbers, without sign.
    unsafe fn max_u32(self, other: Self) -> Self;
    /// Words of 32 bits, shifted left.
    unsafe fn shift_left_23(self) -> Self;
    /// In every 16 bytes, the lowest byte of each four and then the second of each four, 8 in all.
    unsafe fn byte_pairs(self) -> Self;
    /// The words of two registers in turn.
    unsafe fn join_words(self, other: Self) -> (Self, Self);

    /// Words of 16 bits, shifted left by 2 and 4 bits.
    unsafe fn shift_left_2(self) -> Self;
    unsafe fn shift_left_4(self) -> Self;

    /// Words of 16 bits, shifted right by 2, 6 and 7 bits.
    unsafe fn shift_2(self) -> Self;
    unsafe fn shift_6(self) -> Self;
    unsafe fn shift_7(self) -> Self;

    /// `vpmaddubsw`: products of unsigned and signed bytes, added in pairs, saturated to 16 bits.
    unsafe fn multiply_u8_i8(self, signed: Self) -> Self;

    /// `vpmaddwd`: products of 16 bits, added in pairs to 32.
    unsafe fn multiply_i16(self, other: Self) -> Self;

    /// `vpdpbusd`: adds four products of unsigned and signed bytes to 32 bits, which wrap. VNNI.
    unsafe fn add_dot(self, unsigned: Self, signed: Self) -> Self;

    /// The digits of bytes of five trits, from the lowest. Only with VBMI may its instructions be
    /// used.
    #[inline(always)]
    unsafe fn digits<const VBMI: bool>(self) -> [Self; DIGITS] {
        // SAFETY: as the caller promises.
        unsafe { digits(self) }
    }

    /// The digits, with VBMI shifted as in the [`table`](crate::trits5::table).
    #[inline(always)]
    unsafe fn fields<const VBMI: bool>(self) -> [Self; DIGITS] {
        // SAFETY: as the caller promises.
        unsafe { digits(self) }
    }

    unsafe fn load_f32(from: *const f32) -> Self::Floats;
    /// Loads and widens as many halves as there are floats in a register.
    unsafe fn load_f16(from: *const f16) -> Self::Floats;
    /// Loads and widens as many bfloats as there are floats in a register.
    unsafe fn load_bf16(from: *const bf16) -> Self::Floats;
    unsafe fn store_f32(floats: Self::Floats, to: *mut f32);
    unsafe fn splat_f32(value: f32) -> Self::Floats;
    /// The same bits.
    unsafe fn bits_of(floats: Self::Floats) -> Self;
    /// The same bits.
    unsafe fn as_floats(self) -> Self::Floats;
    unsafe fn sub_f32(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `b` where either is NaN.
    unsafe fn max_f32(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `y`, 0 where `x` is less than `bound`.
    unsafe fn zero_where_less(
        y: Self::Floats,
        x: Self::Floats,
        bound: Self::Floats,
    ) -> Self::Floats;
    /// The sums of the floats in each of sixteen registers: the upper half is added to the lower one,
    /// until a float is left.
    unsafe fn sum_each(registers: [Self::Floats; LANES]) -> [f32; LANES];
    unsafe fn add_f32(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn multiply_f32(a: Self::Floats, b: Self::Floats) -> Self::Floats;
}

/// What [`Register::byte_pairs`] takes of every 16 bytes.
pub(super) const BYTE_PAIRS: [i8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, -1, -1, -1, -1, -1, -1, -1, -1];

/// Methods that are an intrinsic each.
macro_rules! intrinsics {
    ($($name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? = $intrinsic:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $type),*) $(-> $out)? {
            // SAFETY: the CPU has the instruction, and pointers reach as far as a register, as the
            // caller promises.
            unsafe { $intrinsic($($arg),*) }
        }
    )*};
}
pub(super) use intrinsics;
