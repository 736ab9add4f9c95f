//! What all matrix products share: tiles, cache blocks and threads.
//!
//! A product is `(rows, cols)` weights times `(tokens, cols)` inputs, to `(tokens, rows)` outputs;
//! every output is a dot product along the columns, in full, so how the outputs are divided never
//! changes their bits. They are divided three times:
//!
//! - into chunks of rows, of which the weights fit into the second-level cache while all tokens
//!   pass by; a chunk is also the unit of work of a thread;
//! - within a chunk into bands of four tokens, which fit into the first-level cache while the rows
//!   of the chunk pass by;
//! - within a band into tiles of four rows, whose sums stay in registers.
//!
//! Weights of 16 bits are widened for every band, or with many tokens once, into a buffer that takes
//! their place in the second-level cache. What is left over at the edges is done by narrower tiles. With one token, a chunk is a single
//! pass over its weights: the product of decoding.

use std::cell::Cell;
use std::ops::Range;

use crate::aligned::AlignedBuf;
use crate::arch::{Kernel, Simd, dispatch};
use crate::isa::Isa;
use crate::parallel;

/// Rows in a tile.
const TILE_ROWS: usize = 4;

/// Tokens in a tile.
const TILE_TOKENS: usize = 4;

/// Bytes of weights in a chunk, at most.
const CHUNK_BYTES: usize = 64 << 10;

/// Tokens from which on the weights of a chunk are widened once for all of them.
const UNPACK_TOKENS: usize = 16;

/// Chunks for each thread, at least, so that a thread that is held up can leave some to others.
const CHUNKS_PER_THREAD: usize = 4;

/// Multiplications from which on threads are worth their start.
const PARALLEL_WORK: usize = if cfg!(miri) { 1 << 6 } else { 1 << 20 };

/// A matrix product that can compute any tile of its outputs.
pub(crate) trait Product: Sync {
    /// An output.
    type Out: Copy + Send;

    /// Some rows of it, of which the weights need not be widened any more.
    type Unpacked<'u>: Product<Out = Self::Out> + Copy
    where
        Self: 'u;

    /// Rows, columns and tokens.
    fn shape(&self) -> Shape;

    /// Bytes that the weights of one row take.
    fn row_bytes(&self) -> usize;

    /// How long a buffer [`Self::unpack`] takes for so many rows; 0 where there is nothing to widen.
    fn unpacked_len(&self, rows: usize) -> usize;

    /// Widens some rows into `buffer`. `#[inline(always)]`, as part of a [`Kernel`].
    fn unpack<'u, S: Simd>(
        &'u self,
        simd: S,
        rows: Range<usize>,
        buffer: &'u mut [f32],
    ) -> Self::Unpacked<'u>;

    /// The outputs of rows `row..row + R` for the tokens `token..token + T`, which all exist.
    /// `#[inline(always)]`, as part of a [`Kernel`].
    fn tile<S: Simd, const R: usize, const T: usize>(
        &self,
        simd: S,
        row: usize,
        token: usize,
    ) -> [[Self::Out; R]; T];
}

/// The extents of a product.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) tokens: usize,
}

/// Computes all outputs, `(tokens, rows)`.
///
/// # Panics
/// When `out` is not `(tokens, rows)`, or the CPU does not have `isa`.
pub(crate) fn compute<P: Product>(isa: Isa, product: &P, out: &mut [P::Out]) {
    let Shape { rows, cols, tokens } = product.shape();
    assert_eq!(Some(out.len()), tokens.checked_mul(rows), "output is not (tokens, rows)");
    if out.is_empty() {
        return;
    }
    let work = out.len().saturating_mul(cols);
    let threads = if work < PARALLEL_WORK { 1 } else { parallel::threads() };
    let step = (CHUNK_BYTES / product.row_bytes().max(1))
        .min(rows.div_ceil(threads * CHUNKS_PER_THREAD))
        .next_multiple_of(TILE_ROWS);
    let run = |i: usize, out: &mut [&mut [P::Out]]| {
        dispatch(isa, Chunk { product, first_row: i * step, out });
    };
    match (tokens, threads) {
        // Decoding takes these ways, which do not allocate.
        (1, 1) => out.chunks_mut(step).enumerate().for_each(|(i, chunk)| run(i, &mut [chunk])),
        (1, _) => parallel::for_each_chunk(out, step, |i, chunk| run(i, &mut [chunk])),
        (_, 1) => {
            split_rows(out, rows, step).iter_mut().enumerate().for_each(|(i, chunk)| run(i, chunk))
        }
        _ => parallel::for_each(&mut split_rows(out, rows, step), |i, chunk| run(i, chunk)),
    }
}

/// Splits `out`, `(tokens, rows)`, into chunks of `step` rows: for each, one slice for each token.
fn split_rows<T>(out: &mut [T], rows: usize, step: usize) -> Vec<Vec<&mut [T]>> {
    let tokens = out.len() / rows;
    let mut chunks: Vec<_> = (0..rows.div_ceil(step)).map(|_| Vec::with_capacity(tokens)).collect();
    for token in out.chunks_exact_mut(rows) {
        for (chunk, rows) in chunks.iter_mut().zip(token.chunks_mut(step)) {
            chunk.push(rows);
        }
    }
    chunks
}

/// Some rows of a product, for all tokens.
struct Chunk<'a, 'o, P: Product> {
    product: &'a P,
    first_row: usize,
    /// `(tokens,)` slices of `(rows of the chunk,)` outputs.
    out: &'a mut [&'o mut [P::Out]],
}

impl<P: Product> Kernel for Chunk<'_, '_, P> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let rows = self.out.first().map_or(0, |out| out.len());
        let len = self.product.unpacked_len(rows);
        if self.out.len() < UNPACK_TOKENS || len == 0 {
            return self.bands(simd);
        }
        let mut buffer = UNPACKED.take();
        if buffer.len() < len {
            buffer = AlignedBuf::new(len);
        }
        let rows = self.first_row..self.first_row + rows;
        let product = self.product.unpack(simd, rows, &mut buffer[..len]);
        Chunk { product: &product, first_row: 0, out: self.out }.bands(simd);
        UNPACKED.set(buffer);
    }
}

thread_local! {
    /// The weights of a chunk.
    static UNPACKED: Cell<AlignedBuf<f32>> = Cell::default();
}

impl<P: Product> Chunk<'_, '_, P> {
    #[inline(always)]
    fn bands<S: Simd>(&mut self, simd: S) {
        let tokens = self.out.len();
        let bands = tokens - tokens % TILE_TOKENS;
        for token in (0..bands).step_by(TILE_TOKENS) {
            self.band::<S, TILE_TOKENS>(simd, token);
        }
        for token in bands..tokens {
            self.band::<S, 1>(simd, token);
        }
    }

    /// All rows for the tokens `token..token + T`.
    #[inline(always)]
    fn band<S: Simd, const T: usize>(&mut self, simd: S, token: usize) {
        let rows = self.out[token].len();
        let tiles = rows - rows % TILE_ROWS;
        for row in (0..tiles).step_by(TILE_ROWS) {
            self.tile::<S, TILE_ROWS, T>(simd, row, token);
        }
        for row in tiles..rows {
            self.tile::<S, 1, T>(simd, row, token);
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize, const T: usize>(&mut self, simd: S, row: usize, token: usize) {
        let tile = self.product.tile::<S, R, T>(simd, self.first_row + row, token);
        for t in 0..T {
            self.out[token + t][row..row + R].copy_from_slice(&tile[t]);
        }
    }
}
