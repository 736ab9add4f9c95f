//! The gradient of weights in int8, `dW = dY^T X`, a sum over tokens.
//!
//! `X` are the codes of the forward pass as they are. `dY` over the scales of these codes is rounded to
//! int8 with a scale for each output and each [`BLOCK`] of tokens, so that neither a token with a large
//! gradient nor a channel with one makes those of others coarse. (SwitchBack, arXiv 2304.13013, leaves
//! this product in 16 bits, since its sums are as long as a batch has tokens; Jetfire, arXiv 2403.12422,
//! multiplies it in int8 with scales by blocks, as here.)
//!
//! Sums of a block are exact; blocks are added in f32 in the order of tokens. So a product has the same
//! bits on every CPU and number of threads.

use crate::activations::Activations;
use crate::aligned::AlignedBuf;
use crate::arch::{Kernel, LANES, ROUND, Simd, dispatch};
use crate::isa::{Isa, isa};
use crate::packed::Line;
use crate::parallel;
use crate::tiling::{COLS, ROWS, for_each_tile};

/// Tokens that share the scales of their gradients.
pub const BLOCK: usize = 256;

/// Tokens whose codes are multiplied at a time.
const QUAD: usize = 4;

/// Most outputs whose gradients are rounded together: those of a block of tokens stay in a cache between
/// the two passes over them.
const GROUP: usize = 16 * ROWS;

/// How many tokens ahead of their use memory is asked for gradients, which lie far apart.
const AHEAD: usize = 8;

/// The largest magnitude of a code.
const LARGEST: f32 = 127.0;

/// Gradients below it are taken for nothing, as 127 over them is no number.
const LEAST: f32 = 1e-36;

/// Codes `X + 128` of one output of the layer before, for four tokens: two lines of sixteen columns.
type Columns = [Line; COLS / LANES];

/// The codes of twelve outputs for four tokens, the first in the low byte.
type Rows = [u32; ROWS];

/// What turns a block's sums into gradients of twelve outputs.
#[derive(Clone, Copy, Debug, Default)]
struct Terms {
    /// What a code stands for.
    scales: [f32; ROWS],
    /// `-128` times the sum of the codes, for the 128 that the right side's codes are larger by.
    starts: [i32; ROWS],
}

/// Whether this CPU multiplies int8 at least four times as fast as f32, in registers of 512 bits; false where
/// `TRINE_ISA` forces less.
pub fn is_fast() -> bool {
    matches!(isa(), Isa::Avx512Vnni | Isa::Avx512Vbmi)
}

/// `dY^T`, `(out, tokens)`.
#[derive(Debug, Default)]
pub struct Gradients {
    tokens: usize,
    out: usize,
    /// For each block of tokens `(ceil(out / 12), quads)`.
    codes: AlignedBuf<u32>,
    /// `(blocks, ceil(out / 12))`
    terms: Vec<Terms>,
}

/// `X`, `(tokens, in)`.
#[derive(Debug, Default)]
pub struct Inputs {
    tokens: usize,
    cols: usize,
    /// For each block of tokens `(ceil(in / 32), quads, 2)`.
    codes: AlignedBuf<Line>,
}

/// The tokens of block `i` of `tokens`.
fn block_tokens(tokens: usize, i: usize) -> usize {
    BLOCK.min(tokens - i * BLOCK)
}

impl Gradients {
    /// Takes `dy` `(tokens, out)`, of which row `t` is divided by `scales[t]`: that of the codes which it
    /// meets.
    ///
    /// # Panics
    /// When `dy` is not `(tokens, out)`, where `tokens` is the number of scales.
    pub fn fill(&mut self, dy: &[f32], scales: &[f32], out: usize) {
        self.fill_on(isa(), dy, scales, out);
    }

    fn fill_on(&mut self, isa: Isa, dy: &[f32], scales: &[f32], out: usize) {
        let tokens = scales.len();
        assert_eq!(Some(dy.len()), tokens.checked_mul(out), "gradients are not (tokens, out)");
        let panels = out.div_ceil(ROWS);
        (self.tokens, self.out) = (tokens, out);
        self.codes.resize(tokens.div_ceil(QUAD) * panels * ROWS);
        self.terms.resize(tokens.div_ceil(BLOCK) * panels, Default::default());
        if out == 0 {
            return;
        }
        let codes = self.codes.chunks_mut(BLOCK / QUAD * panels * ROWS);
        let mut work: Vec<_> = codes.zip(self.terms.chunks_mut(panels)).collect();
        parallel::for_each(&mut work, |i, (codes, terms)| {
            let tokens = block_tokens(tokens, i);
            let scales = &scales[i * BLOCK..][..tokens];
            let dy = &dy[i * BLOCK * out..][..tokens * out];
            let groups = codes.chunks_mut(GROUP * tokens.div_ceil(QUAD));
            for (g, (codes, terms)) in groups.zip(terms.chunks_mut(GROUP / ROWS)).enumerate() {
                dispatch(isa, Round { dy, scales, out, first: g * GROUP, codes, terms });
            }
        });
    }
}

impl Inputs {
    /// Takes the codes of `x`.
    pub fn fill(&mut self, x: &Activations) {
        self.fill_on(isa(), x);
    }

    fn fill_on(&mut self, isa: Isa, x: &Activations) {
        let (tokens, panels) = (x.tokens(), x.cols().div_ceil(COLS));
        (self.tokens, self.cols) = (tokens, x.cols());
        let per_quad = panels * (COLS / LANES);
        self.codes.resize(tokens.div_ceil(QUAD) * per_quad);
        if per_quad > 0 {
            parallel::for_each_chunk(&mut self.codes, BLOCK / QUAD * per_quad, |i, codes| {
                dispatch(isa, Turn { x, first: i * BLOCK, codes });
            });
        }
    }
}

/// `out = dY^T X`, `(out, in)`, on the threads of the pool.
///
/// # Panics
/// When the sides differ in tokens or `out` is not `(out, in)`.
pub fn multiply(gradients: &Gradients, inputs: &Inputs, out: &mut [f32]) {
    multiply_on(isa(), gradients, inputs, out);
}

fn multiply_on(isa: Isa, left: &Gradients, right: &Inputs, out: &mut [f32]) {
    assert_eq!(left.tokens, right.tokens, "the sides of a product differ in tokens");
    let tokens = left.tokens;
    let panel_bytes = tokens.next_multiple_of(QUAD) * COLS;
    let sides = Sides {
        tokens,
        outputs: left.out.div_ceil(ROWS),
        columns: right.cols.div_ceil(COLS),
        gradients: left.codes.as_chunks().0,
        inputs: right.codes.as_chunks().0,
        terms: &left.terms,
    };
    for_each_tile([left.out, right.cols], panel_bytes, out, |block, panel, rows| {
        dispatch(isa, Tile { sides, block, panel, rows });
    });
}

/// The outputs `first..` of a block of tokens, rounded.
struct Round<'a> {
    /// `(tokens, out)`
    dy: &'a [f32],
    /// `(tokens,)`
    scales: &'a [f32],
    out: usize,
    first: usize,
    /// `(panels, quads, 12)`
    codes: &'a mut [u32],
    /// `(panels,)`
    terms: &'a mut [Terms],
}

impl Round<'_> {
    /// What of token `t` is rounded here, and what it is multiplied by.
    #[inline(always)]
    fn line<S: Simd>(&self, simd: S, t: usize, len: usize) -> (&[f32], f32) {
        if let Some(ahead) = self.dy.get((t + AHEAD) * self.out + self.first..) {
            ahead[..len.min(ahead.len())]
                .chunks(LANES)
                .for_each(|at| simd.prefetch(at.as_ptr(), 0));
        }
        (&self.dy[t * self.out + self.first..][..len], 1.0 / self.scales[t])
    }
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (tokens, len) = (self.scales.len(), GROUP.min(self.out - self.first));
        // Magnitudes compare as integers, and NaN is the largest.
        let mut largest = [0; GROUP];
        for t in 0..tokens {
            let (line, scale) = self.line(simd, t, len);
            for (largest, x) in largest.iter_mut().zip(line) {
                *largest = (*largest).max((x * scale).to_bits() & 0x7fff_ffff);
            }
        }
        let largest = largest.map(f32::from_bits);
        let inverse = largest.map(|x| if x < LEAST { 0.0 } else { LARGEST / x });
        let inverse = inverse.as_chunks::<LANES>().0;
        let mut sums = [[0i32; LANES]; GROUP / LANES];
        let quads = tokens.div_ceil(QUAD);
        for q in 0..quads {
            // Behind the last token are none.
            let mut lines = [(&[][..], 0.0); QUAD];
            for i in 0..QUAD.min(tokens - q * QUAD) {
                lines[i] = self.line(simd, q * QUAD + i, len);
            }
            let mut words = [[0; LANES]; GROUP / LANES];
            for g in 0..len.div_ceil(LANES) {
                for (i, (line, scale)) in lines.into_iter().enumerate() {
                    let line = lanes(line, g);
                    for l in 0..LANES {
                        let code = (line[l] * scale * inverse[g][l] + ROUND).to_bits();
                        let code = code.wrapping_sub(ROUND.to_bits());
                        words[g][l] |= (code & 0xff) << (8 * i);
                        sums[g][l] = sums[g][l].wrapping_add(code as i32);
                    }
                }
            }
            let panels = self.codes.as_chunks_mut::<ROWS>().0[q..].iter_mut().step_by(quads);
            for (to, words) in panels.zip(words.as_flattened().as_chunks::<ROWS>().0) {
                *to = *words;
            }
        }
        let sums = sums.as_flattened().as_chunks::<ROWS>().0;
        let columns = largest.as_chunks::<ROWS>().0.iter().zip(sums);
        for (terms, (largest, sums)) in self.terms.iter_mut().zip(columns) {
            let scales = largest.map(|largest| largest / LARGEST);
            *terms = Terms { scales, starts: sums.map(|sum| sum.wrapping_mul(-128)) };
        }
    }
}

/// Sixteen of a line, from `16 g` on; what lies behind its end is 0.
#[inline(always)]
fn lanes(line: &[f32], g: usize) -> [f32; LANES] {
    let rest = line.get(g * LANES..).unwrap_or_default();
    rest.first_chunk().copied().unwrap_or_else(|| {
        let mut lanes = [0.0; LANES];
        lanes[..rest.len()].copy_from_slice(rest);
        lanes
    })
}

/// The codes of the tokens `first..` of a block, by fours of tokens.
struct Turn<'a> {
    x: &'a Activations,
    first: usize,
    /// `(panels, quads, 2)`
    codes: &'a mut [Line],
}

impl Kernel for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let tokens = BLOCK.min(self.x.tokens() - self.first);
        let quads = tokens.div_ceil(QUAD);
        for q in 0..quads {
            let panels = self.codes.as_chunks_mut::<{ COLS / LANES }>().0[q..].iter_mut();
            // Four columns of four tokens are sixteen bytes of a line.
            let parts = panels
                .step_by(quads)
                .flat_map(|lines| lines.as_flattened_mut().as_chunks_mut::<{ QUAD * QUAD }>().0);
            let first = self.first + q * QUAD;
            match self.x.fours(first) {
                Some(fours) => parts.zip(fours).for_each(|(to, codes)| turn(codes, to)),
                None => {
                    let last = self.x.tokens().min(first + QUAD);
                    let rows: Vec<_> = (first..last).map(|t| self.x.codes(t)).collect();
                    for (c, to) in parts.enumerate().take(self.x.cols().div_ceil(QUAD)) {
                        let mut codes = [[0; QUAD]; QUAD];
                        for (codes, row) in codes.iter_mut().zip(&rows) {
                            let row = &row[c * QUAD..];
                            let len = row.len().min(QUAD);
                            codes[..len].copy_from_slice(&row[..len]);
                        }
                        turn(&codes, to);
                    }
                }
            }
        }
    }
}

/// Four columns of four tokens, column by column, larger by 128.
#[inline(always)]
fn turn(codes: &[[i8; QUAD]; QUAD], to: &mut [u8; QUAD * QUAD]) {
    *to = std::array::from_fn(|i| codes[i % QUAD][i / QUAD] as u8 ^ 0x80);
}

/// What is multiplied.
#[derive(Clone, Copy)]
struct Sides<'a> {
    tokens: usize,
    /// Panels of outputs.
    outputs: usize,
    /// Panels of columns.
    columns: usize,
    /// For each block of tokens `(outputs, quads)`.
    gradients: &'a [Rows],
    /// For each block of tokens `(columns, quads)`.
    inputs: &'a [Columns],
    /// `(blocks of tokens, outputs)`
    terms: &'a [Terms],
}

/// A tile: the sums of its blocks of tokens, in registers, and what they stand for.
struct Tile<'a> {
    sides: Sides<'a>,
    block: usize,
    panel: usize,
    rows: [&'a mut [f32]; ROWS],
}

impl Kernel for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Sides { tokens, outputs, columns, gradients, inputs, terms } = self.sides;
        let mut totals = [[simd.splat_f32(0.0); COLS / LANES]; ROWS];
        for i in 0..tokens.div_ceil(BLOCK) {
            let terms = &terms[i * outputs + self.block];
            let (first, quads) = (i * BLOCK / QUAD, block_tokens(tokens, i).div_ceil(QUAD));
            let at = first * outputs + self.block * quads;
            // The gradients of the next block of tokens, or of the tile that comes next, are the one thing
            // here that no cache near by holds, in pieces too short for the processor to foresee.
            let next = at + outputs * quads;
            let next = if next < gradients.len() { next } else { (self.block + 1) * quads };
            let ahead = next.wrapping_sub(at).wrapping_mul(size_of::<Rows>());
            let gradients = &gradients[at..][..quads];
            let inputs = &inputs[first * columns + self.panel * quads..][..quads];
            let mut sums = [[simd.splat_i32(0); COLS / LANES]; ROWS];
            for r in 0..ROWS {
                sums[r] = [simd.splat_i32(terms.starts[r]); COLS / LANES];
            }
            for (gradients, inputs) in gradients.iter().zip(inputs) {
                simd.prefetch_far(gradients, ahead);
                let inputs = [simd.load_codes(&inputs[0]), simd.load_codes(&inputs[1])];
                for r in 0..ROWS {
                    let gradients = gradients[r].to_le_bytes().map(|byte| byte as i8);
                    for c in 0..COLS / LANES {
                        sums[r][c] = simd.multiply_wide(sums[r][c], inputs[c], &gradients);
                    }
                }
            }
            for r in 0..ROWS {
                let scale = simd.splat_f32(terms.scales[r]);
                for c in 0..COLS / LANES {
                    let sum = simd.sums_to_f32(sums[r][c]);
                    totals[r][c] = simd.multiply_add(totals[r][c], sum, scale);
                }
            }
        }
        for (row, totals) in self.rows.into_iter().zip(totals) {
            for (to, total) in row.chunks_mut(LANES).zip(totals) {
                to.copy_from_slice(&simd.to_array(total)[..to.len()]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::available;
    use crate::tiling::painted;

    /// `(out, tokens, in)`
    const SHAPES: [[usize; 3]; 6] =
        [[1, 1, 1], [12, 4, 32], [13, 259, 33], [205, 7, 100], [25, 515, 81], [3, 256, 65]];

    /// What rounding may change: half a code of each token, times its input.
    fn bound(dy: &[f32], x: &[f32], [out, tokens, cols]: [usize; 3], o: usize, c: usize) -> f64 {
        let blocks = (0..tokens).step_by(BLOCK).map(|first| {
            let block = first..tokens.min(first + BLOCK);
            let largest = block.clone().fold(0.0, |max: f32, t| max.max(dy[t * out + o].abs()));
            let inputs: f64 = block.map(|t| f64::from(x[t * cols + c].abs())).sum();
            f64::from(largest) / 253.9 * inputs
        });
        blocks.sum::<f64>() + 1e-4
    }

    #[test]
    fn products_are_the_formula_but_for_half_a_code_on_every_instruction_set() {
        for shape in SHAPES {
            let [out, tokens, cols] = shape;
            let (mut gradients, mut inputs) = (Gradients::default(), Inputs::default());
            // Sides are filled once with something larger, which must leave no trace.
            gradients.fill(&painted(600 * 230, 3), &vec![1.0; 600], 230);
            inputs.fill(&Activations::quantize(&painted(600 * 230, 4), 600, 230));
            let (dy, scales) = (painted(tokens * out, 1), painted(tokens, 7));
            let scales: Vec<_> = scales.iter().map(|s| s.abs() + 0.1).collect();
            let codes: Vec<i8> = (0..tokens * cols).map(|i| (i * 89 % 255) as i8).collect();
            let x = Activations::from_codes(&codes, &scales, cols);
            // With codes as large as scales, what is rounded is the gradient itself.
            let scaled: Vec<_> = dy.iter().enumerate().map(|(i, g)| g / scales[i / out]).collect();
            let floats: Vec<_> = codes.iter().map(|code| f32::from(*code)).collect();
            let mut first: Option<Vec<f32>> = None;
            for isa in available() {
                gradients.fill_on(isa, &dy, &scales, out);
                inputs.fill_on(isa, &x);
                let mut found = vec![f32::NAN; out * cols];
                multiply_on(isa, &gradients, &inputs, &mut found);
                for (i, &found) in found.iter().enumerate() {
                    let (o, c) = (i / cols, i % cols);
                    let term =
                        |t: usize| f64::from(scaled[t * out + o]) * f64::from(floats[t * cols + c]);
                    let expected: f64 = (0..tokens).map(term).sum();
                    let error = (f64::from(found) - expected).abs();
                    let bound = bound(&scaled, &floats, shape, o, c);
                    assert!(error < bound, "{isa}, {shape:?}, {o}, {c}: {found}, not {expected}");
                }
                let first = first.get_or_insert_with(|| found.clone());
                assert_eq!(&found, first, "{isa}, {shape:?}");
            }
        }
    }

    #[test]
    fn a_large_gradient_makes_neither_another_output_nor_another_block_coarse() {
        let (tokens, out) = (2 * BLOCK, 2);
        let mut dy = vec![1e-6; tokens * out];
        dy[0] = 1e6;
        let x = Activations::from_codes(&vec![1; tokens], &vec![1.0; tokens], 1);
        let (mut gradients, mut inputs) = (Gradients::default(), Inputs::default());
        gradients.fill(&dy, x.scales(), out);
        inputs.fill(&x);
        let mut found = vec![0.0; out];
        multiply(&gradients, &inputs, &mut found);
        assert_eq!(found[0], 1e6);
        assert!((found[1] / (1e-6 * tokens as f32) - 1.0).abs() < 1e-5);
        gradients.fill(&dy[BLOCK * out..], &x.scales()[BLOCK..], out);
        inputs.fill(&Activations::from_codes(&vec![1; BLOCK], &vec![1.0; BLOCK], 1));
        multiply(&gradients, &inputs, &mut found);
        assert!((found[0] / (1e-6 * BLOCK as f32) - 1.0).abs() < 1e-5);
    }

    #[test]
    fn a_sum_over_no_tokens_is_nothing() {
        let (out, cols) = (25, 40);
        let (mut gradients, mut inputs) = (Gradients::default(), Inputs::default());
        gradients.fill(&[], &[], out);
        inputs.fill(&Activations::from_codes(&[], &[], cols));
        let mut found = vec![f32::NAN; out * cols];
        multiply(&gradients, &inputs, &mut found);
        assert!(found.iter().all(|gradient| *gradient == 0.0));
    }

    #[test]
    fn nothing_stays_nothing_and_what_is_no_number_stays_none() {
        let x = Activations::from_codes(&[3, -4, 5], &[1.0; 3], 1);
        let (mut gradients, mut inputs) = (Gradients::default(), Inputs::default());
        inputs.fill(&x);
        let mut found = [f32::NAN];
        for dy in [[0.0; 3], [1e-40; 3]] {
            gradients.fill(&dy, x.scales(), 1);
            multiply(&gradients, &inputs, &mut found);
            assert!(found[0].abs() < 1e-38, "{found:?}");
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            gradients.fill(&[1.0, bad, 1.0], x.scales(), 1);
            multiply(&gradients, &inputs, &mut found);
            assert!(!found[0].is_finite(), "{bad}: {found:?}");
        }
    }
}
