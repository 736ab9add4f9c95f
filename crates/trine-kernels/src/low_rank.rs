//! Products with pairs of matrices of low rank, `y += B (A x)`: what low-rank adapters (LoRA, arXiv
//! 2106.09685) add to the projections beside which they stand.
//!
//! A pair takes a fiftieth of the multiplications of its projection, but its numbers are floats, not
//! trits: one token waits for memory to deliver them. So they may be held in 16 bits, `A` lies in rows
//! and `B` in panels of sixteen outputs, both in the order in which they are read, and the products of
//! any number of pairs, for tokens of their own each, are two parallel loops.
//!
//! # The order of sums
//!
//! - An element of `A x` is a [`dot`](crate::dot).
//! - An output of `B` starts at 0 and adds its products in the order of ranks, product and sum rounded
//!   separately; the sum is then added to what is there.
//!
//! So outputs have the same bits on every instruction set and thread count, and for a token alone or
//! among others.

use half::f16;

use crate::aligned::AlignedBuf;
use crate::arch::{AHEAD, Kernel, LANES, Simd, dispatch};
use crate::dense::{Element, dots_ahead};
use crate::isa::{Isa, isa};
use crate::parallel;

/// Rows of `A` that are multiplied together; a thread takes as many at a time.
const ROWS: usize = 4;

/// Tokens that are multiplied together.
const TOKENS: usize = 4;

/// Panels of `B` that are multiplied together with one token, and with several.
const PANELS: usize = 4;
const PANELS_OF_SEVERAL: usize = 2;

/// Parts of a loop for each thread, at least, where there is enough to divide.
const PARTS_PER_THREAD: usize = 4;

/// Multiplications from which on threads are worth their start.
const PARALLEL_WORK: usize = if cfg!(miri) { 1 << 6 } else { 1 << 15 };

/// In what numbers a [`LowRank`] is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LowRankType {
    /// As they are, in single precision.
    #[default]
    F32,
    /// In half precision, after multiplication by a power of two that brings the largest number of each
    /// matrix near the largest half: numbers down to 2^-28 of that keep eleven bits, whatever their
    /// magnitude.
    F16,
}

/// A pair of matrices: `A` `(rank, in)` and `B` `(out, rank)`.
pub struct LowRank {
    out: usize,
    inp: usize,
    rank: usize,
    numbers: Numbers,
    /// What `A x` is multiplied by before `B`: a power of two.
    scale: f32,
}

/// The numbers of both matrices.
enum Numbers {
    F32(Pair<f32>),
    F16(Pair<f16>),
}

struct Pair<E> {
    /// `(rank, in)`
    a: AlignedBuf<E>,
    /// In panels of sixteen outputs, the last filled up with zeros: `(panels, rank, 16)`.
    b: AlignedBuf<E>,
}

impl LowRank {
    /// The pair of `a` `(rank, in)` and `b` `(out, rank)`, whose numbers are finite.
    ///
    /// # Panics
    /// When a matrix is not of its shape.
    pub fn new(dtype: LowRankType, [out, inp, rank]: [usize; 3], a: &[f32], b: &[f32]) -> Self {
        assert_eq!(Some(a.len()), rank.checked_mul(inp), "A is not (rank, in)");
        assert_eq!(Some(b.len()), out.checked_mul(rank), "B is not (out, rank)");
        let (numbers, scale) = match dtype {
            LowRankType::F32 => (Numbers::F32(pair([out, rank], a, b, |x| x, |x| x)), 1.0),
            LowRankType::F16 => {
                let (a_scale, b_scale) = (to_halves(a), to_halves(b));
                let half = |scale: f32| move |x: f32| f16::from_f32(x * scale);
                let pair = pair([out, rank], a, b, half(a_scale), half(b_scale));
                (Numbers::F16(pair), 1.0 / a_scale * (1.0 / b_scale))
            }
        };
        Self { out, inp, rank, numbers, scale }
    }

    /// Outputs, inputs and rank.
    pub fn shape(&self) -> [usize; 3] {
        [self.out, self.inp, self.rank]
    }

    /// Bytes that its numbers take.
    pub fn bytes(&self) -> usize {
        match &self.numbers {
            Numbers::F32(Pair { a, b }) => size_of::<f32>() * (a.len() + b.len()),
            Numbers::F16(Pair { a, b }) => size_of::<f16>() * (a.len() + b.len()),
        }
    }

    fn panels(&self) -> usize {
        self.out.div_ceil(LANES)
    }
}

fn pair<E: Copy + Default + bytemuck::Pod>(
    [out, rank]: [usize; 2],
    a: &[f32],
    b: &[f32],
    a_number: impl Fn(f32) -> E,
    b_number: impl Fn(f32) -> E,
) -> Pair<E> {
    let mut rows = AlignedBuf::new(a.len());
    rows.iter_mut().zip(a).for_each(|(to, &x)| *to = a_number(x));
    let mut panels = AlignedBuf::new(out.div_ceil(LANES) * rank * LANES);
    for (o, row) in b.chunks_exact(rank.max(1)).enumerate() {
        let panel = &mut panels[o / LANES * rank * LANES..];
        for (r, &x) in row.iter().enumerate() {
            panel[r * LANES + o % LANES] = b_number(x);
        }
    }
    Pair { a: rows, b: panels }
}

/// The power of two that brings the largest number to 2^14 and more, below 2^15.
fn to_halves(numbers: &[f32]) -> f32 {
    let largest = numbers.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    if largest == 0.0 {
        return 1.0;
    }
    let exponent = (largest.to_bits() >> 23) as i32 - 127;
    f32::from_bits(((14 - exponent).clamp(-126, 126) + 127) as u32 * (1 << 23))
}

/// What a pair is multiplied by, and to what its product is added.
pub struct LowRankProduct<'a> {
    /// The pair.
    pub pair: &'a LowRank,
    /// `(tokens, in)`
    pub x: &'a [f32],
    /// `(tokens, out)`
    pub out: &'a mut [f32],
}

/// Adds `B (A x)` to the outputs of each product; see the module for the order. Runs on [`isa()`].
///
/// # Panics
/// When inputs or outputs are not of their shape.
pub fn low_rank_add(products: &mut [LowRankProduct<'_>]) {
    low_rank_add_on(isa(), products);
}

pub(crate) fn low_rank_add_on(isa: Isa, products: &mut [LowRankProduct<'_>]) {
    let tokens = |p: &LowRankProduct<'_>| p.x.len() / p.pair.inp.max(1);
    let (mut work, mut low_len) = (0usize, 0);
    for p in &*products {
        let ([out, inp, rank], tokens) = (p.pair.shape(), tokens(p));
        assert_eq!(Some(p.x.len()), tokens.checked_mul(inp), "x is not (tokens, in)");
        assert_eq!(Some(p.out.len()), tokens.checked_mul(out), "output is not (tokens, out)");
        work = work.saturating_add(tokens * rank * (inp + out));
        low_len += tokens * rank;
    }
    let threads = if work < PARALLEL_WORK { 1 } else { parallel::threads() };

    // `A x` of every product, `(rank, tokens)`.
    let mut low = vec![0.0; low_len];
    let mut parts = Vec::new();
    let mut rest = &mut low[..];
    for p in &*products {
        let (part, others) = rest.split_at_mut(p.pair.rank * tokens(p));
        rest = others;
        let chunks = part.chunks_mut((ROWS * tokens(p)).max(1)).enumerate();
        parts.extend(chunks.map(|(i, low)| Reduce { pair: p.pair, row: i * ROWS, x: p.x, low }));
    }
    each(threads, &mut parts, |part| part.run(isa));

    let mut parts = Vec::new();
    let mut rest = &low[..];
    for p in products {
        let (pair, tokens) = (p.pair, tokens(p));
        let (low, others) = rest.split_at(pair.rank * tokens);
        rest = others;
        if tokens == 1 {
            let step = pair.panels().div_ceil(threads * PARTS_PER_THREAD).next_multiple_of(PANELS);
            let chunks = p.out.chunks_mut((step * LANES).max(1)).enumerate();
            parts.extend(chunks.map(|(i, out)| {
                let width = out.len();
                Expand { pair, panel: i * step, low, tokens, token: 0, width, out }
            }));
        } else {
            let step = match tokens.div_ceil(threads * PARTS_PER_THREAD) {
                few @ ..TOKENS => few,
                many => many.next_multiple_of(TOKENS),
            };
            let width = pair.out;
            let chunks = p.out.chunks_mut((step * width).max(1)).enumerate();
            parts.extend(chunks.map(|(i, out)| Expand {
                pair,
                panel: 0,
                low,
                tokens,
                token: i * step,
                width,
                out,
            }));
        }
    }
    each(threads, &mut parts, |part| part.run(isa));
}

fn each<T: Send>(threads: usize, parts: &mut [T], run: impl Fn(&mut T) + Sync) {
    match threads {
        1 => parts.iter_mut().for_each(run),
        _ => parallel::for_each(parts, |_, part| run(part)),
    }
}

/// Up to four rows of `A`, for all tokens.
struct Reduce<'a> {
    pair: &'a LowRank,
    /// The first.
    row: usize,
    /// `(tokens, in)`
    x: &'a [f32],
    /// `(rows, tokens)`
    low: &'a mut [f32],
}

impl Reduce<'_> {
    fn run(&mut self, isa: Isa) {
        let (inp, scale) = (self.pair.inp, self.pair.scale);
        let (from, x, low) = (self.row * inp, self.x, &mut *self.low);
        match &self.pair.numbers {
            Numbers::F32(Pair { a, .. }) => {
                dispatch(isa, ReduceRows { a: &a[from..], inp, scale, x, low });
            }
            Numbers::F16(Pair { a, .. }) => {
                dispatch(isa, ReduceRows { a: &a[from..], inp, scale, x, low });
            }
        }
    }
}

struct ReduceRows<'a, E> {
    /// From the first row on, `(in,)` each.
    a: &'a [E],
    inp: usize,
    scale: f32,
    /// `(tokens, in)`
    x: &'a [f32],
    /// `(rows, tokens)`
    low: &'a mut [f32],
}

impl<E: Element> Kernel for ReduceRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let tokens = self.x.len() / self.inp.max(1);
        let whole = tokens - tokens % TOKENS;
        for token in (0..whole).step_by(TOKENS) {
            self.rows::<S, TOKENS>(simd, token, tokens);
        }
        for token in whole..tokens {
            self.rows::<S, 1>(simd, token, tokens);
        }
    }
}

impl<E: Element> ReduceRows<'_, E> {
    #[inline(always)]
    fn rows<S: Simd, const T: usize>(&mut self, simd: S, token: usize, tokens: usize) {
        let rows = self.low.len() / tokens;
        if rows == ROWS {
            self.tile::<S, ROWS, T>(simd, 0, token, tokens);
        } else {
            for row in 0..rows {
                self.tile::<S, 1, T>(simd, row, token, tokens);
            }
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize, const T: usize>(
        &mut self,
        simd: S,
        row: usize,
        token: usize,
        tokens: usize,
    ) {
        let inp = self.inp;
        let a: [&[E]; R] = std::array::from_fn(|r| &self.a[(row + r) * inp..][..inp]);
        let x: [&[f32]; T] = std::array::from_fn(|t| &self.x[(token + t) * inp..][..inp]);
        // With one token, meanwhile memory is asked for the rows that come next.
        let ahead = if T == 1 { R * inp * size_of::<E>() } else { 0 };
        let sums = dots_ahead(simd, a, x, ahead);
        for t in 0..T {
            for r in 0..R {
                self.low[(row + r) * tokens + token + t] = sums[t][r] * self.scale;
            }
        }
    }
}

/// Some outputs of `B`: of one token those from a panel on, or all of some tokens.
struct Expand<'a> {
    pair: &'a LowRank,
    /// The first.
    panel: usize,
    /// `A x`, `(rank, tokens)`.
    low: &'a [f32],
    tokens: usize,
    /// The first.
    token: usize,
    /// Outputs of a token.
    width: usize,
    /// `(some tokens, width)`
    out: &'a mut [f32],
}

impl Expand<'_> {
    fn run(&mut self, isa: Isa) {
        let from = self.panel * self.pair.rank * LANES;
        let Self { low, tokens, token, width, .. } = *self;
        let (rank, out) = (self.pair.rank, &mut *self.out);
        match &self.pair.numbers {
            Numbers::F32(Pair { b, .. }) => {
                dispatch(isa, ExpandPanels { b: &b[from..], rank, low, tokens, token, width, out });
            }
            Numbers::F16(Pair { b, .. }) => {
                dispatch(isa, ExpandPanels { b: &b[from..], rank, low, tokens, token, width, out });
            }
        }
    }
}

struct ExpandPanels<'a, E> {
    /// From the first panel on, `(rank, 16)` each.
    b: &'a [E],
    rank: usize,
    low: &'a [f32],
    tokens: usize,
    token: usize,
    width: usize,
    out: &'a mut [f32],
}

impl<E: Element> Kernel for ExpandPanels<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let tokens = self.out.len() / self.width.max(1);
        let whole = tokens - tokens % TOKENS;
        for token in (0..whole).step_by(TOKENS) {
            self.panels::<S, PANELS_OF_SEVERAL, TOKENS>(simd, token);
        }
        for token in whole..tokens {
            self.panels::<S, PANELS, 1>(simd, token);
        }
    }
}

impl<E: Element> ExpandPanels<'_, E> {
    /// All panels for `T` of the tokens.
    #[inline(always)]
    fn panels<S: Simd, const P: usize, const T: usize>(&mut self, simd: S, token: usize) {
        let panels = self.width.div_ceil(LANES);
        let whole = panels - panels % P;
        for panel in (0..whole).step_by(P) {
            self.tile::<S, P, T>(simd, panel, token);
        }
        for panel in whole..panels {
            self.tile::<S, 1, T>(simd, panel, token);
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const P: usize, const T: usize>(
        &mut self,
        simd: S,
        panel: usize,
        token: usize,
    ) {
        let rank = self.rank;
        let panels: [&[[E; LANES]]; P] = std::array::from_fn(|p| {
            &self.b[(panel + p) * rank * LANES..][..rank * LANES].as_chunks().0[..rank]
        });
        let mut sums = [[simd.splat_f32(0.0); P]; T];
        for r in 0..rank {
            if T == 1 {
                panels.iter().for_each(|panel| simd.prefetch_far(&panel[r], AHEAD));
            }
            let b: [S::Lanes; P] = std::array::from_fn(|p| E::load(simd, &panels[p][r]));
            let low = &self.low[r * self.tokens + self.token + token..][..T];
            for t in 0..T {
                let low = simd.splat_f32(low[t]);
                for p in 0..P {
                    sums[t][p] = simd.multiply_add(sums[t][p], low, b[p]);
                }
            }
        }
        for t in 0..T {
            let out = &mut self.out[(token + t) * self.width..][..self.width];
            for p in 0..P {
                let out = &mut out[(panel + p) * LANES..];
                let sums = simd.to_array(sums[t][p]);
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
            }
        }
    }
}
