//! The operations of the kernels on x86-64, written once for every kind of register.

use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
use std::marker::PhantomData;

use half::{bf16, f16};

use super::super::{EXP2, EXP2_LEAST, Kernel, LANES, ROUND, Simd};
use super::register::Register;
use crate::packed::{Line, PANEL};
use crate::trits5::DIGITS;
use crate::trits5::table::SHIFTS;

/// Proof that the CPU has what [`Register::detected`] asks for, where `N` registers are a line, with
/// `vpdpbusd` if `VNNI`, and with `vpermi2b` if `VBMI`.
#[derive(Clone, Copy)]
pub(in crate::arch) struct X86<V, const N: usize, const VNNI: bool, const VBMI: bool>(
    PhantomData<V>,
);

impl<V: Register, const N: usize, const VNNI: bool, const VBMI: bool> X86<V, N, VNNI, VBMI> {
    /// Bytes in a register.
    const WIDTH: usize = size_of::<Line>() / N;

    /// Floats in a register.
    const FLOATS: usize = LANES / N;

    /// The proof, where the CPU has the instructions.
    #[inline]
    pub(in crate::arch) fn new() -> Option<Self> {
        const { assert!(size_of::<V>() * N == size_of::<Line>(), "a line is N registers") };
        V::detected::<VNNI, VBMI>().then_some(Self(PhantomData))
    }

    /// Four numbers in every 32 bits.
    #[inline(always)]
    fn broadcast(self, x: [u8; 4]) -> V {
        // SAFETY: `self` exists.
        unsafe { V::splat_i32(i32::from_le_bytes(x)) }
    }

    /// The codes of five trits a byte, shifted by `TRIT_SHIFTS` if `FIELDS`.
    #[inline(always)]
    fn trits<const FIELDS: bool>(self, line: &Line) -> [[V; N]; DIGITS] {
        let packed = self.load_codes(line);
        let mut codes = [packed; DIGITS];
        for n in 0..N {
            // SAFETY: `self` exists.
            let digits = unsafe {
                if FIELDS { packed[n].fields::<VBMI>() } else { packed[n].digits::<VBMI>() }
            };
            for d in 0..DIGITS {
                codes[d][n] = digits[d];
            }
        }
        codes
    }
}

impl<V: Register, const N: usize, const VNNI: bool, const VBMI: bool> Simd
    for X86<V, N, VNNI, VBMI>
{
    type Codes = [V; N];
    type Sums = [V; N];

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` exists.
        unsafe { V::run::<Self, K, VNNI, VBMI>(self, kernel) }
    }

    #[inline(always)]
    fn zero(self) -> [V; N] {
        // SAFETY: `self` exists.
        unsafe { [V::zero(); N] }
    }

    #[inline(always)]
    fn to_i32(self, sums: [V; N]) -> [i32; PANEL] {
        let mut array = [0; PANEL];
        for n in 0..N {
            // SAFETY: `self` exists; all stores together are the array.
            unsafe { sums[n].store(array.as_mut_ptr().add(n * PANEL / N).cast()) };
        }
        array
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; PANEL]) -> [V; N] {
        let mut sums = self.zero();
        for n in 0..N {
            // SAFETY: `self` exists; all loads together are the array.
            sums[n] = unsafe { V::load(from.as_ptr().add(n * PANEL / N).cast()) };
        }
        sums
    }

    #[inline(always)]
    fn integers_of(self, line: &Line) -> [V; N] {
        self.load_codes(line)
    }

    #[inline(always)]
    fn splat_i32(self, sum: i32) -> [V; N] {
        // SAFETY: `self` exists.
        unsafe { [V::splat_i32(sum); N] }
    }

    #[inline(always)]
    fn add_scaled(self, mut sums: [V; N], terms: [V; N], scales: &[u8; PANEL]) -> [V; N] {
        for n in 0..N {
            // SAFETY: `self` exists; all loads together are the array.
            unsafe {
                let scales = V::load_i8_to_i32(scales.as_ptr().add(n * PANEL / N).cast());
                sums[n] = sums[n].add_i32(terms[n].multiply_i32(scales));
            }
        }
        sums
    }

    #[inline(always)]
    fn join_parts(self, high: [V; N], mut low: [V; N]) -> [V; N] {
        for n in 0..N {
            // SAFETY: `self` exists.
            low[n] = unsafe { low[n].add_i32(high[n].multiply_i32(V::splat_i32(128))) };
        }
        low
    }

    #[inline(always)]
    fn no_codes(self) -> [V; N] {
        self.zero()
    }

    #[inline(always)]
    fn load_codes(self, from: &Line) -> [V; N] {
        let mut codes = self.zero();
        for n in 0..N {
            // SAFETY: `self` exists; all loads together are the line.
            codes[n] = unsafe { V::load(from.as_ptr().add(n * Self::WIDTH)) };
        }
        codes
    }

    #[inline(always)]
    fn store_codes(self, codes: [V; N], to: &mut Line) {
        for n in 0..N {
            // SAFETY: `self` exists; all stores together are the line.
            unsafe { codes[n].store(to.as_mut_ptr().add(n * Self::WIDTH)) };
        }
    }

    #[inline(always)]
    fn unpack_bits(self, line: &Line) -> [[V; N]; 4] {
        let packed = self.load_codes(line);
        let mut codes = [packed; 4];
        for n in 0..N {
            // SAFETY: `self` exists.
            unsafe {
                let (packed, mask) = (packed[n], V::splat_i8(3));
                codes[0][n] = packed.and(mask);
                codes[1][n] = packed.shift_2().and(mask);
                codes[2][n] = packed.shift_4().and(mask);
                codes[3][n] = packed.shift_6().and(mask);
            }
        }
        codes
    }

    /// Products of codes up to 192 fit 32 bits, but not 16.
    const BIT_SHIFTS: [u32; 4] = if VNNI { [0, 2, 4, 6] } else { [0; 4] };

    #[inline(always)]
    fn fields_of_bits(self, line: &Line) -> [[V; N]; 4] {
        if !VNNI {
            return self.unpack_bits(line);
        }
        let packed = self.load_codes(line);
        let mut fields = [packed; 4];
        for n in 0..N {
            for d in 0..4 {
                // SAFETY: `self` exists.
                fields[d][n] = unsafe { packed[n].and(V::splat_i8((3 << (2 * d)) as i8)) };
            }
        }
        fields
    }

    const TRIT_SHIFTS: [u32; DIGITS] = if VBMI { SHIFTS } else { [0; DIGITS] };

    #[inline(always)]
    fn fields_of_trits(self, line: &Line) -> [[V; N]; DIGITS] {
        self.trits::<true>(line)
    }

    #[inline(always)]
    fn unpack_nibbles(self, line: &Line) -> [[V; N]; 2] {
        let packed = self.load_codes(line);
        let mut codes = [packed; 2];
        for n in 0..N {
            // SAFETY: `self` exists.
            unsafe {
                let mask = V::splat_i8(15);
                codes[0][n] = packed[n].and(mask);
                codes[1][n] = packed[n].shift_4().and(mask);
            }
        }
        codes
    }

    #[inline(always)]
    fn unpack_sixes(self, low: [&Line; 2], high: &Line) -> [[V; N]; 4] {
        let [mut c0, mut c1] = self.unpack_nibbles(low[0]);
        let [mut c2, mut c3] = self.unpack_nibbles(low[1]);
        let high = self.load_codes(high);
        for n in 0..N {
            // SAFETY: `self` exists.
            unsafe {
                let (high, mask) = (high[n], V::splat_i8(0x30));
                c0[n] = high.shift_left_4().and_or(mask, c0[n]);
                c1[n] = high.shift_left_2().and_or(mask, c1[n]);
                c2[n] = high.and_or(mask, c2[n]);
                c3[n] = high.shift_2().and_or(mask, c3[n]);
            }
        }
        [c0, c1, c2, c3]
    }

    #[inline(always)]
    fn unpack_threes(self, low: [&Line; 2], high: &Line) -> [[[V; N]; 4]; 2] {
        let mut codes = [self.unpack_bits(low[0]), self.unpack_bits(low[1])];
        let high = self.load_codes(high);
        for n in 0..N {
            // SAFETY: `self` exists.
            unsafe {
                let mask = V::splat_i8(4);
                let bits = [high[n], high[n].shift_1()];
                for g in 0..2 {
                    codes[g][0][n] = bits[g].shift_left_2().and_or(mask, codes[g][0][n]);
                    codes[g][1][n] = bits[g].and_or(mask, codes[g][1][n]);
                    codes[g][2][n] = bits[g].shift_2().and_or(mask, codes[g][2][n]);
                    codes[g][3][n] = bits[g].shift_4().and_or(mask, codes[g][3][n]);
                }
            }
        }
        codes
    }

    #[inline(always)]
    fn unpack_trits(self, line: &Line) -> [[V; N]; DIGITS] {
        self.trits::<false>(line)
    }

    #[inline(always)]
    fn multiply(self, sums: [V; N], codes: [V; N], x: &[i8; 4]) -> [V; N] {
        let mut sums = [[sums]];
        self.multiply_rows(&mut sums, &[[codes]], [x]);
        sums[0][0]
    }

    /// 24 of 32 registers.
    const HOLDS_SUMS: bool = VNNI && N == 1;

    // Cascade Lake. On Zen 4, which has VBMI, hints of the first level made reading slower.
    const READS_NEAR: bool = VNNI && N == 1 && !VBMI;

    /// `vpdpbusd` adds to 32-bit sums, which wrap; nothing in between is narrower.
    ///
    /// `vpmaddubsw` adds two products in 16 bits and saturates, which must never happen: with a code
    /// of at most 2 and an activation of at least -128 a pair is within 512, and what is added
    /// before widening, at most five of them, within 2560, far from 32767. For [`Self::multiply`],
    /// with a code of at most 63, the pair is within 16128.
    #[inline(always)]
    fn multiply_rows<const D: usize, const R: usize, const K: usize>(
        self,
        sums: &mut [[[V; N]; R]; K],
        codes: &[[[V; N]; D]; R],
        x: [&[i8; 4]; D],
    ) {
        // SAFETY: `self` exists.
        unsafe {
            let mut pairs = [[V::zero(); N]; R];
            for d in 0..D {
                let x = self.broadcast(x[d].map(|x| x as u8));
                for r in 0..R {
                    for n in 0..N {
                        let codes = codes[r][d][n];
                        if VNNI {
                            sums[d % K][r][n] = sums[d % K][r][n].add_dot(codes, x);
                        } else {
                            pairs[r][n] = pairs[r][n].add_i16(codes.multiply_u8_i8(x));
                        }
                    }
                }
            }
            if !VNNI {
                for r in 0..R {
                    for n in 0..N {
                        let widened = pairs[r][n].multiply_i16(V::splat_i16(1));
                        // Only this waits for the one before, and it is quick.
                        sums[0][r][n] = sums[0][r][n].add_i32(widened);
                    }
                }
            }
        }
    }

    /// Without VNNI, the low seven bits, of which a pair of products is within 32512, and the high
    /// bit apart.
    #[inline(always)]
    fn multiply_wide(self, mut sums: [V; N], codes: [V; N], x: &[i8; 4]) -> [V; N] {
        let x = self.broadcast(x.map(|x| x as u8));
        for n in 0..N {
            // SAFETY: `self` exists.
            unsafe {
                sums[n] = if VNNI {
                    sums[n].add_dot(codes[n], x)
                } else {
                    let low = codes[n].and(V::splat_i8(127)).multiply_u8_i8(x);
                    let high = codes[n].shift_7().and(V::splat_i8(1)).multiply_u8_i8(x);
                    let low = low.multiply_i16(V::splat_i16(1));
                    sums[n].add_i32(low).add_i32(high.multiply_i16(V::splat_i16(128)))
                };
            }
        }
        sums
    }

    /// Without VNNI, a pair of products is within 2 * 127 * 128 = 32512.
    #[inline(always)]
    fn multiply_signed(self, mut sums: [V; N], values: [V; N], x: &[u8; 4]) -> [V; N] {
        let x = self.broadcast(*x);
        for n in 0..N {
            // SAFETY: `self` exists.
            unsafe {
                sums[n] = if VNNI {
                    sums[n].add_dot(x, values[n])
                } else {
                    let pairs = x.multiply_u8_i8(values[n]);
                    sums[n].add_i32(pairs.multiply_i16(V::splat_i16(1)))
                };
            }
        }
        sums
    }

    #[inline(always)]
    fn prefetch<T>(self, at: *const T, bytes: usize) {
        let at = at.cast::<i8>().wrapping_add(bytes);
        // SAFETY: x86-64 has the instruction, and it never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at) };
    }

    #[inline(always)]
    fn prefetch_far<T>(self, at: *const T, bytes: usize) {
        let at = at.cast::<i8>().wrapping_add(bytes);
        // SAFETY: x86-64 has the instruction, and it never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at) };
    }

    type Lanes = [V::Floats; N];

    #[inline(always)]
    fn load_f32(self, from: &[f32; LANES]) -> [V::Floats; N] {
        let mut lanes = self.splat_f32(0.0);
        for n in 0..N {
            // SAFETY: `self` exists; all loads together are the array.
            lanes[n] = unsafe { V::load_f32(from.as_ptr().add(n * Self::FLOATS)) };
        }
        lanes
    }

    #[inline(always)]
    fn splat_f32(self, value: f32) -> [V::Floats; N] {
        // SAFETY: `self` exists.
        unsafe { [V::splat_f32(value); N] }
    }

    #[inline(always)]
    fn sums_to_f32(self, sums: [V; N]) -> [V::Floats; N] {
        let mut lanes = self.splat_f32(0.0);
        for n in 0..N {
            // SAFETY: `self` exists.
            lanes[n] = unsafe { sums[n].to_f32() };
        }
        lanes
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> [V::Floats; N] {
        let mut lanes = self.splat_f32(0.0);
        for n in 0..N {
            // SAFETY: `self` exists; all loads together are the array.
            lanes[n] = unsafe { V::load_f16(from.as_ptr().add(n * Self::FLOATS)) };
        }
        lanes
    }

    #[inline(always)]
    fn load_bf16(self, from: &[bf16; LANES]) -> [V::Floats; N] {
        let mut lanes = self.splat_f32(0.0);
        for n in 0..N {
            // SAFETY: `self` exists; all loads together are the array.
            lanes[n] = unsafe { V::load_bf16(from.as_ptr().add(n * Self::FLOATS)) };
        }
        lanes
    }

    #[inline(always)]
    fn multiply_add(
        self,
        mut acc: [V::Floats; N],
        a: [V::Floats; N],
        b: [V::Floats; N],
    ) -> [V::Floats; N] {
        for n in 0..N {
            // SAFETY: `self` exists.
            acc[n] = unsafe { V::add_f32(acc[n], V::multiply_f32(a[n], b[n])) };
        }
        acc
    }

    #[inline(always)]
    fn multiply_f32(self, mut a: [V::Floats; N], b: [V::Floats; N]) -> [V::Floats; N] {
        for n in 0..N {
            // SAFETY: `self` exists.
            a[n] = unsafe { V::multiply_f32(a[n], b[n]) };
        }
        a
    }

    #[inline(always)]
    fn floats_of(self, line: &Line) -> [V::Floats; N] {
        let mut lanes = self.splat_f32(0.0);
        for n in 0..N {
            // SAFETY: `self` exists; all loads together are the line, of any alignment.
            lanes[n] = unsafe { V::load_f32(line.as_ptr().add(n * Self::WIDTH).cast()) };
        }
        lanes
    }

    #[inline(always)]
    fn add_f32(self, mut a: [V::Floats; N], b: [V::Floats; N]) -> [V::Floats; N] {
        for n in 0..N {
            // SAFETY: `self` exists.
            a[n] = unsafe { V::add_f32(a[n], b[n]) };
        }
        a
    }

    #[inline(always)]
    fn max_f32(self, mut a: [V::Floats; N], b: [V::Floats; N]) -> [V::Floats; N] {
        for n in 0..N {
            // SAFETY: `self` exists.
            a[n] = unsafe { V::max_f32(a[n], b[n]) };
        }
        a
    }

    #[inline(always)]
    fn join_eight(self, rows: [&[[i8; 4]; LANES]; 8], to: &mut [[[i8; 4]; 8]; LANES]) {
        for n in 0..N {
            // SAFETY: `self` exists; loads of all `n` are a row, and stores are what it is joined to.
            unsafe {
                let mut x = [V::zero(); 8];
                for (x, row) in x.iter_mut().zip(rows) {
                    *x = V::load(row.as_ptr().cast::<u8>().add(n * Self::WIDTH));
                }
                // Of eight sequences of one register four of two are made, and so on; those that are
                // joined are the first and the second half, so that in the end rows are in order.
                for round in 0..3 {
                    let from = x;
                    for i in 0..4 {
                        // Register `i` of the first half.
                        let (low, high) = from[i].join_words(from[i + 4]);
                        let (sequence, place) = (i >> round, i % (1 << round));
                        let at = (sequence << (round + 1)) + 2 * place;
                        (x[at], x[at + 1]) = (low, high);
                    }
                }
                let to = to.as_mut_ptr().cast::<u8>().add(8 * n * Self::WIDTH);
                for (i, x) in x.into_iter().enumerate() {
                    x.store(to.add(i * Self::WIDTH));
                }
            }
        }
    }

    #[inline(always)]
    fn max_bits(self, mut a: [V::Floats; N], b: [V::Floats; N]) -> [V::Floats; N] {
        for n in 0..N {
            // SAFETY: `self` exists.
            a[n] = unsafe { V::bits_of(a[n]).max_u32(V::bits_of(b[n])).as_floats() };
        }
        a
    }

    #[inline(always)]
    fn exp2(self, mut x: [V::Floats; N]) -> [V::Floats; N] {
        for n in 0..N {
            // SAFETY: `self` exists.
            x[n] = unsafe {
                let (least, round) = (V::splat_f32(EXP2_LEAST), V::splat_f32(ROUND));
                let clamped = V::max_f32(least, x[n]);
                let shifted = V::add_f32(clamped, round);
                let r = V::sub_f32(clamped, V::sub_f32(shifted, round));
                let mut p = V::splat_f32(EXP2[0]);
                for c in &EXP2[1..] {
                    p = V::add_f32(V::multiply_f32(p, r), V::splat_f32(*c));
                }
                let exponent = V::bits_of(shifted).shift_left_23();
                let power = exponent.add_i32(V::splat_i32(127 << 23)).as_floats();
                V::zero_where_less(V::multiply_f32(p, power), x[n], least)
            };
        }
        x
    }

    #[inline(always)]
    fn split_parts(self, x: [V::Floats; N], offset: i32) -> [[[u8; 4]; 2]; 4] {
        let (mut bytes, mut parts) = ([0; 4 * LANES], [[[0; 4]; 2]; 4]);
        for n in 0..N {
            // SAFETY: `self` exists; all stores together are the array.
            unsafe {
                let code = V::bits_of(V::add_f32(x[n], V::splat_f32(ROUND)));
                let code = code.add_i32(V::splat_i32(offset));
                let mask = V::splat_i32(0x7f);
                let low = code.and(mask).shift_left_4().shift_left_4();
                let both = code.shift_7().and_or(mask, low);
                both.byte_pairs().store(bytes.as_mut_ptr().add(n * Self::WIDTH));
            }
        }
        for (parts, bytes) in parts.iter_mut().zip(bytes.as_chunks::<16>().0) {
            parts.as_flattened_mut().copy_from_slice(&bytes[..8]);
        }
        parts
    }

    #[inline(always)]
    fn sum_each(self, lanes: [[V::Floats; N]; LANES]) -> [f32; LANES] {
        const { assert!(N <= 2, "the halves of a line are registers, or in one") };
        let mut registers = [lanes[0][0]; LANES];
        for i in 0..LANES {
            registers[i] = lanes[i][0];
            for n in 1..N {
                // SAFETY: `self` exists.
                registers[i] = unsafe { V::add_f32(registers[i], lanes[i][n]) };
            }
        }
        // SAFETY: `self` exists.
        unsafe { V::sum_each(registers) }
    }

    #[inline(always)]
    fn to_array(self, lanes: [V::Floats; N]) -> [f32; LANES] {
        let mut array = [0.0; LANES];
        for n in 0..N {
            // SAFETY: `self` exists; all stores together are the array.
            unsafe { V::store_f32(lanes[n], array.as_mut_ptr().add(n * Self::FLOATS)) };
        }
        array
    }
}
