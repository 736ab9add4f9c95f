//! Chains of products in registers; see `arch::peak`.

use std::arch::aarch64::*;
use std::arch::asm;
use std::hint::black_box;

use super::neon::sdot;
use super::{Neon, NeonDot};
use crate::isa::Isa;

/// Independent chains: more than the latency of an instruction times how many start in a cycle.
const CHAINS: usize = 16;

/// As [`int8`](super::super::peak::int8), where `isa` is one of AArch64.
pub(in crate::arch) fn int8(isa: Isa, steps: usize) -> Option<u64> {
    match isa {
        // SAFETY: the proof exists, so the CPU has NEON.
        Isa::Neon => Neon::new().map(|_| unsafe { int8_neon(steps) }),
        // SAFETY: the proof exists, so the CPU has `sdot`.
        Isa::NeonDot => NeonDot::new().map(|_| unsafe { int8_dot(steps) }),
        _ => None,
    }
}

/// As [`f32`](super::super::peak::f32), where `isa` is one of AArch64.
pub(in crate::arch) fn f32(isa: Isa, steps: usize) -> Option<u64> {
    match isa {
        // SAFETY: the proof exists, so the CPU has NEON.
        Isa::Neon | Isa::NeonDot => Neon::new().map(|_| unsafe { f32_neon(steps) }),
        _ => None,
    }
}

/// Widening products, added in 16 bits, which wrap and do not matter.
#[target_feature(enable = "neon")]
fn int8_neon(steps: usize) -> u64 {
    let (codes, x) = (black_box(vdup_n_s8(2)), black_box(vdup_n_s8(-3)));
    let mut sums = [vdupq_n_s16(0); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            // SAFETY: an instruction of NEON on registers. With the intrinsic, the compiler would
            // multiply once, as the product is always the same.
            unsafe {
                asm!(
                    "smlal {sum:v}.8h, {codes:v}.8b, {x:v}.8b",
                    sum = inout(vreg) *sum,
                    codes = in(vreg) codes,
                    x = in(vreg) x,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
    }
    black_box(sums);
    (steps * CHAINS * 8) as u64
}

#[target_feature(enable = "neon,dotprod")]
fn int8_dot(steps: usize) -> u64 {
    let (codes, x) = (black_box(vdupq_n_s8(2)), black_box(vdupq_n_s8(-3)));
    let mut sums = [vdupq_n_s32(0); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            // SAFETY: this function is compiled for the instruction.
            *sum = unsafe { sdot(*sum, codes, x) };
        }
    }
    black_box(sums);
    (steps * CHAINS * 16) as u64
}

#[target_feature(enable = "neon")]
fn f32_neon(steps: usize) -> u64 {
    let (a, b) = (black_box(vdupq_n_f32(0.5)), black_box(vdupq_n_f32(1.5)));
    let mut sums = [vdupq_n_f32(0.0); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = vfmaq_f32(b, *sum, a);
        }
    }
    black_box(sums);
    (2 * steps * CHAINS * 4) as u64
}
