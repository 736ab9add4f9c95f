//! Keys and values in int8, and attention over them in integers.
//!
//! Nearly all of the work is sums of products of small integers, which are exact, so that their order
//! is free and every instruction set gets the same. A key or value of a position and head is int8 codes
//! with one scale, as `trine_ternary` rounds a token's activations. What meets them has 14 bits, in two
//! parts of 7 bits, `128 hi + lo`, each a factor of [`Simd::multiply_signed`]:
//!
//! ```text
//! query    q_i  = round(x_i * 8191 / max |x|) + 8192
//! score    t_j  = (sum over i of q_i k_ij - 8192 sum over i of k_ij) * scales * log2(e) / sqrt(d)
//! span     m    = max over j of t_j      p_j = 2^(t_j - m)      l = sum over j of p_j
//! weight   w_j  = round(p_j s_j * 16383 / max over j of p_j s_j)       s_j: what a value code stands for
//! output   o_i  = (sum over j of w_j v_ij) * (max over j of p_j s_j) / 16383
//! ```
//!
//! A span is 256 positions from a multiple of 256 on. Spans follow each other in the order of
//! positions: `m' = max(m, m_span)`, and `l` and `o` are those so far times `2^(m - m')` plus those of
//! the span times `2^(m_span - m')`. At the end, `out = o / l`. The sum `l` is in the 16 lanes of
//! [`dot`](crate::dot), position `j` in lane `j % 16`.
//!
//! # Accuracy
//!
//! A query's rounding is 64 times finer than a key's, and a weight's error is at most `2^-15` of the
//! largest of its span, so keys and values make nearly all of the error. Relative to exact attention,
//! root mean square over the outputs of 100 tokens behind 900 others, d 128 (`kv_accuracy_is_as_documented`
//! in the tests):
//!
//! | normal keys and values, scores with a standard deviation of | f32 | f16 | int8 |
//! | --- | --- | --- | --- |
//! | 1: weights are flat | 7e-7 | 3.0e-4 | 9.1e-3 |
//! | 6: one or a few positions have most of the weight | 2e-6 | 6.8e-4 | 1.9e-2 |
//! | about 5, with two features of every key ten times as large | 2e-6 | 9.8e-4 | 8.2e-2 |
//!
//! The last line is the weakness of one scale for a whole key: features that are always large cost the
//! others their precision.
//!
//! # Layout
//!
//! A block is, in lines of 64 bytes:
//!
//! | lines | what |
//! | --- | --- |
//! | 4 | what a key's code stands for, f32, of each of 64 positions |
//! | 4 | -8192 times the sum of its codes, i32 |
//! | 4 | what a value's code stands for, f32 |
//! | `4 ceil(d / 4)` | keys: panels of 16 positions, of which byte `4 r + i` of line `l` is feature `4 l + i` of position `r` |
//! | `16 ceil(d / 16)` | values: groups of 16 features, of which byte `4 r + i` of line `l` is feature `r` at position `4 l + i` |
//!
//! Panels and groups come in pairs, line by line, as they are read: memory is fastest where lines follow each
//! other. Of an odd number of groups the last is alone.

mod block;
mod span;
mod tile;

use std::cell::Cell;
use std::ops::Range;

use super::super::{Kernel, LANES, Simd, exp2};
use super::{BAND, Band, KV_BLOCK};
use crate::aligned::AlignedBuf;
use crate::packed::PANEL;
use crate::parallel::SharedMut;

pub(super) use block::{Write, block_bytes};
use block::{groups, key_lines};
use span::{Span, seen};
use tile::{Keys, add_values, score, weigh};

/// Positions of which the weights are rounded together.
pub(super) const SPAN: usize = 4 * KV_BLOCK;

/// Groups of 16 positions in a span, and in a block.
const SPAN_CHUNKS: usize = SPAN / LANES;
const BLOCK_CHUNKS: usize = KV_BLOCK / LANES;

/// Largest magnitude of a query's code, and what is added to make it positive.
const QUERY_MAX: f32 = 8191.0;
const QUERY_OFFSET: i32 = 8192;

/// Largest weight.
const WEIGHT_MAX: f32 = 16383.0;

const INFINITY: u32 = 0x7f80_0000;

/// Floats of a partial result of one row: `m`, `l` and `o`.
pub(super) fn partial_len(d: usize) -> usize {
    2 + d
}

/// A band over its past.
pub(super) struct Attend<'a> {
    pub(super) band: &'a Band<'a>,
    pub(super) to: To<'a>,
    /// What this thread will look at next, if that is known: a span of some band.
    pub(super) then: Option<(&'a Band<'a>, usize)>,
}

/// How much of the past, and what for.
pub(super) enum To<'a> {
    /// All of it, for the outputs.
    Outputs(&'a SharedMut<'a, f32>),
    /// Some spans, for their partial results, `(spans, rows, 2 + d)`.
    Partials(Range<usize>, &'a mut [f32]),
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { band, mut to, then } = self;
        let d = band.layout.d;
        let mut scratch = SCRATCH.take();
        scratch.fit(d);
        let mut rows = queries(simd, band, &mut scratch);
        let spans = match &to {
            To::Outputs(_) => 0..band.spans,
            To::Partials(spans, _) => spans.clone(),
        };
        scratch.clear(band.rows);
        for span in spans.clone() {
            let next = if span + 1 < spans.end { Some((band, span + 1)) } else { then };
            one_span(simd, band, span, next, &mut rows, &mut scratch);
            if let To::Partials(_, partials) = &mut to {
                let len = partial_len(d);
                let at = (span - spans.start) * band.rows * len;
                let outputs = scratch.outputs.chunks_exact(scratch.stride);
                let partials = partials[at..][..band.rows * len].chunks_exact_mut(len);
                for ((to, row), o) in partials.zip(&mut rows).zip(outputs) {
                    (to[0], to[1]) = (row.m, row.l);
                    to[2..].copy_from_slice(&o[..d]);
                    *row = Row { scale: row.scale, ..Row::default() };
                }
                scratch.clear(band.rows);
            }
        }
        if let To::Outputs(out) = to {
            for (r, o) in scratch.outputs.chunks_exact(scratch.stride).take(band.rows).enumerate() {
                finish(o, rows[r].l, band.out(out, r));
            }
        }
        SCRATCH.set(scratch);
    }
}

/// The spans of a band, one after another.
pub(super) struct Merge<'a> {
    pub(super) band: &'a Band<'a>,
    /// `(spans, rows, 2 + d)`
    pub(super) partials: &'a mut [f32],
    pub(super) out: &'a SharedMut<'a, f32>,
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { band, partials, out } = self;
        let len = partial_len(band.layout.d);
        for r in 0..band.rows {
            let spans = band.seen(r).div_ceil(SPAN);
            let (first, others) = partials.split_at_mut(band.rows * len);
            let first = &mut first[r * len..][..len];
            let mut row = Row { m: first[0], l: first[1], ..Row::default() };
            for span in 1..spans {
                let part = &others[((span - 1) * band.rows + r) * len..][..len];
                let (a, b) = row.advance(part[0], part[1]);
                for (o, part) in first[2..].iter_mut().zip(&part[2..]) {
                    *o = *o * a + part * b;
                }
            }
            finish(&first[2..], row.l, band.out(out, r));
        }
    }
}

#[inline(always)]
fn finish(o: &[f32], l: f32, out: &mut [f32]) {
    for (out, o) in out.iter_mut().zip(o) {
        *out = o / l;
    }
}

/// What is known of a query row besides its output.
#[derive(Clone, Copy)]
struct Row {
    /// What one unit of its integer score stands for, to the base of 2.
    scale: f32,
    m: f32,
    l: f32,
    /// Positions of the last span that it sees.
    seen: usize,
    /// What the row's integer output of that span stands for, and the factors of the last two sums.
    unit: f32,
    factors: (f32, f32),
}

impl Default for Row {
    fn default() -> Self {
        let factors = (1.0, 0.0);
        Self { scale: 0.0, m: f32::NEG_INFINITY, l: 0.0, seen: 0, unit: 0.0, factors }
    }
}

impl Row {
    /// Takes up a span, and returns the factors of what was and of what came.
    #[inline(always)]
    fn advance(&mut self, m: f32, l: f32) -> (f32, f32) {
        let max = if m > self.m { m } else { self.m };
        let (a, b) = (exp2(self.m - max), exp2(m - max));
        self.m = max;
        self.l = self.l * a + l * b;
        (a, b)
    }
}

/// Rows of a tile, which are multiplied together: twice as many vectors of 7 bits.
const TILE: usize = 4;

/// The tiles of so many rows, each with its first row: of 4 rows, and what is left of 2 and 1.
#[inline(always)]
fn tiles(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let width = match rows - first {
            TILE.. => TILE,
            2..TILE => 2,
            1 => 1,
            0 => return None,
        };
        first += width;
        Some((first - width, width))
    })
}

#[derive(Default)]
struct Scratch {
    d: usize,
    /// Floats of a row of `outputs`.
    stride: usize,
    /// By tile: `(ceil(d / 4), rows, 2, 4)` halves of codes.
    queries: AlignedBuf<u8>,
    /// `(rows, 16, 16)`: scores, to the base of 2, and what they make of weights.
    scores: AlignedBuf<f32>,
    /// `(rows, 16)`: the largest score in every lane.
    largest: AlignedBuf<f32>,
    /// By tile: `(64, rows, 2, 4)` halves of weights.
    weights: AlignedBuf<u8>,
    /// `(rows, stride)`
    outputs: AlignedBuf<f32>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

impl Scratch {
    fn fit(&mut self, d: usize) {
        if self.d != d {
            let stride = groups(d) * PANEL;
            *self = Self {
                d,
                stride,
                queries: AlignedBuf::new(BAND * 8 * key_lines(d)),
                scores: AlignedBuf::new(BAND * SPAN),
                largest: AlignedBuf::new(BAND * LANES),
                weights: AlignedBuf::new(BAND * 2 * SPAN),
                outputs: AlignedBuf::new(BAND * stride),
            };
        }
    }

    /// Before anything is added up.
    fn clear(&mut self, rows: usize) {
        self.outputs[..rows * self.stride].fill(0.0);
    }
}

/// Rounds the queries of a band.
#[inline(always)]
fn queries<S: Simd>(simd: S, band: &Band<'_>, scratch: &mut Scratch) -> [Row; BAND] {
    let words = key_lines(band.layout.d);
    let mut rows = [Row::default(); BAND];
    let codes: &mut [[u8; 4]] = scratch.queries.as_chunks_mut().0;
    for (first, width) in tiles(band.rows) {
        let tile = &mut codes[first * 2 * words..][..width * 2 * words];
        for r in 0..width {
            let query = band.query(first + r);
            rows[first + r].scale = match width {
                4 => round_query::<S, 4>(simd, query, tile, r),
                2 => round_query::<S, 2>(simd, query, tile, r),
                _ => round_query::<S, 1>(simd, query, tile, r),
            };
        }
    }
    rows
}

/// Writes the codes of a query as row `r` of a tile of `W`; returns what one unit of a score stands for.
#[inline(always)]
fn round_query<S: Simd, const W: usize>(
    simd: S,
    query: &[f32],
    tile: &mut [[u8; 4]],
    r: usize,
) -> f32 {
    let max = query.iter().fold(0, |max: u32, x| max.max(x.to_bits() & 0x7fff_ffff));
    let max = if max < INFINITY { f32::from_bits(max) } else { f32::NAN };
    // A row of zeros, or nearly so, has codes of 0.
    let factor = simd.splat_f32(QUERY_MAX / if max < 1e-30 { 1e-30 } else { max });
    let steps = tile.as_chunks_mut::<2>().0.as_chunks_mut::<W>().0;
    let (chunks, rest) = query.as_chunks::<LANES>();
    let (whole, last) = steps.split_at_mut(chunks.len() * (LANES / 4));
    for (steps, x) in whole.as_chunks_mut::<{ LANES / 4 }>().0.iter_mut().zip(chunks) {
        let x = simd.multiply_f32(simd.load_f32(x), factor);
        let parts = simd.split_parts(x, QUERY_OFFSET);
        for i in 0..LANES / 4 {
            steps[i][r] = parts[i];
        }
    }
    // Behind the last feature, key codes are 0, and those of the query may be anything.
    let mut padded = [0.0; LANES];
    padded[..rest.len()].copy_from_slice(rest);
    let x = simd.multiply_f32(simd.load_f32(&padded), factor);
    for (step, parts) in last.iter_mut().zip(simd.split_parts(x, QUERY_OFFSET)) {
        step[r] = parts;
    }
    max / QUERY_MAX * (std::f32::consts::LOG2_E / (query.len() as f32).sqrt())
}

/// Adds a span of the past to the rows of a band. Meanwhile, memory is asked for what lies at the same place
/// of the span that comes `next`: for one query, there are no more multiplications in a span than memory
/// needs time to deliver it.
#[inline(always)]
fn one_span<S: Simd>(
    simd: S,
    band: &Band<'_>,
    span: usize,
    next: Option<(&Band<'_>, usize)>,
    rows: &mut [Row; BAND],
    scratch: &mut Scratch,
) {
    let d = band.layout.d;
    let rows = &mut rows[..band.rows];
    for (r, row) in rows.iter_mut().enumerate() {
        row.seen = seen(band, span, r);
    }
    let this = Span::new(band, span);
    let blocks = this.blocks();
    let next = next.map(|(band, span)| Span::new(band, span));
    let next = next.as_ref().map_or(&[][..], Span::blocks);

    let words = key_lines(d);
    let queries: &[[u8; 4]] = scratch.queries.as_chunks().0;
    let scores: &mut [[f32; LANES]] = scratch.scores.as_chunks_mut().0;
    let largest: &mut [[f32; LANES]] = scratch.largest.as_chunks_mut().0;
    largest[..rows.len()].fill([f32::NEG_INFINITY; LANES]);
    for chunk in (0..rows[rows.len() - 1].seen.div_ceil(LANES)).step_by(2) {
        let mut keys = Keys::new(simd, blocks, next, chunk);
        for (first, width) in tiles(rows.len()) {
            let rows = &rows[first..][..width];
            if chunk * LANES >= rows[width - 1].seen {
                continue;
            }
            let x = &queries[first * 2 * words..][..width * 2 * words];
            let scores = &mut scores[first * SPAN_CHUNKS..];
            let largest = &mut largest[first..];
            match width {
                4 => score::<S, 8>(simd, x, &keys, rows, scores, largest),
                2 => score::<S, 4>(simd, x, &keys, rows, scores, largest),
                _ => score::<S, 2>(simd, x, &keys, rows, scores, largest),
            }
            keys.asked();
        }
    }

    let weights: &mut [[u8; 4]] = scratch.weights.as_chunks_mut().0;
    for (first, width) in tiles(rows.len()) {
        let rows = &mut rows[first..];
        let tile = &mut weights[first * SPAN / 2..][..width * SPAN / 2];
        let scores = &mut scores[first * SPAN_CHUNKS..];
        let largest = &largest[first..];
        match width {
            4 => weigh::<S, 4>(simd, rows, blocks, scores, largest, tile),
            2 => weigh::<S, 2>(simd, rows, blocks, scores, largest, tile),
            _ => weigh::<S, 1>(simd, rows, blocks, scores, largest, tile),
        }
    }

    let stride = scratch.stride;
    for group in (0..groups(d)).step_by(2) {
        let pair = group + 1 < groups(d);
        for (first, width) in tiles(rows.len()) {
            let rows = &rows[first..][..width];
            let steps = rows[width - 1].seen.div_ceil(LANES) * (LANES / 4);
            let x = &weights[first * SPAN / 2..][..steps * 2 * width];
            let out = &mut scratch.outputs[first * stride + group * PANEL..];
            let next = if first == 0 { next } else { blocks };
            match (width, pair) {
                (4, true) => add_values::<S, 8, 2>(simd, x, blocks, next, group, rows, out, stride),
                (4, false) => {
                    add_values::<S, 8, 1>(simd, x, blocks, next, group, rows, out, stride)
                }
                (2, true) => add_values::<S, 4, 2>(simd, x, blocks, next, group, rows, out, stride),
                (2, false) => {
                    add_values::<S, 4, 1>(simd, x, blocks, next, group, rows, out, stride)
                }
                (_, true) => add_values::<S, 2, 2>(simd, x, blocks, next, group, rows, out, stride),
                (_, false) => {
                    add_values::<S, 2, 1>(simd, x, blocks, next, group, rows, out, stride)
                }
            }
        }
    }
}
