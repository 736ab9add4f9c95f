//! Pairs of matrices of low rank, against the order of their documentation.

use std::sync::Arc;

use half::f16;

use super::{assert_same_bits, floats, scalar_dot, too_large};
use crate::Isa;
use crate::low_rank::{LowRank, LowRankProduct, LowRankType, low_rank_add_on};
use crate::parallel::Pool;

/// Matrices of a pair and the input and outputs of a product.
struct Case {
    shape: [usize; 3],
    a: Vec<f32>,
    b: Vec<f32>,
    x: Vec<f32>,
    out: Vec<f32>,
}

fn case(shape: [usize; 3], tokens: usize) -> Case {
    let [out, inp, rank] = shape;
    let number = |i: usize| floats(i + 1)[i] * 1e-3;
    let a = (0..rank * inp).map(|i| number(i % 700 + 3)).collect();
    let b = (0..out * rank).map(|i| number(i % 600 + 11)).collect();
    Case { shape, a, b, x: floats(tokens * inp), out: floats(tokens * out) }
}

/// What is added, straight from the documentation, for matrices whose products are scaled by `scale`.
fn expected(case: &Case, a: &[f32], b: &[f32], scale: f32) -> Vec<f32> {
    let [out, inp, rank] = case.shape;
    let mut sums = case.out.clone();
    for (x, y) in case.x.chunks_exact(inp).zip(sums.chunks_exact_mut(out)) {
        let low: Vec<f32> = a.chunks_exact(inp).map(|a| scalar_dot(a, x) * scale).collect();
        for (y, b) in y.iter_mut().zip(b.chunks_exact(rank)) {
            let mut sum = 0.0;
            for (low, b) in low.iter().zip(b) {
                let product = low * b;
                sum += product;
            }
            *y += sum;
        }
    }
    sums
}

fn pair(case: &Case, dtype: LowRankType) -> LowRank {
    LowRank::new(dtype, case.shape, &case.a, &case.b)
}

/// Numbers as halves after multiplication by a power of two, which the largest says.
fn halves(numbers: &[f32]) -> (Vec<f32>, f32) {
    let largest = numbers.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let scale = 2f32.powi(14 - largest.log2().floor() as i32);
    (numbers.iter().map(|x| f16::from_f32(x * scale).to_f32()).collect(), scale)
}

pub(super) fn low_rank_products_match_scalar(isa: Isa) {
    let mut shapes = vec![([1031, 515, 16], 1), ([259, 1027, 8], 37)];
    for rank in [1, 3, 4, 5, 16] {
        for (out, inp) in [(1, 1), (15, 17), (64, 63), (65, 33), (131, 257)] {
            shapes.extend([1, 2, 4, 7].map(|tokens| ([out, inp, rank], tokens)));
        }
    }
    for (shape, tokens) in shapes {
        let [out, inp, rank] = shape;
        if too_large((out + inp) * rank * tokens) {
            continue;
        }
        let case = case(shape, tokens);
        let exact = expected(&case, &case.a, &case.b, 1.0);
        let ((a, a_scale), (b, b_scale)) = (halves(&case.a), halves(&case.b));
        let halved = expected(&case, &a, &b, 1.0 / a_scale * (1.0 / b_scale));
        for (dtype, expected) in [(LowRankType::F32, exact), (LowRankType::F16, halved)] {
            let (pair, mut found) = (pair(&case, dtype), case.out.clone());
            let product = LowRankProduct { pair: &pair, x: &case.x, out: &mut found };
            low_rank_add_on(isa, &mut [product]);
            assert_same_bits(&found, &expected);
        }
    }
}

/// Several pairs together, of several shapes and for tokens of their own, give what each gives alone.
pub(super) fn low_rank_products_are_the_same_in_any_company(isa: Isa) {
    let shapes = [([70, 130, 4], 1), ([40, 130, 9], 3), ([300, 20, 2], 1), ([16, 16, 16], 8)];
    let cases = shapes.map(|(shape, tokens)| case(shape, tokens));
    let pairs = cases.each_ref().map(|case| pair(case, LowRankType::F16));
    let together = |threads| {
        Arc::new(Pool::new(threads)).install(|| {
            let mut outs = cases.each_ref().map(|case| case.out.clone());
            let mut products = Vec::new();
            for ((case, pair), out) in cases.iter().zip(&pairs).zip(&mut outs) {
                products.push(LowRankProduct { pair, x: &case.x, out });
            }
            low_rank_add_on(isa, &mut products);
            outs
        })
    };
    let alone = cases.iter().zip(&pairs).map(|(case, pair)| {
        let mut out = case.out.clone();
        let product = LowRankProduct { pair, x: &case.x, out: &mut out };
        low_rank_add_on(isa, &mut [product]);
        out
    });
    let alone: Vec<_> = alone.collect();
    for threads in [1, 2, 5] {
        assert_eq!(together(threads)[..], alone);
    }
}

#[test]
fn halves_of_any_magnitude_keep_eleven_bits() {
    for power in [-100, -40, -3, 0, 5, 60, 100] {
        let size = 2f32.powi(power);
        let mut case = case([20, 30, 4], 1);
        case.a.iter_mut().for_each(|a| *a *= size);
        case.b.iter_mut().for_each(|b| *b /= size);
        case.out.fill(0.0);
        let exact = expected(&case, &case.a, &case.b, 1.0);
        let mut found = case.out.clone();
        let pair = pair(&case, LowRankType::F16);
        let product = LowRankProduct { pair: &pair, x: &case.x, out: &mut found };
        low_rank_add_on(Isa::Generic, &mut [product]);
        let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let wrong: Vec<f32> = found.iter().zip(&exact).map(|(a, b)| a - b).collect();
        assert!(
            norm(&wrong) < 5e-4 * norm(&exact),
            "2^{power}: {} of {}",
            norm(&wrong),
            norm(&exact)
        );
        assert_eq!(pair.bytes(), 2 * (4 * 30 + 4 * 32));
    }
}
