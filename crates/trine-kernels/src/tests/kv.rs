//! Attention over the KV cache, against plain loops over what its documentation says.

use std::sync::Arc;

use half::f16;

use super::{assert_same_bits, scalar_dot};
use crate::Isa;
use crate::nn::attention::attention_on;
use crate::nn::kv::attention_kv_on;
use crate::nn::{Blocks, KV_BLOCK, KvLayout, KvPage, KvSequence, KvType, Rows};
use crate::parallel::Pool;

/// Standard normal numbers, more or less, of a sequence that `seed` chooses.
fn normal(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..len).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

/// Queries, keys and values of a sequence: `(positions, heads or kv_heads, d)`.
#[derive(Clone)]
struct Case {
    d: usize,
    heads: usize,
    kv_heads: usize,
    positions: usize,
    q: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Case {
    fn new(d: usize, heads: usize, kv_heads: usize, positions: usize) -> Self {
        let kv = positions * kv_heads * d;
        let (q, keys) = (normal(positions * heads * d, 1), normal(kv, 2));
        Self { d, heads, kv_heads, positions, q, keys, values: normal(kv, 3) }
    }

    fn layout(&self, kind: KvType) -> KvLayout {
        KvLayout::new(kind, self.d).unwrap()
    }

    /// What lies before each page's blocks, of some other layer.
    const OFFSET: usize = 192;

    fn pages(&self, isa: Isa, kind: KvType) -> Vec<KvPage> {
        let (layout, d) = (self.layout(kind), self.d);
        let bytes = layout.block_bytes();
        let page = || {
            let mut page = KvPage::new(Self::OFFSET + self.kv_heads * bytes);
            // What was never written must not matter.
            page.fill(0xff);
            page
        };
        let mut pages: Vec<_> = (0..self.positions.div_ceil(KV_BLOCK)).map(|_| page()).collect();
        for j in 0..self.positions {
            for h in 0..self.kv_heads {
                let at = (j * self.kv_heads + h) * d;
                let block = &mut pages[j / KV_BLOCK][Self::OFFSET + h * bytes..][..bytes];
                layout.write_on(isa, block, j, &self.keys[at..][..d], &self.values[at..][..d]);
            }
        }
        pages
    }

    /// The outputs of the tokens `from..to`.
    fn run(&self, isa: Isa, kind: KvType, pages: &[KvPage], from: usize, to: usize) -> Vec<f32> {
        let width = self.heads * self.d;
        let pages: Vec<&[u8]> = pages.iter().map(|page| &**page).collect();
        let sequence =
            KvSequence { pages: &pages, offset: Self::OFFSET, start: from, tokens: to - from };
        let mut out = vec![f32::MAX; (to - from) * width];
        let q = &self.q[from * width..to * width];
        attention_kv_on(
            isa,
            self.layout(kind),
            self.heads,
            self.kv_heads,
            &[sequence],
            q,
            &mut out,
        );
        out
    }

    /// The query of a token's head, and keys and values that it sees.
    fn inputs(&self, token: usize, head: usize) -> (&[f32], Vec<&[f32]>, Vec<&[f32]>) {
        let (d, k) = (self.d, head / (self.heads / self.kv_heads));
        let row = |rows: &'_ [f32], j: usize| ((j * self.kv_heads + k) * d, rows.len()).0;
        let keys = (0..=token).map(|j| &self.keys[row(&self.keys, j)..][..d]).collect();
        let values = (0..=token).map(|j| &self.values[row(&self.values, j)..][..d]).collect();
        (&self.q[(token * self.heads + head) * d..][..d], keys, values)
    }

    /// What `one`, of a query, its keys and values, gives for each of the tokens `from..to`.
    fn each(
        &self,
        from: usize,
        to: usize,
        one: impl Fn(&[f32], &[&[f32]], &[&[f32]]) -> Vec<f32>,
    ) -> Vec<f32> {
        let rows = (from..to).flat_map(|t| (0..self.heads).map(move |h| (t, h)));
        rows.flat_map(|(t, h)| {
            let (q, keys, values) = self.inputs(t, h);
            one(q, &keys, &values)
        })
        .collect()
    }
}

/// `round_half_even`, where it matters.
fn round(x: f32) -> i64 {
    x.round_ties_even() as i64
}

/// 2^x as it is documented, from its polynomial.
fn exp2(x: f32) -> f32 {
    if x.is_nan() || x < -126.0 {
        return if x.is_nan() { x } else { 0.0 };
    }
    let n = x.round_ties_even();
    let r = x - n;
    let coefficients = [9.666_283e-3, 5.557_400_5e-2, 0.240_223_51, 0.693_142_8, 1.0];
    let p = coefficients.iter().fold(1.112_550_8e-3, |p: f32, c| {
        let product = p * r;
        product + c
    });
    p * 2.0f32.powi(n as i32)
}

/// Attention of one query over int8 keys and values: the definition, without a block or a lane.
fn scalar_int8(q: &[f32], keys: &[&[f32]], values: &[&[f32]]) -> Vec<f32> {
    let d = q.len();
    let quantized = |rows: &[&[f32]]| -> Vec<(Vec<i8>, f32)> {
        let one = |row: &&[f32]| {
            let mut codes = vec![0; d];
            let scale = trine_ternary::quantize_activations(row, &mut codes);
            (codes, 1.0 / scale)
        };
        rows.iter().map(one).collect()
    };
    let (keys, values) = (quantized(keys), quantized(values));
    let finite = q.iter().all(|x| x.is_finite());
    let largest = q.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let factor = 8191.0 / largest.max(1e-30);
    let codes: Vec<i64> = q.iter().map(|x| if finite { round(x * factor) } else { 0 }).collect();
    let base = std::f32::consts::LOG2_E / (d as f32).sqrt();
    let scale = if finite { largest / 8191.0 * base } else { f32::NAN };
    let score = |(key, unit): &(Vec<i8>, f32)| {
        let sum: i64 = codes.iter().zip(key).map(|(q, k)| q * i64::from(*k)).sum();
        sum as i32 as f32 * unit * scale
    };
    let scores: Vec<f32> = keys.iter().map(score).collect();
    let (mut m, mut l, mut o) = (f32::NEG_INFINITY, 0.0, vec![0.0; d]);
    for (scores, values) in scores.chunks(256).zip(values.chunks(256)) {
        let max = scores.iter().fold(f32::NEG_INFINITY, |max, x| if *x > max { *x } else { max });
        let p: Vec<f32> = scores.iter().map(|t| exp2(t - max)).collect();
        let sum = scalar_dot(&p, &vec![1.0; p.len()]);
        let w: Vec<f32> = p.iter().zip(values).map(|(p, (_, unit))| p * unit).collect();
        let finite = w.iter().all(|w| w.is_finite());
        let heaviest = w.iter().fold(0.0f32, |max, w| max.max(*w));
        let factor = 16383.0 / heaviest;
        let unit = if finite { heaviest / 16383.0 } else { f32::NAN };
        let w: Vec<i64> = w.iter().map(|w| if finite { round(w * factor) } else { 0 }).collect();
        let both = if max > m { max } else { m };
        let (a, b) = (exp2(m - both), exp2(max - both));
        (m, l) = (both, l * a + sum * b);
        for (i, o) in o.iter_mut().enumerate() {
            let sum: i64 = w.iter().zip(values).map(|(w, (v, _))| w * i64::from(v[i])).sum();
            let (before, added) = (*o * a, sum as f32 * unit * b);
            *o = before + added;
        }
    }
    o.iter().map(|o| o / l).collect()
}

/// Attention of one query over keys and values rounded to `kind`, by [`attention_on`].
fn scalar_float(kind: KvType, q: &[f32], keys: &[&[f32]], values: &[&[f32]]) -> Vec<f32> {
    let round = |x: &f32| if kind == KvType::F16 { f16::from_f32(*x).to_f32() } else { *x };
    let mut blocks = Blocks::new(q.len());
    keys.iter().for_each(|key| blocks.push(&key.iter().map(round).collect::<Vec<_>>()));
    let values: Vec<f32> = values.iter().flat_map(|value| value.iter().map(round)).collect();
    let (mut weights, mut out) = (vec![0.0; keys.len()], vec![0.0; q.len()]);
    let values = Rows { data: &values, stride: q.len() };
    attention_on(Isa::Generic, q, &blocks, values, &mut weights, &mut out);
    out
}

fn scalar(kind: KvType, q: &[f32], keys: &[&[f32]], values: &[&[f32]]) -> Vec<f32> {
    match kind {
        KvType::Int8 => scalar_int8(q, keys, values),
        _ => scalar_float(kind, q, keys, values),
    }
}

/// `(d, heads, kv_heads, positions)`: at and around lanes, blocks, spans, tiles and bands.
const CASES: [(usize, usize, usize, usize); 10] = [
    (1, 1, 1, 1),
    (16, 4, 1, 63),
    (20, 5, 1, 64),
    (64, 10, 2, 65),
    (80, 3, 3, 129),
    (128, 4, 1, 257),
    (128, 8, 2, 70),
    (256, 2, 1, 256),
    (31, 7, 7, 17),
    (33, 40, 1, 515),
];

pub(super) fn kv_attention_matches_scalar(isa: Isa) {
    for (d, heads, kv_heads, positions) in CASES {
        let case = Case::new(d, heads, kv_heads, positions);
        for kind in KvType::ALL {
            let pages = case.pages(isa, kind);
            // All at once; then the last few, as a decoding step and as a check of drafts.
            for from in [0, positions.saturating_sub(3), positions - 1] {
                if from > 0 || positions < 200 {
                    let found = case.run(isa, kind, &pages, from, positions);
                    let expected = case.each(from, positions, |q, k, v| scalar(kind, q, k, v));
                    assert_same_bits(&found, &expected);
                }
            }
        }
    }
}

/// However tokens are divided into calls, sequences into batches, and tasks among threads.
pub(super) fn kv_attention_is_the_same_in_any_company(isa: Isa) {
    let case = Case::new(48, 6, 2, 700);
    let width = case.heads * case.d;
    for kind in KvType::ALL {
        let pages = case.pages(isa, kind);
        let expected = case.run(isa, kind, &pages, 0, case.positions);
        for threads in [1, 3] {
            Arc::new(Pool::new(threads)).install(|| {
                for (from, to) in [(0, 700), (0, 1), (255, 258), (511, 512), (640, 700)] {
                    let found = case.run(isa, kind, &pages, from, to);
                    assert_same_bits(&found, &expected[from * width..to * width]);
                }
                // Sequences of different lengths that share their first pages.
                let pages: Vec<&[u8]> = pages.iter().map(|page| &**page).collect();
                let ranges = [(650, 651), (3, 40), (0, 0), (699, 700), (255, 266)];
                let sequences = ranges.map(|(from, to)| KvSequence {
                    pages: &pages[..usize::div_ceil(to, KV_BLOCK)],
                    offset: Case::OFFSET,
                    start: from,
                    tokens: to - from,
                });
                let of = |x: &[f32]| -> Vec<f32> {
                    ranges
                        .iter()
                        .flat_map(|(from, to)| x[from * width..to * width].to_vec())
                        .collect()
                };
                let q = of(&case.q);
                let mut found = vec![0.0; q.len()];
                attention_kv_on(isa, case.layout(kind), 6, 2, &sequences, &q, &mut found);
                assert_same_bits(&found, &of(&expected));
            });
        }
    }
}

/// What is not an ordinary number spoils the tokens that see it, and no other.
pub(super) fn kv_attention_keeps_poison_to_its_own(isa: Isa) {
    for bad in [f32::NAN, f32::INFINITY] {
        for kind in KvType::ALL {
            let mut case = Case::new(32, 4, 2, 300);
            let width = case.heads * case.d;
            let clean = case.run(isa, kind, &case.pages(isa, kind), 0, 300);
            // A query of token 7, head 1; a key of position 270 and a value of 290, head 0.
            case.q[7 * width + 32 + 5] = bad;
            case.keys[270 * 64 + 3] = bad;
            case.values[290 * 64 + 3] = bad;
            let pages = case.pages(isa, kind);
            let found = case.run(isa, kind, &pages, 0, 300);
            assert_same_bits(&found, &case.each(0, 300, |q, k, v| scalar(kind, q, k, v)));
            for (i, (found, clean)) in found.iter().zip(&clean).enumerate() {
                let (token, head) = (i / width, i % width / 32);
                let spoilt = (token == 7 && head == 1) || (token >= 270 && head < 2);
                match spoilt {
                    // A key of infinity may have a weight of 0, as in any arithmetic of floats.
                    true => assert!(found.is_nan() || kind != KvType::Int8),
                    false => assert_eq!(found, clean),
                }
            }
        }
    }
}

pub(super) fn kv_attention_of_extremes_matches_scalar(isa: Isa) {
    let mut cases = vec![Case::new(24, 2, 1, 90); 5];
    cases[0].q.fill(0.0);
    cases[0].values.fill(0.0);
    cases[1].keys.fill(0.0);
    // All of the weight on one position, with values of which the sums are largest.
    cases[2].keys[40 * 24..41 * 24].fill(1000.0);
    cases[2].q.fill(30.0);
    cases[2].values.fill(-9.0);
    // Weights that are all the same: the largest sums of weights.
    cases[3].keys.fill(-1.0);
    cases[3].values.fill(1.0);
    cases[4].q.iter_mut().for_each(|x| *x *= 1e15);
    cases[4].values.iter_mut().for_each(|x| *x *= 1e-20);
    for case in cases {
        for kind in KvType::ALL {
            let found = case.run(isa, kind, &case.pages(isa, kind), 0, 90);
            assert_same_bits(&found, &case.each(0, 90, |q, k, v| scalar(kind, q, k, v)));
        }
    }
}

/// Root mean square of the error, relative to that of exact attention in f64.
fn error(case: &Case, kind: KvType, from: usize) -> f64 {
    let pages = case.pages(crate::isa(), kind);
    let found = case.run(crate::isa(), kind, &pages, from, case.positions);
    let exact = |q: &[f32], keys: &[&[f32]], values: &[&[f32]]| -> Vec<f32> {
        let dot = |key: &&[f32]| -> f64 {
            q.iter().zip(*key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let scores: Vec<f64> = keys.iter().map(|k| dot(k) / (q.len() as f64).sqrt()).collect();
        let max = scores.iter().copied().fold(f64::MIN, f64::max);
        let exps: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = exps.iter().sum();
        let output = |i: usize| -> f64 {
            exps.iter().zip(values).map(|(e, v)| e / sum * f64::from(v[i])).sum()
        };
        (0..q.len()).map(|i| output(i) as f32).collect()
    };
    let expected = case.each(from, case.positions, exact);
    let square = |x: &f32| f64::from(*x) * f64::from(*x);
    let wrong: f64 = found.iter().zip(&expected).map(|(a, b)| square(&(a - b))).sum();
    (wrong / expected.iter().map(square).sum::<f64>()).sqrt()
}

/// The figures of `nn::kv::int8`: relative errors of the output for normal keys and values.
#[test]
fn kv_accuracy_is_as_documented() {
    // What queries are multiplied by, and two features of each key; bounds for each type.
    for (spread, outlier, bounds) in [
        (1.0, 1.0, [5e-6, 1e-3, 1.5e-2]),
        (6.0, 1.0, [5e-6, 2e-3, 3e-2]),
        (3.0, 10.0, [5e-6, 2e-3, 1.2e-1]),
    ] {
        let mut case = Case::new(128, 4, 1, 1000);
        case.q.iter_mut().for_each(|x| *x *= spread);
        case.keys.iter_mut().step_by(64).for_each(|k| *k *= outlier);
        for (kind, bound) in KvType::ALL.into_iter().zip(bounds) {
            let error = error(&case, kind, 900);
            println!("{kind}: spread {spread}, outliers {outlier}: {error:.2e}");
            assert!(error < bound, "{kind}: {error}, not below {bound}");
        }
    }
}
