//! Float products: the output head, attention, and other weights that are not ternary.
//!
//! # The order of a sum
//!
//! Floating-point addition is not associative, so this crate has one order for every sum of
//! products, and keeps to it on every instruction set:
//!
//! - element `i` belongs to lane `i % 16`;
//! - a lane starts at 0 and adds its products in order; product and sum are rounded separately
//!   (no fused multiply-add, which some CPUs lack);
//! - at the end lanes are added in pairs: `l + (l + 8)`, then `+ 4`, `+ 2`, `+ 1`.
//!
//! Sixteen lanes fill one AVX-512 register, two of AVX2, four of NEON.

use std::ops::Range;

use half::{bf16, f16};

use crate::arch::{Kernel, LANES, Simd, dispatch};
use crate::isa::{Isa, isa};
use crate::product::{Product, Shape, compute};

/// Weights, `(rows, cols)` row-major, in the type in which they are stored.
#[derive(Clone, Copy, Debug)]
pub enum DenseData<'a> {
    /// IEEE single precision.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// The upper half of a single.
    Bf16(&'a [bf16]),
}

/// The dot product of two vectors, in the order of this module. Runs on [`isa()`].
///
/// # Panics
/// When the lengths differ.
#[inline]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    dot_on(isa(), a, b)
}

#[inline]
pub(crate) fn dot_on(isa: Isa, a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "vectors differ in length");
    dispatch(isa, Dot { a, b })
}

/// Dense weights, `(rows, cols)`, times `x`, `(tokens, cols)`: `out[t, r]` is the [`dot`] of row `r`,
/// widened exactly to f32, with token `t`. Runs on [`isa()`], in parallel over rows.
///
/// # Panics
/// When weights are not `(rows, cols)`, `x` is not `(tokens, cols)` or `out` not `(tokens, rows)`.
pub fn dense_matmul(
    weights: DenseData<'_>,
    rows: usize,
    cols: usize,
    x: &[f32],
    tokens: usize,
    out: &mut [f32],
) {
    dense_matmul_on(isa(), weights, Shape { rows, cols, tokens }, x, out);
}

pub(crate) fn dense_matmul_on(
    isa: Isa,
    weights: DenseData<'_>,
    shape: Shape,
    x: &[f32],
    out: &mut [f32],
) {
    match weights {
        DenseData::F32(weights) => compute(isa, &Dense::new(weights, shape, x), out),
        DenseData::F16(weights) => compute(isa, &Dense::new(weights, shape, x), out),
        DenseData::Bf16(weights) => compute(isa, &Dense::new(weights, shape, x), out),
    }
}

struct Dot<'a> {
    a: &'a [f32],
    b: &'a [f32],
}

impl Kernel for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        dots(simd, [self.a], [self.b])[0][0]
    }
}

/// `y += a * x`, product and sum rounded separately.
#[inline(always)]
pub(crate) fn add_scaled(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// A product with dense weights.
#[derive(Clone, Copy)]
struct Dense<'a, E> {
    /// `(rows, cols)`
    weights: &'a [E],
    shape: Shape,
    /// `(tokens, cols)`
    x: &'a [f32],
}

impl<'a, E: Element> Dense<'a, E> {
    fn new(weights: &'a [E], shape: Shape, x: &'a [f32]) -> Self {
        let Shape { rows, cols, tokens } = shape;
        assert_eq!(Some(weights.len()), rows.checked_mul(cols), "weights are not (rows, cols)");
        assert_eq!(Some(x.len()), tokens.checked_mul(cols), "x is not (tokens, cols)");
        Self { weights, shape, x }
    }
}

impl<E: Element> Product for Dense<'_, E> {
    type Out = f32;
    type Unpacked<'u>
        = Dense<'u, f32>
    where
        Self: 'u;

    fn unpacked_len(&self, rows: usize) -> usize {
        if size_of::<E>() == size_of::<f32>() { 0 } else { rows * self.shape.cols }
    }

    #[inline(always)]
    fn unpack<'u, S: Simd>(
        &'u self,
        simd: S,
        rows: Range<usize>,
        buffer: &'u mut [f32],
    ) -> Dense<'u, f32> {
        let cols = self.shape.cols;
        let weights = &self.weights[rows.start * cols..rows.end * cols];
        let (chunks, rest) = weights.as_chunks();
        let (to, to_rest) = buffer.as_chunks_mut::<LANES>();
        for (to, chunk) in to.iter_mut().zip(chunks) {
            *to = simd.to_array(E::load(simd, chunk));
        }
        to_rest.copy_from_slice(&simd.to_array(E::load(simd, &padded(rest)))[..rest.len()]);
        let shape = Shape { rows: rows.len(), ..self.shape };
        Dense { weights: buffer, shape, x: self.x }
    }

    fn shape(&self) -> Shape {
        self.shape
    }

    fn row_bytes(&self) -> usize {
        self.shape.cols * size_of::<E>()
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize, const T: usize>(
        &self,
        simd: S,
        row: usize,
        token: usize,
    ) -> [[f32; R]; T] {
        let cols = self.shape.cols;
        let weights: [&[E]; R] = std::array::from_fn(|r| &self.weights[(row + r) * cols..][..cols]);
        let x: [&[f32]; T] = std::array::from_fn(|t| &self.x[(token + t) * cols..][..cols]);
        // With one token, meanwhile memory is asked for the rows of the next tile.
        let ahead = if T == 1 { R * self.row_bytes() } else { 0 };
        dots_ahead(simd, weights, x, ahead)
    }
}

/// The dot products of some rows with some tokens, in the order of this module; all of one length.
#[inline(always)]
pub(crate) fn dots<S: Simd, E: Element, const R: usize, const T: usize>(
    simd: S,
    rows: [&[E]; R],
    tokens: [&[f32]; T],
) -> [[f32; R]; T] {
    dots_ahead(simd, rows, tokens, 0)
}

/// [`dots`]; memory is asked for what lies `ahead` bytes after the rows meanwhile, unless that is 0.
#[inline(always)]
pub(crate) fn dots_ahead<S: Simd, E: Element, const R: usize, const T: usize>(
    simd: S,
    rows: [&[E]; R],
    tokens: [&[f32]; T],
    ahead: usize,
) -> [[f32; R]; T] {
    let len = tokens[0].len();
    let (chunks, rest) = (len / LANES, len % LANES);
    let row_chunks: [&[[E; LANES]]; R] = std::array::from_fn(|r| &rows[r].as_chunks().0[..chunks]);
    let token_chunks: [&[[f32; LANES]]; T] =
        std::array::from_fn(|t| &tokens[t].as_chunks().0[..chunks]);
    let mut lanes = [[simd.load_f32(&[0.0; LANES]); R]; T];
    for c in 0..chunks {
        let w: [&[E; LANES]; R] = std::array::from_fn(|r| &row_chunks[r][c]);
        if ahead > 0 {
            for r in 0..R {
                simd.prefetch_far(w[r], ahead);
            }
        }
        let x = std::array::from_fn(|t| &token_chunks[t][c]);
        step(simd, &mut lanes, w, x);
    }
    if rest > 0 {
        // Zeros fill up the last chunk. They change no lane: a lane is never -0, as it starts at +0.
        let w: [_; R] = std::array::from_fn(|r| padded(&rows[r][len - rest..]));
        let x: [_; T] = std::array::from_fn(|t| padded(&tokens[t][len - rest..]));
        step(simd, &mut lanes, w.each_ref(), x.each_ref());
    }
    let mut sums = [[0.0; R]; T];
    if R * T == LANES {
        let mut all = [lanes[0][0]; LANES];
        for i in 0..LANES {
            all[i] = lanes[i / R][i % R];
        }
        let all = simd.sum_each(all);
        for i in 0..LANES {
            sums[i / R][i % R] = all[i];
        }
        return sums;
    }
    for t in 0..T {
        for r in 0..R {
            sums[t][r] = sum_lanes(simd.to_array(lanes[t][r]));
        }
    }
    sums
}

/// Adds one product to every lane of every row and token; a row is widened once for all tokens.
#[inline(always)]
fn step<S: Simd, E: Element, const R: usize, const T: usize>(
    simd: S,
    lanes: &mut [[S::Lanes; R]; T],
    w: [&[E; LANES]; R],
    x: [&[f32; LANES]; T],
) {
    for r in 0..R {
        let w = E::load(simd, w[r]);
        for t in 0..T {
            lanes[t][r] = simd.multiply_add(lanes[t][r], w, simd.load_f32(x[t]));
        }
    }
}

/// `rest`, which is shorter than a chunk, filled up with zeros.
#[inline(always)]
fn padded<E: Element>(rest: &[E]) -> [E; LANES] {
    let mut chunk = [E::default(); LANES];
    chunk[..rest.len()].copy_from_slice(rest);
    chunk
}

#[inline(always)]
pub(crate) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    for width in [8, 4, 2, 1] {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
    }
    lanes[0]
}

/// A float that widens exactly to f32.
pub(crate) trait Element: Copy + Default + Sync {
    /// Loads and widens sixteen.
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> S::Lanes;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> S::Lanes {
        simd.load_f32(from)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> S::Lanes {
        simd.load_f16(from)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> S::Lanes {
        simd.load_bf16(from)
    }
}
