//! The largest logits of a head without reading all of it: a sketch of 4.5 bits a weight (`sketch`)
//! says which rows can be among them, and only those are read.

use crate::arch::{Simd, dispatch};
use crate::dense::{DenseData, dense_matmul_on};
use crate::isa::{Isa, isa};
use crate::packed::PANEL;
use crate::parallel::{self, SharedMut};
use crate::product::Shape;

use super::inputs::Inputs;
use super::layout::BlockMatrix;
use super::product::{Panels, block_matmul_on};
use super::sketch::{Estimates, Sketch};

/// From so many of its rows on, a head is read whole: one after another they come sooner.
const SCATTERED: f64 = 0.25;

/// The rows of a head, in the type that its logits are computed from.
#[derive(Clone, Copy, Debug)]
pub enum HeadRows<'a> {
    /// As [`dense_matmul`](crate::dense_matmul) takes them, `(rows, cols)`.
    Dense(DenseData<'a>),
    /// As [`block_matmul`](crate::block_matmul) takes them.
    Blocks(&'a BlockMatrix),
}

/// Which logits of a row matter to who asks for them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Largest {
    /// So many of the largest, at least one; and what equals the least of them.
    pub count: usize,
    /// And what is less than the least of them by at most this much, which is not negative.
    pub within: f32,
}

impl Largest {
    /// The largest, and what equals it.
    pub const ONE: Self = Self { count: 1, within: 0.0 };

    /// What matters to either of two.
    pub fn and(self, other: Self) -> Self {
        Self { count: self.count.max(other.count), within: self.within.max(other.within) }
    }
}

/// A sketch of a head `(rows, cols)`.
#[derive(Clone, Debug)]
pub struct TwoStageHead {
    sketch: Sketch,
}

impl TwoStageHead {
    /// Makes the sketch of `head`. Runs on [`isa()`], in parallel over rows.
    ///
    /// # Panics
    /// When `head` is not `(rows, cols)` or `cols` not a multiple of 32.
    pub fn new(head: HeadRows<'_>, rows: usize, cols: usize) -> Self {
        head.check(rows, cols);
        Self { sketch: Sketch::new(isa(), head, rows, cols) }
    }

    /// Bytes of the sketch: what finding the largest logits reads, beside some rows of the head.
    pub fn bytes(&self) -> usize {
        self.sketch.bytes()
    }

    /// Writes to `out` `(tokens, rows)` the largest logits for `x` `(tokens, cols)`, with the bits that the
    /// product of `head` with `x` would give; of all others either these bits or `-inf`. Returns how many
    /// logits were computed. Runs on [`isa()`], in parallel over rows.
    ///
    /// # Panics
    /// When `head`, `x` or `out` has another shape than the sketch.
    pub fn largest(
        &self,
        head: HeadRows<'_>,
        x: &[f32],
        largest: Largest,
        out: &mut [f32],
    ) -> usize {
        self.largest_on(isa(), head, x, largest, out)
    }

    pub(crate) fn largest_on(
        &self,
        isa: Isa,
        head: HeadRows<'_>,
        x: &[f32],
        largest: Largest,
        out: &mut [f32],
    ) -> usize {
        let (rows, cols) = (self.sketch.rows(), self.sketch.cols());
        head.check(rows, cols);
        let tokens = out.len().checked_div(rows).unwrap_or(0);
        assert_eq!(tokens * rows, out.len(), "output is not (tokens, rows)");
        assert_eq!(Some(x.len()), tokens.checked_mul(cols), "x is not (tokens, cols)");
        if x.is_empty() {
            out.fill(0.0);
            return 0;
        }
        let estimates = self.sketch.estimate(isa, x);
        let rows = x.chunks_exact(cols).zip(out.chunks_exact_mut(rows)).enumerate();
        rows.map(|(t, (x, out))| decide(isa, head, (&estimates, t), x, largest, out)).sum()
    }
}

/// Writes the exact logits of the rows that can be among the largest; returns how many.
fn decide(
    isa: Isa,
    head: HeadRows<'_>,
    (estimates, token): (&Estimates, usize),
    x: &[f32],
    Largest { count, within }: Largest,
    out: &mut [f32],
) -> usize {
    out.fill(f32::NEG_INFINITY);
    // Those that look largest; whatever they are, the largest logits are not below theirs.
    let first = estimates.largest(token, count.clamp(1, out.len()));
    exact(isa, head, x, &first, out);
    let least = first.iter().fold(f32::INFINITY, |least, &r| {
        // A logit that is no number makes every row a candidate.
        if out[r] < least || out[r].is_nan() { out[r] } else { least }
    });
    // Not above the difference, however that is rounded.
    let candidates = estimates.at_least(token, (least - within).next_down());
    exact(isa, head, x, &candidates, out)
}

/// Writes the logits of some rows, which are in order, and perhaps of others; returns of how many.
fn exact(isa: Isa, head: HeadRows<'_>, x: &[f32], rows: &[usize], out: &mut [f32]) -> usize {
    let most = (out.len() as f64 * SCATTERED) as usize;
    match head {
        HeadRows::Dense(data) if rows.len() > most => {
            let shape = Shape { rows: out.len(), cols: x.len(), tokens: 1 };
            dense_matmul_on(isa, data, shape, x, out);
            out.len()
        }
        HeadRows::Dense(data) => {
            let shape = Shape { rows: 1, cols: x.len(), tokens: 1 };
            let mut logits = vec![0.0; rows.len()];
            parallel::for_each(&mut logits, |i, logit| {
                let row = rows[i] * x.len()..(rows[i] + 1) * x.len();
                let row = match data {
                    DenseData::F32(data) => DenseData::F32(&data[row]),
                    DenseData::F16(data) => DenseData::F16(&data[row]),
                    DenseData::Bf16(data) => DenseData::Bf16(&data[row]),
                };
                dense_matmul_on(isa, row, shape, x, std::slice::from_mut(logit));
            });
            rows.iter().zip(logits).for_each(|(&r, logit)| out[r] = logit);
            rows.len()
        }
        HeadRows::Blocks(weights) => {
            let mut panels: Vec<_> = rows.iter().map(|r| r / PANEL).collect();
            panels.dedup();
            if panels.len() * PANEL > most {
                block_matmul_on(isa, weights, x, 1, out);
                return out.len();
            }
            let inputs = Inputs::split(isa, weights.kind(), x, x.len());
            let out = SharedMut::new(out);
            parallel::run(panels.len(), |i| {
                let (first, inputs, out) = (panels[i], &inputs, &out);
                dispatch(isa, Panels { weights, first, panels: 1, inputs, out });
            });
            panels.len() * PANEL
        }
    }
}

impl HeadRows<'_> {
    /// # Panics
    /// When it is not `(rows, cols)`.
    fn check(self, rows: usize, cols: usize) {
        let fits = match self {
            Self::Blocks(head) => (head.rows(), head.cols()) == (rows, cols),
            Self::Dense(DenseData::F32(data)) => Some(data.len()) == rows.checked_mul(cols),
            Self::Dense(DenseData::F16(data)) => Some(data.len()) == rows.checked_mul(cols),
            Self::Dense(DenseData::Bf16(data)) => Some(data.len()) == rows.checked_mul(cols),
        };
        assert!(fits, "a head that is not ({rows}, {cols})");
    }

    /// Row `r`, widened to f32, into `out` `(cols,)`, of which there are whole sixteens.
    #[inline(always)]
    pub(super) fn widen<S: Simd>(self, simd: S, r: usize, out: &mut [f32]) {
        let at = r * out.len()..(r + 1) * out.len();
        match self {
            Self::Blocks(head) => head.widen(r, out),
            Self::Dense(DenseData::F32(data)) => out.copy_from_slice(&data[at]),
            Self::Dense(DenseData::F16(data)) => {
                for (out, data) in out.as_chunks_mut().0.iter_mut().zip(data[at].as_chunks().0) {
                    *out = simd.to_array(simd.load_f16(data));
                }
            }
            Self::Dense(DenseData::Bf16(data)) => {
                for (out, data) in out.as_chunks_mut().0.iter_mut().zip(data[at].as_chunks().0) {
                    *out = simd.to_array(simd.load_bf16(data));
                }
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::isa::available;
    use crate::{BlockKind, block_matmul, dense_matmul};

    pub(in crate::block) const ROWS: usize = 3001;
    pub(in crate::block) const COLS: usize = 512;

    /// Normal numbers, as the sum of twelve uniform ones; larger in some rows and columns.
    pub(in crate::block) fn normal(len: usize, seed: u64) -> Vec<f32> {
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

    /// Checks what was found of some tokens: right bits or nothing, and nothing is missing.
    fn check(found: &[f32], logits: &[f32], rows: usize, Largest { count, within }: Largest) {
        for (found, logits) in found.chunks(rows).zip(logits.chunks(rows)) {
            let mut sorted = logits.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let least = sorted[count.min(rows) - 1] - within;
            for (r, (found, logit)) in found.iter().zip(logits).enumerate() {
                let same = found.to_bits() == logit.to_bits();
                let spared = *found == f32::NEG_INFINITY && *logit < least;
                assert!(same || spared, "row {r}: {found}, {logit}, least {least}");
            }
        }
    }

    #[test]
    fn the_largest_logits_are_those_of_the_whole_head() {
        let mut weights = normal(ROWS * COLS, 1);
        // Equal logits, also of rows that are far apart.
        weights.copy_within(5 * COLS..6 * COLS, 2000 * COLS);
        let halves: Vec<_> = weights.iter().map(|w| f16::from_f32(*w)).collect();
        let bfloats: Vec<_> = weights.iter().map(|w| bf16::from_f32(*w)).collect();
        let mut x = normal(10 * COLS, 2);
        x[..COLS].copy_from_slice(&weights[5 * COLS..6 * COLS]);
        let mut computed = 0;
        for data in [DenseData::F32(&weights), DenseData::F16(&halves), DenseData::Bf16(&bfloats)] {
            let head = HeadRows::Dense(data);
            let sketch = TwoStageHead::new(head, ROWS, COLS);
            let (mut logits, mut found) = (vec![0.0; 10 * ROWS], vec![0.0; 10 * ROWS]);
            dense_matmul(data, ROWS, COLS, &x, 10, &mut logits);
            for (count, within) in [(1, 0.0), (2, 0.5), (40, 0.0), (0, 0.1)] {
                let largest = Largest { count, within };
                for isa in available() {
                    let n = sketch.largest_on(isa, head, &x, largest, &mut found);
                    check(&found, &logits, ROWS, Largest { count: count.max(1), within });
                    computed += if largest == Largest::ONE { n } else { 0 };
                }
            }
            assert!(found[5] == found[2000] && found[5].is_finite());
        }
        let share = computed as f64 / (3 * 10 * available().len() * ROWS) as f64;
        assert!(share < 0.05, "a sketch that spares little: {share}");
    }

    #[test]
    fn heads_in_blocks_have_sketches_too() {
        for kind in BlockKind::ALL {
            let bytes = crate::tests::block::blocks(kind, ROWS, COLS);
            let matrix = BlockMatrix::new(kind, ROWS, COLS, &bytes);
            let head = HeadRows::Blocks(&matrix);
            let sketch = TwoStageHead::new(head, ROWS, COLS);
            let (mut logits, mut found) = (vec![0.0; 4 * ROWS], vec![0.0; 4 * ROWS]);
            let x = normal(4 * COLS, 3);
            block_matmul(&matrix, &x, 4, &mut logits);
            for count in [1, 10, 5000] {
                let largest = Largest { count, within: 0.0 };
                let n = sketch.largest(head, &x, largest, &mut found);
                check(&found, &logits, ROWS, largest);
                assert!(count < ROWS || n == found.len());
            }
        }
    }

    #[test]
    fn infinite_numbers_make_every_row_that_has_them_a_candidate() {
        let mut weights = normal(64 * COLS, 1);
        weights[17 * COLS + 3] = f32::MAX;
        let head = HeadRows::Dense(DenseData::F32(&weights));
        let sketch = TwoStageHead::new(head, 64, COLS);
        let (mut x, mut found) = (normal(COLS, 2), vec![0.0; 64]);
        x[3] = 1.0;
        sketch.largest(head, &x, Largest::ONE, &mut found);
        assert!(found[17] > 1e38);
        for bad in [f32::INFINITY, f32::NAN] {
            x[3] = bad;
            assert_eq!(sketch.largest(head, &x, Largest::ONE, &mut found), 64);
            assert!(found.iter().all(|logit| *logit != f32::NEG_INFINITY || bad.is_infinite()));
        }
        assert_eq!(sketch.largest(head, &[], Largest::ONE, &mut []), 0);
    }
}
