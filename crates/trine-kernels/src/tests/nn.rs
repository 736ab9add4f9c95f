//! The float parts of a layer against plain loops in the documented order: bit for bit.

use super::{COLS, assert_same_bits, floats, scalar_dot};
use crate::nn::attention::attention_on;
use crate::nn::exp::{exp_sum_in_place_on, exp_sum_on};
use crate::nn::{Blocks, Gate, Rows, exp, gate_on, rms_norm_on};
use crate::{Activations, Isa};

/// `(d, positions, weights)`: at and around lanes, blocks and groups of blocks.
const HEADS: [(usize, usize, usize); 7] = [
    (2, 1, 1),
    (6, 20, 5),
    (16, 16, 16),
    (32, 70, 17),
    (34, 130, 129),
    (48, 64, 64),
    (128, 200, 193),
];

/// What a logit or a gate can be, and the values around which the exponential changes.
fn edges() -> Vec<f32> {
    let big = [f32::INFINITY, f32::MAX, 90.0, 88.722_83, 87.336_54, 60.0, 1.0, 1e-30];
    let tiny = [f32::MIN_POSITIVE, f32::from_bits(1), 0.0];
    big.iter().chain(&tiny).flat_map(|x| [*x, -*x]).chain([f32::NAN]).collect()
}

/// Numbers of the size of scores and logits.
fn scores(len: usize) -> Vec<f32> {
    floats(len).into_iter().map(|x| x / 300.0).collect()
}

/// The exponentials of `row` less its largest, and their sum over 16 lanes.
fn scalar_exps(row: &[f32]) -> (Vec<f32>, f32, f32) {
    let max = row.iter().fold(f32::NEG_INFINITY, |max, x| if *x > max { *x } else { max });
    let exps: Vec<f32> = row.iter().map(|x| exp(x - max)).collect();
    let ones = vec![1.0; exps.len()];
    let sum = scalar_dot(&exps, &ones);
    (exps, max, sum)
}

pub(super) fn quantized_activations_match_definition(isa: Isa) {
    for (tokens, cols) in [(1, 1), (3, 255), (2, 257), (3, 30_000)] {
        let x = floats(tokens * cols);
        let found = Activations::quantize_on(isa, &x, tokens, cols);
        for (t, x) in x.chunks_exact(cols).enumerate() {
            let mut codes = vec![0; cols];
            let scale = trine_ternary::quantize_activations(x, &mut codes);
            assert_eq!((found.codes(t), found.scale(t)), (codes.clone(), scale));
        }
    }
}

pub(super) fn rms_norm_matches_scalar(isa: Isa) {
    for n in COLS {
        let (x, weight) = (floats(n), floats(n + 3));
        let weight = &weight[3..];
        let inverse = 1.0 / (scalar_dot(&x, &x) / n as f32 + 1e-5).sqrt();
        let expected: Vec<f32> = x.iter().zip(weight).map(|(x, w)| x * inverse * w).collect();
        let mut found = vec![9.0; n];
        let returned = rms_norm_on(isa, &x, weight, 1e-5, &mut found);
        assert_same_bits(&[returned], &[inverse]);
        assert_same_bits(&found, &expected);
    }
}

pub(super) fn gates_match_scalar(isa: Isa) {
    let gate = [edges(), scores(333), floats(100)].concat();
    let up = floats(gate.len());
    let relu2 = |x: f32| {
        let positive = if x > 0.0 { x } else { 0.0 };
        positive * positive
    };
    let silu = |x: f32| x / (1.0 + exp(-x));
    let expected = |activation: &dyn Fn(f32) -> f32| -> Vec<f32> {
        gate.iter().zip(&up).map(|(gate, up)| activation(*gate) * up).collect()
    };
    let (mut squared, mut sigmoid) = (gate.clone(), gate.clone());
    gate_on(isa, Gate::Relu2, &mut squared, &up);
    gate_on(isa, Gate::Silu, &mut sigmoid, &up);
    assert_same_bits(&squared, &expected(&relu2));
    assert_same_bits(&sigmoid, &expected(&silu));
}

pub(super) fn softmax_passes_match_scalar(isa: Isa) {
    let rows = COLS.map(scores).into_iter().chain([edges(), vec![f32::NEG_INFINITY; 20]]);
    for row in rows {
        let (exps, max, sum) = scalar_exps(&row);
        let found = exp_sum_on(isa, &row);
        assert_same_bits(&[found.0, found.1], &[max, sum]);
        let mut row = row;
        let found = exp_sum_in_place_on(isa, &mut row);
        assert_same_bits(&[found.0, found.1], &[max, sum]);
        assert_same_bits(&row, &exps);
    }
}

/// `q . row_j` for every row, feature by feature.
fn scalar_products(q: &[f32], rows: &[f32]) -> Vec<f32> {
    let product = |row: &[f32]| {
        q.iter().zip(row).fold(0.0, |sum, (q, k)| {
            let product = q * k;
            sum + product
        })
    };
    rows.chunks_exact(q.len()).map(product).collect()
}

/// `sum over j of w_j row_j`, position by position.
fn scalar_weighted_sum(weights: &[f32], rows: &[f32], d: usize) -> Vec<f32> {
    let mut out = vec![0.0; d];
    for (w, row) in weights.iter().zip(rows.chunks_exact(d)) {
        add_scaled(*w, row, &mut out);
    }
    out
}

fn add_scaled(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        let product = a * x;
        *y += product;
    }
}

fn scalar_weights(q: &[f32], keys: &[f32]) -> Vec<f32> {
    let scale = 1.0 / (q.len() as f32).sqrt();
    let scores: Vec<f32> = scalar_products(q, keys).iter().map(|score| score * scale).collect();
    let (exps, _, sum) = scalar_exps(&scores);
    exps.iter().map(|e| e / sum).collect()
}

fn blocks(rows: &[f32], d: usize) -> Blocks {
    let mut blocks = Blocks::new(d);
    rows.chunks_exact(d).for_each(|row| blocks.push(row));
    blocks
}

pub(super) fn attention_matches_scalar(isa: Isa) {
    for (d, positions, seen) in HEADS {
        let rows = scores(2 * d * positions + d);
        let (q, rows) = rows.split_at(d);
        let (keys, values) = rows.split_at(d * positions);
        let expected = scalar_weights(q, &keys[..seen * d]);
        let key_blocks = blocks(keys, d);
        let (mut found, mut out) = (vec![9.0; seen], vec![9.0; d]);
        let rows = Rows { data: values, stride: d };
        attention_on(isa, q, &key_blocks, rows, &mut found, &mut out);
        assert_same_bits(&found, &expected);
        assert_same_bits(&out, &scalar_weighted_sum(&expected, values, d));
    }
}
