//! Every kernel, on every instruction set, against the scalar definition: bit for bit.
//!
//! The claims are written once, for any instruction set; a macro stamps them into each. On a CPU
//! that lacks one its tests say so and return, and so that this cannot go unnoticed, a machine that
//! has it sets `TRINE_REQUIRE_ISA` to a comma-separated list of what must have been tested.

use std::sync::Arc;

use half::{bf16, f16};
use proptest::prelude::*;
use trine_ternary::{TernaryMatrix, reference};

use crate::arch::{Kernel, Simd, dispatch};
use crate::dense::{dense_matmul_on, dot_on};
use crate::nn::{Gate, gate_on};
use crate::packed::Line;
use crate::parallel::Pool;
use crate::product::Shape;
use crate::sums::{bitlinear_sums_on, rescale_sums_on};
use crate::ternary::{bitlinear_add_on, bitlinear_all_on, bitlinear_gated_on, bitlinear_on};
use crate::{Activations, DenseData, Isa, PackedMatrix, Packing, available, matmul_i32, select};

pub(crate) mod block;
mod kv;
mod low_rank;
mod nn;
use block::*;
use kv::*;
use low_rank::*;
use nn::*;

/// At and around the sizes of blocks, vectors and lanes, and none at all.
const COLS: [usize; 16] = [0, 1, 15, 16, 17, 19, 21, 63, 64, 79, 81, 255, 256, 257, 511, 2561];

/// `len` trits of a prime period, so that no two rows or blocks look alike.
fn trits(len: usize) -> Vec<i8> {
    (0..len).map(|i| (i * i % 251 % 3) as i8 - 1).collect()
}

/// `len` codes of another prime period, over all of int8.
fn codes(len: usize) -> Vec<i8> {
    (0..len).map(|i| (i * 37 % 241 * 17 % 256) as u8 as i8).collect()
}

/// `len` floats of mixed signs and magnitudes, of which sums depend on their order.
fn floats(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 % 1009) as f32 - 504.3) * [1.0, 1e-3, 41.7][i % 3]).collect()
}

/// Whether a product is too large to be interpreted by Miri.
fn too_large(multiplications: usize) -> bool {
    cfg!(miri) && multiplications > 1000
}

fn check_matmul(isa: Isa, rows: usize, tokens: usize, trits: &[i8], codes: &[i8]) {
    if !too_large(trits.len() * tokens) {
        check_products(isa, rows, tokens, trits, codes);
    }
}

fn check_products(isa: Isa, rows: usize, tokens: usize, trits: &[i8], codes: &[i8]) {
    let cols = trits.len() / rows;
    let matrix = TernaryMatrix::from_trits(trits, rows, cols, 1.0).unwrap();
    let x = Activations::from_codes(codes, &vec![1.0; tokens], cols);
    let mut expected = vec![0; tokens * rows];
    reference::matmul(trits, codes, tokens, &mut expected);
    for packing in Packing::ALL {
        let mut found = vec![i32::MIN; tokens * rows];
        matmul_i32(isa, &PackedMatrix::new(&matrix, packing), &x, &mut found);
        assert!(found == expected, "{isa}, {packing:?}, ({rows}, {cols}) x {tokens}");
    }
}

fn matmul_matches_scalar(isa: Isa) {
    if cfg!(miri) {
        // One and several panels, tiles of every width, weights unpacked for a tile and for all.
        let shapes = [(5, 21, 1), (33, 81, 1), (17, 19, 15), (33, 17, 17)].into_iter();
        for (rows, cols, tokens) in shapes.chain((2..=8).map(|tokens| (17, 19, tokens))) {
            check_products(isa, rows, tokens, &trits(rows * cols), &codes(tokens * cols));
        }
        return;
    }
    for rows in [1, 5, 15, 16, 17, 33, 48] {
        for cols in COLS {
            for tokens in (1..=9).chain([16, 17, 31]) {
                check_matmul(isa, rows, tokens, &trits(rows * cols), &codes(tokens * cols));
            }
        }
    }
}

/// Products of many rows, which are split into chunks and go to threads.
fn large_matmul_matches_scalar(isa: Isa) {
    let few = [(1031, 1027, 1), (523, 257, 9), (4099, 259, 2), (517, 515, 33)];
    // So many tokens that weights are unpacked once for all, which depends on packing and CPU; panels are
    // then multiplied by threes, of which one or two are left.
    let many = [(48, 81, 50), (65, 83, 49), (111, 21, 71), (517, 259, 97), (1031, 33, 521)];
    for (rows, cols, tokens) in few.into_iter().chain(many) {
        check_matmul(isa, rows, tokens, &trits(rows * cols), &codes(tokens * cols));
    }
}

/// Nothing saturates or overflows where all signs agree, however long the row.
fn extreme_codes_do_not_overflow(isa: Isa) {
    let cols = 16384 + 3;
    for trit in [-1, 0, 1] {
        for code in [-128, 127] {
            for tokens in [1, 2, 5] {
                let codes = vec![code; tokens * cols];
                check_matmul(isa, 5, tokens, &vec![trit; 5 * cols], &codes);
            }
        }
    }
    // Where a sum of codes that are not shifted down in their bytes would be too large.
    let cols = 700_003;
    for tokens in [1, 2] {
        check_matmul(isa, 1, tokens, &vec![1; cols], &vec![-128; tokens * cols]);
    }
}

fn random_matmul_matches_scalar(isa: Isa) {
    let case = (1usize..10, 1usize..700, 1usize..10).prop_flat_map(|(rows, cols, tokens)| {
        let trits = prop::collection::vec(-1i8..=1, rows * cols);
        (Just(rows), Just(tokens), trits, prop::collection::vec(any::<i8>(), tokens * cols))
    });
    proptest!(ProptestConfig::with_cases(64), |((rows, tokens, trits, codes) in case)| {
        check_matmul(isa, rows, tokens, &trits, &codes);
    });
}

/// What is kept in 16 bits comes back as it was, where sums fit and where they do not.
fn sums_in_16_bits_give_back_every_output(isa: Isa) {
    let (rows, long) = (33, if cfg!(miri) { 300 } else { 3000 });
    for (cols, tokens) in [(21, 1), (17, 5), (257, 17), (long, 3)] {
        if too_large(rows * cols * tokens) && cols != long {
            continue;
        }
        // The trits of every third row agree in sign, and so do all codes: sums of up to 127 cols.
        let of =
            |i: usize| if (i / cols).is_multiple_of(3) { 1 } else { (i * i % 251 % 3) as i8 - 1 };
        let trits: Vec<i8> = (0..rows * cols).map(of).collect();
        let codes: Vec<i8> = (0..tokens * cols).map(|i| 127 - (i % 7) as i8).collect();
        let scales: Vec<f32> = (0..tokens).map(|t| 3.7 + t as f32).collect();
        let x = Activations::from_codes(&codes, &scales, cols);
        let matrix = TernaryMatrix::from_trits(&trits, rows, cols, 0.37).unwrap();
        let weights = PackedMatrix::new(&matrix, Packing::Bits2);
        let (mut expected, mut found) = (vec![0.0; tokens * rows], vec![0.0; rows]);
        bitlinear_on(isa, &weights, &x, &mut expected);
        let mut sums = [vec![0; tokens * rows], vec![0; tokens * rows]];
        let [first, second] = &mut sums;
        bitlinear_sums_on(isa, &mut [(&weights, first), (&weights, second)], &x);
        assert_eq!(sums[0], sums[1]);
        assert_eq!(sums[0].contains(&i16::MIN), 121 * cols > 32_767, "{cols} columns");
        for t in 0..tokens {
            rescale_sums_on(isa, &sums[0][t * rows..][..rows], &weights, &x, t, &mut found);
            assert_same_bits(&found, &expected[t * rows..][..rows]);
        }
    }
}

/// One line of codes times four numbers, on any instruction set.
struct OneLine {
    codes: Line,
    x: [i8; 4],
}

impl Kernel for OneLine {
    type Output = [[i32; 16]; 3];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [[i32; 16]; 3] {
        let codes = simd.load_codes(&self.codes);
        let small = simd.load_codes(&self.codes.map(|code| code % 64));
        let mut stored = [0; 64];
        simd.store_codes(codes, &mut stored);
        assert_eq!(stored, self.codes);
        let once = simd.multiply_signed(simd.zero(), codes, &self.x.map(|x| x as u8 & 127));
        [
            simd.multiply(simd.zero(), small, &self.x),
            simd.multiply_wide(simd.zero(), codes, &self.x),
            // A second time on top, so that sums are added to.
            simd.multiply_signed(once, codes, &self.x.map(|x| x as u8 & 127)),
        ]
        .map(|sums| simd.to_i32(sums))
    }
}

fn lines_match_scalar(isa: Isa) {
    let mut lines = vec![[0; 64], [255; 64], [128; 64], [127; 64], [63; 64]];
    lines.extend((0..16).map(|k| std::array::from_fn(|i| (i * i * 37 + k * 101 + i) as u8)));
    for codes in lines {
        for x in [[-128; 4], [127; 4], [-128, 127, -128, 127], [0, -1, 77, -90], [1, 2, 3, 4]] {
            let [small, wide, signed] = dispatch(isa, OneLine { codes, x });
            for r in 0..16 {
                let sum = |product: &dyn Fn(usize, usize) -> i32| -> i32 {
                    (0..4).map(|i| product(4 * r + i, i)).sum()
                };
                assert_eq!(small[r], sum(&|c, i| i32::from(codes[c] % 64) * i32::from(x[i])));
                assert_eq!(wide[r], sum(&|c, i| i32::from(codes[c]) * i32::from(x[i])));
                let weight = |i: usize| i32::from(x[i] as u8 & 127);
                assert_eq!(signed[r], 2 * sum(&|c, i| i32::from(codes[c] as i8) * weight(i)));
            }
        }
    }
}

fn bitlinear_matches_definition(isa: Isa) {
    for (rows, cols, tokens) in [(17, 257, 1), (9, 2561, 6), (1031, 1027, 3), (121, 83, 70)] {
        let weights = TernaryMatrix::from_weights(&floats(rows * cols), rows, cols).unwrap();
        let mut x = floats(tokens * cols);
        if tokens > 1 {
            // A poisoned token is NaN throughout, and leaves the others alone.
            x[cols] = f32::INFINITY;
        }
        let mut expected = vec![0.0; tokens * rows];
        for (x, out) in x.chunks_exact(cols).zip(expected.chunks_exact_mut(rows)) {
            reference::bitlinear(&weights, x, out);
        }
        let mut found = vec![0.0; tokens * rows];
        let activations = Activations::quantize_on(isa, &x, tokens, cols);
        bitlinear_on(isa, &PackedMatrix::from(&weights), &activations, &mut found);
        assert_same_bits(&found, &expected);
        fused_products_match_bitlinear(isa, &weights, &activations, &expected);
    }
}

/// What is done to the outputs of a product on their way out is what would be done to them after.
fn fused_products_match_bitlinear(
    isa: Isa,
    weights: &TernaryMatrix,
    x: &Activations,
    expected: &[f32],
) {
    for packing in Packing::ALL {
        let w = PackedMatrix::new(weights, packing);
        let mut twice = [vec![0.0; expected.len()], vec![0.0; expected.len()]];
        let [a, b] = &mut twice;
        bitlinear_all_on(isa, &mut [(&w, a), (&w, b)], x);
        assert_same_bits(&twice[0], expected);
        assert_same_bits(&twice[1], expected);
        let residual = floats(expected.len());
        let mut found = residual.clone();
        bitlinear_add_on(isa, &w, x, &mut found);
        let sums: Vec<f32> = residual.iter().zip(expected).map(|(a, b)| a + b).collect();
        assert_same_bits(&found, &sums);
        // Another matrix beside it, of the same shape: its rows the other way round.
        let up = weights.select_rows(|r| weights.rows() - 1 - r);
        let mut reversed = expected.to_vec();
        reversed.chunks_exact_mut(up.rows()).for_each(|token| token.reverse());
        for gate in [Gate::Relu2, Gate::Silu] {
            let mut gated = expected.to_vec();
            gate_on(isa, gate, &mut gated, &reversed);
            let mut found = vec![0.0; expected.len()];
            bitlinear_gated_on(isa, gate, [&w, &PackedMatrix::new(&up, packing)], x, &mut found);
            assert_same_bits(&found, &gated);
        }
    }
}

/// The order of a dot product, straight from its documentation.
fn scalar_dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; 16];
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let product = a * b;
        lanes[i % 16] += product;
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// Equal bits; all NaNs count as one, as CPUs differ in the NaN that an operation makes.
fn assert_same_bits(found: &[f32], expected: &[f32]) {
    let bits = |v: &f32| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() };
    let bits = |v: &[f32]| v.iter().map(bits).collect::<Vec<_>>();
    assert_eq!(bits(found), bits(expected));
}

fn dot_matches_scalar(isa: Isa) {
    for cols in COLS {
        let (a, b) = (floats(cols), floats(cols + 5));
        assert_same_bits(&[dot_on(isa, &a, &b[5..])], &[scalar_dot(&a, &b[5..])]);
    }
    for bad in [f32::NAN, f32::INFINITY, f32::MAX, f32::from_bits(1), -0.0] {
        for a in [vec![bad; 3], vec![bad; 33]] {
            assert_same_bits(&[dot_on(isa, &a, &a)], &[scalar_dot(&a, &a)]);
        }
    }
}

fn dense_matches_scalar(isa: Isa) {
    let mut shapes = vec![Shape { rows: 1031, cols: 257, tokens: 5 }];
    for rows in [1, 4, 7] {
        for cols in COLS {
            shapes.extend([1, 2, 4, 9, 18].map(|tokens| Shape { rows, cols, tokens }));
        }
    }
    for shape in shapes {
        if too_large(shape.rows * shape.cols * shape.tokens) {
            continue;
        }
        let (x, w) = (floats(shape.tokens * shape.cols), floats(shape.rows * shape.cols));
        let half: Vec<_> = w.iter().map(|&v| f16::from_f32(v)).collect();
        let bfloat: Vec<_> = w.iter().map(|&v| bf16::from_f32(v)).collect();
        let widened: Vec<_> = half.iter().map(|v| v.to_f32()).collect();
        check_dense(isa, DenseData::F16(&half), &widened, shape, &x);
        let widened: Vec<_> = bfloat.iter().map(|v| v.to_f32()).collect();
        check_dense(isa, DenseData::Bf16(&bfloat), &widened, shape, &x);
        check_dense(isa, DenseData::F32(&w), &w, shape, &x);
    }
}

/// All 65536 of each, denormals and NaNs among them: products with 1, one to a row.
fn widening_is_exact(isa: Isa) {
    let shape = Shape { rows: 1 << 16, cols: 1, tokens: 1 };
    let half: Vec<_> = (0..=u16::MAX).map(f16::from_bits).collect();
    let widened: Vec<_> = half.iter().map(|v| v.to_f32()).collect();
    check_dense(isa, DenseData::F16(&half), &widened, shape, &[1.0]);
    let bfloat: Vec<_> = (0..=u16::MAX).map(bf16::from_bits).collect();
    let widened: Vec<_> = bfloat.iter().map(|v| v.to_f32()).collect();
    check_dense(isa, DenseData::Bf16(&bfloat), &widened, shape, &[1.0]);
}

fn check_dense(isa: Isa, weights: DenseData<'_>, widened: &[f32], shape: Shape, x: &[f32]) {
    let Shape { rows, cols, tokens } = shape;
    if too_large(rows * cols * tokens) {
        return;
    }
    let mut expected = vec![0.0; tokens * rows];
    for t in 0..tokens {
        for r in 0..rows {
            let (w, x) = (&widened[r * cols..][..cols], &x[t * cols..][..cols]);
            expected[t * rows + r] = scalar_dot(w, x);
        }
    }
    let mut found = vec![f32::MAX; tokens * rows];
    dense_matmul_on(isa, weights, shape, x, &mut found);
    assert_same_bits(&found, &expected);
}

/// Threads change who computes an output, never its bits.
fn results_do_not_depend_on_threads(isa: Isa) {
    let (rows, cols, tokens) = (2053, 517, 5);
    let weights = TernaryMatrix::from_weights(&floats(rows * cols), rows, cols).unwrap();
    let (packed, x) = (PackedMatrix::from(&weights), floats(tokens * cols));
    let on_threads = |threads| {
        Arc::new(Pool::new(threads)).install(|| {
            let mut out = [vec![0.0; tokens * rows], vec![0.0; tokens * rows], vec![0.0; rows]];
            let activations = Activations::quantize_on(isa, &x, tokens, cols);
            bitlinear_on(isa, &packed, &activations, &mut out[0]);
            let dense = floats(rows * cols);
            let dense = DenseData::F32(&dense);
            dense_matmul_on(isa, dense, Shape { rows, cols, tokens }, &x, &mut out[1]);
            dense_matmul_on(isa, dense, Shape { rows, cols, tokens: 1 }, &x[..cols], &mut out[2]);
            out
        })
    };
    let expected = on_threads(1);
    for threads in [2, 3, 7] {
        assert_eq!(on_threads(threads), expected);
    }
}

macro_rules! stamp {
    ($isa:expr, [$($claim:ident),* $(,)?]) => {
        $(
            #[test]
            fn $claim() {
                if available().contains(&$isa) {
                    super::$claim($isa);
                } else {
                    println!("not tested: this CPU does not have {}", $isa);
                }
            }
        )*
    };
    ($($module:ident: $isa:expr),* => $claims:tt) => {
        $(mod $module {
            use crate::{Isa, available};
            stamp!($isa, $claims);
        })*
    };
}

// A macro cannot repeat the claims for each instruction set by itself: `$claims` is passed on whole.
stamp!(
    generic: Isa::Generic,
    avx2: Isa::Avx2,
    avxvnni: Isa::AvxVnni,
    avx512: Isa::Avx512,
    avx512vnni: Isa::Avx512Vnni,
    avx512vbmi: Isa::Avx512Vbmi,
    neon: Isa::Neon,
    neondot: Isa::NeonDot
 => [
    matmul_matches_scalar,
    large_matmul_matches_scalar,
    extreme_codes_do_not_overflow,
    random_matmul_matches_scalar,
    lines_match_scalar,
    bitlinear_matches_definition,
    sums_in_16_bits_give_back_every_output,
    block_products_match_scalar,
    block_products_are_those_of_the_numbers,
    sixteen_sums_match_scalar,
    dot_matches_scalar,
    dense_matches_scalar,
    widening_is_exact,
    quantized_activations_match_definition,
    rms_norm_matches_scalar,
    gates_match_scalar,
    softmax_passes_match_scalar,
    attention_matches_scalar,
    kv_attention_matches_scalar,
    kv_attention_is_the_same_in_any_company,
    kv_attention_keeps_poison_to_its_own,
    kv_attention_of_extremes_matches_scalar,
    low_rank_products_match_scalar,
    low_rank_products_are_the_same_in_any_company,
    results_do_not_depend_on_threads,
]);

#[test]
fn required_instruction_sets_were_tested() {
    let tested = available();
    println!("instruction sets tested: {tested:?}; in use: {:?}", select());
    let required = std::env::var("TRINE_REQUIRE_ISA").unwrap_or_default();
    for name in required.split(',').filter(|name| !name.is_empty()) {
        let isa: Isa = name.parse().unwrap();
        assert!(tested.contains(&isa), "{isa} is required, but this CPU has only {tested:?}");
    }
}

/// A forced instruction set that is not there must fail the tests, not pass them on another.
#[test]
fn the_forced_instruction_set_is_in_use() {
    let forced = std::env::var("TRINE_ISA").unwrap_or_default();
    let selected = select().unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(selected, crate::isa());
    if !forced.is_empty() {
        assert_eq!(selected.name(), forced);
    }
}

#[test]
fn products_with_nothing_in_them_are_allowed() {
    for (rows, cols, tokens) in [(0, 5, 2), (3, 5, 0), (0, 0, 0)] {
        let weights = TernaryMatrix::from_trits(&trits(rows * cols), rows, cols, 1.0).unwrap();
        let x = Activations::quantize(&floats(tokens * cols), tokens, cols);
        crate::bitlinear(&PackedMatrix::from(&weights), &x, &mut []);
        let dense = floats(rows * cols);
        let x = floats(tokens * cols);
        crate::dense_matmul(DenseData::F32(&dense), rows, cols, &x, tokens, &mut []);
    }
}

#[test]
#[should_panic(expected = "output is not (tokens, rows)")]
fn a_wrong_output_is_refused() {
    let weights = TernaryMatrix::from_trits(&trits(6), 2, 3, 1.0).unwrap();
    let x = Activations::quantize(&floats(3), 1, 3);
    crate::bitlinear(&PackedMatrix::from(&weights), &x, &mut [0.0; 3]);
}

#[test]
#[should_panic(expected = "differ in columns")]
fn a_wrong_width_is_refused() {
    let weights = TernaryMatrix::from_trits(&trits(6), 2, 3, 1.0).unwrap();
    let x = Activations::quantize(&floats(4), 1, 4);
    crate::bitlinear(&PackedMatrix::from(&weights), &x, &mut [0.0; 2]);
}
