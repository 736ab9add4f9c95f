//! What is computed for a tile of rows over a span: scores, weights, and sums of values.

use super::super::super::exp::largest_lane;
use super::super::super::{LANES, Simd, sum_lanes};
use super::block::{Block, VALUE_LINES};
use super::{BLOCK_CHUNKS, INFINITY, Row, SPAN_CHUNKS, WEIGHT_MAX};
use crate::packed::{Line, PANEL};

/// Adds the products of `T` vectors of 7 bits with `P` panels of int8, line by line, and asks memory for as
/// many lines from `next` on.
#[inline(always)]
fn multiply<S: Simd, const T: usize, const P: usize>(
    simd: S,
    sums: &mut [[S::Sums; P]; T],
    x: &[[[u8; 4]; T]],
    lines: &[Line],
    next: *const Line,
) {
    let lines = &lines.as_chunks::<P>().0[..x.len()];
    for step in 0..x.len() {
        let mut values = [simd.no_codes(); P];
        for p in 0..P {
            values[p] = simd.load_codes(&lines[step][p]);
            simd.prefetch_far(next.wrapping_add(P * step + p), 0);
        }
        for t in 0..T {
            for p in 0..P {
                sums[t][p] = simd.multiply_signed(sums[t][p], values[p], &x[step][t]);
            }
        }
    }
}

/// Two chunks of keys.
pub(super) struct Keys<'a> {
    /// The first of them, in the span.
    chunk: usize,
    keys: &'a [Line],
    starts: [&'a Line; 2],
    units: [&'a Line; 2],
    /// What memory is asked for meanwhile: keys at the same place of the span that comes next, or these.
    next: *const Line,
}

impl<'a> Keys<'a> {
    #[inline(always)]
    pub(super) fn new<S: Simd>(
        simd: S,
        blocks: &[Block<'a>],
        next: &[Block<'_>],
        chunk: usize,
    ) -> Self {
        let (b, c) = (chunk / BLOCK_CHUNKS, chunk % BLOCK_CHUNKS);
        let block = &blocks[b];
        let keys = block.keys(c / 2);
        let starts = [block.starts(c), block.starts(c + 1)];
        let units = [block.key_units(c), block.key_units(c + 1)];
        let next = next.get(b).unwrap_or(block);
        for c in [c, c + 1] {
            for line in [next.key_units(c), next.starts(c), next.value_units(c)] {
                simd.prefetch_far(line, 0);
            }
        }
        let next = next.keys(c / 2).as_ptr();
        Self { chunk, keys, starts, units, next }
    }

    /// What comes next has been asked for.
    #[inline(always)]
    pub(super) fn asked(&mut self) {
        self.next = self.keys.as_ptr();
    }
}

/// Scores of the rows of a tile for two chunks of positions: into `scores`, `(W, 16, 16)`, and the largest
/// of each lane into `largest`, `(W, 16)`.
#[inline(always)]
pub(super) fn score<S: Simd, const T: usize>(
    simd: S,
    x: &[[u8; 4]],
    keys: &Keys<'_>,
    rows: &[Row],
    scores: &mut [[f32; LANES]],
    largest: &mut [[f32; LANES]],
) {
    let mut sums = [[simd.zero(); 2]; T];
    for t in (1..T).step_by(2) {
        sums[t] = [simd.integers_of(keys.starts[0]), simd.integers_of(keys.starts[1])];
    }
    multiply(simd, &mut sums, x.as_chunks::<T>().0, keys.keys, keys.next);
    let units = [simd.floats_of(keys.units[0]), simd.floats_of(keys.units[1])];
    let mut t = [[units[0]; 2]; T];
    for r in 0..T / 2 {
        let scale = simd.splat_f32(rows[r].scale);
        for p in 0..2 {
            let joined = simd.join_parts(sums[2 * r][p], sums[2 * r + 1][p]);
            let score = simd.multiply_f32(simd.sums_to_f32(joined), units[p]);
            t[r][p] = simd.multiply_f32(score, scale);
        }
    }
    // The first row sees the least.
    if rows[0].seen < (keys.chunk + 2) * LANES {
        for r in 0..T / 2 {
            for p in 0..2 {
                let chunk = keys.chunk + p;
                t[r][p] = seen_or(simd, t[r][p], rows[r].seen, chunk, f32::NEG_INFINITY);
            }
        }
    }
    for r in 0..T / 2 {
        let mut max = simd.load_f32(&largest[r]);
        for p in 0..2 {
            scores[r * SPAN_CHUNKS + keys.chunk + p] = simd.to_array(t[r][p]);
            max = simd.max_f32(t[r][p], max);
        }
        largest[r] = simd.to_array(max);
    }
}

/// The softmax of the rows of a tile over a span: rounded weights, up to the last position that any of them
/// sees, 0 for what a row does not see. `scores` is `(W, 16, 16)`, `largest` the largest of each lane of
/// them, `(W, 16)`.
#[inline(always)]
pub(super) fn weigh<S: Simd, const W: usize>(
    simd: S,
    rows: &mut [Row],
    blocks: &[Block<'_>],
    scores: &mut [[f32; LANES]],
    largest: &[[f32; LANES]],
    tile: &mut [[u8; 4]],
) {
    let rows = &mut rows[..W];
    let scores = &mut scores[..W * SPAN_CHUNKS];
    // The last row sees the most. Of the first chunks all see all.
    let (chunks, whole) = (rows[W - 1].seen.div_ceil(LANES), rows[0].seen / LANES);
    let mut max = [0.0; W];
    for r in 0..W {
        max[r] = largest_lane(largest[r]);
    }

    // No weight is below 0, so they order like their bits, NaN above all. A NaN in what the row does
    // not see is nothing to it.
    let (mut sums, mut heaviest) = ([simd.splat_f32(0.0); W], [simd.splat_f32(0.0); W]);
    for chunk in 0..chunks {
        let units = simd.floats_of(blocks[chunk / BLOCK_CHUNKS].value_units(chunk % BLOCK_CHUNKS));
        for r in 0..W {
            let t = &mut scores[r * SPAN_CHUNKS + chunk];
            let mut p = simd.exp2(simd.add_f32(simd.load_f32(t), simd.splat_f32(-max[r])));
            let mut w = simd.multiply_f32(p, units);
            if chunk >= whole {
                p = seen_or(simd, p, rows[r].seen, chunk, 0.0);
                w = seen_or(simd, w, rows[r].seen, chunk, 0.0);
            }
            sums[r] = simd.add_f32(sums[r], p);
            heaviest[r] = simd.max_bits(w, heaviest[r]);
            *t = simd.to_array(w);
        }
    }
    let mut factors = [simd.splat_f32(0.0); W];
    for r in 0..W {
        let row = &mut rows[r];
        let heaviest = simd.to_array(heaviest[r]).iter().fold(0, |max, w| w.to_bits().max(max));
        let heaviest = if heaviest < INFINITY { f32::from_bits(heaviest) } else { f32::NAN };
        row.unit = heaviest / WEIGHT_MAX;
        if row.seen > 0 {
            row.factors = row.advance(max[r], sum_lanes(simd.to_array(sums[r])));
        }
        factors[r] = simd.splat_f32(if heaviest > 0.0 { WEIGHT_MAX / heaviest } else { 0.0 });
    }

    let steps = tile.as_chunks_mut::<2>().0.as_chunks_mut::<W>().0;
    for (chunk, steps) in steps.as_chunks_mut::<4>().0.iter_mut().take(chunks).enumerate() {
        for r in 0..W {
            let w = simd.load_f32(&scores[r * SPAN_CHUNKS + chunk]);
            let parts = simd.split_parts(simd.multiply_f32(w, factors[r]), 0);
            for i in 0..4 {
                steps[i][r] = parts[i];
            }
        }
    }
}

/// Of the lanes of a chunk those that a row sees, `other` in the place of the rest.
#[inline(always)]
fn seen_or<S: Simd>(simd: S, x: S::Lanes, seen: usize, chunk: usize, other: f32) -> S::Lanes {
    let seen = seen.saturating_sub(chunk * LANES);
    if seen >= LANES {
        return x;
    }
    let mut x = simd.to_array(x);
    x[seen..].fill(other);
    simd.load_f32(&x)
}

/// Adds the weighted values of a span, of `P * 16` features from those of `group` on, and asks memory for
/// the same of the blocks that come `next`.
#[inline(always)]
pub(super) fn add_values<S: Simd, const T: usize, const P: usize>(
    simd: S,
    x: &[[u8; 4]],
    blocks: &[Block<'_>],
    next: &[Block<'_>],
    group: usize,
    rows: &[Row],
    out: &mut [f32],
    stride: usize,
) {
    let mut sums = [[simd.zero(); P]; T];
    let x = x.as_chunks::<T>().0;
    for (b, x) in x.chunks(VALUE_LINES).enumerate() {
        let block = &blocks[b];
        let values = block.values(group, P);
        let next = next.get(b).unwrap_or(block).values(group, P).as_ptr();
        multiply(simd, &mut sums, x, values, next);
    }
    // A loop of its own, simple enough that the sums stay in registers until it.
    let mut joined = [[simd.splat_f32(0.0); P]; T];
    for r in 0..T / 2 {
        for p in 0..P {
            joined[r][p] = simd.sums_to_f32(simd.join_parts(sums[2 * r][p], sums[2 * r + 1][p]));
        }
    }
    for r in 0..T / 2 {
        let Row { unit, factors: (a, b), .. } = rows[r];
        if unit == 0.0 {
            // It sees nothing here.
            continue;
        }
        for p in 0..P {
            let new = simd.multiply_f32(joined[r][p], simd.splat_f32(unit));
            let out = &mut out.as_chunks_mut::<PANEL>().0[r * stride / PANEL + p];
            let old = simd.multiply_f32(simd.load_f32(out), simd.splat_f32(a));
            *out = simd.to_array(simd.multiply_add(old, new, simd.splat_f32(b)));
        }
    }
}
