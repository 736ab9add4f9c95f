//! int8 activations in the layout that the kernels multiply.
//!
//! The codes of a token lie in order, padded with 0 to a multiple of 256 columns; beside them its
//! scale, and the sum of its codes, which turns products of weight codes into products of trits
//! (see `packed`). The rounding is that of `trine_ternary::quantize_activations`, which is called.

use rayon::prelude::*;
use trine_ternary::quantize_activations;

use crate::aligned::AlignedBuf;
use crate::arch::{Kernel, Simd, dispatch};
use crate::isa::{Isa, isa};
use crate::packed::BLOCK;

/// The codes that meet one block of weights.
pub(crate) type CodeBlock = [i8; BLOCK];

/// From this many elements on, tokens are quantized in parallel.
const PARALLEL_ELEMENTS: usize = 1 << 16;

/// Quantized activations of some tokens.
#[derive(Clone, Debug)]
pub struct Activations {
    tokens: usize,
    cols: usize,
    /// `(tokens, ceil(cols / 256) * 256)` int8.
    codes: AlignedBuf<i8>,
    /// Sum of the codes of each token, `(tokens,)`; wraps as the products do.
    sums: Vec<i32>,
    /// A code stands for `code / scale`, `(tokens,)`.
    scales: Vec<f32>,
}

impl Activations {
    /// Quantizes `x`, `(tokens, cols)`.
    ///
    /// # Panics
    /// When `x` is not `(tokens, cols)`.
    pub fn quantize(x: &[f32], tokens: usize, cols: usize) -> Self {
        Self::quantize_on(isa(), x, tokens, cols)
    }

    pub(crate) fn quantize_on(isa: Isa, x: &[f32], tokens: usize, cols: usize) -> Self {
        assert_eq!(Some(x.len()), tokens.checked_mul(cols), "activations are not (tokens, cols)");
        let mut activations = Self::zeros(tokens, cols);
        if x.is_empty() {
            // Tokens without columns: scales as the definition gives them for an empty row.
            activations.scales.fill(quantize_activations(&[], &mut []));
            return activations;
        }
        let padded = padded(cols);
        let quantize = |(((x, codes), sum), scale): (((_, &mut [i8]), &mut i32), &mut f32)| {
            let codes = &mut codes[..cols];
            (*sum, *scale) = dispatch(isa, Quantize { x, codes });
        };
        let Self { codes, sums, scales, .. } = &mut activations;
        if tokens > 1 && x.len() >= PARALLEL_ELEMENTS {
            x.par_chunks_exact(cols)
                .zip(codes.par_chunks_exact_mut(padded))
                .zip(sums)
                .zip(scales)
                .for_each(quantize);
        } else {
            x.chunks_exact(cols)
                .zip(codes.chunks_exact_mut(padded))
                .zip(sums)
                .zip(scales)
                .for_each(quantize);
        }
        activations
    }

    /// Takes codes, `(tokens, cols)`, and scales, `(tokens,)`, as they are.
    ///
    /// # Panics
    /// When `codes` is not `(tokens, cols)`, where `tokens` is the number of scales.
    pub fn from_codes(codes: &[i8], scales: &[f32], cols: usize) -> Self {
        let tokens = scales.len();
        assert_eq!(Some(codes.len()), tokens.checked_mul(cols), "codes are not (tokens, cols)");
        let mut activations = Self::zeros(tokens, cols);
        activations.scales.copy_from_slice(scales);
        for t in 0..tokens {
            let codes = &codes[t * cols..][..cols];
            activations.codes[t * padded(cols)..][..cols].copy_from_slice(codes);
            activations.sums[t] = sum(codes);
        }
        activations
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Number of columns: input features, without the padding.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The codes of token `t`, `(cols,)`.
    ///
    /// # Panics
    /// When there is no token `t`.
    pub fn codes(&self, t: usize) -> &[i8] {
        assert!(t < self.tokens, "token {t} of {}", self.tokens);
        &self.codes[t * padded(self.cols)..][..self.cols]
    }

    /// The scale of token `t`: its codes stand for `code / scale`.
    ///
    /// # Panics
    /// When there is no token `t`.
    #[inline(always)]
    pub fn scale(&self, t: usize) -> f32 {
        self.scales[t]
    }

    /// The sum of the codes of token `t`.
    #[inline(always)]
    pub(crate) fn sum(&self, t: usize) -> i32 {
        self.sums[t]
    }

    /// The padded codes of token `t`, `(ceil(cols / 256),)` blocks.
    #[inline(always)]
    pub(crate) fn blocks(&self, t: usize) -> &[CodeBlock] {
        let blocks = self.cols.div_ceil(BLOCK);
        &self.codes.as_chunks().0[t * blocks..][..blocks]
    }

    fn zeros(tokens: usize, cols: usize) -> Self {
        let codes = AlignedBuf::new(tokens * padded(cols));
        Self { tokens, cols, codes, sums: vec![0; tokens], scales: vec![0.0; tokens] }
    }
}

fn padded(cols: usize) -> usize {
    cols.div_ceil(BLOCK) * BLOCK
}

/// The definition's rounding of one token. It is dispatched like a kernel, so that it can compile to
/// the instructions of the CPU wherever the compiler inlines it; the result is the same.
struct Quantize<'a> {
    /// `(cols,)`
    x: &'a [f32],
    /// `(cols,)`
    codes: &'a mut [i8],
}

impl Kernel for Quantize<'_> {
    /// Sum of the codes, and scale.
    type Output = (i32, f32);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (i32, f32) {
        let scale = quantize_activations(self.x, self.codes);
        (sum(self.codes), scale)
    }
}

#[inline(always)]
fn sum(codes: &[i8]) -> i32 {
    codes.iter().fold(0, |sum: i32, &code| sum.wrapping_add(i32::from(code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(tokens: usize, cols: usize) -> Vec<f32> {
        (0..tokens * cols).map(|i| ((i * i) % 251) as f32 / 17.0 - 7.0).collect()
    }

    #[test]
    fn codes_scales_and_sums_are_the_definitions() {
        // The last shape is over the threshold of parallel quantization.
        for (tokens, cols) in [(1, 1), (3, 255), (2, 256), (4, 257), (9, 2561), (3, 30_000)] {
            let x = floats(tokens, cols);
            let activations = Activations::quantize(&x, tokens, cols);
            for t in 0..tokens {
                let mut codes = vec![0; cols];
                let scale = quantize_activations(&x[t * cols..][..cols], &mut codes);
                assert_eq!(activations.codes(t), codes);
                assert_eq!(activations.scale(t), scale);
                assert_eq!(activations.sum(t), codes.iter().map(|&c| i32::from(c)).sum::<i32>());
                let padding = &activations.blocks(t).as_flattened()[cols..];
                assert!(padding.iter().all(|&code| code == 0));
            }
        }
    }

    #[test]
    fn empty_shapes_are_allowed() {
        for (tokens, cols) in [(0, 0), (3, 0), (0, 5)] {
            let activations = Activations::quantize(&[], tokens, cols);
            assert_eq!((activations.tokens(), activations.cols()), (tokens, cols));
        }
    }
}
