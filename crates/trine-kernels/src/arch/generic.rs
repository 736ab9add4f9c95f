//! Plain Rust: the instruction set that every CPU has.

use half::{bf16, f16};

use super::{Kernel, LANES, Simd};
use crate::packed::{Line, PANEL};
use crate::trits5::{DIGITS, digits};

/// Needs no proof.
#[derive(Clone, Copy)]
pub(super) struct Generic;

impl Simd for Generic {
    type Codes = Line;
    type Sums = [i32; PANEL];

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn zero(self) -> [i32; PANEL] {
        [0; PANEL]
    }

    #[inline(always)]
    fn to_i32(self, sums: [i32; PANEL]) -> [i32; PANEL] {
        sums
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; PANEL]) -> [i32; PANEL] {
        *from
    }

    #[inline(always)]
    fn no_codes(self) -> Line {
        [0; 4 * PANEL]
    }

    #[inline(always)]
    fn load_codes(self, from: &Line) -> Line {
        *from
    }

    #[inline(always)]
    fn store_codes(self, codes: Line, to: &mut Line) {
        *to = codes;
    }

    #[inline(always)]
    fn unpack_bits(self, line: &Line) -> [Line; 4] {
        [0, 2, 4, 6].map(|shift| line.map(|byte| byte >> shift & 3))
    }

    #[inline(always)]
    fn unpack_trits(self, line: &Line) -> [Line; DIGITS] {
        let mut codes = [[0; 4 * PANEL]; DIGITS];
        for (i, byte) in line.iter().enumerate() {
            for (codes, digit) in codes.iter_mut().zip(digits(*byte)) {
                codes[i] = digit;
            }
        }
        codes
    }

    #[inline(always)]
    fn multiply(self, mut sums: [i32; PANEL], codes: Line, x: &[i8; 4]) -> [i32; PANEL] {
        for r in 0..PANEL {
            for i in 0..4 {
                let product = i32::from(codes[4 * r + i]) * i32::from(x[i]);
                sums[r] = sums[r].wrapping_add(product);
            }
        }
        sums
    }

    #[inline(always)]
    fn multiply_wide(self, sums: [i32; PANEL], codes: Line, x: &[i8; 4]) -> [i32; PANEL] {
        self.multiply(sums, codes, x)
    }

    #[inline(always)]
    fn multiply_signed(self, mut sums: [i32; PANEL], values: Line, x: &[u8; 4]) -> [i32; PANEL] {
        for r in 0..PANEL {
            for i in 0..4 {
                let product = i32::from(values[4 * r + i] as i8) * i32::from(x[i]);
                sums[r] = sums[r].wrapping_add(product);
            }
        }
        sums
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
