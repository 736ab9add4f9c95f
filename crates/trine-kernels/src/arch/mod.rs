//! Instruction sets, and the two traits that keep algorithms apart from them.
//!
//! A [`Simd`] is an instruction set: a value that exists only where the CPU has the instructions,
//! and the few operations in which instruction sets differ. A [`Kernel`] is an algorithm, written
//! once for any `Simd`. [`dispatch`] brings them together: it runs the kernel inside a function
//! that is compiled for the instruction set, so that the operations inline and the compiler may use
//! the instructions for the plain Rust between them as well, such as the loop of a gate.
//!
//! A new instruction set is one file here and one arm in [`has`] and [`dispatch`]: NEON will be
//! `aarch64/neon.rs`.

mod generic;
pub(crate) mod peak;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use half::{bf16, f16};

use crate::activations::CodeBlock;
use crate::isa::Isa;
use crate::packed::WeightBlock;
use generic::Generic;
#[cfg(target_arch = "x86_64")]
use x86_64::{Avx2, Avx512Vnni};

/// Part sums of a float dot product; see `dense` for their order.
pub(crate) const LANES: usize = 16;

/// An instruction set; a value of the type proves that the CPU has it.
pub(crate) trait Simd: Copy + Send + Sync {
    /// Part sums of one row times one token, in i32; additions wrap.
    type Acc: Copy;

    /// Runs `kernel` in a function compiled for this instruction set.
    fn run<K: Kernel>(self, kernel: K) -> K::Output;

    /// Part sums of nothing.
    fn zero(self) -> Self::Acc;

    /// Multiplies a block of `R` rows by the same block of `T` tokens: adds to each `acc[r][t]` the
    /// products of the weight codes (0, 1, 2) with the activation codes.
    fn step<const R: usize, const T: usize>(
        self,
        acc: &mut [[Self::Acc; T]; R],
        weights: [&WeightBlock; R],
        codes: [&CodeBlock; T],
    );

    /// The sum of the part sums; wraps.
    fn sum(self, acc: Self::Acc) -> i32;

    /// Sixteen floats.
    type Lanes: Copy;

    /// Loads sixteen floats.
    fn load_f32(self, from: &[f32; LANES]) -> Self::Lanes;

    /// Loads sixteen halves; widening is exact.
    fn load_f16(self, from: &[f16; LANES]) -> Self::Lanes;

    /// Loads sixteen bfloats; widening is exact.
    fn load_bf16(self, from: &[bf16; LANES]) -> Self::Lanes;

    /// `acc + a * b` in every lane, product and sum rounded separately.
    fn multiply_add(self, acc: Self::Lanes, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;

    /// The floats, in the order in which they were loaded.
    fn to_array(self, lanes: Self::Lanes) -> [f32; LANES];
}

/// An algorithm that can be compiled for any instruction set.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;

    /// The algorithm. Implementations are `#[inline(always)]`, as is everything that they call in
    /// their inner loops: code outside the function of [`Simd::run`] is compiled for the least CPU.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Whether this CPU has `isa`.
pub(crate) fn has(isa: Isa) -> bool {
    match isa {
        Isa::Generic => true,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => Avx2::new().is_some(),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => Avx512Vnni::new().is_some(),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512Vnni => false,
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
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => Avx2::new().unwrap_or_else(|| missing(isa)).run(kernel),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => Avx512Vnni::new().unwrap_or_else(|| missing(isa)).run(kernel),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512Vnni => missing(isa),
    }
}

#[cold]
fn missing(isa: Isa) -> ! {
    panic!("this CPU does not have {isa}")
}
