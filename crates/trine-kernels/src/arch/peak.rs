//! Arithmetic as fast as an instruction set has it: in registers, with nothing to load or unpack.
//!
//! Chains of products of which each waits only for itself, so many that the units are never idle.
//! The inputs are not known to the compiler, and the sums are used.

use std::hint::black_box;

use crate::isa::Isa;

/// Numbers that the generic code multiplies at a time.
const BUFFER: usize = 4096;

/// Runs `steps` steps of chains of int8 products; returns the number of products added to a sum.
pub(crate) fn int8(isa: Isa, steps: usize) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if let Some(done) = super::x86_64::peak::int8(isa, steps) {
        return done;
    }
    #[cfg(target_arch = "aarch64")]
    if let Some(done) = super::aarch64::peak::int8(isa, steps) {
        return done;
    }
    let _generic = isa;
    let (a, b) = black_box(([3i8; BUFFER], [2i8; BUFFER]));
    for _ in 0..steps / 256 {
        let (a, b) = black_box((&a, &b));
        // Sums of 16 bits, as many as fit the vectors of every CPU.
        let mut sums = [0i16; 32];
        for (a, b) in a.as_chunks::<32>().0.iter().zip(b.as_chunks::<32>().0) {
            for i in 0..32 {
                sums[i] = sums[i].wrapping_add(i16::from(a[i]) * i16::from(b[i]));
            }
        }
        black_box(sums);
    }
    (steps / 256 * BUFFER) as u64
}

/// Runs `steps` steps of chains of multiply-adds in f32; returns the number of float operations,
/// two for each.
pub(crate) fn f32(isa: Isa, steps: usize) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if let Some(done) = super::x86_64::peak::f32(isa, steps) {
        return done;
    }
    #[cfg(target_arch = "aarch64")]
    if let Some(done) = super::aarch64::peak::f32(isa, steps) {
        return done;
    }
    let _generic = isa;
    const LANES: usize = 32;
    let (mut sums, a, b) = black_box(([0.0f32; LANES], [1.5f32; LANES], 0.5f32));
    for _ in 0..steps {
        for (sum, a) in sums.iter_mut().zip(a) {
            *sum = *sum * b + a;
        }
    }
    black_box(sums);
    (2 * steps * LANES) as u64
}

/// Runs `steps` steps of chains of products of bfloats, of which each adds two to a sum; returns the
/// number of float operations, two for each product. 0 where the CPU has no such instruction.
pub(crate) fn bf16(steps: usize) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if let Some(cpu) = super::x86_64::bfloat::Avx512Bf16::new() {
        return cpu.peak(steps);
    }
    let _ = steps;
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::available;

    #[test]
    fn more_steps_are_more_operations() {
        for isa in available() {
            for count in [int8, f32] {
                assert_eq!(count(isa, 0), 0, "{isa}");
                let one = count(isa, 256);
                assert!(one >= 256, "{isa}");
                assert_eq!(count(isa, 512), 2 * one, "{isa}");
            }
        }
    }
}
