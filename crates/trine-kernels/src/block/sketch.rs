//! The sketch of a head: 4.5 bits a weight that say how large a logit can be at most.
//!
//! # Why no logit is larger
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
//! | `w / d` is rounded to a multiple of 2^-19, and the dither is uniform over such multiples: its mean is 2^-20 less than 0, and it is sub-Gaussian still, a sum of independent signs | `3e-6 * sqrt(32 B)` |

use half::f16;

use crate::arch::{Kernel, Simd, dispatch};
use crate::isa::Isa;
use crate::packed::{Line, PANEL};
use crate::parallel::{self, SharedMut};

use super::inputs::Inputs;
use super::layout::{BlockKind, BlockMatrix};
use super::product::{Blocks, Q4_0};
use super::two_stage::HeadRows;

/// The probability with which a token may miss a row.
const FAILURE: f64 = 1e-15;
/// Columns that share a step.
pub(super) const BLOCK: usize = BlockKind::Q4_0.block();
/// Columns of the largest block that a head may have.
const LARGEST_BLOCK: usize = 256;
/// The largest magnitude of a weight, in steps.
const LEVELS: f32 = 7.0;
/// Panels that a thread takes at a time.
const CHUNK: usize = 16;

/// A sketch of a head `(rows, cols)`.
#[derive(Clone, Debug)]
pub(super) struct Sketch {
    /// Codes are `q + 8`.
    codes: BlockMatrix,
    /// `(cols,)`
    dither: Vec<f32>,
    /// What the root of the sum of `d^2 * X` is multiplied by for the bound.
    factor: f32,
}

/// What the sketch says about a logit.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Estimate {
    /// Infinite instead of NaN.
    pub(super) logit: f32,
    /// The exact logit is at most this; infinite where no number is known.
    pub(super) upper: f32,
}

/// What the sketch says about the logits of some tokens.
pub(super) struct Estimates {
    rows: usize,
    /// `(tokens, rows)`
    all: Vec<Estimate>,
    /// The largest of every panel, `(tokens, panels)`.
    most: Vec<Estimate>,
}

impl Sketch {
    /// Makes the sketch of `head`, in parallel over rows.
    ///
    /// # Panics
    /// When `cols` is not a multiple of 32.
    pub(super) fn new(isa: Isa, head: HeadRows<'_>, rows: usize, cols: usize) -> Self {
        let dither = dither(cols);
        let codes = BlockMatrix::from_panels(BlockKind::Q4_0, rows, cols, |p, lines, steps| {
            let rows = p * PANEL..rows.min((p + 1) * PANEL);
            dispatch(isa, Make { head, rows, dither: &dither, lines, steps });
        });
        Self { codes, dither, factor: factor(rows, cols) }
    }

    pub(super) fn rows(&self) -> usize {
        self.codes.rows()
    }

    pub(super) fn cols(&self) -> usize {
        self.codes.cols()
    }

    pub(super) fn bytes(&self) -> usize {
        self.codes.bytes()
    }

    /// The logits of `x` `(tokens, cols)`, where nothing is empty, and their bounds; in parallel over rows.
    pub(super) fn estimate(&self, isa: Isa, x: &[f32]) -> Estimates {
        let (rows, cols, panels) = (self.rows(), self.cols(), self.codes.panels());
        let tiles = Inputs::split(isa, BlockKind::Q4_0, x, cols).into_iter();
        let tiles: Vec<_> = tiles.map(|inputs| self.tile(inputs, x)).collect();
        let tokens = x.len() / cols;
        let mut all = vec![Estimate::default(); tokens * rows];
        let mut most = vec![Estimate::default(); tokens * panels];
        let (out, out_most) = (SharedMut::new(&mut all), SharedMut::new(&mut most));
        parallel::run(panels.div_ceil(CHUNK), |i| {
            let panels = i * CHUNK..panels.min((i + 1) * CHUNK);
            let (tiles, all, most) = (&tiles[..], &out, &out_most);
            dispatch(isa, Product { sketch: self, panels, tiles, all, most });
        });
        Estimates { rows, all, most }
    }

    /// What a tile of tokens contributes beside its products.
    fn tile(&self, inputs: Inputs, x: &[f32]) -> Tile {
        let cols = self.cols();
        let (first, width, blocks) = (inputs.tile.first, inputs.tile.width, cols / BLOCK);
        let (mut dither, mut squares) = (vec![0.0; blocks * width], vec![0.0; blocks * width]);
        for t in 0..width {
            let x = &x[(first + t) * cols..][..cols];
            for b in 0..blocks {
                (dither[b * width + t], squares[b * width + t]) = self.block(x, b);
            }
        }
        Tile { inputs, dither, squares }
    }

    /// Of block `b` of a token the sum of dither times input, and `X`.
    fn block(&self, x: &[f32], b: usize) -> (f32, f32) {
        let at = b * BLOCK;
        let products = self.dither[at..].iter().zip(&x[at..at + BLOCK]);
        let dither: f64 = products.map(|(u, x)| f64::from(*u) * f64::from(*x)).sum();
        let squares: f64 = x[at..at + BLOCK].iter().map(|x| f64::from(*x).powi(2)).sum();
        let around = at - at % LARGEST_BLOCK;
        let around = &x[around..x.len().min(around + LARGEST_BLOCK)];
        let largest = around.iter().fold(0.0, |max: f64, x| max.max(f64::from(x.abs())));
        // Numbers that are split into zeros, below 1e-30, still count.
        let squares = squares.max(largest * largest / 16.0).max(1e-36);
        (dither as f32, squares as f32)
    }
}

impl Estimates {
    /// The rows of the `count` largest estimates of a token, in order of rows.
    pub(super) fn largest(&self, token: usize, count: usize) -> Vec<usize> {
        // The largest first; of equal ones the first row.
        let mut best: Vec<(usize, f32)> = Vec::with_capacity(count + 1);
        let exceeds = |best: &[(usize, f32)], logit: f32| {
            best.len() < count || best.last().is_some_and(|&(_, last)| logit > last)
        };
        let (all, most) = self.of(token);
        for (p, most) in most.iter().enumerate() {
            if !exceeds(&best, most.logit) {
                continue;
            }
            for (r, estimate) in (p * PANEL..).zip(panel(all, p)) {
                if exceeds(&best, estimate.logit) {
                    let at = best.partition_point(|&(_, other)| other >= estimate.logit);
                    best.insert(at, (r, estimate.logit));
                    best.truncate(count);
                }
            }
        }
        let mut rows: Vec<_> = best.into_iter().map(|(r, _)| r).collect();
        rows.sort_unstable();
        rows
    }

    /// The rows of a token whose logit may be at least `least`, in order; all where that is NaN.
    pub(super) fn at_least(&self, token: usize, least: f32) -> Vec<usize> {
        let possible = |estimate: &Estimate| estimate.upper >= least || least.is_nan();
        let (all, most) = self.of(token);
        let panels = (0..most.len()).filter(|&p| possible(&most[p]));
        let rows = panels.flat_map(|p| (p * PANEL..).zip(panel(all, p)));
        rows.filter_map(|(r, estimate)| possible(estimate).then_some(r)).collect()
    }

    /// What there is about a token: `(rows,)` and `(panels,)`.
    fn of(&self, token: usize) -> (&[Estimate], &[Estimate]) {
        let panels = self.rows.div_ceil(PANEL);
        (&self.all[token * self.rows..][..self.rows], &self.most[token * panels..][..panels])
    }
}

/// Panel `p` of `(rows,)`.
fn panel(all: &[Estimate], p: usize) -> &[Estimate] {
    &all[p * PANEL..all.len().min((p + 1) * PANEL)]
}

/// The inputs of a tile of tokens.
struct Tile {
    inputs: Inputs,
    /// Sums of dither times input, `(blocks, width)`.
    dither: Vec<f32>,
    /// `X`, `(blocks, width)`.
    squares: Vec<f32>,
}

/// Estimates of some panels.
struct Product<'a> {
    sketch: &'a Sketch,
    panels: std::ops::Range<usize>,
    tiles: &'a [Tile],
    /// `(tokens, rows)`, of which those of these panels are ours alone.
    all: &'a SharedMut<'a, Estimate>,
    /// `(tokens, panels)`, in the same way.
    most: &'a SharedMut<'a, Estimate>,
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for tile in self.tiles {
            match tile.inputs.tile.width {
                8 => self.tile::<S, 8>(simd, tile),
                4 => self.tile::<S, 4>(simd, tile),
                2 => self.tile::<S, 2>(simd, tile),
                _ => self.tile::<S, 1>(simd, tile),
            }
        }
    }
}

impl Product<'_> {
    /// All panels for a tile of `T` tokens.
    #[inline(always)]
    fn tile<S: Simd, const T: usize>(&self, simd: S, tile: &Tile) {
        for p in self.panels.clone() {
            let (logits, squares) = self.panel::<S, T>(simd, p, tile);
            for t in 0..T {
                self.put(p, tile.inputs.tile.first + t, &logits[t], &squares[t]);
            }
        }
    }

    /// The logits of sixteen rows for `T` tokens, and the sums of `d^2 * X`.
    #[inline(always)]
    fn panel<S: Simd, const T: usize>(
        &self,
        simd: S,
        p: usize,
        tile: &Tile,
    ) -> ([[f32; PANEL]; T], [[f32; PANEL]; T]) {
        let (parts, starts, x_scales) = tile.inputs.of::<T>();
        let (dither, squares_of_x) = (tile.dither.as_chunks::<T>().0, tile.squares.as_chunks().0);
        let (lines, steps) = self.sketch.codes.panel(p);
        let mut logits = [simd.splat_f32(0.0); T];
        let mut squares = [simd.splat_f32(0.0); T];
        let operands = lines
            .chunks_exact(BlockKind::Q4_0.lines())
            .zip(parts.chunks_exact(BLOCK / 4))
            .zip(starts.iter().zip(x_scales))
            .zip(steps.iter().zip(dither.iter().zip(squares_of_x)));
        for (((lines, parts), (starts, x_scales)), (steps, (dither, x))) in operands {
            let x: &[f32; T] = x;
            let [high, low] = Q4_0::sums::<S, T>(simd, lines, parts, std::slice::from_ref(starts));
            let steps = simd.load_f16(steps);
            for t in 0..T {
                let (high, low) = (simd.sums_to_f32(high[t]), simd.sums_to_f32(low[t]));
                let sum = simd.multiply_add(low, high, simd.splat_f32(256.0));
                let shift = simd.splat_f32(-dither[t]);
                let sum = simd.multiply_add(shift, sum, simd.splat_f32(x_scales[t]));
                logits[t] = simd.multiply_add(logits[t], sum, steps);
                let weighted = simd.multiply_f32(steps, simd.splat_f32(x[t]));
                squares[t] = simd.multiply_add(squares[t], weighted, steps);
            }
        }
        let mut out = ([[0.0; PANEL]; T], [[0.0; PANEL]; T]);
        for t in 0..T {
            (out.0[t], out.1[t]) = (simd.to_array(logits[t]), simd.to_array(squares[t]));
        }
        out
    }

    /// Writes what is known of a panel for a token.
    #[inline(always)]
    fn put(&self, p: usize, token: usize, logits: &[f32; PANEL], squares: &[f32; PANEL]) {
        let (rows, panels) = (self.sketch.rows(), self.sketch.codes.panels());
        let count = PANEL.min(rows - p * PANEL);
        // SAFETY: every panel is in one chunk, and every chunk is computed by one thread.
        #[allow(unsafe_code)]
        let (out, most) = unsafe {
            (
                self.all.slice(token * rows + p * PANEL, count),
                self.most.slice(token * panels + p, 1),
            )
        };
        let number = |value: f32| if value.is_nan() { f32::INFINITY } else { value };
        let mut largest = Estimate { logit: f32::NEG_INFINITY, upper: f32::NEG_INFINITY };
        for (r, out) in out.iter_mut().enumerate() {
            let logit = number(logits[r]);
            let upper = number(logits[r] + self.sketch.factor * squares[r].sqrt());
            *out = Estimate { logit, upper };
            largest.logit = if logit > largest.logit { logit } else { largest.logit };
            largest.upper = if upper > largest.upper { upper } else { largest.upper };
        }
        most[0] = largest;
    }
}

/// Makes a panel of a sketch.
struct Make<'a> {
    head: HeadRows<'a>,
    /// Those of the panel.
    rows: std::ops::Range<usize>,
    dither: &'a [f32],
    /// `(blocks, 4)`
    lines: &'a mut [Line],
    /// `(blocks,)`
    steps: &'a mut [[f16; PANEL]],
}

impl Kernel for Make<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut row = vec![0.0; self.dither.len()];
        for (r, index) in self.rows.enumerate() {
            self.head.widen(simd, index, &mut row);
            let blocks = row.as_chunks().0.iter().zip(self.dither.as_chunks().0);
            let out = self.lines.as_chunks_mut().0.iter_mut().zip(&mut *self.steps);
            for ((weights, dither), (lines, steps)) in blocks.zip(out) {
                steps[r] = encode(weights, dither, r, lines);
            }
        }
    }
}

/// Writes the codes of row `r` in a block of a panel; returns their step.
#[inline(always)]
fn encode(
    weights: &[f32; BLOCK],
    dither: &[f32; BLOCK],
    r: usize,
    lines: &mut [Line; BlockKind::Q4_0.lines()],
) -> f16 {
    // As integers, so that a NaN is more than infinity, which is more than any number.
    let largest = weights.iter().fold(0, |max, w| (w.to_bits() & 0x7fff_ffff).max(max));
    let step = step(f32::from_bits(largest));
    let inverse = if step.to_bits() == 0 { 0.0 } else { 1.0 / step.to_f32() };
    let mut codes = [0; BLOCK];
    for i in 0..BLOCK {
        // Between 17 and 32, in multiples of 2^-19: the sum is exact, and its upper bits are the code.
        // What is not finite gets any code, as its step is not finite either.
        let steps = (weights[i] * inverse + 24.5) + dither[i];
        codes[i] = (steps.to_bits() >> 19 & 15) as u8;
    }
    let words = codes.as_chunks::<8>().0.iter().zip(lines);
    for (&[a, b, c, d, e, f, g, h], line) in words {
        let word = [a | e << 4, b | f << 4, c | g << 4, d | h << 4];
        line[4 * r..][..4].copy_from_slice(&word);
    }
    step
}

/// The least f16 of which [`LEVELS`] are not below `largest`.
#[inline(always)]
fn step(largest: f32) -> f16 {
    let step = f16::from_f32(largest / LEVELS);
    // The product is exact.
    match step.to_f32() * LEVELS < largest {
        true => f16::from_bits(step.to_bits() + 1),
        false => step,
    }
}

/// The factor of the bound; see the module.
fn factor(rows: usize, cols: usize) -> f32 {
    let (rows, cols) = (rows.max(1) as f64, cols as f64);
    let c = (2.0 * (2.0 * rows / FAILURE).ln()).sqrt();
    let root = (cols / BLOCK as f64).sqrt();
    let split = root * (128.0 + 4.0 * 112.0) / 32639.0;
    let rounded = 2.0 * (cols + 64.0) * 2f64.powi(-24) * 8.0 * 32f64.sqrt() * root;
    let dithered = 3e-6 * 32f64.sqrt() * root;
    // The bound itself is rounded, too: a sum of as many positive terms as there are blocks.
    let slack = 1.0 + (cols + 64.0) * 2f64.powi(-23);
    ((c / 12f64.sqrt() + split + rounded + dithered) * slack) as f32
}

/// Uniform numbers in `[-1/2, 1/2)` in steps of 2^-19: the upper bits of SplitMix64 (Steele, Lea,
/// Flood 2014). Always the same ones, so that the same model takes the same time.
fn dither(cols: usize) -> Vec<f32> {
    let number = |i: usize| {
        let mut z = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 45) as f32 / (1 << 19) as f32 - 0.5
    };
    (0..cols).map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::super::two_stage::tests::{COLS, ROWS, normal};
    use super::*;
    use crate::dense::DenseData;
    use crate::isa::{available, isa};

    fn sketch(isa: Isa, rows: usize, weights: &[f32]) -> Sketch {
        Sketch::new(isa, HeadRows::Dense(DenseData::F32(weights)), rows, weights.len() / rows)
    }

    #[test]
    fn no_logit_is_farther_from_its_estimate_than_the_bound() {
        let weights = normal(ROWS * COLS, 1);
        let head = sketch(isa(), ROWS, &weights);
        for (seed, scale) in [(2, 1.0), (3, 1e-12), (4, 1e12)] {
            let x: Vec<_> = normal(COLS, seed).iter().map(|x| x * scale).collect();
            let (mut errors, mut bounds) = (0.0, 0.0);
            for (estimate, row) in head.estimate(isa(), &x).all.iter().zip(weights.chunks(COLS)) {
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
    fn tokens_have_the_same_estimates_alone_and_together_on_every_instruction_set() {
        let weights = normal(ROWS * COLS, 1);
        let x = normal(15 * COLS, 2);
        let bits = |estimates: &[Estimate]| -> Vec<_> {
            estimates.iter().map(|e| (e.logit.to_bits(), e.upper.to_bits())).collect()
        };
        let scalar = sketch(Isa::Generic, ROWS, &weights);
        let alone = |x| bits(&scalar.estimate(Isa::Generic, x).all);
        let alone: Vec<_> = x.chunks(COLS).map(alone).collect();
        for isa in available() {
            let head = sketch(isa, ROWS, &weights);
            for tokens in [1, 2, 5, 8, 15] {
                let together = head.estimate(isa, &x[..tokens * COLS]);
                assert_eq!(bits(&together.all), alone[..tokens].concat(), "{isa} {tokens}");
                for t in 0..tokens {
                    let (all, most) = together.of(t);
                    for (p, most) in most.iter().enumerate() {
                        let upper = panel(all, p).iter().map(|e| e.upper).max_by(f32::total_cmp);
                        assert_eq!(Some(most.upper), upper);
                    }
                }
            }
        }
    }

    #[test]
    fn weights_are_within_half_a_step_of_what_the_sketch_says() {
        for largest in [0.0, 1e-30, 1e-9, 6e-8, 0.1, 1.0 / 3.0, 2.0, 65504.0, 458_527.9, 1e6] {
            assert!(step(largest).to_f32() * LEVELS >= largest, "{largest}");
        }
        let mut weights = normal(PANEL * COLS, 3);
        weights[5..37].fill(0.0);
        let head = sketch(isa(), PANEL, &weights);
        let mut row = vec![0.0; COLS];
        for (r, weights) in weights.chunks(COLS).enumerate() {
            head.codes.row(r, &mut row);
            for c in 0..COLS {
                let step = head.codes.panel(0).1[c / BLOCK][r].to_f32();
                let error = row[c] - step * head.dither[c] - weights[c];
                assert!(error.abs() <= 0.500_01 * step, "{r}, {c}: {error} {step}");
            }
        }
    }

    #[test]
    fn the_dither_is_uniform() {
        let dither = dither(1 << 16);
        let mean = |of: &dyn Fn(f64) -> f64| {
            dither.iter().map(|u| of(f64::from(*u))).sum::<f64>() / dither.len() as f64
        };
        assert!(dither.iter().all(|u| (-0.5..0.5).contains(u) && (u * 524_288.0).fract() == 0.0));
        assert!(mean(&|u| u).abs() < 0.005);
        assert!((mean(&|u| u * u) - 1.0 / 12.0).abs() < 0.002);
    }
}
