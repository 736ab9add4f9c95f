//! Keys and values in f32 or f16, and attention over them in the order of [`super::super::attention`].
//!
//! A block is four groups of 16 transposed keys, `(4, d, 16)`, and then the values, `(64, d)`. So a
//! score is again a sum over features in a lane of its own, and an output a sum over positions.
//! Keys and values are widened to f32 exactly; for some query rows at a time, so that a key is loaded
//! and widened once for all of them.

use std::cell::Cell;
use std::marker::PhantomData;

use bytemuck::Pod;
use half::f16;

use super::super::exp::softmax;
use super::super::{Kernel, LANES, Simd};
use super::KV_BLOCK;
use crate::aligned::AlignedBuf;
use crate::dense::Element;
use crate::parallel::SharedMut;

/// Query rows of a tile.
const TILE: usize = 4;

/// Groups of 16 positions in a block.
const GROUPS: usize = KV_BLOCK / LANES;

/// A float in which keys and values are stored.
pub(super) trait Stored: Element + Pod {
    /// The nearest to `x`.
    fn of(x: f32) -> Self;

    /// Itself, exactly.
    fn widen(self) -> f32;
}

impl Stored for f32 {
    fn of(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Stored for f16 {
    fn of(x: f32) -> Self {
        Self::from_f32(x)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32_const()
    }
}

pub(super) fn block_bytes<E>(d: usize) -> usize {
    2 * KV_BLOCK * d * size_of::<E>()
}

/// Writes position `at` of a block.
pub(super) fn write<E: Stored>(block: &mut [u8], at: usize, key: &[f32], value: &[f32]) {
    let d = key.len();
    let (keys, values) = bytemuck::cast_slice_mut::<u8, E>(block).split_at_mut(KV_BLOCK * d);
    let (group, lane) = (at / LANES, at % LANES);
    let columns = keys.as_chunks_mut::<LANES>().0[group * d..].iter_mut();
    for (column, k) in columns.zip(key) {
        column[lane] = E::of(*k);
    }
    for (to, v) in values[at * d..].iter_mut().zip(value) {
        *to = E::of(*v);
    }
}

/// The keys of a block, `(4, d, 16)`, and its values, `(64, d)`.
#[inline(always)]
fn parts<E: Stored>(block: &[u8], d: usize) -> (&[[E; LANES]], &[E]) {
    let (keys, values) = bytemuck::cast_slice::<u8, E>(block).split_at(KV_BLOCK * d);
    (keys.as_chunks().0, values)
}

/// A band of query rows over the whole past.
pub(super) struct Band<'a, E> {
    band: &'a super::Band<'a>,
    out: &'a SharedMut<'a, f32>,
    element: PhantomData<E>,
}

impl<'a, E: Stored> Band<'a, E> {
    pub(super) fn new(band: &'a super::Band<'a>, out: &'a SharedMut<'a, f32>) -> Self {
        Self { band, out, element: PhantomData }
    }
}

thread_local! {
    /// Scores, then weights, of the rows of a tile.
    static WEIGHTS: Cell<AlignedBuf<f32>> = Cell::default();
}

impl<E: Stored> Kernel for Band<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (mut first, rows) = (0, self.band.rows);
        while first + TILE <= rows {
            self.tile::<S, TILE>(simd, first);
            first += TILE;
        }
        for first in first..rows {
            self.tile::<S, 1>(simd, first);
        }
    }
}

impl<E: Stored> Band<'_, E> {
    /// Rows `first..first + R`.
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(&self, simd: S, first: usize) {
        let d = self.band.layout.d;
        // The last row sees the most. Scores of what a row must not see are computed and left.
        let seen = self.band.seen(first + R - 1);
        let blocks = seen.div_ceil(KV_BLOCK);
        let stride = blocks * KV_BLOCK;
        let mut buffer = WEIGHTS.take();
        if buffer.len() < R * stride {
            buffer = AlignedBuf::new((R * stride).next_power_of_two());
        }
        let weights = &mut buffer[..R * stride];
        let queries: [&[f32]; R] = std::array::from_fn(|r| self.band.query(first + r));
        for b in 0..blocks {
            let (keys, _) = parts::<E>(self.band.block(b), d);
            let left = (seen - b * KV_BLOCK).min(KV_BLOCK).div_ceil(LANES);
            let at = b * KV_BLOCK;
            if left == GROUPS {
                scores::<S, E, R, GROUPS>(simd, queries, keys, weights, stride, at);
            } else {
                for g in 0..left {
                    let keys = &keys[g * d..][..d];
                    scores::<S, E, R, 1>(simd, queries, keys, weights, stride, at + g * LANES);
                }
            }
        }
        let scale = 1.0 / (d as f32).sqrt();
        for r in 0..R {
            let row = &mut weights[r * stride..][..self.band.seen(first + r)];
            softmax(row, scale);
        }
        let mut out: [&mut [f32]; R] = std::array::from_fn(|r| self.band.out(self.out, first + r));
        let mut at = 0;
        while at + 4 * LANES <= d {
            self.columns::<S, R, 4>(simd, first, weights, stride, at, &mut out);
            at += 4 * LANES;
        }
        while at + LANES <= d {
            self.columns::<S, R, 1>(simd, first, weights, stride, at, &mut out);
            at += LANES;
        }
        if at < d {
            self.rest(first, weights, stride, at, &mut out);
        }
        WEIGHTS.set(buffer);
    }

    /// The weighted sums of `N * 16` features from `at` on, position by position.
    #[inline(always)]
    fn columns<S: Simd, const R: usize, const N: usize>(
        &self,
        simd: S,
        first: usize,
        weights: &[f32],
        stride: usize,
        at: usize,
        out: &mut [&mut [f32]; R],
    ) {
        let d = self.band.layout.d;
        let mut sums = [[simd.load_f32(&[0.0; LANES]); N]; R];
        // All rows see what the first sees; what only some see is added to those.
        let common = self.band.seen(first);
        let seen: [usize; R] = std::array::from_fn(|r| self.band.seen(first + r));
        for b in 0..seen[R - 1].div_ceil(KV_BLOCK) {
            let (_, values) = parts::<E>(self.band.block(b), d);
            let start = b * KV_BLOCK;
            for j in start..(start + KV_BLOCK).min(seen[R - 1]) {
                let row = values[(j - start) * d + at..][..N * LANES].as_chunks::<LANES>().0;
                let mut v = [simd.load_f32(&[0.0; LANES]); N];
                for n in 0..N {
                    v[n] = E::load(simd, &row[n]);
                }
                for r in 0..R {
                    if j < common || j < seen[r] {
                        let w = simd.load_f32(&[weights[r * stride + j]; LANES]);
                        for n in 0..N {
                            sums[r][n] = simd.multiply_add(sums[r][n], w, v[n]);
                        }
                    }
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                out[r][at + n * LANES..][..LANES].copy_from_slice(&simd.to_array(sums[r][n]));
            }
        }
    }

    /// The weighted sums of the features from `at` on, of which there are less than 16.
    #[inline(always)]
    fn rest<const R: usize>(
        &self,
        first: usize,
        weights: &[f32],
        stride: usize,
        at: usize,
        out: &mut [&mut [f32]; R],
    ) {
        let d = self.band.layout.d;
        for r in 0..R {
            let out = &mut out[r][at..];
            out.fill(0.0);
            for j in 0..self.band.seen(first + r) {
                let (_, values) = parts::<E>(self.band.block(j / KV_BLOCK), d);
                let row = &values[j % KV_BLOCK * d + at..];
                for (out, v) in out.iter_mut().zip(row) {
                    *out += weights[r * stride + j] * v.widen();
                }
            }
        }
    }
}

/// `q . key` of some query rows with `N` groups of 16 keys, feature by feature.
#[inline(always)]
fn scores<S: Simd, E: Stored, const R: usize, const N: usize>(
    simd: S,
    queries: [&[f32]; R],
    keys: &[[E; LANES]],
    to: &mut [f32],
    stride: usize,
    at: usize,
) {
    let d = queries[0].len();
    let queries: [&[f32]; R] = std::array::from_fn(|r| &queries[r][..d]);
    let keys: [&[[E; LANES]]; N] = std::array::from_fn(|n| &keys[n * d..][..d]);
    let mut sums = [[simd.load_f32(&[0.0; LANES]); N]; R];
    for i in 0..d {
        let mut k = [simd.load_f32(&[0.0; LANES]); N];
        for n in 0..N {
            k[n] = E::load(simd, &keys[n][i]);
        }
        for r in 0..R {
            let q = simd.load_f32(&[queries[r][i]; LANES]);
            for n in 0..N {
                sums[r][n] = simd.multiply_add(sums[r][n], q, k[n]);
            }
        }
    }
    for r in 0..R {
        for n in 0..N {
            let to = &mut to[r * stride + at + n * LANES..][..LANES];
            to.copy_from_slice(&simd.to_array(sums[r][n]));
        }
    }
}
