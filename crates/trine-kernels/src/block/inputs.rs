//! Inputs of a product with blocks: two int8 parts for each number.
//!
//! A number is `(256 * high + low) * scale` with `high` and `low` in int8: the nearest of 65279 steps
//! between the largest magnitude among the columns of a block and its negative. For Gaussian inputs
//! that moves a product by some 3e-5 of its own spread; a single part would move it by more than half
//! a percent.
//!
//! Tokens come in tiles, as [`Activations`](crate::Activations) do. A tile has, for every four columns,
//! the high parts of its tokens, four bytes each, and then the low parts; and for every group of
//! columns what the sums of its products start at: codes are unsigned, so they begin with minus the
//! code of 0 times the sum of the parts.

use crate::activations::{Tile, tiles_up_to};
use crate::aligned::AlignedBuf;
use crate::arch::{Kernel, ROUND, Simd, dispatch};
use crate::isa::Isa;
use crate::parallel;

use super::layout::BlockKind;

/// The largest magnitude of `256 * high + low`: what two parts can hold of either sign.
const LARGEST: f32 = 32639.0;

/// A block whose numbers are all smaller counts as zeros: their steps would be subnormal. Logits that
/// they could change are some 30 orders of magnitude away from mattering.
const SMALLEST: f32 = 1e-30;

/// From this many elements on, tokens are split in parallel.
const PARALLEL_ELEMENTS: usize = 1 << 15;

/// The inputs of one tile of tokens.
pub(super) struct Inputs {
    pub(super) tile: Tile,
    /// `(cols / 4, 2, width, 4)`: for every four columns the high and then the low parts.
    parts: AlignedBuf<i8>,
    /// `(cols / group, 2, width)`
    starts: Vec<i32>,
    /// `(blocks, width)`; NaN where a number of the block is not finite.
    scales: Vec<f32>,
}

/// The parts of four columns for `T` tokens: high, then low.
pub(super) type Parts<const T: usize> = [[[i8; 4]; T]; 2];

/// What sums of high and of low parts start at, for `T` tokens.
pub(super) type Starts<const T: usize> = [[i32; T]; 2];

impl Inputs {
    /// Splits `x`, `(tokens, cols)`, for matrices of a type.
    pub(super) fn split(isa: Isa, kind: BlockKind, x: &[f32], cols: usize) -> Vec<Self> {
        let tokens = x.len().checked_div(cols).unwrap_or(0);
        let tiles = tiles_up_to(kind.tile(), tokens);
        let mut inputs: Vec<_> = tiles.map(|tile| Self::zeros(kind, tile, cols)).collect();
        let fill = |inputs: &mut Self| {
            let Tile { first, width } = inputs.tile;
            let x = &x[first * cols..][..width * cols];
            dispatch(isa, Split { kind, x, inputs });
        };
        if x.len() < PARALLEL_ELEMENTS {
            inputs.iter_mut().for_each(fill);
        } else {
            parallel::for_each(&mut inputs, |_, inputs| fill(inputs));
        }
        inputs
    }

    fn zeros(kind: BlockKind, tile: Tile, cols: usize) -> Self {
        Self {
            tile,
            parts: AlignedBuf::new(2 * tile.width * cols),
            starts: vec![0; 2 * tile.width * (cols / kind.group())],
            scales: vec![0.0; tile.width * (cols / kind.block())],
        }
    }

    /// Parts of four columns after four columns, starts of group after group, scales of block after
    /// block, in a tile of `T` tokens.
    #[inline(always)]
    pub(super) fn of<const T: usize>(&self) -> (&[Parts<T>], &[Starts<T>], &[[f32; T]]) {
        (
            self.parts.as_chunks().0.as_chunks().0.as_chunks().0,
            self.starts.as_chunks().0.as_chunks().0,
            self.scales.as_chunks().0,
        )
    }
}

/// Splits the numbers of a tile. It is dispatched like a kernel for the instructions of the CPU.
struct Split<'a> {
    kind: BlockKind,
    /// `(width, cols)`
    x: &'a [f32],
    inputs: &'a mut Inputs,
}

impl Kernel for Split<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Inputs { tile: Tile { width, .. }, parts, starts, scales } = self.inputs;
        let (block, group) = (self.kind.block(), self.kind.group());
        let zero = i32::from(self.kind.zero());
        let words = parts.as_chunks_mut::<4>().0;
        let mut split = [[0; 256]; 2];
        for (t, x) in self.x.chunks_exact(self.x.len() / *width).enumerate() {
            for (b, x) in x.chunks_exact(block).enumerate() {
                scales[b * *width + t] = split_block(x, &mut split);
                for (part, split) in split.iter().enumerate() {
                    let at = |i: usize| (i * 2 + part) * *width + t;
                    for (k, word) in split[..block].as_chunks().0.iter().enumerate() {
                        words[at(b * (block / 4) + k)] = *word;
                    }
                    for (g, split) in split[..block].chunks_exact(group).enumerate() {
                        let sum: i32 = split.iter().map(|&part| i32::from(part)).sum();
                        starts[at(b * (block / group) + g)] = -zero * sum;
                    }
                }
            }
        }
    }
}

/// Writes the high and low parts of at most 256 numbers; returns their scale.
#[inline(always)]
fn split_block(x: &[f32], [high, low]: &mut [[i8; 256]; 2]) -> f32 {
    // As integers, so that a NaN is more than infinity, which is more than any number.
    let largest = x.iter().fold(0, |max, x| (x.to_bits() & 0x7fff_ffff).max(max));
    let largest = f32::from_bits(largest);
    if !largest.is_finite() || largest < SMALLEST {
        high.fill(0);
        low.fill(0);
        return if largest.is_finite() { 0.0 } else { f32::NAN };
    }
    let steps = LARGEST / largest;
    for ((x, high), low) in x.iter().zip(high).zip(low) {
        let step = (x * steps + ROUND) - ROUND;
        // The product can exceed the largest step by its rounding, far less than half a step.
        let step = step as i32;
        *high = ((step + 128) >> 8) as i8;
        *low = step as i8;
    }
    largest / LARGEST
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::available;

    fn numbers(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 % 1009) as f32 - 504.3) * [1.0, 1e-3, 41.7][i % 3]).collect()
    }

    #[test]
    fn parts_are_the_nearest_steps() {
        for isa in available() {
            for kind in BlockKind::ALL {
                let (tokens, cols) = (11, 2 * kind.block());
                let x = numbers(tokens * cols);
                for inputs in Inputs::split(isa, kind, &x, cols) {
                    match inputs.tile.width {
                        8 => check::<8>(&inputs, kind, &x, cols),
                        4 => check::<4>(&inputs, kind, &x, cols),
                        2 => check::<2>(&inputs, kind, &x, cols),
                        _ => check::<1>(&inputs, kind, &x, cols),
                    }
                }
            }
        }
    }

    fn check<const T: usize>(inputs: &Inputs, kind: BlockKind, x: &[f32], cols: usize) {
        let (parts, starts, scales) = inputs.of::<T>();
        for t in 0..T {
            let mut sums = vec![[0; 2]; cols / kind.group()];
            for c in 0..cols {
                let part = |p: usize| i32::from(parts[c / 4][p][t][c % 4]);
                let scale = scales[c / kind.block()][t];
                let x = x[(inputs.tile.first + t) * cols + c];
                let error = f64::from(256 * part(0) + part(1)) * f64::from(scale) - f64::from(x);
                assert!(error.abs() <= 0.502 * f64::from(scale), "{kind:?} {c}: {error} {scale}");
                sums[c / kind.group()][0] += part(0);
                sums[c / kind.group()][1] += part(1);
            }
            for (start, sums) in starts.iter().zip(sums) {
                assert_eq!(
                    [start[0][t], start[1][t]],
                    sums.map(|sum| -sum * i32::from(kind.zero()))
                );
            }
        }
    }

    #[test]
    fn the_largest_magnitudes_fit_two_parts() {
        for largest in [1.0f32, 3.3, 1e-30, 1e38, f32::MAX, 0.1, 32639.0, 7.1e-12] {
            let mut parts = [[0; 256]; 2];
            let scale = split_block(&[largest, -largest, 0.0], &mut parts);
            let [high, low] = parts.map(|part| [part[0], part[1], part[2]]);
            assert_eq!((high, low), ([127, -127, 0], [127, -127, 0]), "{largest}");
            assert!((scale * LARGEST / largest - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn blocks_without_numbers_have_no_parts() {
        let mut parts = [[1; 256]; 2];
        assert_eq!(split_block(&[0.0, -1e-31, 0.0], &mut parts), 0.0);
        assert_eq!(parts, [[0; 256]; 2]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut parts = [[1; 256]; 2];
            assert!(split_block(&[1.0, bad, 2.0], &mut parts).is_nan());
            assert_eq!(parts, [[0; 256]; 2]);
        }
    }
}
