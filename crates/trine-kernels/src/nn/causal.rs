//! Causal attention of one head over a whole sequence: that of [`attention`](super::attention), bit for
//! bit, for several queries at a time.
//!
//! A key or value that is loaded meets as many queries as have room in registers. Every sum still runs
//! in its documented order: a score feature by feature, an output position by position. Positions that
//! a query does not see have weight 0, and adding 0 changes no sum.

use super::attention::{Blocks, Rows};
use super::exp::softmax;
use super::{Isa, Kernel, LANES, Simd, dispatch, isa};
use crate::parallel::Strip;

/// Queries at a time.
const QUERIES: usize = 4;

/// Vectors of sixteen numbers that are computed together for each query.
const WIDE: usize = 2;

/// What the queries of one head see.
#[derive(Clone, Copy)]
pub struct Causal<'a> {
    /// Of T positions.
    pub queries: Rows<'a>,
    /// Of T positions or more.
    pub keys: &'a Blocks,
    /// `(T, d)`
    pub values: &'a [f32],
    /// The first position that each query sees, `(T,)`, at most its own; without it, 0. The last is
    /// its own.
    pub starts: Option<&'a [u32]>,
}

/// The attention of queries `first..`, as many as `out` `(n, d)` has rows. `scratch` may hold anything; it
/// keeps its memory from call to call.
///
/// # Panics
/// When the lengths do not fit together.
pub fn attention_causal(
    head: Causal<'_>,
    first: usize,
    out: &mut Strip<'_, f32>,
    scratch: &mut Vec<f32>,
) {
    attention_causal_on(isa(), head, first, out, scratch);
}

pub(crate) fn attention_causal_on(
    isa: Isa,
    head: Causal<'_>,
    first: usize,
    out: &mut Strip<'_, f32>,
    scratch: &mut Vec<f32>,
) {
    let d = head.keys.features();
    assert_eq!(head.values.len() % d, 0, "values are not (T, d)");
    let tokens = head.values.len() / d;
    assert!(head.queries.positions(d) >= tokens, "fewer queries than values");
    assert!(tokens <= head.keys.positions(), "fewer keys than queries");
    assert_eq!(out.cols(), d, "outputs are not (n, d)");
    assert!(first + out.rows() <= tokens, "more outputs than queries");
    if let Some(starts) = head.starts {
        let seen = starts.iter().enumerate().all(|(t, start)| *start as usize <= t);
        assert!(starts.len() == tokens && seen, "starts are not (T,), up to each position");
    }
    dispatch(isa, Run { head, first, out, scratch });
}

struct Run<'a, 'o> {
    head: Causal<'a>,
    first: usize,
    out: &'a mut Strip<'o, f32>,
    scratch: &'a mut Vec<f32>,
}

impl Kernel for Run<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { head, first, out, scratch } = self;
        let rows = out.rows();
        let width = (first + rows).next_multiple_of(LANES * WIDE);
        scratch.clear();
        scratch.resize(width * QUERIES, 0.0);
        let mut row = 0;
        while row < rows {
            if row + QUERIES <= rows {
                tile::<S, QUERIES>(simd, head, first, row, width, out, scratch);
                row += QUERIES;
            } else {
                tile::<S, 1>(simd, head, first, row, width, out, scratch);
                row += 1;
            }
        }
    }
}

/// Rows `row..row + Q` of the outputs, of which row 0 is of query `first`; `scores` is `(Q, width)`.
#[inline(always)]
fn tile<S: Simd, const Q: usize>(
    simd: S,
    head: Causal<'_>,
    first: usize,
    row: usize,
    width: usize,
    out: &mut Strip<'_, f32>,
    scores: &mut [f32],
) {
    let (d, t) = (head.keys.features(), first + row);
    let start = |t: usize| head.starts.map_or(0, |starts| starts[t] as usize);
    let queries: [&[f32]; Q] = std::array::from_fn(|i| head.queries.row(t + i, d));
    let low = (0..Q).fold(t, |low, i| low.min(start(t + i)));
    let blocks = (t + Q).div_ceil(LANES);
    let mut at = low / LANES;
    while at < blocks {
        if at + WIDE <= blocks {
            block_scores::<S, Q, WIDE>(simd, &queries, head.keys, at, width, scores);
            at += WIDE;
        } else {
            block_scores::<S, Q, 1>(simd, &queries, head.keys, at, width, scores);
            at += 1;
        }
    }
    let scale = 1.0 / (d as f32).sqrt();
    for i in 0..Q {
        let scores = &mut scores[i * width..][low..t + Q];
        let (from, to) = (start(t + i) - low, t + i + 1 - low);
        scores[..from].fill(0.0);
        scores[to..].fill(0.0);
        softmax(&mut scores[from..to], scale);
    }
    let weights: [&[f32]; Q] = std::array::from_fn(|i| &scores[i * width..][low..t + Q]);
    let values = &head.values[low * d..(t + Q) * d];
    let mut at = 0;
    while at < d {
        if at + WIDE * LANES <= d {
            columns::<S, Q, WIDE>(simd, &weights, values, at, row, out);
            at += WIDE * LANES;
        } else if at + LANES <= d {
            columns::<S, Q, 1>(simd, &weights, values, at, row, out);
            at += LANES;
        } else {
            for i in 0..Q {
                let out = &mut out.row_mut(row + i)[at..];
                out.fill(0.0);
                for (value, w) in values.chunks_exact(d).zip(weights[i]) {
                    out.iter_mut().zip(&value[at..]).for_each(|(out, v)| *out += w * v);
                }
            }
            at = d;
        }
    }
}

/// The products of queries with `N` blocks of keys from block `at` on.
#[inline(always)]
fn block_scores<S: Simd, const Q: usize, const N: usize>(
    simd: S,
    queries: &[&[f32]; Q],
    keys: &Blocks,
    at: usize,
    width: usize,
    scores: &mut [f32],
) {
    let d = keys.features();
    let blocks: [&[[f32; LANES]]; N] = std::array::from_fn(|n| keys.block(at + n));
    let mut sums = [[simd.splat_f32(0.0); N]; Q];
    for i in 0..d {
        let keys: [S::Lanes; N] = std::array::from_fn(|n| simd.load_f32(&blocks[n][i]));
        for q in 0..Q {
            let query = simd.splat_f32(queries[q][i]);
            for n in 0..N {
                sums[q][n] = simd.multiply_add(sums[q][n], query, keys[n]);
            }
        }
    }
    for q in 0..Q {
        for n in 0..N {
            let to = &mut scores[q * width + (at + n) * LANES..][..LANES];
            to.copy_from_slice(&simd.to_array(sums[q][n]));
        }
    }
}

/// Weighted sums of `N * 16` columns of `values` from column `at` on.
#[inline(always)]
fn columns<S: Simd, const Q: usize, const N: usize>(
    simd: S,
    weights: &[&[f32]; Q],
    values: &[f32],
    at: usize,
    row: usize,
    out: &mut Strip<'_, f32>,
) {
    let d = out.cols();
    let mut sums = [[simd.splat_f32(0.0); N]; Q];
    for (j, value) in values.chunks_exact(d).enumerate() {
        let value = value[at..at + N * LANES].as_chunks::<LANES>().0;
        let lanes: [S::Lanes; N] = std::array::from_fn(|n| simd.load_f32(&value[n]));
        for q in 0..Q {
            let weight = simd.splat_f32(weights[q][j]);
            for n in 0..N {
                sums[q][n] = simd.multiply_add(sums[q][n], weight, lanes[n]);
            }
        }
    }
    for q in 0..Q {
        for n in 0..N {
            let to = &mut out.row_mut(row + q)[at + n * LANES..][..LANES];
            to.copy_from_slice(&simd.to_array(sums[q][n]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention::attention_on;
    use super::*;
    use crate::{available, parallel};

    fn painted(n: usize, phase: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + phase * 101) % 251) as f32 / 64.0 - 2.0).collect()
    }

    #[test]
    fn attention_of_a_sequence_is_that_of_its_queries_to_the_bit() {
        for (tokens, d) in [(1, 2), (5, 6), (19, 16), (37, 34), (70, 64), (33, 40)] {
            let [queries, keys, values] = [1, 2, 3].map(|phase| painted(tokens * d, phase));
            let mut blocks = Blocks::new(d);
            keys.chunks_exact(d).for_each(|key| blocks.push(key));
            let documents: Vec<u32> = (0..tokens).map(|t| (t - t % 11) as u32).collect();
            for starts in [None, Some(&documents[..])] {
                let mut expected = vec![0.0; tokens * d];
                for t in 0..tokens {
                    let from = starts.map_or(0, |starts| starts[t] as usize);
                    let mut seen = Blocks::new(d);
                    keys[from * d..].chunks_exact(d).for_each(|key| seen.push(key));
                    let (query, out) = (&queries[t * d..][..d], &mut expected[t * d..][..d]);
                    let values = Rows { data: &values[from * d..], stride: d };
                    let mut weights = vec![0.0; t + 1 - from];
                    attention_on(Isa::Generic, query, &seen, values, &mut weights, out);
                }
                let queries = Rows { data: &queries, stride: d };
                let head = Causal { queries, keys: &blocks, values: &values, starts };
                for isa in available() {
                    let mut out = vec![9.0; tokens * d];
                    let mut scratch = vec![f32::NAN; 3];
                    // In two calls, so that the second does not begin at 0.
                    let (first, second) = out.split_at_mut(tokens / 3 * d);
                    for (at, out) in [(0, first), (tokens / 3, second)] {
                        for mut out in parallel::strips(out, d, out.len() / d, d) {
                            attention_causal_on(isa, head, at, &mut out, &mut scratch);
                        }
                    }
                    assert_eq!(out, expected, "{isa}, {tokens} tokens, d {d}");
                }
            }
        }
    }
}
