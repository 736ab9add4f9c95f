//! Instruction sets, and the two traits that keep algorithms apart from them.
//!
//! A [`Simd`] is an instruction set: a value that exists only where the CPU has the instructions,
//! and the few operations in which instruction sets differ. A [`Kernel`] is an algorithm, written
//! once for any `Simd`. [`dispatch`] brings them together: it runs the kernel inside a function
//! that is compiled for the instruction set, so that the operations inline and the compiler may use
//! the instructions for the plain Rust between them as well, such as the loop of a gate.
//!
//! A new instruction set is one file here and one line in `rungs`.

#[cfg(target_arch = "aarch64")]
mod aarch64;
pub(crate) mod bfloat;
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
mod digits;
mod generic;
pub(crate) mod peak;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use half::{bf16, f16};

use crate::dense::sum_lanes;
use crate::isa::Isa;
use crate::packed::{Line, PANEL};
use crate::trits5::DIGITS;
use generic::Generic;

/// Part sums of a float dot product; see `dense` for their order.
pub(crate) const LANES: usize = 16;

/// How far ahead of its use a line of weights that are read once is asked for, in bytes, by
/// [`Simd::prefetch_far`]: beyond what the processor asks for by itself, which is up to the end of a
/// page of 4 KiB.
pub(crate) const AHEAD: usize = 6144;

/// The same by [`Simd::prefetch`], of all that is read at a time together.
const AHEAD_NEAR: usize = 4096;

/// An instruction set; a value of the type proves that the CPU has it.
pub(crate) trait Simd: Copy + Send + Sync {
    /// 64 unsigned codes: four columns of each of the sixteen rows of a panel (see `packed`).
    type Codes: Copy;

    /// Sixteen sums in i32, one for each row of a panel; additions wrap.
    type Sums: Copy;

    /// Runs `kernel` in a function compiled for this instruction set.
    fn run<K: Kernel>(self, kernel: K) -> K::Output;

    /// Sums of nothing.
    fn zero(self) -> Self::Sums;

    /// The sums, in the order of the rows.
    fn to_i32(self, sums: Self::Sums) -> [i32; PANEL];

    /// The sums that [`Self::to_i32`] gives back.
    fn load_i32(self, from: &[i32; PANEL]) -> Self::Sums;

    /// The sixteen numbers of a line, little-endian.
    #[inline(always)]
    fn integers_of(self, line: &Line) -> Self::Sums {
        let mut sums = [0; PANEL];
        for (sum, bytes) in sums.iter_mut().zip(line.as_chunks().0) {
            *sum = i32::from_le_bytes(*bytes);
        }
        self.load_i32(&sums)
    }

    /// Sixteen times the same.
    #[inline(always)]
    fn splat_i32(self, sum: i32) -> Self::Sums {
        self.load_i32(&[sum; PANEL])
    }

    /// Adds to every row of `sums` the product of its `terms` and its `scales`, which are signed;
    /// wraps.
    #[inline(always)]
    fn add_scaled(self, sums: Self::Sums, terms: Self::Sums, scales: &[u8; PANEL]) -> Self::Sums {
        let (mut sums, terms) = (self.to_i32(sums), self.to_i32(terms));
        for r in 0..PANEL {
            let product = terms[r].wrapping_mul(i32::from(scales[r] as i8));
            sums[r] = sums[r].wrapping_add(product);
        }
        self.load_i32(&sums)
    }

    /// `128 high + low`; wraps.
    #[inline(always)]
    fn join_parts(self, high: Self::Sums, low: Self::Sums) -> Self::Sums {
        let (high, mut low) = (self.to_i32(high), self.to_i32(low));
        for r in 0..PANEL {
            low[r] = low[r].wrapping_add(high[r] << 7);
        }
        self.load_i32(&low)
    }

    /// Codes 0.
    fn no_codes(self) -> Self::Codes;

    /// Loads a line that holds a code in every byte.
    fn load_codes(self, from: &Line) -> Self::Codes;

    /// What [`Self::load_codes`] loads again.
    fn store_codes(self, codes: Self::Codes, to: &mut Line);

    /// The codes of a line of [`Packing::Bits2`](crate::Packing::Bits2), from the low bits up.
    fn unpack_bits(self, line: &Line) -> [Self::Codes; 4];

    /// The codes of a line of [`Packing::Trits5`](crate::Packing::Trits5), from the lowest digit up;
    /// of a byte that is no code, any that are at most 2.
    fn unpack_trits(self, line: &Line) -> [Self::Codes; DIGITS];

    /// By how many bits the codes of [`Self::fields_of_bits`] are shifted to the left.
    const BIT_SHIFTS: [u32; 4] = [0; 4];

    /// As [`Self::unpack_bits`], but codes may stay where they lie in a byte, where that is less work
    /// and [`Self::multiply_rows`] takes them.
    #[inline(always)]
    fn fields_of_bits(self, line: &Line) -> [Self::Codes; 4] {
        self.unpack_bits(line)
    }

    /// By how many bits the codes of [`Self::fields_of_trits`] are shifted to the left.
    const TRIT_SHIFTS: [u32; DIGITS] = [0; DIGITS];

    /// As [`Self::unpack_trits`], but codes may stay where they lie in a byte of a table.
    #[inline(always)]
    fn fields_of_trits(self, line: &Line) -> [Self::Codes; DIGITS] {
        self.unpack_trits(line)
    }

    /// The low and the high halves of every byte.
    #[inline(always)]
    fn unpack_nibbles(self, line: &Line) -> [Self::Codes; 2] {
        [self.load_codes(&line.map(|byte| byte & 15)), self.load_codes(&line.map(|byte| byte >> 4))]
    }

    /// Codes of 6 bits: the low 4 of each are those of [`Self::unpack_nibbles`], of the first line and
    /// then of the second, and the high 2 those of [`Self::unpack_bits`].
    #[inline(always)]
    fn unpack_sixes(self, low: [&Line; 2], high: &Line) -> [Self::Codes; 4] {
        std::array::from_fn(|q| {
            let (low, shift) = (low[q / 2], q % 2 * 4);
            let code = |i: usize| low[i] >> shift & 15 | (high[i] >> (2 * q) & 3) << 4;
            self.load_codes(&std::array::from_fn(code))
        })
    }

    /// Codes of 3 bits, eight groups of them: the low 2 of each are those of [`Self::unpack_bits`], of the
    /// first line and then of the second, and the high one is bit `2 q` of `high` for group `q` of the first
    /// line and bit `2 q + 1` for that of the second.
    #[inline(always)]
    fn unpack_threes(self, low: [&Line; 2], high: &Line) -> [[Self::Codes; 4]; 2] {
        std::array::from_fn(|g| {
            std::array::from_fn(|q| {
                let code = |i: usize| low[g][i] >> (2 * q) & 3 | (high[i] >> (2 * q + g) & 1) << 2;
                self.load_codes(&std::array::from_fn(code))
            })
        })
    }

    /// Adds to the sum of every row its four codes times the four numbers of `x`. Codes are at most
    /// 63, of which a pair of products fits 16 bits.
    fn multiply(self, sums: Self::Sums, codes: Self::Codes, x: &[i8; 4]) -> Self::Sums;

    /// As [`Self::multiply`], for any codes.
    fn multiply_wide(self, sums: Self::Sums, codes: Self::Codes, x: &[i8; 4]) -> Self::Sums;

    /// Adds to the sum of every row its four bytes, taken as signed, times the four numbers of `x`,
    /// which are at most 127.
    fn multiply_signed(self, sums: Self::Sums, values: Self::Codes, x: &[u8; 4]) -> Self::Sums;

    /// Whether the sums of three panels and eight tokens stay in registers while products of bytes are
    /// added to them. Then nothing is added before that in [`Self::multiply_rows`], which may be called
    /// for every group of codes by itself.
    const HOLDS_SUMS: bool = false;

    /// Whether memory gives most to who has [`Self::prefetch`] ask for lines of weights that are read once,
    /// rather than [`Self::prefetch_far`], and to who reads two panels at a time.
    const READS_NEAR: bool = false;

    /// Multiplies `R` panels by one token: adds to the sums of each the `D` groups of its codes, which
    /// are at most 2, times the `D` groups of `x`. There are `K` sums for each panel, to be added up
    /// at the end; products may go into any of them, so that none waits for another.
    #[inline(always)]
    fn multiply_rows<const D: usize, const R: usize, const K: usize>(
        self,
        sums: &mut [[Self::Sums; R]; K],
        codes: &[[Self::Codes; D]; R],
        x: [&[i8; 4]; D],
    ) {
        for d in 0..D {
            for r in 0..R {
                sums[d % K][r] = self.multiply(sums[d % K][r], codes[r][d], x[d]);
            }
        }
    }

    /// Asks memory for the line that lies `bytes` after `at`, whatever is there: one that is used soon.
    #[inline(always)]
    fn prefetch<T>(self, _at: *const T, _bytes: usize) {}

    /// The same of one that is used later, or is one of very many: it comes no nearer than the
    /// second-level cache. Only a few dozen lines can be on their way to the first at a time, too few for
    /// memory to be busy.
    #[inline(always)]
    fn prefetch_far<T>(self, _at: *const T, _bytes: usize) {}

    /// How many bytes ahead of the one that is read a pass over weights that are read once, from so many
    /// places at a time, asks for lines by [`Self::prefetch_stream`].
    #[inline(always)]
    fn stream_ahead(places: usize) -> usize {
        if Self::READS_NEAR { AHEAD_NEAR / places } else { AHEAD }
    }

    /// Asks for the line `bytes` after `line`, of weights that are read once.
    #[inline(always)]
    fn prefetch_stream<T>(self, line: *const T, bytes: usize) {
        match Self::READS_NEAR {
            true => self.prefetch(line, bytes),
            false => self.prefetch_far(line, bytes),
        }
    }

    /// Sixteen floats.
    type Lanes: Copy;

    /// Loads sixteen floats.
    fn load_f32(self, from: &[f32; LANES]) -> Self::Lanes;

    /// Sixteen times the same.
    #[inline(always)]
    fn splat_f32(self, value: f32) -> Self::Lanes {
        self.load_f32(&[value; LANES])
    }

    /// The sums of sixteen rows, rounded.
    #[inline(always)]
    fn sums_to_f32(self, sums: Self::Sums) -> Self::Lanes {
        self.load_f32(&self.to_i32(sums).map(|sum| sum as f32))
    }

    /// Loads sixteen halves; widening is exact.
    fn load_f16(self, from: &[f16; LANES]) -> Self::Lanes;

    /// Loads sixteen bfloats; widening is exact.
    fn load_bf16(self, from: &[bf16; LANES]) -> Self::Lanes;

    /// `acc + a * b` in every lane, product and sum rounded separately.
    fn multiply_add(self, acc: Self::Lanes, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;

    /// `a * b` in every lane.
    #[inline(always)]
    fn multiply_f32(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        let (mut a, b) = (self.to_array(a), self.to_array(b));
        a.iter_mut().zip(b).for_each(|(a, b)| *a *= b);
        self.load_f32(&a)
    }

    /// The sixteen floats of a line, little-endian.
    #[inline(always)]
    fn floats_of(self, line: &Line) -> Self::Lanes {
        let mut lanes = [0.0; LANES];
        for (lane, bytes) in lanes.iter_mut().zip(line.as_chunks().0) {
            *lane = f32::from_le_bytes(*bytes);
        }
        self.load_f32(&lanes)
    }

    /// `a + b` in every lane.
    #[inline(always)]
    fn add_f32(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        self.multiply_add(a, b, self.splat_f32(1.0))
    }

    /// In every lane `a` if it is more than `b`, else `b`; so `b` if either is NaN.
    #[inline(always)]
    fn max_f32(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        let (a, mut b) = (self.to_array(a), self.to_array(b));
        for l in 0..LANES {
            b[l] = if a[l] > b[l] { a[l] } else { b[l] };
        }
        self.load_f32(&b)
    }

    /// In every lane the one of which the bits are the larger integer.
    #[inline(always)]
    fn max_bits(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        let (a, mut b) = (self.to_array(a), self.to_array(b));
        for l in 0..LANES {
            b[l] = f32::from_bits(a[l].to_bits().max(b[l].to_bits()));
        }
        self.load_f32(&b)
    }

    /// [`exp2`] of every lane.
    #[inline(always)]
    fn exp2(self, x: Self::Lanes) -> Self::Lanes {
        let mut lanes = self.to_array(x);
        for l in 0..LANES {
            lanes[l] = exp2(lanes[l]);
        }
        self.load_f32(&lanes)
    }

    /// Rounds floats to the nearest integers, and splits these plus `offset`, from 0 to 16383: for each
    /// four lanes, the high seven bits and then the low seven bits. Of NaN, any bits.
    #[inline(always)]
    fn split_parts(self, x: Self::Lanes, offset: i32) -> [[[u8; 4]; 2]; 4] {
        let (x, mut parts) = (self.to_array(x), [[[0; 4]; 2]; 4]);
        for l in 0..LANES {
            let code = (x[l] + ROUND).to_bits().wrapping_add(offset as u32);
            parts[l / 4][0][l % 4] = (code >> 7 & 0x7f) as u8;
            parts[l / 4][1][l % 4] = (code & 0x7f) as u8;
        }
        parts
    }

    /// The sums of the lanes of each of sixteen, in the order of `dense`.
    #[inline(always)]
    fn sum_each(self, lanes: [Self::Lanes; LANES]) -> [f32; LANES] {
        let mut sums = [0.0; LANES];
        for i in 0..LANES {
            sums[i] = sum_lanes(self.to_array(lanes[i]));
        }
        sums
    }

    /// Joins eight rows of sixteen words: the first word of each, then the second of each, and so on.
    #[inline(always)]
    fn join_eight(self, rows: [&[[i8; 4]; LANES]; 8], to: &mut [[[i8; 4]; 8]; LANES]) {
        for (i, to) in to.iter_mut().enumerate() {
            for (to, row) in to.iter_mut().zip(rows) {
                *to = row[i];
            }
        }
    }

    /// The floats, in the order in which they were loaded.
    fn to_array(self, lanes: Self::Lanes) -> [f32; LANES];
}

/// 1.5 * 2^23: added to a number of magnitude below 2^22, it leaves the nearest integer in the low bits.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// From the highest power down; they make the largest relative error of [`exp2`] least while it is 1
/// at 0.
pub(crate) const EXP2: [f32; 6] =
    [1.112_550_8e-3, 9.666_283e-3, 5.557_400_5e-2, 0.240_223_51, 0.693_142_8, 1.0];

/// Below it, [`exp2`] is 0.
pub(crate) const EXP2_LEAST: f32 = -126.0;

/// `2^x` of `x` up to 0, within 1e-6 of its size, exactly 1 of 0; 0 below -126, NaN for NaN.
///
/// `2^n` times a polynomial of degree 5 on `|r| <= 1/2`, with `n = round(x)`.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    let clamped = if EXP2_LEAST > x { EXP2_LEAST } else { x };
    let shifted = clamped + ROUND;
    let r = clamped - (shifted - ROUND);
    let mut p = EXP2[0];
    for c in &EXP2[1..] {
        p = p * r + c;
    }
    // The last bits of `shifted` are n, from -126 to 0.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    let y = p * power;
    if x < EXP2_LEAST { 0.0 } else { y }
}

/// An algorithm that can be compiled for any instruction set.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;

    /// The algorithm. Implementations are `#[inline(always)]`, as is everything that they call in
    /// their inner loops: code outside the function of [`Simd::run`] is compiled for the least CPU.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// [`has`] and [`dispatch`], of the rungs of each architecture.
macro_rules! rungs {
    ($($arch:literal: $($isa:ident => $rung:ty),+;)*) => {
        /// Whether this CPU has `isa`.
        pub(crate) fn has(isa: Isa) -> bool {
            match isa {
                Isa::Generic => true,
                $($(
                    #[cfg(target_arch = $arch)]
                    Isa::$isa => <$rung>::new().is_some(),
                    #[cfg(not(target_arch = $arch))]
                    Isa::$isa => false,
                )+)*
            }
        }

        /// Runs `kernel` on `isa`.
        ///
        /// # Panics
        /// When the CPU does not have `isa`.
        #[inline]
        pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
            match isa {
                Isa::Generic => Generic.run(kernel),
                $($(
                    #[cfg(target_arch = $arch)]
                    Isa::$isa => <$rung>::new().unwrap_or_else(|| missing(isa)).run(kernel),
                    #[cfg(not(target_arch = $arch))]
                    Isa::$isa => missing(isa),
                )+)*
            }
        }
    };
}

rungs! {
    "x86_64":
        Avx2 => x86_64::Avx2,
        AvxVnni => x86_64::AvxVnni,
        Avx512 => x86_64::Avx512,
        Avx512Vnni => x86_64::Avx512Vnni,
        Avx512Vbmi => x86_64::Avx512Vbmi;
    "aarch64":
        Neon => aarch64::Neon,
        NeonDot => aarch64::NeonDot;
}

#[cold]
fn missing(isa: Isa) -> ! {
    panic!("this CPU does not have {isa}")
}
