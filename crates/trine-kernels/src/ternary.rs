//! Trits times int8: the exact integer product, and BitLinear on top of it.
//!
//! A panel of sixteen rows (see `packed`) meets a tile of tokens (see `activations`); their sums stay
//! in registers from the first column to the last. Two panels are multiplied together, so that an
//! activation is broadcast once for both. The work is divided by panels:
//!
//! - with one token, a product is a single pass over the weights, panel after panel in the order of
//!   memory, and as fast as memory if all goes well;
//! - with a few tiles, weights are unpacked anew for each;
//! - with more, two panels are unpacked once, into some 100 KB that stay in the second-level cache
//!   while all tokens pass by.

mod panels;

use std::cell::Cell;
use std::ops::Range;

use trine_ternary::rescale;

use crate::activations::{Activations, TILE, Tile, tiles};
use crate::aligned::AlignedBuf;
use crate::arch::{Kernel, Simd, dispatch};
use crate::isa::{Isa, isa};
use crate::nn::Gate;
use crate::packed::{Line, PANEL, PackedMatrix, Packing};
use crate::parallel::{self, SharedMut};
use panels::{Form, OneToken, PLAIN, Tiles, UnpackPanel};

/// Bytes of weights, times tokens, that a thread takes at a time, where it takes more than two panels.
const PART_WORK: usize = 64 << 10;

/// Most tokens of a part, in whole tiles: as many as fit into the second-level cache with their codes.
const PART_TOKENS: usize = 512;

/// Multiplications from which on threads are worth their start.
const PARALLEL_WORK: usize = if cfg!(miri) { 1 << 6 } else { 1 << 18 };

/// Panels of one token whose sums are kept before outputs are made of them.
const GROUP: usize = 8;

/// Tiles of two panels whose sums are kept before outputs are made of them. What memory is asked for has
/// to stay in the first-level cache until then, in the few places there that rows of outputs share.
const TILES: usize = 4;

/// Tokens up to which weights are unpacked anew for each tile.
const DIRECT_TOKENS: usize = 2 * TILE;

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

/// Some panels of a product, for some tokens.
#[derive(Clone)]
struct Part {
    product: usize,
    first: usize,
    panels: usize,
    /// In whole tiles, but for the last.
    tokens: Range<usize>,
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
    let parts = parts(&shared, tokens, threads);
    let run = |i: usize| {
        let Part { product, first, panels, tokens } = parts[i].clone();
        let (weights, out) = &shared[product];
        Panels { isa, weights: *weights, first, panels, x, tokens, finish, out }.run();
    };
    match threads {
        1 => (0..parts.len()).for_each(run),
        _ => parallel::run(parts.len(), run),
    }
}

/// Divides the panels of all products into parts of about [`PART_WORK`]. Those of the same tokens follow
/// each other: in a long pass they are computed by a thread that had these tokens before, and while their
/// codes are in its cache.
fn parts<O, const N: usize>(
    products: &[([&PackedMatrix; N], SharedMut<'_, O>)],
    tokens: usize,
    threads: usize,
) -> Vec<Part> {
    let mut parts = Vec::new();
    for start in (0..tokens).step_by(PART_TOKENS) {
        let tokens = start..tokens.min(start + PART_TOKENS);
        for (product, (weights, _)) in products.iter().enumerate() {
            let (panels, bytes) = (weights[0].panels(), N * weights[0].lines() * size_of::<Line>());
            let step = match threads {
                1 => panels,
                _ => (PART_WORK / (bytes * tokens.len()).max(1)).next_multiple_of(2).max(2),
            };
            for first in (0..panels).step_by(step.max(1)) {
                let (panels, tokens) = (step.min(panels - first), tokens.clone());
                parts.push(Part { product, first, panels, tokens });
            }
        }
    }
    parts
}

/// Some panels of a product, for some tokens. The products are not generic over what becomes of their
/// sums, which pass through a few KB of memory: so there is one of each, however many uses.
struct Panels<'a, F: Finish<N>, const N: usize> {
    isa: Isa,
    weights: [&'a PackedMatrix; N],
    first: usize,
    panels: usize,
    x: &'a Activations,
    /// Those that are computed.
    tokens: Range<usize>,
    finish: F,
    /// `(tokens, rows)`, of which the rows of these panels and tokens are ours alone.
    out: &'a SharedMut<'a, F::Out>,
}

impl<F: Finish<N>, const N: usize> Panels<'_, F, N> {
    fn run(&self) {
        let end = self.first + self.panels;
        let mut p = self.first;
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
        // Two panels at a time: one each of two matrices, or neighbours.
        while p < end {
            let first = self.weights[0].panel(p);
            if N == 2 {
                self.rows(p, [first, self.weights[1].panel(p)]);
                p += 1;
            } else if p + 1 < end {
                self.rows(p, [first, self.weights[0].panel(p + 1)]);
                p += 2;
            } else {
                self.rows(p, [first]);
                p += 1;
            }
        }
    }

    /// `R` panels, of which the first is `p`, for the tokens.
    fn rows<const R: usize>(&self, p: usize, panels: [&[Line]; R]) {
        let packing = self.weights[0].packing();
        let form = match packing {
            Packing::Bits2 => Form::Bits2,
            Packing::Trits5 => Form::Trits5,
        };
        let rows = self.weights[0].rows();
        let mut ahead = Ahead {
            outputs: self.out.address(p * PANEL).cast(),
            row_bytes: rows * size_of::<F::Out>(),
            output_lines: (R / N * PANEL * size_of::<F::Out>()).div_ceil(size_of::<Line>()),
            first: self.tokens.start,
            tokens: self.tokens.len(),
            weights: [&[]; R],
        };
        if self.tokens.len() <= DIRECT_TOKENS {
            return self.tiles(p, form, panels, ahead);
        }
        ahead.weights = panels;
        let mut buffer = UNPACKED.take();
        // What follows the last columns meets activations of 0.
        let lines = (panels[0].len() * packing.digits()).next_multiple_of(PLAIN);
        if buffer.len() < R * lines * size_of::<Line>() {
            buffer = AlignedBuf::new(R * lines * size_of::<Line>());
        }
        let unpacked = &mut buffer.as_chunks_mut().0[..R * lines];
        for (panel, to) in panels.iter().zip(unpacked.chunks_exact_mut(lines.max(1))) {
            dispatch(self.isa, UnpackPanel { form, panel, to });
        }
        let unpacked = std::array::from_fn(|r| &unpacked[r * lines..][..lines]);
        self.tiles::<R>(p, Form::Plain, unpacked, ahead);
        UNPACKED.set(buffer);
    }

    fn tiles<const R: usize>(
        &self,
        p: usize,
        form: Form,
        panels: [&[Line]; R],
        ahead: Ahead<'_, R>,
    ) {
        let mut sums = [[[0; PANEL]; TILES * TILE]; R];
        let tiles = tiles(self.x.tokens());
        let tiles: Vec<_> = tiles.filter(|tile| self.tokens.contains(&tile.first)).collect();
        for tiles in tiles.chunks(TILES) {
            let first = tiles[0].first;
            let tokens = tiles.iter().map(|tile| tile.width).sum();
            let out = sums.each_mut().map(|sums| &mut sums[..tokens]);
            dispatch(self.isa, Tiles { form, panels, x: self.x, tiles, out, ahead });
            let sums = sums.each_ref().map(|sums| &sums[..tokens]);
            if N == 2 {
                let both = std::array::from_fn(|n| sums[n]);
                self.store(Place { panel: p, token: first, across: true }, both);
            } else {
                for r in 0..R {
                    let one = std::array::from_fn(|_| sums[r]);
                    self.store(Place { panel: p + r, token: first, across: true }, one);
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
    /// The panels, packed, behind each of which as many lines are asked for as lie between them.
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
                simd.prefetch_far(line, self.output_lines * len * size_of::<Line>());
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

thread_local! {
    /// The codes of the panels that a thread is multiplying.
    static UNPACKED: Cell<AlignedBuf<u8>> = Cell::default();
}
