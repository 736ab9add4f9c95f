//! The largest logits of a head without reading all of it: a sketch of 4.5 bits a weight says which
//! rows can be among them, and only those are read.
//!
//! # Why no row is missed
//!
//! The sketch has a step `d` for every 32 columns of a row and codes `q = round(w / d + u)`, with a
//! `u` in `[-1/2, 1/2)` for every column, the dither, and stands for the weights `d * (q - u)`. As codes
//! never overflow, the error of a weight is uniform in `[-d/2, d/2]` whatever the weight is, and
//! errors of different columns are independent (Schuchman 1964). Such an error is sub-Gaussian with
//! its own variance for a proxy, so for any fixed row and any input `x`, with `X_b` the sum of squares
//! of the inputs of block `b`,
//!
//! ```text
//! P(|error . x| > c * sqrt(sum over b of d_b^2 * X_b / 12)) <= 2 * exp(-c^2 / 2)
//! ```
//!
//! `c` is chosen so that all rows together fail with a probability of 1e-15 for a token. The
//! probability is over the dither alone: nothing is assumed of weights and inputs but that they were
//! not made with the dither in mind, and inputs cannot come to depend on it, as all that leaves the
//! head is exact. A certain bound (Cauchy and Schwarz, block by block) is five times as wide and
//! useless below 6 bits; `experiments/two-stage-head` has the figures.
//!
//! What else stands between the sum that is computed and the true one, and between the exact logit
//! that is computed and the true one, has certain bounds, all of the form
//! `factor * sqrt(sum over b of d_b^2 * X_b)` by Cauchy and Schwarz over `B` blocks, since `|w| <= 7 d`:
//!
//! | what | factor, at most |
//! | --- | --- |
//! | inputs are split into two int8 parts here: off by `max / 65278` each, times `8 d` | `sqrt(B) * 128 / 32639` |
//! | so they are for a head in blocks of up to 256: off by their largest / 65278, times `7 d`; `X_b` is made at least `1/16` of the square of that largest | `sqrt(B) * 4 * 112 / 32639` |
//! | roundings to f32, at most `cols + 64` in a chain, of terms up to `8 d` | `2 * (cols + 64) * 2^-24 * 8 * sqrt(32 B)` |
//! | `w / d + u` is computed in f64 and the dither has 24 bits | under `1e-6 * sqrt(32 B)` |

use crate::arch::{Kernel, Simd, dispatch};
use crate::dense::{DenseData, dense_matmul_on};
use crate::isa::{Isa, isa};
use crate::packed::PANEL;
use crate::parallel::{self, SharedMut};
use crate::product::Shape;

use super::inputs::Inputs;
use super::layout::{BlockKind, BlockMatrix};
use super::product::{Blocks, Panels, Q4_0};

/// The probability with which a token may miss a row.
const FAILURE: f64 = 1e-15;
/// Columns that share a step.
const BLOCK: usize = BlockKind::Q4_0.block();
/// Columns of the largest block that a head may have.
const LARGEST_BLOCK: usize = 256;
/// The largest magnitude of a weight, in steps.
const LEVELS: f64 = 7.0;
/// Panels that a thread takes at a time.
const CHUNK: usize = 16;

/// The rows of a head, in the type that its logits are computed from.
#[derive(Clone, Copy, Debug)]
pub enum HeadRows<'a> {
    /// As [`dense_matmul`](crate::dense_matmul) takes them, `(rows, cols)`.
    Dense(DenseData<'a>),
    /// As [`block_matmul`](crate::block_matmul) takes them.
    Blocks(&'a BlockMatrix),
}

/// The largest logits of a head.
#[derive(Clone, Debug, PartialEq)]
pub struct Top {
    /// Rows and their logits, the largest logit first; of equal ones the first row.
    pub rows: Vec<(usize, f32)>,
    /// How many rows of the head could have been among them.
    pub candidates: usize,
}

/// A sketch of a head `(rows, cols)`.
#[derive(Clone, Debug)]
pub struct TwoStageHead {
    /// Codes are `q + 8`.
    sketch: BlockMatrix,
    /// `(cols,)`
    dither: Vec<f32>,
    /// What the root of the sum of `d^2 * X` is multiplied by for the bound.
    factor: f32,
}

impl TwoStageHead {
    /// Makes the sketch of a head; `row` writes a row, widened to f32, and is called on any thread.
    ///
    /// # Panics
    /// When `cols` is not a multiple of 32.
    pub fn new(rows: usize, cols: usize, row: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let dither = dither(cols);
        let sketch = BlockMatrix::from_rows(BlockKind::Q4_0, rows, cols, |r, bytes| {
            let mut weights = vec![0.0; cols];
            row(r, &mut weights);
            let blocks = weights.as_chunks().0.iter().zip(dither.as_chunks().0);
            for (bytes, (weights, dither)) in bytes.as_chunks_mut().0.iter_mut().zip(blocks) {
                encode(weights, dither, bytes);
            }
        });
        Self { sketch, dither, factor: factor(rows, cols) }
    }

    /// Bytes of the sketch: what finding the largest logits reads, beside some rows of the head.
    pub fn bytes(&self) -> usize {
        self.sketch.bytes()
    }

    /// The `k` largest logits for `x`, `(cols,)`, of all that a product of `head` with `x` would give:
    /// the same rows and the same bits. Runs on [`isa()`], in parallel over rows.
    ///
    /// # Panics
    /// When `head` or `x` has another shape than the sketch.
    pub fn top_k(&self, head: HeadRows<'_>, x: &[f32], k: usize) -> Top {
        self.top_k_on(isa(), head, x, k)
    }

    pub(crate) fn top_k_on(&self, isa: Isa, head: HeadRows<'_>, x: &[f32], k: usize) -> Top {
        let (rows, cols) = (self.sketch.rows(), self.sketch.cols());
        assert_eq!(x.len(), cols, "x is not (cols,)");
        if let HeadRows::Blocks(head) = head {
            assert_eq!((head.rows(), head.cols()), (rows, cols), "sketch of another head");
        }
        let k = k.min(rows);
        if k == 0 || cols == 0 {
            return Top { rows: (0..k).map(|r| (r, 0.0)).collect(), candidates: 0 };
        }
        let estimates = self.estimate(isa, x);
        // Those that look largest; whatever they are, the k largest logits are not below theirs.
        let mut first = Best::new(k);
        for (r, estimate) in estimates.iter().enumerate() {
            first.offer(r, estimate.logit);
        }
        let first: Vec<_> = first.rows.iter().map(|&(r, _)| r).collect();
        let logits = exact(isa, head, x, &first);
        let least = logits.iter().fold(f32::INFINITY, |least, &(_, logit)| {
            // A logit that is no number makes every row a candidate.
            if logit < least || logit.is_nan() { logit } else { least }
        });
        let possible = |estimate: &Estimate| {
            // Also where a bound is no number, as a number of the row or the input is infinite.
            !matches!(estimate.upper.partial_cmp(&least), Some(std::cmp::Ordering::Less))
        };
        let candidates: Vec<_> = (0..rows).filter(|&r| possible(&estimates[r])).collect();
        let mut best = Best::new(k);
        for (r, logit) in exact(isa, head, x, &candidates) {
            best.offer(r, logit);
        }
        Top { rows: best.rows, candidates: candidates.len() }
    }

    /// The logits of the sketch and their bounds.
    fn estimate(&self, isa: Isa, x: &[f32]) -> Vec<Estimate> {
        let inputs = Inputs::split(isa, BlockKind::Q4_0, x, x.len());
        let blocks = (0..x.len() / BLOCK).map(|b| self.block(x, b)).collect::<Vec<_>>();
        let mut estimates = vec![Estimate::default(); self.sketch.rows()];
        let (panels, out) = (self.sketch.panels(), SharedMut::new(&mut estimates));
        parallel::run(panels.div_ceil(CHUNK), |i| {
            let panels = i * CHUNK..panels.min((i + 1) * CHUNK);
            let inputs = &inputs[0];
            dispatch(isa, Sketch { head: self, panels, inputs, blocks: &blocks, out: &out });
        });
        estimates
    }

    fn block(&self, x: &[f32], b: usize) -> BlockInputs {
        let at = b * BLOCK;
        let products = self.dither[at..].iter().zip(&x[at..at + BLOCK]);
        let dither: f64 = products.map(|(u, x)| f64::from(*u) * f64::from(*x)).sum();
        let squares: f64 = x[at..at + BLOCK].iter().map(|x| f64::from(*x).powi(2)).sum();
        let around = at - at % LARGEST_BLOCK;
        let around = &x[around..x.len().min(around + LARGEST_BLOCK)];
        let largest = around.iter().fold(0.0, |max: f64, x| max.max(f64::from(x.abs())));
        // Numbers that are split into zeros, below 1e-30, still count.
        let squares = squares.max(largest * largest / 16.0).max(1e-36);
        BlockInputs { dither: dither as f32, squares: squares as f32 }
    }
}

/// What a block of inputs contributes beside its product.
struct BlockInputs {
    /// Sum of dither times input.
    dither: f32,
    /// `X`.
    squares: f32,
}

/// What the sketch says about a logit.
#[derive(Clone, Copy, Default)]
struct Estimate {
    logit: f32,
    /// The exact logit is at most this.
    upper: f32,
}

/// Estimates of some panels.
struct Sketch<'a> {
    head: &'a TwoStageHead,
    panels: std::ops::Range<usize>,
    inputs: &'a Inputs,
    blocks: &'a [BlockInputs],
    /// `(rows,)`, of which those of these panels are ours alone.
    out: &'a SharedMut<'a, Estimate>,
}

impl Kernel for Sketch<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { head, inputs, blocks, .. } = self;
        let (parts, starts, x_scales) = inputs.of::<1>();
        for p in self.panels {
            let (lines, scales) = head.sketch.panel(p);
            let (mut logits, mut squares) = (simd.splat_f32(0.0), simd.splat_f32(0.0));
            let operands = lines
                .chunks_exact(BlockKind::Q4_0.lines())
                .zip(parts.chunks_exact(BLOCK / 4))
                .zip(starts.iter().zip(x_scales))
                .zip(scales.iter().zip(blocks));
            for (((lines, parts), (starts, x_scale)), (scales, block)) in operands {
                let [high, low] =
                    Q4_0::sums::<S, 1>(simd, lines, parts, std::slice::from_ref(starts));
                let (high, low) = (simd.sums_to_f32(high[0]), simd.sums_to_f32(low[0]));
                let sum = simd.multiply_add(low, high, simd.splat_f32(256.0));
                let shift = simd.splat_f32(-block.dither);
                let sum = simd.multiply_add(shift, sum, simd.splat_f32(x_scale[0]));
                let steps = simd.load_f16(scales);
                logits = simd.multiply_add(logits, sum, steps);
                let weighted = simd.multiply_f32(steps, simd.splat_f32(block.squares));
                squares = simd.multiply_add(squares, weighted, steps);
            }
            let (logits, squares) = (simd.to_array(logits), simd.to_array(squares));
            let mut estimates = [Estimate::default(); PANEL];
            for r in 0..PANEL {
                let upper = logits[r] + head.factor * squares[r].sqrt();
                estimates[r] = Estimate { logit: logits[r], upper };
            }
            let count = PANEL.min(head.sketch.rows() - p * PANEL);
            // SAFETY: every panel is in one chunk, and every chunk is computed by one thread.
            #[allow(unsafe_code)]
            let out = unsafe { self.out.slice(p * PANEL, count) };
            out.copy_from_slice(&estimates[..count]);
        }
    }
}

/// The logits of some rows, in the order of `rows`.
fn exact(isa: Isa, head: HeadRows<'_>, x: &[f32], rows: &[usize]) -> Vec<(usize, f32)> {
    let cols = x.len();
    let mut logits: Vec<_> = rows.iter().map(|&r| (r, 0.0)).collect();
    match head {
        HeadRows::Dense(data) => parallel::for_each(&mut logits, |_, (r, logit)| {
            let row = *r * cols..(*r + 1) * cols;
            let row = match data {
                DenseData::F32(data) => DenseData::F32(&data[row]),
                DenseData::F16(data) => DenseData::F16(&data[row]),
                DenseData::Bf16(data) => DenseData::Bf16(&data[row]),
            };
            let shape = Shape { rows: 1, cols, tokens: 1 };
            dense_matmul_on(isa, row, shape, x, std::slice::from_mut(logit));
        }),
        HeadRows::Blocks(weights) => {
            let inputs = Inputs::split(isa, weights.kind(), x, cols);
            let mut panels: Vec<_> = rows.iter().map(|r| r / PANEL).collect();
            panels.sort_unstable();
            panels.dedup();
            let mut sums = vec![0.0; weights.rows()];
            let out = SharedMut::new(&mut sums);
            parallel::run(panels.len(), |i| {
                let (first, inputs, out) = (panels[i], &inputs, &out);
                dispatch(isa, Panels { weights, first, panels: 1, inputs, out });
            });
            logits.iter_mut().for_each(|(r, logit)| *logit = sums[*r]);
        }
    }
    logits
}

/// The rows of the `k` largest logits so far, the largest first; of equal ones the first offered.
struct Best {
    k: usize,
    rows: Vec<(usize, f32)>,
}

impl Best {
    fn new(k: usize) -> Self {
        Self { k, rows: Vec::with_capacity(k + 1) }
    }

    #[inline]
    fn offer(&mut self, row: usize, logit: f32) {
        let full = self.rows.len() == self.k;
        if full && self.rows.last().is_some_and(|&(_, last)| logit.total_cmp(&last).is_le()) {
            return;
        }
        let at = self.rows.partition_point(|&(_, other)| other.total_cmp(&logit).is_ge());
        self.rows.insert(at, (row, logit));
        self.rows.truncate(self.k);
    }
}

/// The factor of the bound; see the module.
fn factor(rows: usize, cols: usize) -> f32 {
    let (rows, cols) = (rows.max(1) as f64, cols as f64);
    let c = (2.0 * (2.0 * rows / FAILURE).ln()).sqrt();
    let root = (cols / BLOCK as f64).sqrt();
    let split = root * (128.0 + 4.0 * 112.0) / 32639.0;
    let rounded = 2.0 * (cols + 64.0) * 2f64.powi(-24) * 8.0 * 32f64.sqrt() * root;
    let dithered = 1e-6 * 32f64.sqrt() * root;
    // The bound itself is rounded, too: a sum of as many positive terms as there are blocks.
    let slack = 1.0 + (cols + 64.0) * 2f64.powi(-23);
    ((c / 12f64.sqrt() + split + rounded + dithered) * slack) as f32
}

/// Uniform numbers in `[-1/2, 1/2)` in steps of 2^-24: the upper bits of SplitMix64 (Steele, Lea,
/// Flood 2014). Always the same ones, so that the same model takes the same time.
fn dither(cols: usize) -> Vec<f32> {
    let number = |i: usize| {
        let mut z = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..cols).map(number).collect()
}

/// Writes a block of the sketch as a block of Q4_0.
fn encode(weights: &[f32; BLOCK], dither: &[f32; BLOCK], out: &mut [u8; 18]) {
    let largest = weights.iter().fold(0.0, |max: f32, w| max.max(w.abs()));
    let step = step(f64::from(largest) / LEVELS);
    let inverse = match f64::from(step.to_f32()) {
        0.0 => 0.0,
        step => 1.0 / step,
    };
    // As integer casts saturate, what is not finite gets any code: its step is not finite either.
    let code = |i: usize| {
        let steps = f64::from(weights[i]) * inverse + f64::from(dither[i]);
        ((steps + 8.5).floor() as i32).clamp(0, 15) as u8
    };
    out[..2].copy_from_slice(&step.to_le_bytes());
    for j in 0..BLOCK / 2 {
        out[2 + j] = code(j) | code(j + BLOCK / 2) << 4;
    }
}

/// The least f16 that is not below `least`.
fn step(least: f64) -> half::f16 {
    let step = half::f16::from_f64(least);
    if step.to_f64() < least { half::f16::from_bits(step.to_bits() + 1) } else { step }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::available;
    use crate::{block_matmul, dense_matmul};

    const ROWS: usize = 3001;
    const COLS: usize = 512;

    /// Normal numbers, as the sum of twelve uniform ones; larger in some rows and columns.
    fn normal(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..len)
            .map(|i| (0..12).map(|_| next()).sum::<f32>() * [0.02, 0.02, 0.1][i / 300 % 3])
            .collect()
    }

    fn largest(logits: &[f32], k: usize) -> Vec<(usize, f32)> {
        let mut rows: Vec<_> = logits.iter().copied().enumerate().collect();
        rows.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        rows.truncate(k);
        rows
    }

    #[test]
    fn the_largest_logits_are_those_of_the_whole_head() {
        let mut weights = normal(ROWS * COLS, 1);
        // Equal logits, of which the first row counts.
        weights.copy_within(5 * COLS..6 * COLS, 2000 * COLS);
        let head = TwoStageHead::new(ROWS, COLS, |r, row| {
            row.copy_from_slice(&weights[r * COLS..][..COLS]);
        });
        let data = DenseData::F32(&weights);
        let (mut logits, mut candidates) = (vec![0.0; ROWS], 0);
        for seed in 2..12 {
            let mut x = normal(COLS, seed);
            if seed == 3 {
                x.copy_from_slice(&weights[5 * COLS..6 * COLS]);
            }
            dense_matmul(data, ROWS, COLS, &x, 1, &mut logits);
            for k in [1, 2, 40] {
                for isa in available() {
                    let top = head.top_k_on(isa, HeadRows::Dense(data), &x, k);
                    assert_eq!(top.rows, largest(&logits, k), "{isa} {k}");
                    candidates += if k == 1 { top.candidates } else { 0 };
                }
            }
        }
        let share = candidates as f64 / (10 * available().len() * ROWS) as f64;
        assert!(share < 0.05, "a sketch that spares little: {share}");
    }

    #[test]
    fn heads_in_blocks_have_sketches_too() {
        for kind in BlockKind::ALL {
            let bytes = crate::tests::block::blocks(kind, ROWS, COLS);
            let matrix = BlockMatrix::new(kind, ROWS, COLS, &bytes);
            let head = TwoStageHead::new(ROWS, COLS, |r, row| matrix.row(r, row));
            let mut logits = vec![0.0; ROWS];
            for seed in 0..4 {
                let x = normal(COLS, seed);
                block_matmul(&matrix, &x, 1, &mut logits);
                for k in [1, 10] {
                    let top = head.top_k(HeadRows::Blocks(&matrix), &x, k);
                    assert_eq!(top.rows, largest(&logits, k), "{kind:?} {k}");
                }
            }
        }
    }

    #[test]
    fn no_logit_is_farther_from_its_estimate_than_the_bound() {
        let weights = normal(ROWS * COLS, 1);
        let head = TwoStageHead::new(ROWS, COLS, |r, row| {
            row.copy_from_slice(&weights[r * COLS..][..COLS]);
        });
        for (seed, scale) in [(2, 1.0), (3, 1e-12), (4, 1e12)] {
            let x: Vec<_> = normal(COLS, seed).iter().map(|x| x * scale).collect();
            let (mut errors, mut bounds) = (0.0, 0.0);
            for (estimate, row) in head.estimate(isa(), &x).iter().zip(weights.chunks(COLS)) {
                let exact: f64 =
                    row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                let bound = f64::from(estimate.upper) - f64::from(estimate.logit);
                let error = (exact - f64::from(estimate.logit)).abs();
                assert!(error <= bound, "{error} {bound}");
                errors += error * error;
                bounds += bound * bound;
            }
            // Nearly ten standard deviations, and little more for all the roundings.
            let ratio = (bounds / errors).sqrt();
            assert!((9.0..12.0).contains(&ratio), "{ratio}");
        }
    }

    #[test]
    fn infinite_numbers_make_every_row_that_has_them_a_candidate() {
        let mut weights = normal(64 * COLS, 1);
        weights[17 * COLS + 3] = f32::MAX;
        let head = TwoStageHead::new(64, COLS, |r, row| {
            row.copy_from_slice(&weights[r * COLS..][..COLS]);
        });
        let rows = HeadRows::Dense(DenseData::F32(&weights));
        let mut x = normal(COLS, 2);
        x[3] = 1.0;
        assert_eq!(head.top_k(rows, &x, 1).rows[0].0, 17);
        x[3] = f32::INFINITY;
        assert_eq!(head.top_k(rows, &x, 1).candidates, 64);
        assert_eq!(head.top_k(rows, &x, 0), Top { rows: vec![], candidates: 0 });
    }

    #[test]
    fn steps_are_never_too_small() {
        for least in [0.0, 1e-9, 6e-8, 0.1, 1.0 / 3.0, 2.0, 65504.0, 1e6] {
            assert!(step(least).to_f64() >= least, "{least}");
        }
        let (weights, dither) = (normal(BLOCK, 3), dither(BLOCK));
        let (weights, dither) = (weights.first_chunk().unwrap(), dither.first_chunk().unwrap());
        let mut block = [0; 18];
        encode(weights, dither, &mut block);
        let mut row = [0.0; BLOCK];
        BlockMatrix::new(BlockKind::Q4_0, 1, BLOCK, &block).row(0, &mut row);
        let step = half::f16::from_le_bytes([block[0], block[1]]).to_f32();
        for i in 0..BLOCK {
            let error = row[i] - step * dither[i] - weights[i];
            assert!(error.abs() <= 0.50001 * step, "{error} {step}");
        }
    }
}
