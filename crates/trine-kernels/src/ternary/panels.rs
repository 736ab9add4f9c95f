//! The integer sums of some panels, for one token or for tiles of them, and how lines hold codes.

use super::Ahead;
use crate::activations::{Activations, Tile, tiles};
use crate::arch::{Kernel, Simd};
use crate::packed::{Line, PANEL, PackedMatrix, Packing};

/// The sums of codes of some panels for a single token.
pub(super) struct OneToken<'a> {
    pub(super) weights: &'a PackedMatrix,
    /// The first panel.
    pub(super) first: usize,
    pub(super) x: &'a Activations,
    /// One of each panel.
    pub(super) out: &'a mut [[i32; PANEL]],
}

impl Kernel for OneToken<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.weights.packing() {
            Packing::Bits2 => self.with::<S, Bits2, 1, 4>(simd),
            Packing::Trits5 => self.with::<S, Trits5, 1, 5>(simd),
        }
    }
}

/// Steps of which the sums of shifted codes fit 32 bits. Each of `D` sums has codes that are shifted alike,
/// and is shifted back at the end; a step adds at most `4 * 2 * 128` to it, times 64.
const FIELD_STEPS: usize = (1 << 31) / (4 * 2 * 128 * 64) - 1;

impl OneToken<'_> {
    #[inline(always)]
    fn with<S: Simd, U: Unpack<L, D>, const L: usize, const D: usize>(self, simd: S) {
        if self.weights.panel(self.first).len() / L <= FIELD_STEPS {
            self.sums(simd, U::fields::<S>, U::shifts::<S>());
        } else {
            self.sums(simd, U::unpack::<S>, [0; D]);
        }
    }

    #[inline(always)]
    fn sums<S: Simd, const L: usize, const D: usize>(
        self,
        simd: S,
        codes: impl Fn(S, &[Line; L]) -> [S::Codes; D],
        shifts: [u32; D],
    ) {
        let mut panel = self.first;
        let (pairs, rest) = match S::READS_NEAR {
            true => self.out.as_chunks_mut::<2>(),
            false => (&mut [][..], self.out),
        };
        for out in pairs {
            *out = panel_sums(simd, self.weights, panel, self.x, &codes, shifts);
            panel += 2;
        }
        for out in rest {
            [*out] = panel_sums(simd, self.weights, panel, self.x, &codes, shifts);
            panel += 1;
        }
    }
}

/// How far ahead lines are asked for of `R` panels that follow each other in memory and are read together,
/// in bytes. What lies behind the end of a panel is the next of them, which has been read by then; so in its
/// last steps the panels after all of them are asked for.
struct Stream<const R: usize> {
    within: usize,
    beyond: usize,
    /// The first step that asks for what is beyond.
    turn: usize,
}

impl<const R: usize> Stream<R> {
    /// For panels of so many steps, each of so many bytes.
    #[inline(always)]
    fn new<S: Simd>(steps: usize, step_bytes: usize) -> Self {
        let within = S::stream_ahead(R);
        Self {
            within,
            beyond: within + (R - 1) * steps * step_bytes,
            turn: steps.saturating_sub(within / step_bytes),
        }
    }

    #[inline(always)]
    fn at(&self, step: usize) -> usize {
        if step < self.turn { self.within } else { self.beyond }
    }
}

/// The sums of `R` panels, of which the first is `first`, for the only token.
#[inline(always)]
fn panel_sums<S: Simd, const R: usize, const L: usize, const D: usize>(
    simd: S,
    weights: &PackedMatrix,
    first: usize,
    x: &Activations,
    codes: &impl Fn(S, &[Line; L]) -> [S::Codes; D],
    shifts: [u32; D],
) -> [[i32; PANEL]; R] {
    let steps = weights.panel(first).len() / L;
    let x = &x.tile::<1>(0).as_chunks::<D>().0[..steps];
    let panels: [&[[Line; L]]; R] =
        std::array::from_fn(|r| &weights.panel(first + r).as_chunks::<L>().0[..steps]);
    let ahead = Stream::<R>::new::<S>(steps, size_of::<[Line; L]>());
    let mut sums = [[simd.zero(); R]; D];
    for step in 0..steps {
        let mut group = [[simd.no_codes(); D]; R];
        let ahead = ahead.at(step);
        for r in 0..R {
            let lines = &panels[r][step];
            simd.prefetch_stream(&lines[0], ahead);
            group[r] = codes(simd, lines);
        }
        simd.multiply_rows(&mut sums, &group, std::array::from_fn(|d| &x[step][d][0]));
    }
    add_up(simd, &sums, shifts)
}

/// The `K` sums of each of `R` panels, each shifted to the right, added up.
#[inline(always)]
fn add_up<S: Simd, const R: usize, const K: usize>(
    simd: S,
    sums: &[[S::Sums; R]; K],
    shifts: [u32; K],
) -> [[i32; PANEL]; R] {
    let mut out = [[0i32; PANEL]; R];
    for (sums, shift) in sums.iter().zip(shifts) {
        for r in 0..R {
            let sums = simd.to_i32(sums[r]);
            for i in 0..PANEL {
                out[r][i] = out[r][i].wrapping_add(sums[i] >> shift);
            }
        }
    }
    out
}

/// How far ahead of its use a line of unpacked codes is asked for, in bytes.
const AHEAD_IN_CACHE: usize = 2048;

/// [`Simd::HOLDS_SUMS`].
pub(super) struct HoldsSums;

impl Kernel for HoldsSums {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> bool {
        S::HOLDS_SUMS
    }
}

/// The sums of codes of `R` panels for some tiles of tokens.
pub(super) struct Tiles<'a, const R: usize> {
    pub(super) form: Form,
    pub(super) panels: [&'a [Line]; R],
    pub(super) x: &'a Activations,
    /// The first token, that of a tile.
    pub(super) first: usize,
    /// `(tokens,)` of each panel, of whole tiles.
    pub(super) out: [&'a mut [[i32; PANEL]]; R],
    pub(super) ahead: Ahead<'a, R>,
}

impl<const R: usize> Kernel for Tiles<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.form {
            Form::Bits2 => self.with::<S, Bits2, 1, 4>(simd),
            Form::Trits5 => self.with::<S, Trits5, 1, 5>(simd),
            Form::Plain if S::HOLDS_SUMS => self.with::<S, Plain, 1, 1>(simd),
            Form::Plain => self.with::<S, Plain, PLAIN, PLAIN>(simd),
        }
    }
}

impl<const R: usize> Tiles<'_, R> {
    #[inline(always)]
    fn with<S: Simd, U: Unpack<L, D>, const L: usize, const D: usize>(mut self, simd: S) {
        for Tile { first: at, width } in tiles(self.out[0].len()) {
            let tile = Tile { first: self.first + at, width };
            self.ahead.ask(simd, &tile);
            // With as many sums as there are registers for.
            match tile.width {
                8 => self.tile::<S, U, L, D, 8, 1, false>(simd, tile.first, at),
                7 => self.tile::<S, U, L, D, 7, 1, false>(simd, tile.first, at),
                6 => self.tile::<S, U, L, D, 6, 1, false>(simd, tile.first, at),
                5 => self.tile::<S, U, L, D, 5, 1, false>(simd, tile.first, at),
                4 => self.tile::<S, U, L, D, 4, 2, false>(simd, tile.first, at),
                3 => self.tile::<S, U, L, D, 3, 2, false>(simd, tile.first, at),
                2 if self.panels[0].len() / L <= FIELD_STEPS => {
                    self.tile::<S, U, L, D, 2, D, true>(simd, tile.first, at);
                }
                2 => self.tile::<S, U, L, D, 2, 2, false>(simd, tile.first, at),
                _ => self.tile::<S, U, L, D, 1, 4, false>(simd, tile.first, at),
            }
        }
    }

    /// The tile of `T` tokens that begins with `token`, to `out` from `at` on, with `K` sums for each token
    /// and panel; `D` of them if `FIELDS`, of codes that stay where they lie.
    #[inline(always)]
    fn tile<
        S: Simd,
        U: Unpack<L, D>,
        const L: usize,
        const D: usize,
        const T: usize,
        const K: usize,
        const FIELDS: bool,
    >(
        &mut self,
        simd: S,
        token: usize,
        at: usize,
    ) {
        let steps = self.panels[0].len() / L;
        let x = &self.x.tile::<T>(token).as_chunks::<D>().0[..steps];
        let panels: [&[[Line; L]]; R] =
            std::array::from_fn(|r| &self.panels[r].as_chunks::<L>().0[..steps]);
        let ahead = Stream::<R>::new::<S>(steps, size_of::<[Line; L]>());
        let mut sums = [[[simd.zero(); R]; K]; T];
        for step in 0..steps {
            let ahead = ahead.at(step);
            let mut codes = [[simd.no_codes(); D]; R];
            for r in 0..R {
                if U::FROM_MEMORY {
                    simd.prefetch_stream(&panels[r][step][0], ahead);
                } else if S::HOLDS_SUMS {
                    // Products are made faster than the second-level cache answers.
                    simd.prefetch(&panels[r][step], AHEAD_IN_CACHE);
                }
                let lines = &panels[r][step];
                codes[r] = if FIELDS { U::fields(simd, lines) } else { U::unpack(simd, lines) };
            }
            if !S::HOLDS_SUMS {
                for t in 0..T {
                    let x: [&[i8; 4]; D] = std::array::from_fn(|d| &x[step][d][t]);
                    simd.multiply_rows(&mut sums[t], &codes, x);
                }
                continue;
            }
            // A sum is not there for some cycles, in which those of the other tokens get their products.
            for d in 0..D {
                let mut group = [[simd.no_codes()]; R];
                for r in 0..R {
                    group[r] = [codes[r][d]];
                }
                for t in 0..T {
                    let sums = std::array::from_mut(&mut sums[t][d % K]);
                    simd.multiply_rows(sums, &group, [&x[step][d][t]]);
                }
            }
        }
        let mut shifts = [0; K];
        if FIELDS {
            shifts.copy_from_slice(&U::shifts::<S>());
        }
        for t in 0..T {
            let sums = add_up(simd, &sums[t], shifts);
            for r in 0..R {
                self.out[r][at + t] = sums[r];
            }
        }
    }
}

/// Writes the codes of a panel.
pub(super) struct UnpackPanel<'a> {
    pub(super) form: Form,
    pub(super) panel: &'a [Line],
    pub(super) to: &'a mut [Line],
}

impl Kernel for UnpackPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.form {
            Form::Bits2 => self.with::<S, Bits2, 1, 4>(simd),
            Form::Trits5 => self.with::<S, Trits5, 1, 5>(simd),
            Form::Plain => self.to.copy_from_slice(self.panel),
        }
    }
}

impl UnpackPanel<'_> {
    #[inline(always)]
    fn with<S: Simd, U: Unpack<L, D>, const L: usize, const D: usize>(self, simd: S) {
        let to = self.to.as_chunks_mut::<D>().0;
        for (from, to) in self.panel.as_chunks::<L>().0.iter().zip(to) {
            let codes = U::unpack(simd, from);
            for d in 0..D {
                simd.store_codes(codes[d], &mut to[d]);
            }
        }
    }
}

/// How lines hold codes.
#[derive(Clone, Copy)]
pub(super) enum Form {
    Bits2,
    Trits5,
    /// One code in a byte.
    Plain,
}

/// How `L` lines hold `D` vectors of codes.
trait Unpack<const L: usize, const D: usize> {
    /// Whether lines come from memory, which is slow, rather than from a cache.
    const FROM_MEMORY: bool = true;

    /// Codes of four columns, then of the next four, and so on.
    fn unpack<S: Simd>(simd: S, lines: &[Line; L]) -> [S::Codes; D];

    /// By how many bits those of [`Self::fields`] are shifted to the left.
    fn shifts<S: Simd>() -> [u32; D] {
        [0; D]
    }

    /// The same codes, but shifted.
    #[inline(always)]
    fn fields<S: Simd>(simd: S, lines: &[Line; L]) -> [S::Codes; D] {
        Self::unpack(simd, lines)
    }
}

/// [`Packing::Bits2`].
struct Bits2;

impl Unpack<1, 4> for Bits2 {
    #[inline(always)]
    fn unpack<S: Simd>(simd: S, lines: &[Line; 1]) -> [S::Codes; 4] {
        simd.unpack_bits(&lines[0])
    }

    fn shifts<S: Simd>() -> [u32; 4] {
        S::BIT_SHIFTS
    }

    #[inline(always)]
    fn fields<S: Simd>(simd: S, lines: &[Line; 1]) -> [S::Codes; 4] {
        simd.fields_of_bits(&lines[0])
    }
}

/// [`Packing::Trits5`].
struct Trits5;

impl Unpack<1, 5> for Trits5 {
    #[inline(always)]
    fn unpack<S: Simd>(simd: S, lines: &[Line; 1]) -> [S::Codes; 5] {
        simd.unpack_trits(&lines[0])
    }

    fn shifts<S: Simd>() -> [u32; 5] {
        S::TRIT_SHIFTS
    }

    #[inline(always)]
    fn fields<S: Simd>(simd: S, lines: &[Line; 1]) -> [S::Codes; 5] {
        simd.fields_of_trits(&lines[0])
    }
}

/// Lines that are codes already, some at a time.
struct Plain;

/// How many: as many as are added before sums are widened, where that is done.
pub(super) const PLAIN: usize = 4;

impl<const D: usize> Unpack<D, D> for Plain {
    const FROM_MEMORY: bool = false;

    #[inline(always)]
    fn unpack<S: Simd>(simd: S, lines: &[Line; D]) -> [S::Codes; D] {
        let mut codes = [simd.no_codes(); D];
        for d in 0..D {
            codes[d] = simd.load_codes(&lines[d]);
        }
        codes
    }
}
