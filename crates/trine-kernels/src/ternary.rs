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

use std::cell::Cell;

use trine_ternary::rescale;

use crate::activations::{Activations, TILE, Tile, tiles};
use crate::aligned::AlignedBuf;
use crate::arch::{Kernel, Simd, dispatch};
use crate::isa::{Isa, isa};
use crate::nn::Gate;
use crate::packed::{Line, PANEL, PackedMatrix, Packing};
use crate::parallel::{self, SharedMut};

/// Bytes of weights that a thread takes at a time where there is one token, at least.
const SMALLEST_PART: usize = 32 << 10;

/// How far ahead of its use a line is asked for, in bytes: what memory delivers while it answers.
const AHEAD: usize = 2048;

/// Multiplications from which on threads are worth their start.
const PARALLEL_WORK: usize = 1 << 18;

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
struct Product<'a, O, const N: usize> {
    weights: [&'a PackedMatrix; N],
    /// `(tokens, rows)`
    out: &'a mut [O],
}

/// What becomes of the sums of sixteen rows of `N` matrices.
trait Finish<const N: usize>: Copy + Sync {
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

/// Some panels of a product.
#[derive(Clone, Copy)]
struct Part {
    product: usize,
    first: usize,
    panels: usize,
}

fn compute<'a, F: Finish<N>, const N: usize>(
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
        let Part { product, first, panels } = parts[i];
        let (weights, out) = &shared[product];
        dispatch(isa, Panels { weights: *weights, first, panels, x, finish, out });
    };
    match threads {
        1 => (0..parts.len()).for_each(run),
        _ => parallel::run(parts.len(), run),
    }
}

/// Divides the panels of all products: large parts first, so that there are few, and small ones at
/// the end, so that no thread waits long for another.
fn parts<O, const N: usize>(
    products: &[([&PackedMatrix; N], SharedMut<'_, O>)],
    tokens: usize,
    threads: usize,
) -> Vec<Part> {
    let bytes = |w: &PackedMatrix| N * w.lines() * size_of::<Line>();
    let mut left: usize = products.iter().map(|(w, _)| w[0].panels() * bytes(w[0])).sum();
    let mut parts = Vec::new();
    if tokens == 0 {
        return parts;
    }
    for (product, (weights, _)) in products.iter().enumerate() {
        let (panel_bytes, total) = (bytes(weights[0]).max(1), weights[0].panels());
        let mut first = 0;
        while first < total {
            let want = match threads {
                1 => left,
                // The work of a panel grows with the tokens, its share of the start does not.
                _ if tokens > 1 => left / (4 * threads),
                _ => (left / (2 * threads)).max(SMALLEST_PART),
            };
            let panels = (want / panel_bytes).next_multiple_of(2).clamp(2, (total - first).max(2));
            let panels = panels.min(total - first);
            parts.push(Part { product, first, panels });
            first += panels;
            left = left.saturating_sub(panels * panel_bytes);
        }
    }
    parts
}

/// Some panels of a product, for all tokens.
struct Panels<'a, F: Finish<N>, const N: usize> {
    weights: [&'a PackedMatrix; N],
    first: usize,
    panels: usize,
    x: &'a Activations,
    finish: F,
    /// `(tokens, rows)`, of which the rows of these panels are ours alone.
    out: &'a SharedMut<'a, F::Out>,
}

impl<F: Finish<N>, const N: usize> Kernel for Panels<'_, F, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.weights[0].packing() {
            Packing::Bits2 => self.with::<S, Bits2, 1, 4>(simd),
            Packing::Trits5 => self.with::<S, Trits5, 1, 5>(simd),
        }
    }
}

impl<F: Finish<N>, const N: usize> Panels<'_, F, N> {
    #[inline(always)]
    fn with<S: Simd, U: Unpack<L, D>, const L: usize, const D: usize>(&self, simd: S) {
        let end = self.first + self.panels;
        if self.x.tokens() == 1 {
            for p in self.first..end {
                let mut sums = [[0; PANEL]; N];
                for n in 0..N {
                    let panel = self.weights[n].panel(p);
                    sums[n] = one_token::<S, U, L, D>(simd, panel, self.x.tile(0));
                }
                self.store(p, 0, &sums);
            }
            return;
        }
        let mut p = self.first;
        while p < end {
            // Two panels at a time: one each of two matrices, or neighbours.
            let first = self.weights[0].panel(p);
            if N == 2 {
                self.rows::<S, U, L, D, 2>(simd, p, [first, self.weights[1].panel(p)]);
                p += 1;
            } else if p + 1 < end {
                self.rows::<S, U, L, D, 2>(simd, p, [first, self.weights[0].panel(p + 1)]);
                p += 2;
            } else {
                self.rows::<S, U, L, D, 1>(simd, p, [first]);
                p += 1;
            }
        }
    }

    /// `R` panels, of which the first is `p`, for all tokens.
    #[inline(always)]
    fn rows<S: Simd, U: Unpack<L, D>, const L: usize, const D: usize, const R: usize>(
        &self,
        simd: S,
        p: usize,
        panels: [&[Line]; R],
    ) {
        if self.x.tokens() <= DIRECT_TOKENS {
            return self.tiles::<S, U, L, D, R>(simd, p, panels);
        }
        // Taken and put back, for what runs inside a closure of another crate is not compiled for
        // the instruction set.
        let mut buffer = UNPACKED.take();
        let lines = (panels[0].len() * D).next_multiple_of(PLAIN);
        if buffer.len() < R * lines * size_of::<Line>() {
            buffer = AlignedBuf::new(R * lines * size_of::<Line>());
        }
        let (unpacked, _) = buffer.as_chunks_mut::<{ size_of::<Line>() }>();
        for r in 0..R {
            let to = unpacked[r * lines..][..lines].as_chunks_mut::<D>().0;
            for (from, to) in panels[r].as_chunks::<L>().0.iter().zip(to) {
                let codes = U::unpack(simd, from);
                for d in 0..D {
                    simd.store_codes(codes[d], &mut to[d]);
                }
            }
        }
        // What follows the last columns meets activations of 0.
        let panels = std::array::from_fn(|r| &unpacked[r * lines..][..lines]);
        self.tiles::<S, Plain, PLAIN, PLAIN, R>(simd, p, panels);
        UNPACKED.set(buffer);
    }

    #[inline(always)]
    fn tiles<S: Simd, U: Unpack<L, D>, const L: usize, const D: usize, const R: usize>(
        &self,
        simd: S,
        p: usize,
        panels: [&[Line]; R],
    ) {
        for Tile { first, width } in tiles(self.x.tokens()) {
            match width {
                8 => self.tile::<S, U, L, D, R, 8>(simd, p, first, panels),
                4 => self.tile::<S, U, L, D, R, 4>(simd, p, first, panels),
                2 => self.tile::<S, U, L, D, R, 2>(simd, p, first, panels),
                _ => self.tile::<S, U, L, D, R, 1>(simd, p, first, panels),
            }
        }
    }

    #[inline(always)]
    fn tile<
        S: Simd,
        U: Unpack<L, D>,
        const L: usize,
        const D: usize,
        const R: usize,
        const T: usize,
    >(
        &self,
        simd: S,
        p: usize,
        first: usize,
        panels: [&[Line]; R],
    ) {
        let x = self.x.tile::<T>(first).as_chunks::<D>().0;
        let steps = panels[0].len() / L;
        let x = &x[..steps];
        let panels: [&[[Line; L]]; R] =
            std::array::from_fn(|r| &panels[r].as_chunks::<L>().0[..steps]);
        let mut sums = [[simd.zero(); R]; T];
        for step in 0..steps {
            let mut codes = [[simd.no_codes(); D]; R];
            for r in 0..R {
                codes[r] = U::unpack(simd, &panels[r][step]);
            }
            for t in 0..T {
                let x: [&[i8; 4]; D] = std::array::from_fn(|d| &x[step][d][t]);
                simd.multiply_rows(&mut sums[t], &codes, x);
            }
        }
        for t in 0..T {
            let sums = sums[t].map(|sums| simd.to_i32(sums));
            match N {
                1 => (0..R).for_each(|r| self.store(p + r, first + t, &sums[r..])),
                _ => self.store(p, first + t, &sums),
            }
        }
    }

    /// Makes outputs of the sums of codes of panel `p`, the first `N` of `sums`.
    #[inline(always)]
    fn store(&self, p: usize, token: usize, sums: &[[i32; PANEL]]) {
        // The codes that were multiplied are trits plus one; see `packed`.
        let excess = self.x.sum(token);
        let sums: [_; N] =
            std::array::from_fn(|n| sums[n].map(|sum: i32| sum.wrapping_sub(excess)));
        let sums = std::array::from_fn(|n| &sums[n]);
        let scales = std::array::from_fn(|n| self.weights[n].scale());
        let finish = |out: &mut [F::Out; PANEL]| {
            self.finish.finish(sums, scales, self.x.scale(token), out);
        };
        let rows = self.weights[0].rows();
        let (row, count) = (p * PANEL, PANEL.min(rows - p * PANEL));
        // SAFETY: every panel is in one part, and every part is computed by one thread.
        #[allow(unsafe_code)]
        let out = unsafe { self.out.slice(token * rows + row, count) };
        match out.first_chunk_mut() {
            Some(out) => finish(out),
            None => {
                let mut padded = [F::Out::default(); PANEL];
                padded[..count].copy_from_slice(out);
                finish(&mut padded);
                out.copy_from_slice(&padded[..count]);
            }
        }
    }
}

/// The sums of codes of a panel for a single token.
#[inline(always)]
fn one_token<S: Simd, U: Unpack<L, D>, const L: usize, const D: usize>(
    simd: S,
    panel: &[Line],
    x: &[[[i8; 4]; 1]],
) -> [i32; PANEL] {
    let mut sums = [simd.zero(); D];
    for (lines, x) in panel.as_chunks::<L>().0.iter().zip(x.as_chunks::<D>().0) {
        simd.prefetch(&lines[0], AHEAD);
        let codes = U::unpack(simd, lines);
        simd.multiply_one(&mut sums, &codes, std::array::from_fn(|d| &x[d][0]));
    }
    let mut sum = [0i32; PANEL];
    for sums in sums {
        let sums = simd.to_i32(sums);
        for r in 0..PANEL {
            sum[r] = sum[r].wrapping_add(sums[r]);
        }
    }
    sum
}

/// How `L` lines hold `D` vectors of codes.
trait Unpack<const L: usize, const D: usize> {
    /// Codes of four columns, then of the next four, and so on.
    fn unpack<S: Simd>(simd: S, lines: &[Line; L]) -> [S::Codes; D];
}

/// [`Packing::Bits2`].
struct Bits2;

impl Unpack<1, 4> for Bits2 {
    #[inline(always)]
    fn unpack<S: Simd>(simd: S, lines: &[Line; 1]) -> [S::Codes; 4] {
        simd.unpack_bits(&lines[0])
    }
}

/// [`Packing::Trits5`].
struct Trits5;

impl Unpack<1, 5> for Trits5 {
    #[inline(always)]
    fn unpack<S: Simd>(simd: S, lines: &[Line; 1]) -> [S::Codes; 5] {
        simd.unpack_trits(&lines[0])
    }
}

/// Lines that are codes already, some at a time.
struct Plain;

/// How many: as many as are added before sums are widened, where that is done.
const PLAIN: usize = 4;

impl Unpack<PLAIN, PLAIN> for Plain {
    #[inline(always)]
    fn unpack<S: Simd>(simd: S, lines: &[Line; PLAIN]) -> [S::Codes; PLAIN] {
        let mut codes = [simd.no_codes(); PLAIN];
        for d in 0..PLAIN {
            codes[d] = simd.load_codes(&lines[d]);
        }
        codes
    }
}

thread_local! {
    /// The codes of the panels that a thread is multiplying.
    static UNPACKED: Cell<AlignedBuf<u8>> = Cell::default();
}
