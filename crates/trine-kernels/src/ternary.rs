//! Trits times int8: the exact integer product, and BitLinear on top of it.
//!
//! A panel of sixteen rows (see `packed`) meets a tile of tokens (see `activations`); their sums stay
//! in registers from the first column to the last. Two or three panels are multiplied together, so that
//! an activation is broadcast once for all. The work is divided by panels:
//!
//! - with one token, a product is a single pass over the weights, panel after panel in the order of
//!   memory, and as fast as memory if all goes well;
//! - with a few tiles, weights are unpacked anew for each;
//! - with more, the panels are unpacked once, into some 100 KB that stay in the second-level cache
//!   while all tokens pass by.

mod panels;

use std::cell::RefCell;
use std::ops::Range;

use trine_ternary::rescale;

use crate::activations::{Activations, TILE, Tile};
use crate::aligned::AlignedBuf;
use crate::arch::{Kernel, Simd, dispatch};
use crate::isa::{Isa, isa};
use crate::nn::Gate;
use crate::packed::{Line, PANEL, PackedMatrix, Packing};
use crate::parallel::{self, SharedMut};
use panels::{Form, HoldsSums, OneToken, PLAIN, Tiles, UnpackPanel};

/// Bytes of weights, times tokens, that a thread takes at a time, where it takes more than two panels.
const PART_WORK: usize = 64 << 10;

/// Most tokens of a part, in whole tiles: as many as fit into the second-level cache with their codes.
const PART_TOKENS: usize = 512;

/// Multiplications from which on threads are worth their start.
const PARALLEL_WORK: usize = if cfg!(miri) { 1 << 6 } else { 1 << 18 };

/// Panels of one token whose sums are kept before outputs are made of them.
const GROUP: usize = 8;

/// Tiles of panels whose sums are kept before outputs are made of them. What memory is asked for has
/// to stay in the first-level cache until then, in the few places there that rows of outputs share.
const TILES: usize = 4;

/// The integer product: `out[t, r] = sum over c of trits[r, c] * codes[t, c]`, `(tokens, rows)`.
///
/// Exact, so the same on every instruction set and thread count, wherever the sum fits an i32: up
/// to 16 million columns of the largest codes.
///
/// # Panics
/// When columns differ, `out` is not `(tokens, rows)`, or the CPU does not have `isa`.
pub fn matmul_i32(isa: Isa, weights: &PackedMatrix, x: &Activations, out: &mut [i32]) {
    compute(isa, [Product { weights: [weights], out }], x, Integers);
}

/// The forward pass of a BitLinear layer, `(tokens, rows)`: the integer product, rescaled as
/// [`trine_ternary::rescale`] defines. Runs on [`isa()`].
///
/// # Panics
/// When columns differ or `out` is not `(tokens, rows)`.
pub fn bitlinear(weights: &PackedMatrix, x: &Activations, out: &mut [f32]) {
    bitlinear_on(isa(), weights, x, out);
}

pub(crate) fn bitlinear_on(isa: Isa, weights: &PackedMatrix, x: &Activations, out: &mut [f32]) {
    bitlinear_all_on(isa, &mut [(weights, out)], x);
}

/// [`bitlinear`] of some matrices with the same activations, in one parallel loop.
///
/// # Panics
/// As [`bitlinear`], for any of them.
pub fn bitlinear_all(products: &mut [(&PackedMatrix, &mut [f32])], x: &Activations) {
    bitlinear_all_on(isa(), products, x);
}

pub(crate) fn bitlinear_all_on(
    isa: Isa,
    products: &mut [(&PackedMatrix, &mut [f32])],
    x: &Activations,
) {
    let products = products.iter_mut().map(|(w, out)| Product { weights: [*w], out });
    compute(isa, products, x, Rescale);
}

/// Adds [`bitlinear`] to `out`, each output rounded before it is added.
///
/// # Panics
/// As [`bitlinear`].
pub fn bitlinear_add(weights: &PackedMatrix, x: &Activations, out: &mut [f32]) {
    bitlinear_add_on(isa(), weights, x, out);
}

pub(crate) fn bitlinear_add_on(isa: Isa, weights: &PackedMatrix, x: &Activations, out: &mut [f32]) {
    compute(isa, [Product { weights: [weights], out }], x, Add);
}

/// `out = gate(g) * u`, where `g` and `u` are the [`bitlinear`] of two matrices with the same
/// activations: the first half of a gated feed-forward layer, `(tokens, rows)`.
///
/// # Panics
/// As [`bitlinear`], for either; when the matrices differ in rows or packing.
pub fn bitlinear_gated(
    gate: Gate,
    gate_weights: &PackedMatrix,
    up_weights: &PackedMatrix,
    x: &Activations,
    out: &mut [f32],
) {
    bitlinear_gated_on(isa(), gate, [gate_weights, up_weights], x, out);
}

pub(crate) fn bitlinear_gated_on(
    isa: Isa,
    gate: Gate,
    weights: [&PackedMatrix; 2],
    x: &Activations,
    out: &mut [f32],
) {
    match gate {
        Gate::Relu2 => compute(isa, [Product { weights, out }], x, Gated(Gate::relu2)),
        Gate::Silu => compute(isa, [Product { weights, out }], x, Gated(Gate::silu)),
    }
}

/// A product of `N` matrices of one shape with the same activations, to one output.
pub(crate) struct Product<'a, O, const N: usize> {
    pub(crate) weights: [&'a PackedMatrix; N],
    /// `(tokens, rows)`
    pub(crate) out: &'a mut [O],
}

/// What becomes of the sums of sixteen rows of `N` matrices.
pub(crate) trait Finish<const N: usize>: Copy + Sync {
    /// An output.
    type Out: Copy + Default + Send;

    /// `scales` are those of the matrices, `activation` that of the token.
    /// `#[inline(always)]`, as part of a [`Kernel`].
    fn finish(
        self,
        sums: [&[i32; PANEL]; N],
        scales: [f32; N],
        activation: f32,
        out: &mut [Self::Out; PANEL],
    );
}

#[derive(Clone, Copy)]
struct Integers;

impl Finish<1> for Integers {
    type Out = i32;

    #[inline(always)]
    fn finish(self, sums: [&[i32; PANEL]; 1], _: [f32; 1], _: f32, out: &mut [i32; PANEL]) {
        *out = *sums[0];
    }
}

#[derive(Clone, Copy)]
struct Rescale;

impl Finish<1> for Rescale {
    type Out = f32;

    #[inline(always)]
    fn finish(self, sums: [&[i32; PANEL]; 1], scales: [f32; 1], x: f32, out: &mut [f32; PANEL]) {
        for r in 0..PANEL {
            out[r] = rescale(sums[0][r], scales[0], x);
        }
    }
}

#[derive(Clone, Copy)]
struct Add;

impl Finish<1> for Add {
    type Out = f32;

    #[inline(always)]
    fn finish(self, sums: [&[i32; PANEL]; 1], scales: [f32; 1], x: f32, out: &mut [f32; PANEL]) {
        for r in 0..PANEL {
            out[r] += rescale(sums[0][r], scales[0], x);
        }
    }
}

#[derive(Clone, Copy)]
struct Gated<F>(F);

impl<F: Fn(f32) -> f32 + Copy + Sync> Finish<2> for Gated<F> {
    type Out = f32;

    #[inline(always)]
    fn finish(self, sums: [&[i32; PANEL]; 2], scales: [f32; 2], x: f32, out: &mut [f32; PANEL]) {
        for r in 0..PANEL {
            let gate = rescale(sums[0][r], scales[0], x);
            out[r] = (self.0)(gate) * rescale(sums[1][r], scales[1], x);
        }
    }
}

/// A product for some tokens, to be computed in parts.
struct Block {
    product: usize,
    /// In whole tiles, but for the last.
    tokens: Range<usize>,
    plan: Plan,
    /// Of the product.
    panels: usize,
    /// Panels of a part, but for the last.
    step: usize,
    /// The parts of the blocks before it.
    parts_before: usize,
}

impl Block {
    /// Its number of parts.
    fn parts(&self) -> usize {
        // None of a single panel, which takes nearly as long as two.
        let single = self.panels > self.step && self.panels % self.step == 1;
        self.panels.div_ceil(self.step) - usize::from(single)
    }

    /// The panels of a part.
    fn part(&self, i: usize) -> Range<usize> {
        let end = if i + 1 == self.parts() { self.panels } else { (i + 1) * self.step };
        i * self.step..end
    }
}

pub(crate) fn compute<'a, F: Finish<N>, const N: usize>(
    isa: Isa,
    products: impl IntoIterator<Item = Product<'a, F::Out, N>>,
    x: &Activations,
    finish: F,
) where
    F::Out: 'a,
{
    let tokens = x.tokens();
    let (mut shared, mut work) = (Vec::with_capacity(4), 0usize);
    for Product { weights, out } in products {
        let rows = weights[0].rows();
        for w in weights {
            assert_eq!(w.cols(), x.cols(), "weights and activations differ in columns");
            let (first, other) = ((rows, weights[0].packing()), (w.rows(), w.packing()));
            assert_eq!(first, other, "weights of a gate differ in rows or packing");
        }
        assert_eq!(Some(out.len()), tokens.checked_mul(rows), "output is not (tokens, rows)");
        work = work.saturating_add(out.len().saturating_mul(N * x.cols()));
        shared.push((weights, SharedMut::new(out)));
    }
    let threads = if work < PARALLEL_WORK { 1 } else { parallel::threads() };
    let blocks = blocks(isa, &shared, tokens, threads);
    let parts = blocks.last().map_or(0, |last| last.parts_before + last.parts());
    let run = |i: usize| {
        let block = &blocks[blocks.partition_point(|block| block.parts_before <= i) - 1];
        let (weights, out) = &shared[block.product];
        let (panels, tokens) = (block.part(i - block.parts_before), block.tokens.clone());
        Panels { isa, weights: *weights, panels, x, tokens, plan: block.plan, finish, out }.run();
    };
    match threads {
        1 => (0..parts).for_each(run),
        _ => parallel::run(parts, run),
    }
}

/// How panels meet some tokens.
#[derive(Clone, Copy)]
struct Plan {
    /// Whether weights are unpacked anew for each tile of tokens, rather than once for all.
    direct: bool,
    /// How many panels are multiplied at a time.
    panels: usize,
}

impl Plan {
    /// On a core of Cascade Lake (2560 rows and columns in 2 bits), of 305 GMAC/s: 32 tokens directly 217,
    /// else 195; 48 tokens 217 and 213, 64 tokens 215 and 227.
    fn new(isa: Isa, packing: Packing, tokens: usize) -> Self {
        let holds_sums = dispatch(isa, HoldsSums);
        let direct =
            tokens <= if holds_sums && packing == Packing::Bits2 { 6 * TILE } else { 2 * TILE };
        Self { direct, panels: if holds_sums && !direct { 3 } else { 2 } }
    }
}

/// Divides all products into blocks, with parts of about [`PART_WORK`]. Those of the same tokens follow
/// each other: in a long pass they are computed by a thread that had these tokens before, and while their
/// codes are in its cache. Parts are not listed: a token's products have thousands, and while they were
/// written down no thread would multiply.
fn blocks<O, const N: usize>(
    isa: Isa,
    products: &[([&PackedMatrix; N], SharedMut<'_, O>)],
    tokens: usize,
    threads: usize,
) -> Vec<Block> {
    let (mut blocks, mut parts_before) = (Vec::new(), 0);
    for start in (0..tokens).step_by(PART_TOKENS) {
        let tokens = start..tokens.min(start + PART_TOKENS);
        for (product, (weights, _)) in products.iter().enumerate() {
            let (panels, bytes) = (weights[0].panels(), N * weights[0].lines() * size_of::<Line>());
            let plan = Plan::new(isa, weights[0].packing(), tokens.len());
            let step = match threads {
                1 => panels.max(1),
                _ => (PART_WORK / (bytes * tokens.len()).max(1))
                    .next_multiple_of(plan.panels)
                    .max(plan.panels),
            };
            let tokens = tokens.clone();
            let block = Block { product, tokens, plan, panels, step, parts_before };
            parts_before += block.parts();
            blocks.push(block);
        }
    }
    blocks
}

/// Some panels of a product, for some tokens. The products are not generic over what becomes of their
/// sums, which pass through a few KB of memory: so there is one of each, however many uses.
struct Panels<'a, F: Finish<N>, const N: usize> {
    isa: Isa,
    weights: [&'a PackedMatrix; N],
    /// Those that are computed.
    panels: Range<usize>,
    x: &'a Activations,
    /// The same of tokens.
    tokens: Range<usize>,
    plan: Plan,
    finish: F,
    /// `(tokens, rows)`, of which the rows of these panels and tokens are ours alone.
    out: &'a SharedMut<'a, F::Out>,
}

impl<F: Finish<N>, const N: usize> Panels<'_, F, N> {
    fn run(&self) {
        let Range { start: mut p, end } = self.panels;
        if self.x.tokens() == 1 {
            while p < end {
                let count = (end - p).min(GROUP);
                let mut sums = [[[0; PANEL]; GROUP]; N];
                for n in 0..N {
                    let (weights, out) = (self.weights[n], &mut sums[n][..count]);
                    dispatch(self.isa, OneToken { weights, first: p, x: self.x, out });
                }
                let sums = sums.each_ref().map(|sums| &sums[..count]);
                self.store(Place { panel: p, token: 0, across: false }, sums);
                p += count;
            }
            return;
        }
        BUFFERS.with_borrow_mut(|buffers| {
            while p < end {
                // Four are twice two rather than three and one.
                p += match (end - p, self.plan.panels) {
                    (1, _) => self.rows::<1>(p, buffers),
                    (2 | 4, _) | (_, 2) => self.rows::<2>(p, buffers),
                    _ => self.rows::<3>(p, buffers),
                };
            }
        });
    }

    /// `R` panels of each matrix, of which the first is `p`, for the tokens. Returns `R`.
    fn rows<const R: usize>(&self, p: usize, buffers: &mut Buffers) -> usize {
        let direct = self.plan.direct;
        let (packing, rows) = (self.weights[0].packing(), self.weights[0].rows());
        let packed_form = match packing {
            Packing::Bits2 => Form::Bits2,
            Packing::Trits5 => Form::Trits5,
        };
        // What follows the last columns meets activations of 0.
        let lines = (self.weights[0].lines() * packing.digits()).next_multiple_of(PLAIN);
        buffers.codes.resize(if direct { 0 } else { R * lines * size_of::<Line>() });
        buffers.sums.resize((N - 1) * R * self.tokens.len() * PANEL);
        for n in 0..N {
            let packed = std::array::from_fn(|r| self.weights[n].panel(p + r));
            let (mut form, mut panels) = (packed_form, packed);
            let unpacked = buffers.codes.as_chunks_mut().0;
            if !direct {
                for (panel, to) in packed.iter().zip(unpacked.chunks_exact_mut(lines.max(1))) {
                    dispatch(self.isa, UnpackPanel { form, panel, to });
                }
                form = Form::Plain;
                panels = std::array::from_fn(|r| &unpacked[r * lines..][..lines]);
            }
            let output_bytes = if n + 1 == N { R * PANEL * size_of::<F::Out>() } else { 0 };
            let ahead = Ahead {
                outputs: self.out.address(p * PANEL).cast(),
                row_bytes: rows * size_of::<F::Out>(),
                output_lines: output_bytes.div_ceil(size_of::<Line>()),
                first: self.tokens.start,
                tokens: self.tokens.len(),
                weights: if direct { [&[]; R] } else { packed },
            };
            self.tiles([n, p], form, panels, ahead, buffers.sums.as_chunks_mut().0);
        }
        R
    }

    /// The sums of panels of matrix `n`, of which the first is `p`. They are `kept`, by matrix, panel and token,
    /// until those of the last matrix make outputs of all.
    fn tiles<const R: usize>(
        &self,
        [n, p]: [usize; 2],
        form: Form,
        panels: [&[Line]; R],
        ahead: Ahead<'_, R>,
        kept: &mut [[i32; PANEL]],
    ) {
        let mut sums = [[[0; PANEL]; TILES * TILE]; R];
        for first in self.tokens.clone().step_by(TILES * TILE) {
            let count = (TILES * TILE).min(self.tokens.end - first);
            let out = sums.each_mut().map(|sums| &mut sums[..count]);
            dispatch(self.isa, Tiles { form, panels, x: self.x, first, out, ahead });
            for r in 0..R {
                let sums = &sums[r][..count];
                let place = |n| (n * R + r) * self.tokens.len() + first - self.tokens.start;
                if n + 1 < N {
                    kept[place(n)..][..count].copy_from_slice(sums);
                } else {
                    let all = std::array::from_fn(|m| match m == n {
                        true => sums,
                        false => &kept[place(m)..][..count],
                    });
                    self.store(Place { panel: p + r, token: first, across: true }, all);
                }
            }
        }
    }

    /// Makes outputs of sums of codes.
    fn store(&self, place: Place, sums: [&[[i32; PANEL]]; N]) {
        dispatch(self.isa, Store { panels: self, place, sums });
    }
}

/// What to ask memory for while `R` panels are multiplied: the lines that outputs will be stored to,
/// and the weights that come next.
#[derive(Clone, Copy)]
struct Ahead<'a, const R: usize> {
    /// The outputs of token 0.
    outputs: *const Line,
    /// From the outputs of one token to those of the next.
    row_bytes: usize,
    /// For the outputs of a token.
    output_lines: usize,
    /// The tokens that are computed.
    first: usize,
    tokens: usize,
    /// The panels, packed: as many behind them are asked for.
    weights: [&'a [Line]; R],
}

impl<const R: usize> Ahead<'_, R> {
    /// A tile's share.
    #[inline(always)]
    fn ask<S: Simd>(&self, simd: S, tile: &Tile) {
        let end = tile.first + tile.width;
        for t in tile.first..end {
            for line in 0..self.output_lines {
                simd.prefetch(self.outputs, t * self.row_bytes + line * size_of::<Line>());
            }
        }
        for weights in self.weights {
            let len = weights.len();
            let share = |token: usize| (token - self.first) * len / self.tokens;
            for line in &weights[share(tile.first)..share(end)] {
                simd.prefetch_far(line, R * len * size_of::<Line>());
            }
        }
    }
}

/// Where some sums belong: to one panel and as many tokens, or to one token and as many panels.
#[derive(Clone, Copy)]
struct Place {
    panel: usize,
    token: usize,
    /// Across tokens.
    across: bool,
}

/// The last step of [`Panels`].
struct Store<'a, F: Finish<N>, const N: usize> {
    panels: &'a Panels<'a, F, N>,
    place: Place,
    sums: [&'a [[i32; PANEL]]; N],
}

impl<F: Finish<N>, const N: usize> Kernel for Store<'_, F, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Panels { weights, x, out, .. } = self.panels;
        let Place { panel, token, across } = self.place;
        let (out, rows, len) = (**out, weights[0].rows(), self.sums[0].len());
        if across {
            let (x_sums, x_scales) = (&x.sums()[token..][..len], &x.scales()[token..][..len]);
            let (row, count) = (panel * PANEL, PANEL.min(rows - panel * PANEL));
            for i in 0..len {
                // SAFETY: every panel is in one part, and every part is computed by one thread.
                #[allow(unsafe_code)]
                let out = unsafe { out.slice((token + i) * rows + row, count) };
                self.outputs(i, x_sums[i], x_scales[i], out);
            }
        } else {
            for i in 0..len {
                let row = (panel + i) * PANEL;
                // SAFETY: as above.
                #[allow(unsafe_code)]
                let out = unsafe { out.slice(token * rows + row, PANEL.min(rows - row)) };
                self.outputs(i, x.sums()[token], x.scales()[token], out);
            }
        }
    }
}

impl<F: Finish<N>, const N: usize> Store<'_, F, N> {
    /// The outputs of the sums `i`. The codes that were multiplied are trits plus one (see `packed`), so
    /// these are too large by the sum of the token's codes, `excess`.
    #[inline(always)]
    fn outputs(&self, i: usize, excess: i32, x_scale: f32, out: &mut [F::Out]) {
        let mut sums = [[0; PANEL]; N];
        for n in 0..N {
            for r in 0..PANEL {
                sums[n][r] = self.sums[n][i][r].wrapping_sub(excess);
            }
        }
        let scales = self.panels.weights.each_ref().map(|w| w.scale());
        match out.first_chunk_mut() {
            Some(out) => self.panels.finish.finish(sums.each_ref(), scales, x_scale, out),
            None => self.last_rows(sums, scales, x_scale, out),
        }
    }

    /// The outputs of a panel that has less than sixteen rows.
    #[cold]
    #[inline(never)]
    fn last_rows(
        &self,
        sums: [[i32; PANEL]; N],
        scales: [f32; N],
        x_scale: f32,
        out: &mut [F::Out],
    ) {
        let mut padded = [F::Out::default(); PANEL];
        padded[..out.len()].copy_from_slice(out);
        self.panels.finish.finish(sums.each_ref(), scales, x_scale, &mut padded);
        out.copy_from_slice(&padded[..out.len()]);
    }
}

/// What a thread has in hand while it multiplies panels by tiles.
#[derive(Default)]
struct Buffers {
    /// The codes of the panels.
    codes: AlignedBuf<u8>,
    /// Sums that wait for those of another matrix.
    sums: AlignedBuf<i32>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_every_panel_once_and_none_has_one_alone() {
        let plan = Plan { direct: true, panels: 2 };
        for step in [2, 3, 6, 50] {
            for panels in 0..50 {
                let block = Block { product: 0, tokens: 0..1, plan, panels, step, parts_before: 0 };
                let parts: Vec<_> = (0..block.parts()).map(|i| block.part(i)).collect();
                assert!(parts.iter().cloned().flatten().eq(0..panels), "{panels} by {step}");
                assert!(panels == 1 || parts.iter().all(|part| part.len() > 1));
            }
        }
    }
}
