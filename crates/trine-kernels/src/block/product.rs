//! The product: one algorithm for all types, and how each reads a block.
//!
//! A panel of sixteen rows meets a tile of tokens, block after block. With one token it is a single
//! pass over the weights; with more, some panels stay in the second-level cache while all tiles pass
//! by.

use std::marker::PhantomData;

use half::f16;

use crate::arch::{Kernel, Simd, dispatch};
use crate::isa::{Isa, isa};
use crate::packed::{Line, PANEL};
use crate::parallel::{self, SharedMut};

use super::inputs::{Inputs, Parts, Starts};
use super::layout::{BlockKind, BlockMatrix, SCALE_LINES};

/// Bytes of weights that a thread takes at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// Chunks for each thread, at least, so that a thread that is held up can leave some to others.
const CHUNKS_PER_THREAD: usize = 4;

/// Multiplications from which on threads are worth their start.
const PARALLEL_WORK: usize = 1 << 18;

/// Weights in blocks times `x`, `(tokens, cols)`: `out[t, r]` is the product of row `r` with token `t`,
/// as the module `block` defines it. Runs on [`isa()`], in parallel over rows.
///
/// Where a number of `x` is not finite, all outputs of its token are NaN.
///
/// # Panics
/// When `x` is not `(tokens, cols)` or `out` not `(tokens, rows)`.
pub fn block_matmul(weights: &BlockMatrix, x: &[f32], tokens: usize, out: &mut [f32]) {
    block_matmul_on(isa(), weights, x, tokens, out);
}

pub(crate) fn block_matmul_on(
    isa: Isa,
    weights: &BlockMatrix,
    x: &[f32],
    tokens: usize,
    out: &mut [f32],
) {
    let (rows, cols) = (weights.rows(), weights.cols());
    assert_eq!(Some(x.len()), tokens.checked_mul(cols), "x is not (tokens, cols)");
    assert_eq!(Some(out.len()), tokens.checked_mul(rows), "output is not (tokens, rows)");
    if out.is_empty() {
        return;
    }
    if cols == 0 {
        return out.fill(0.0);
    }
    let inputs = Inputs::split(isa, weights.kind(), x, cols);
    let threads = match out.len().saturating_mul(cols) {
        work if work < PARALLEL_WORK => 1,
        _ => parallel::threads(),
    };
    let panels = weights.panels();
    let step = (CHUNK_BYTES / (weights.bytes() / panels).max(1))
        .min(panels.div_ceil(threads * CHUNKS_PER_THREAD))
        .max(1);
    let out = SharedMut::new(out);
    let run = |i: usize| {
        let (first, panels) = (i * step, step.min(panels - i * step));
        dispatch(isa, Panels { weights, first, panels, inputs: &inputs, out: &out });
    };
    match threads {
        1 => (0..panels.div_ceil(step)).for_each(run),
        _ => parallel::run(panels.div_ceil(step), run),
    }
}

/// Some panels of a product, for all tokens.
pub(super) struct Panels<'a> {
    pub(super) weights: &'a BlockMatrix,
    pub(super) first: usize,
    pub(super) panels: usize,
    pub(super) inputs: &'a [Inputs],
    /// `(tokens, rows)`, of which the rows of these panels are ours alone.
    pub(super) out: &'a SharedMut<'a, f32>,
}

impl Kernel for Panels<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.weights.kind() {
            BlockKind::Q8_0 => self.with::<S, Q8_0>(simd),
            BlockKind::Q6_K => self.with::<S, Groups<Q6_K, 1>>(simd),
            BlockKind::Q4_0 => self.with::<S, Q4_0>(simd),
            BlockKind::Q3_K => self.with::<S, Groups<Q3_K, 2>>(simd),
        }
    }
}

impl Panels<'_> {
    #[inline(always)]
    fn with<S: Simd, B: Blocks>(&self, simd: S) {
        for inputs in self.inputs {
            match inputs.tile.width {
                8 => self.tile::<S, B, 8>(simd, inputs),
                4 => self.tile::<S, B, 4>(simd, inputs),
                2 => self.tile::<S, B, 2>(simd, inputs),
                _ => self.tile::<S, B, 1>(simd, inputs),
            }
        }
    }

    /// All panels for a tile of `T` tokens.
    #[inline(always)]
    fn tile<S: Simd, B: Blocks, const T: usize>(&self, simd: S, inputs: &Inputs) {
        let rows = self.weights.rows();
        for p in self.first..self.first + self.panels {
            let (lines, scales) = self.weights.panel(p);
            let sums = panel::<S, B, T>(simd, lines, scales, inputs);
            let (row, count) = (p * PANEL, PANEL.min(rows - p * PANEL));
            for (t, sums) in sums.iter().enumerate() {
                let at = (inputs.tile.first + t) * rows + row;
                // SAFETY: every panel is in one chunk, and every chunk is computed by one thread.
                #[allow(unsafe_code)]
                let out = unsafe { self.out.slice(at, count) };
                out.copy_from_slice(&sums[..count]);
            }
        }
    }
}

/// The products of sixteen rows with `T` tokens.
#[inline(always)]
fn panel<S: Simd, B: Blocks, const T: usize>(
    simd: S,
    lines: &[Line],
    scales: &[[f16; PANEL]],
    inputs: &Inputs,
) -> [[f32; PANEL]; T] {
    let (parts, starts, x_scales) = inputs.of::<T>();
    let mut out = [simd.load_f32(&[0.0; PANEL]); T];
    let operands = lines
        .chunks_exact(B::KIND.lines())
        .zip(parts.chunks_exact(B::KIND.block() / 4))
        .zip(starts.chunks_exact(B::KIND.block() / B::KIND.group()))
        .zip(scales.iter().zip(x_scales));
    for (((lines, parts), starts), (scales, x_scales)) in operands {
        let [high, low] = B::sums::<S, T>(simd, lines, parts, starts);
        let scales = simd.load_f16(scales);
        for t in 0..T {
            let high = simd.sums_to_f32(high[t]);
            let sum = simd.multiply_add(simd.sums_to_f32(low[t]), high, simd.splat_f32(256.0));
            let sum = simd.multiply_f32(sum, simd.splat_f32(x_scales[t]));
            out[t] = simd.multiply_add(out[t], sum, scales);
        }
    }
    let mut sums = [[0.0; PANEL]; T];
    for t in 0..T {
        sums[t] = simd.to_array(out[t]);
    }
    sums
}

/// How a type of blocks is multiplied.
pub(super) trait Blocks {
    const KIND: BlockKind;

    /// The sums of the high and of the low parts in one block of sixteen rows.
    fn sums<S: Simd, const T: usize>(
        simd: S,
        lines: &[Line],
        parts: &[Parts<T>],
        starts: &[Starts<T>],
    ) -> [[S::Sums; T]; 2];
}

/// What the sums of a group start with.
#[inline(always)]
fn start<S: Simd, const T: usize>(simd: S, starts: &Starts<T>) -> [[S::Sums; T]; 2] {
    // No `map`: a closure in it may not be compiled for the instruction set.
    let mut sums = [[simd.zero(); T]; 2];
    for p in 0..2 {
        for t in 0..T {
            sums[p][t] = simd.splat_i32(starts[p][t]);
        }
    }
    sums
}

/// Adds the products of codes, at most 63, with both parts of all tokens.
#[inline(always)]
fn multiply<S: Simd, const T: usize>(
    simd: S,
    sums: &mut [[S::Sums; T]; 2],
    codes: S::Codes,
    parts: &Parts<T>,
) {
    for p in 0..2 {
        for t in 0..T {
            sums[p][t] = simd.multiply(sums[p][t], codes, &parts[p][t]);
        }
    }
}

#[allow(non_camel_case_types)]
struct Q8_0;

impl Blocks for Q8_0 {
    const KIND: BlockKind = BlockKind::Q8_0;

    #[inline(always)]
    fn sums<S: Simd, const T: usize>(
        simd: S,
        lines: &[Line],
        parts: &[Parts<T>],
        starts: &[Starts<T>],
    ) -> [[S::Sums; T]; 2] {
        let mut sums = start(simd, &starts[0]);
        for (line, parts) in lines.iter().zip(parts) {
            simd.prefetch_stream(line, S::stream_ahead(1));
            let codes = simd.load_codes(line);
            for p in 0..2 {
                for t in 0..T {
                    sums[p][t] = simd.multiply_wide(sums[p][t], codes, &parts[p][t]);
                }
            }
        }
        sums
    }
}

#[allow(non_camel_case_types)]
pub(super) struct Q4_0;

impl Blocks for Q4_0 {
    const KIND: BlockKind = BlockKind::Q4_0;

    #[inline(always)]
    fn sums<S: Simd, const T: usize>(
        simd: S,
        lines: &[Line],
        parts: &[Parts<T>],
        starts: &[Starts<T>],
    ) -> [[S::Sums; T]; 2] {
        let mut sums = start(simd, &starts[0]);
        for (line, parts) in lines.iter().zip(parts.as_chunks::<2>().0) {
            simd.prefetch_stream(line, S::stream_ahead(1));
            let codes = simd.unpack_nibbles(line);
            for q in 0..2 {
                multiply(simd, &mut sums, codes[q], &parts[q]);
            }
        }
        sums
    }
}

/// A type whose blocks begin with a scale for every sixteen columns of every row: `G` groups of those in
/// three lines.
trait Scaled<const G: usize> {
    const KIND: BlockKind;

    /// The codes of the groups.
    fn unpack<S: Simd>(simd: S, lines: &[Line; 3]) -> [[S::Codes; 4]; G];
}

#[allow(non_camel_case_types)]
struct Q6_K;

impl Scaled<1> for Q6_K {
    const KIND: BlockKind = BlockKind::Q6_K;

    #[inline(always)]
    fn unpack<S: Simd>(simd: S, [a, b, high]: &[Line; 3]) -> [[S::Codes; 4]; 1] {
        [simd.unpack_sixes([a, b], high)]
    }
}

#[allow(non_camel_case_types)]
struct Q3_K;

impl Scaled<2> for Q3_K {
    const KIND: BlockKind = BlockKind::Q3_K;

    #[inline(always)]
    fn unpack<S: Simd>(simd: S, [a, b, high]: &[Line; 3]) -> [[S::Codes; 4]; 2] {
        simd.unpack_threes([a, b], high)
    }
}

/// The blocks of a [`Scaled`] type.
struct Groups<B, const G: usize>(PhantomData<B>);

impl<B: Scaled<G>, const G: usize> Blocks for Groups<B, G> {
    const KIND: BlockKind = B::KIND;

    /// The sums of each group of sixteen columns, times the scales of its rows.
    #[inline(always)]
    fn sums<S: Simd, const T: usize>(
        simd: S,
        lines: &[Line],
        parts: &[Parts<T>],
        starts: &[Starts<T>],
    ) -> [[S::Sums; T]; 2] {
        let (scales, lines) = lines.split_at(SCALE_LINES);
        for line in scales {
            simd.prefetch_stream(line, S::stream_ahead(1));
        }
        let scales = scales.as_flattened().as_chunks::<PANEL>().0.as_chunks::<G>().0;
        let parts = parts.as_chunks::<4>().0.as_chunks::<G>().0;
        let groups = lines.as_chunks::<3>().0.iter().zip(parts);
        let groups = groups.zip(starts.as_chunks::<G>().0).zip(scales);
        let mut total = [[simd.zero(); T]; 2];
        for (((lines, parts), starts), scales) in groups {
            for line in lines {
                simd.prefetch_stream(line, S::stream_ahead(1));
            }
            let codes = B::unpack(simd, lines);
            for g in 0..G {
                let mut sums = start(simd, &starts[g]);
                for q in 0..4 {
                    multiply(simd, &mut sums, codes[g][q], &parts[g][q]);
                }
                for p in 0..2 {
                    for t in 0..T {
                        total[p][t] = simd.add_scaled(total[p][t], sums[p][t], &scales[g]);
                    }
                }
            }
        }
        total
    }
}
