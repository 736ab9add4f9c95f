//! Attention of one query head over positions.
//!
//! Scores are sums over the features of a head, of which there are few, for many positions; so
//! sixteen positions are computed together, one in each lane, and keys lie transposed in [`Blocks`]
//! of sixteen. No sum then runs across lanes.

use super::exp::softmax;
use super::{Isa, Kernel, LANES, Simd, add_scaled, dispatch, isa};

/// Blocks of positions whose scores are computed together: enough sums in flight to hide the
/// latency of an addition.
const TOGETHER: usize = 4;

/// Vectors `(d,)` of one head at every position, transposed in blocks of 16 positions: feature `i`
/// of position `j` is `data[(j / 16 * d + i) * 16 + j % 16]`.
#[derive(Clone, Debug)]
pub struct Blocks {
    d: usize,
    positions: usize,
    data: Vec<[f32; LANES]>,
}

impl Blocks {
    /// No positions yet of a head with `d` features.
    pub fn new(d: usize) -> Self {
        Self { d, positions: 0, data: Vec::new() }
    }

    /// Number of positions.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Number of features.
    pub(super) fn features(&self) -> usize {
        self.d
    }

    /// Block `i`: sixteen positions of each feature, `(d, 16)`.
    #[inline(always)]
    pub(super) fn block(&self, i: usize) -> &[[f32; LANES]] {
        &self.data[i * self.d..][..self.d]
    }

    /// Appends the vector `(d,)` of the next position.
    ///
    /// # Panics
    /// When the vector has another length.
    pub fn push(&mut self, vector: &[f32]) {
        assert_eq!(vector.len(), self.d, "vector and head differ in length");
        let (block, lane) = (self.positions / LANES, self.positions % LANES);
        if lane == 0 {
            self.data.resize((block + 1) * self.d, [0.0; LANES]);
        }
        for (column, v) in self.data[block * self.d..].iter_mut().zip(vector) {
            column[lane] = *v;
        }
        self.positions += 1;
    }

    /// Forgets all but the first `positions` positions.
    pub fn truncate(&mut self, positions: usize) {
        self.positions = self.positions.min(positions);
        self.data.truncate(self.positions.div_ceil(LANES) * self.d);
    }
}

/// Vectors `(d,)` of one head at every position, one after another: that of position `j` is
/// `data[j * stride..][..d]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The numbers, beginning with the head's at position 0.
    pub data: &'a [f32],
    /// Distance from one position to the next.
    pub stride: usize,
}

impl<'a> Rows<'a> {
    /// Positions that there are vectors `(d,)` of.
    pub(super) fn positions(&self, d: usize) -> usize {
        self.data.len().checked_sub(d).map_or(0, |before| before / self.stride + 1)
    }

    /// The vector `(d,)` of position `j`.
    ///
    /// # Panics
    /// When there is none.
    #[inline(always)]
    pub fn row(&self, j: usize, d: usize) -> &'a [f32] {
        &self.data[j * self.stride..][..d]
    }
}

/// Attention of one query head over the positions `0..weights.len()`.
///
/// `q` and `out` are `(d,)`; `out = sum over j of weights[j] * value_j`. `weights` is scratch whose
/// contents are replaced by the softmax weights.
///
/// # Panics
/// When there are fewer keys or values than weights, or the heads differ in length.
pub fn attention(q: &[f32], keys: &Blocks, values: Rows<'_>, weights: &mut [f32], out: &mut [f32]) {
    attention_on(isa(), q, keys, values, weights, out);
}

pub(crate) fn attention_on(
    isa: Isa,
    q: &[f32],
    keys: &Blocks,
    values: Rows<'_>,
    weights: &mut [f32],
    out: &mut [f32],
) {
    check(q, keys, weights);
    assert_eq!(q.len(), out.len(), "query and output differ in length");
    dispatch(isa, Attention { q, keys, values, weights, out });
}

fn check(q: &[f32], keys: &Blocks, weights: &[f32]) {
    assert_eq!(q.len(), keys.d, "query and keys differ in length");
    assert!(weights.len() <= keys.positions, "more weights than keys");
}

struct Attention<'a> {
    q: &'a [f32],
    keys: &'a Blocks,
    values: Rows<'a>,
    weights: &'a mut [f32],
    out: &'a mut [f32],
}

impl Kernel for Attention<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { q, keys, values, weights, out } = self;
        products(simd, q, keys, weights);
        let scale = 1.0 / (q.len() as f32).sqrt();
        softmax(weights, scale);
        weighted_sum(simd, weights, values, out);
    }
}

/// `out[j] = q . vector_j`, summed feature by feature.
#[inline(always)]
fn products<S: Simd>(simd: S, q: &[f32], vectors: &Blocks, out: &mut [f32]) {
    let d = q.len();
    let mut blocks = vectors.data.chunks_exact(d);
    for out in out.chunks_mut(LANES * TOGETHER) {
        if out.len() == LANES * TOGETHER {
            let group: [&[[f32; LANES]]; TOGETHER] =
                std::array::from_fn(|_| blocks.next().expect("as many blocks as positions"));
            let sums = block_products(simd, q, group);
            for (out, sums) in out.as_chunks_mut().0.iter_mut().zip(sums) {
                *out = sums;
            }
        } else {
            for out in out.chunks_mut(LANES) {
                let block = blocks.next().expect("as many blocks as positions");
                out.copy_from_slice(&block_products(simd, q, [block])[0][..out.len()]);
            }
        }
    }
}

/// The products of a query with some blocks of positions.
#[inline(always)]
fn block_products<S: Simd, const N: usize>(
    simd: S,
    q: &[f32],
    blocks: [&[[f32; LANES]]; N],
) -> [[f32; LANES]; N] {
    let mut sums = [simd.load_f32(&[0.0; LANES]); N];
    for (i, q) in q.iter().enumerate() {
        let q = simd.load_f32(&[*q; LANES]);
        for n in 0..N {
            sums[n] = simd.multiply_add(sums[n], q, simd.load_f32(&blocks[n][i]));
        }
    }
    sums.map(|lanes| simd.to_array(lanes))
}

/// `out = sum over j of weights[j] * row_j`, position by position.
#[inline(always)]
fn weighted_sum<S: Simd>(simd: S, weights: &[f32], rows: Rows<'_>, out: &mut [f32]) {
    let (chunks, rest) = out.as_chunks_mut::<LANES>();
    let (pairs, single) = chunks.as_chunks_mut::<2>();
    let mut at = 0;
    for pair in pairs {
        *pair = columns(simd, weights, rows, at);
        at += 2 * LANES;
    }
    for chunk in single {
        [*chunk] = columns(simd, weights, rows, at);
        at += LANES;
    }
    if !rest.is_empty() {
        rest.fill(0.0);
        for (j, w) in weights.iter().enumerate() {
            add_scaled(*w, &rows.data[j * rows.stride + at..][..rest.len()], rest);
        }
    }
}

/// The weighted sum of `N * 16` columns from column `at` on.
#[inline(always)]
fn columns<S: Simd, const N: usize>(
    simd: S,
    weights: &[f32],
    rows: Rows<'_>,
    at: usize,
) -> [[f32; LANES]; N] {
    let mut sums = [simd.load_f32(&[0.0; LANES]); N];
    for (j, w) in weights.iter().enumerate() {
        let w = simd.load_f32(&[*w; LANES]);
        let (row, _) = rows.data[j * rows.stride + at..][..N * LANES].as_chunks::<LANES>();
        for n in 0..N {
            sums[n] = simd.multiply_add(sums[n], w, simd.load_f32(&row[n]));
        }
    }
    sums.map(|lanes| simd.to_array(lanes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::available;

    fn painted(n: usize, phase: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + phase * 101) % 251) as f32 / 64.0 - 2.0).collect()
    }

    fn blocks(rows: &[f32], d: usize) -> Blocks {
        let mut blocks = Blocks::new(d);
        rows.chunks_exact(d).for_each(|row| blocks.push(row));
        blocks
    }

    /// Attention straight from its formula, in f64.
    fn formula(q: &[f32], keys: &[f32], values: &[f32], seen: usize) -> Vec<f64> {
        let d = q.len();
        let dot = |j: usize| -> f64 {
            q.iter().zip(&keys[j * d..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let exps: Vec<f64> = (0..seen).map(|j| (dot(j) / (d as f64).sqrt()).exp()).collect();
        let sum: f64 = exps.iter().sum();
        let value = |i: usize| {
            exps.iter().enumerate().map(|(j, e)| e / sum * f64::from(values[j * d + i])).sum()
        };
        (0..d).map(value).collect()
    }

    #[test]
    fn attention_is_the_formula_and_the_same_on_every_isa() {
        for (d, positions, seen) in
            [(2, 1, 1), (6, 20, 5), (16, 16, 16), (32, 70, 17), (34, 130, 129), (48, 64, 64)]
        {
            let (q, keys, values) =
                (painted(d, 1), painted(d * positions, 2), painted(d * positions, 3));
            let key_blocks = blocks(&keys, d);
            let on = |isa| {
                let (mut weights, mut out) = (vec![0.0; seen], vec![9.0; d]);
                let values = Rows { data: &values, stride: d };
                attention_on(isa, &q, &key_blocks, values, &mut weights, &mut out);
                out
            };
            let generic = on(Isa::Generic);
            for (y, expected) in generic.iter().zip(formula(&q, &keys, &values, seen)) {
                assert!((f64::from(*y) - expected).abs() < 1e-5, "{y} instead of {expected}");
            }
            for isa in available() {
                assert_eq!(on(isa), generic, "{isa}, d {d}, seen {seen}");
            }
        }
    }

    #[test]
    fn truncated_blocks_take_new_positions() {
        let rows = painted(3 * 40, 1);
        let mut cut = blocks(&rows, 3);
        cut.truncate(17);
        rows[17 * 3..].chunks_exact(3).for_each(|row| cut.push(row));
        assert_eq!(cut.data, blocks(&rows, 3).data);
        assert_eq!(cut.positions(), 40);
    }
}
