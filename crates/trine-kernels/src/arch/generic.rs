//! Plain Rust: the instruction set that every CPU has.

use half::{bf16, f16};

use super::{Kernel, LANES, Simd};
use crate::activations::CodeBlock;
use crate::packed::{BLOCK, WeightBlock};

/// Needs no proof.
#[derive(Clone, Copy)]
pub(super) struct Generic;

impl Simd for Generic {
    type Acc = i32;

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn zero(self) -> i32 {
        0
    }

    #[inline(always)]
    fn step<const R: usize, const T: usize>(
        self,
        acc: &mut [[i32; T]; R],
        weights: [&WeightBlock; R],
        codes: [&CodeBlock; T],
    ) {
        for r in 0..R {
            for t in 0..T {
                // One 16-bit sum for each byte of the weights, which every compiler makes vectors
                // of: four products of at most 2 * 128 cannot overflow it.
                let mut sums = [0i16; BLOCK / 4];
                for (q, x) in codes[t].as_chunks::<{ BLOCK / 4 }>().0.iter().enumerate() {
                    for j in 0..BLOCK / 4 {
                        sums[j] += i16::from(weights[r][j] >> (2 * q) & 3) * i16::from(x[j]);
                    }
                }
                let sum = sums.iter().map(|&sum| i32::from(sum)).sum();
                acc[r][t] = acc[r][t].wrapping_add(sum);
            }
        }
    }

    #[inline(always)]
    fn sum(self, acc: i32) -> i32 {
        acc
    }

    type Lanes = [f32; LANES];

    #[inline(always)]
    fn load_f32(self, from: &[f32; LANES]) -> [f32; LANES] {
        *from
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> [f32; LANES] {
        // Not `to_f32`, which looks for instructions of the CPU at every call.
        from.map(f16::to_f32_const)
    }

    #[inline(always)]
    fn load_bf16(self, from: &[bf16; LANES]) -> [f32; LANES] {
        from.map(|half| f32::from_bits(u32::from(half.to_bits()) << 16))
    }

    #[inline(always)]
    fn multiply_add(self, mut acc: [f32; LANES], a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        for l in 0..LANES {
            acc[l] += a[l] * b[l];
        }
        acc
    }

    #[inline(always)]
    fn to_array(self, lanes: [f32; LANES]) -> [f32; LANES] {
        lanes
    }
}
