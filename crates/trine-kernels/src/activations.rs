//! int8 activations in the layout that the kernels multiply.
//!
//! Tokens come in tiles of at most eight, whose sums fit into registers together: as many tiles of 8
//! as there are, then one of what is left. A tile holds its codes by fours, so that a product reads one
//! address after another: columns `4 k..4 k + 4` of its first token, of its second and so on, then the
//! next four columns. A single token thus lies in order.
//! Columns are padded with 0. Beside the codes there are each token's scale, and the sum of its
//! codes, which turns products of weight codes into products of trits (see `packed`).
//! The rounding is that of `trine_ternary::quantize_activations`, which is called.

use trine_ternary::quantize_activations;

use crate::aligned::AlignedBuf;
use crate::arch::{Kernel, LANES, Simd, dispatch};
use crate::isa::{Isa, isa};
use crate::parallel;

/// Most tokens in a tile.
pub(crate) const TILE: usize = 8;

/// Columns are padded to a multiple of this: to whole lines of every packing.
const COLS: usize = 80;

/// From this many elements on, tokens are quantized in parallel.
const PARALLEL_ELEMENTS: usize = if cfg!(miri) { 1 << 6 } else { 1 << 15 };

/// Quantized activations of some tokens.
#[derive(Clone, Debug)]
pub struct Activations {
    tokens: usize,
    cols: usize,
    /// `(tokens, cols)` int8 in tiles, columns padded.
    codes: AlignedBuf<i8>,
    /// Sum of the codes of each token, `(tokens,)`; wraps as the products do.
    sums: Vec<i32>,
    /// A code stands for `code / scale`, `(tokens,)`.
    scales: Vec<f32>,
}

/// The tokens `first..first + width`, which are multiplied together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    pub(crate) first: usize,
    /// At most [`TILE`].
    pub(crate) width: usize,
}

/// The tiles of `tokens` tokens.
pub(crate) fn tiles(tokens: usize) -> impl Iterator<Item = Tile> {
    let tile = move |first| Tile { first, width: TILE.min(tokens - first) };
    (0..tokens).step_by(TILE).map(tile)
}

/// Tiles whose widths are powers of two, at most `width`, for products that know no others.
pub(crate) fn tiles_up_to(width: usize, tokens: usize) -> impl Iterator<Item = Tile> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let width = width.min(1 << (tokens - first).checked_ilog2()?);
        let tile = Tile { first, width };
        first += width;
        Some(tile)
    })
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
        Self::from_rows_on(isa, tokens, cols, |_, t, row| {
            row.copy_from_slice(&x[t * cols..][..cols]);
        })
    }

    /// Quantizes `tokens` rows `(cols,)` that `fill` writes, each called for once, in any order and
    /// on any thread of the pool. `fill` gets a token and its row.
    pub fn from_rows(tokens: usize, cols: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        Self::from_rows_on(isa(), tokens, cols, |_, t, row| fill(t, row))
    }

    /// As [`Self::from_rows`], in the memory of what was here.
    pub fn refill(&mut self, tokens: usize, cols: usize, fill: impl Fn(usize, &mut [f32]) + Sync) {
        self.refill_on(isa(), tokens, cols, |_, t, row| fill(t, row));
    }

    /// Quantizes `x` `(tokens, cols)` times `factor`, in the memory of what was here.
    ///
    /// # Panics
    /// When `x` is not `(tokens, cols)`.
    pub fn refill_scaled(&mut self, x: &[f32], tokens: usize, cols: usize, factor: f32) {
        assert_eq!(Some(x.len()), tokens.checked_mul(cols), "activations are not (tokens, cols)");
        self.refill_on(isa(), tokens, cols, |isa, t, row| {
            dispatch(isa, Scale { x: &x[t * cols..][..cols], factor, to: row });
        });
    }

    pub(crate) fn from_rows_on(
        isa: Isa,
        tokens: usize,
        cols: usize,
        fill: impl Fn(Isa, usize, &mut [f32]) + Sync,
    ) -> Self {
        let mut activations = Self::zeros(0, 0);
        activations.refill_on(isa, tokens, cols, fill);
        activations
    }

    fn refill_on(
        &mut self,
        isa: Isa,
        tokens: usize,
        cols: usize,
        fill: impl Fn(Isa, usize, &mut [f32]) + Sync,
    ) {
        self.resize(tokens, cols);
        let padded = padded(cols);
        let tile = |tile: Tile, codes: &mut [i8], sums: &mut [i32], scales: &mut [f32]| {
            let mut row = vec![0.0; cols];
            let mut rows = vec![0; if tile.width == 1 { 0 } else { tile.width * padded }];
            for t in 0..tile.width {
                fill(isa, tile.first + t, &mut row);
                let to = if tile.width == 1 { &mut *codes } else { &mut rows[t * padded..] };
                to[cols..padded].fill(0);
                (sums[t], scales[t]) = dispatch(isa, Quantize { x: &row, codes: &mut to[..cols] });
            }
            if tile.width > 1 {
                dispatch(isa, Interleave { rows: &rows, width: tile.width, tile: codes });
            }
        };
        let Self { codes, sums, scales, .. } = self;
        let mut work = Vec::with_capacity(tokens.div_ceil(TILE));
        let (mut codes, mut sums, mut scales) = (&mut codes[..], &mut sums[..], &mut scales[..]);
        for t in tiles(tokens) {
            let parts = (
                codes.split_off_mut(..t.width * padded),
                sums.split_off_mut(..t.width),
                scales.split_off_mut(..t.width),
            );
            if let (Some(codes), Some(sums), Some(scales)) = parts {
                work.push((t, codes, sums, scales));
            }
        }
        if tokens.saturating_mul(cols) >= PARALLEL_ELEMENTS {
            parallel::for_each(&mut work, |_, (t, codes, sums, scales)| {
                tile(*t, codes, sums, scales);
            });
        } else {
            work.into_iter().for_each(|(t, codes, sums, scales)| tile(t, codes, sums, scales));
        }
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
        let padded = padded(cols);
        let mut rows = vec![0; TILE * padded];
        for Tile { first, width } in tiles(tokens) {
            for t in 0..width {
                let row = &mut rows[t * padded..][..padded];
                row[..cols].copy_from_slice(&codes[(first + t) * cols..][..cols]);
                activations.sums[first + t] = sum(row);
            }
            let (rows, len) = (&rows, width * padded);
            let tile = &mut activations.codes[first * padded..][..len];
            dispatch(isa(), Interleave { rows: &rows[..len], width, tile });
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
    pub fn codes(&self, t: usize) -> Vec<i8> {
        assert!(t < self.tokens, "token {t} of {}", self.tokens);
        let Tile { first, width } = self.tile_of(t);
        let tile = &self.codes[first * padded(self.cols)..];
        (0..self.cols).map(|c| tile[(c / 4 * width + t - first) * 4 + c % 4]).collect()
    }

    /// The scale of token `t`: its codes stand for `code / scale`.
    ///
    /// # Panics
    /// When there is no token `t`.
    #[inline(always)]
    pub fn scale(&self, t: usize) -> f32 {
        self.scales[t]
    }

    /// The scale of each token, `(tokens,)`.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// The sum of the codes of each token, `(tokens,)`.
    pub(crate) fn sums(&self) -> &[i32] {
        &self.sums
    }

    /// The codes of a tile of `T` tokens that begins with token `first`: by four columns, by token.
    #[inline(always)]
    pub(crate) fn tile<const T: usize>(&self, first: usize) -> &[[[i8; 4]; T]] {
        let padded = padded(self.cols);
        self.codes[first * padded..][..T * padded].as_chunks().0.as_chunks().0
    }

    /// Writes the codes of token `t` from column `first` on, a multiple of four.
    #[inline(always)]
    pub(crate) fn floats_from(&self, t: usize, first: usize, out: &mut [f32]) {
        let Tile { first: token, width } = self.tile_of(t);
        let padded = padded(self.cols);
        let words = self.codes[token * padded..][..width * padded].as_chunks::<4>().0;
        let words = words[first / 4 * width + t - token..].iter().step_by(width);
        let (whole, rest) = out.as_chunks_mut::<4>();
        let mut words = words.map(|word| word.map(f32::from));
        for (to, word) in whole.iter_mut().zip(&mut words) {
            *to = word;
        }
        if let Some(word) = words.next() {
            rest.copy_from_slice(&word[..rest.len()]);
        }
    }

    /// Codes of the tokens `first..first + 4`, four columns after four; `first` is a multiple of four. None
    /// where these tokens do not lie in a tile of four or eight.
    #[inline(always)]
    pub(crate) fn fours(&self, first: usize) -> Option<impl Iterator<Item = &[[i8; 4]; 4]>> {
        let Tile { first: token, width } = self.tile_of(first);
        let padded = padded(self.cols);
        let fours = self.codes[token * padded..][..width * padded].as_chunks::<4>().0.as_chunks().0;
        width.is_multiple_of(4).then(|| fours[(first - token) / 4..].iter().step_by(width / 4))
    }

    /// Writes what the codes stand for, `code * (1 / scale)`, `(tokens, cols)`.
    ///
    /// # Panics
    /// When `out` is not `(tokens, cols)`.
    pub fn dequantize(&self, out: &mut [f32]) {
        assert_eq!(out.len(), self.tokens * self.cols, "output is not (tokens, cols)");
        parallel::for_each_chunk(out, self.cols.max(1), |t, row| {
            let inverse = 1.0 / self.scales[t];
            self.floats_from(t, 0, row);
            row.iter_mut().for_each(|v| *v *= inverse);
        });
    }

    /// The tile that holds token `t`.
    #[inline(always)]
    fn tile_of(&self, t: usize) -> Tile {
        let first = t - t % TILE;
        Tile { first, width: TILE.min(self.tokens - first) }
    }

    fn zeros(tokens: usize, cols: usize) -> Self {
        let codes = AlignedBuf::new(tokens * padded(cols));
        Self { tokens, cols, codes, sums: vec![0; tokens], scales: vec![0.0; tokens] }
    }

    /// Room for other tokens, whose codes, sums and scales are of any value.
    fn resize(&mut self, tokens: usize, cols: usize) {
        (self.tokens, self.cols) = (tokens, cols);
        self.codes.resize(tokens * padded(cols));
        self.sums.resize(tokens, 0);
        self.scales.resize(tokens, 0.0);
    }
}

fn padded(cols: usize) -> usize {
    cols.div_ceil(COLS) * COLS
}

/// Brings the codes of a tile's tokens into the order of a tile. It is dispatched like a kernel, for
/// the instructions of the CPU.
struct Interleave<'a> {
    /// `(width, padded)`
    rows: &'a [i8],
    width: usize,
    /// `(padded / 4, width, 4)`
    tile: &'a mut [i8],
}

impl Kernel for Interleave<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.width {
            8 => self.of_eight(simd),
            7 => self.of::<7>(),
            6 => self.of::<6>(),
            5 => self.of::<5>(),
            4 => self.of::<4>(),
            3 => self.of::<3>(),
            2 => self.of::<2>(),
            _ => self.of::<1>(),
        }
    }
}

impl Interleave<'_> {
    #[inline(always)]
    fn of_eight<S: Simd>(self, simd: S) {
        let to = self.tile.as_chunks_mut::<4>().0.as_chunks_mut::<8>().0;
        let (words, len) = (self.rows.as_chunks::<4>().0, to.len());
        // Rows have more words than are joined at a time, if they have any; the last may be joined twice.
        let Some(last) = len.checked_sub(LANES) else { return };
        for k in (0..last).step_by(LANES).chain([last]) {
            let mut rows = [&[[0; 4]; LANES]; 8];
            for (t, row) in rows.iter_mut().enumerate() {
                *row = words[t * len + k..].first_chunk().expect("a row of words");
            }
            simd.join_eight(rows, to[k..].first_chunk_mut().expect("a row of words"));
        }
    }

    #[inline(always)]
    fn of<const T: usize>(self) {
        let to = self.tile.as_chunks_mut::<4>().0.as_chunks_mut::<T>().0;
        let words = self.rows.as_chunks::<4>().0;
        let rows: [&[[i8; 4]]; T] = std::array::from_fn(|t| &words[t * to.len()..][..to.len()]);
        for k in 0..to.len() {
            for t in 0..T {
                to[k][t] = rows[t][k];
            }
        }
    }
}

/// `to = factor x`, dispatched as [`Interleave`].
struct Scale<'a> {
    x: &'a [f32],
    factor: f32,
    to: &'a mut [f32],
}

impl Kernel for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        self.to.iter_mut().zip(self.x).for_each(|(to, x)| *to = x * self.factor);
    }
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
        for (tokens, cols) in [(1, 1), (3, 255), (2, 256), (15, 257), (9, 2561), (3, 30_000)] {
            if cfg!(miri) && tokens * cols > 4000 {
                continue;
            }
            let x = floats(tokens, cols);
            let activations = Activations::quantize(&x, tokens, cols);
            let taken: Vec<i8> = (0..tokens).flat_map(|t| activations.codes(t)).collect();
            let taken = Activations::from_codes(&taken, &activations.scales, cols);
            for t in 0..tokens {
                let mut codes = vec![0; cols];
                let scale = quantize_activations(&x[t * cols..][..cols], &mut codes);
                assert_eq!(activations.codes(t), codes);
                assert_eq!(activations.scale(t), scale);
                assert_eq!(activations.sums()[t], codes.iter().map(|&c| i32::from(c)).sum::<i32>());
            }
            assert_eq!((&*taken.codes, &taken.sums), (&*activations.codes, &activations.sums));
            let mut scaled = Activations::from_codes(&[1; 7], &[1.0], 7);
            scaled.refill_scaled(&x, tokens, cols, 8.0);
            assert_eq!((&*scaled.codes, &scaled.sums), (&*activations.codes, &activations.sums));
            assert!(scaled.scales.iter().zip(&activations.scales).all(|(a, b)| a * 8.0 == *b));
        }
    }

    #[test]
    fn a_tile_holds_four_columns_of_each_token_in_turn() {
        let codes: Vec<i8> = (0..13 * 6).map(|i| i as i8).collect();
        let activations = Activations::from_codes(&codes, &[1.0; 13], 6);
        let code = |t: usize, c: usize| if c < 6 { codes[t * 6 + c] } else { 0 };
        fn check<const T: usize>(x: &Activations, first: usize, code: impl Fn(usize, usize) -> i8) {
            for (k, words) in x.tile::<T>(first).iter().enumerate() {
                for (t, word) in words.iter().enumerate() {
                    assert_eq!(*word, std::array::from_fn(|i| code(first + t, 4 * k + i)));
                }
            }
        }
        let found: Vec<_> = tiles(13).map(|tile| (tile.first, tile.width)).collect();
        assert_eq!(found, [(0, 8), (8, 5)]);
        check::<8>(&activations, 0, code);
        check::<5>(&activations, 8, code);
    }

    #[test]
    fn empty_shapes_are_allowed() {
        for (tokens, cols) in [(0, 0), (3, 0), (0, 5)] {
            let activations = Activations::quantize(&[], tokens, cols);
            assert_eq!((activations.tokens(), activations.cols()), (tokens, cols));
        }
    }
}
