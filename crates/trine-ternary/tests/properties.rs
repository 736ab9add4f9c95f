//! What must hold for every input.

#![allow(clippy::unwrap_used)]

use proptest::collection::vec;
use proptest::prelude::*;
use trine_ternary::pack::{
    find_code_three, pack_2bit, pack_base3, row_bytes_2bit, row_bytes_base3, unpack_2bit,
    unpack_base3,
};
use trine_ternary::{
    TernaryError, TernaryMatrix, absmean, quantize_activations, reference, ternarize,
};

fn trits(len: impl Into<proptest::collection::SizeRange>) -> impl Strategy<Value = Vec<i8>> {
    vec(-1i8..=1, len)
}

/// Finite floats over the whole range of exponents.
fn finite() -> impl Strategy<Value = f32> {
    any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |v| v.is_finite())
}

proptest! {
    #[test]
    fn pack_unpack_is_identity(t in trits(0..200)) {
        let mut out = vec![9; t.len()];
        let mut packed = vec![0; row_bytes_2bit(t.len())];
        pack_2bit(&t, &mut packed).unwrap();
        unpack_2bit(&packed, &mut out).unwrap();
        prop_assert_eq!(&out, &t);
        let mut packed = vec![0; row_bytes_base3(t.len())];
        pack_base3(&t, &mut packed).unwrap();
        unpack_base3(&packed, &mut out).unwrap();
        prop_assert_eq!(&out, &t);
    }

    #[test]
    fn unpack_pack_is_identity_on_accepted_bytes(bytes in vec(any::<u8>(), 1..20), cut in 0usize..5) {
        let mut again = vec![0; bytes.len()];
        let mut out = vec![0; bytes.len() * 4 - cut.min(3)];
        if unpack_2bit(&bytes, &mut out).is_ok() {
            pack_2bit(&out, &mut again).unwrap();
            prop_assert_eq!(&again, &bytes);
        }
        let mut out = vec![0; bytes.len() * 5 - cut];
        if unpack_base3(&bytes, &mut out).is_ok() {
            pack_base3(&out, &mut again).unwrap();
            prop_assert_eq!(&again, &bytes);
        }
    }

    #[test]
    fn matrix_keeps_trits_and_scale((rows, cols, t) in (0usize..9, 0usize..23)
        .prop_flat_map(|(r, c)| (Just(r), Just(c), trits(r * c))), scale in 0f32..10.0) {
        let m = TernaryMatrix::from_trits(&t, rows, cols, scale).unwrap();
        prop_assert_eq!(m.trits(), t);
        prop_assert_eq!(m.scale(), scale);
    }

    #[test]
    fn rows_one_by_one_make_the_same_matrix((rows, cols, w) in (0usize..9, 0usize..40)
        .prop_flat_map(|(r, c)| (Just(r), Just(c), vec(finite(), r * c)))) {
        let whole = TernaryMatrix::from_weights(&w, rows, cols).unwrap();
        let widen = |r: usize, out: &mut [f32]| out.copy_from_slice(&w[r * cols..][..cols]);
        let by_rows = TernaryMatrix::from_weight_rows(rows, cols, widen).unwrap();
        prop_assert_eq!(&by_rows, &whole);
        prop_assert_eq!(whole.scale(), absmean(&w).unwrap());
        let count = |of| whole.trits().into_iter().filter(|t| *t == of).count();
        prop_assert_eq!(whole.counts(), [-1, 0, 1].map(count));
    }

    #[test]
    fn a_byte_without_trits_is_found_wherever_it_is(len in 1usize..10_000, at in 0usize..10_000) {
        let mut bytes = vec![0b10_01_00_10; len];
        prop_assert_eq!(find_code_three(&bytes), None);
        let at = at % len;
        bytes[at] = 0b00_11_00_00;
        prop_assert_eq!(find_code_three(&bytes), Some(at));
        let refused = unpack_2bit(&bytes, &mut vec![0; len * 4]);
        prop_assert_eq!(refused, Err(TernaryError::Code { index: at, byte: bytes[at] }));
    }

    #[test]
    fn trits_are_the_nearest_of_three(w in vec(finite(), 1..100)) {
        let scale = absmean(&w).unwrap();
        let mut t = vec![0; w.len()];
        ternarize(&w, scale, &mut t).unwrap();
        for (t, w) in t.iter().zip(&w) {
            let ratio = f64::from(*w) / f64::from(scale);
            let distance = |k: i8| (ratio - f64::from(k)).abs();
            let best = distance(-1).min(distance(0)).min(distance(1));
            // One f32 rounding of the reciprocal and one of the product.
            prop_assert!(distance(*t) <= best + 2e-7 * ratio.abs().max(1.0));
        }
    }

    #[test]
    fn negated_weights_have_negated_trits(w in vec(finite(), 1..100)) {
        let scale = absmean(&w).unwrap();
        let negated: Vec<f32> = w.iter().map(|v| -v).collect();
        prop_assert_eq!(absmean(&negated).unwrap(), scale);
        let (mut a, mut b) = (vec![0; w.len()], vec![0; w.len()]);
        ternarize(&w, scale, &mut a).unwrap();
        ternarize(&negated, scale, &mut b).unwrap();
        prop_assert!(a.iter().zip(&b).all(|(a, b)| *a == -b));
    }

    #[test]
    fn scale_does_not_depend_on_the_order(mut w in vec(-100f32..100.0, 1..500)) {
        let scale = absmean(&w).unwrap();
        w.reverse();
        prop_assert_eq!(absmean(&w).unwrap(), scale);
        w.sort_by(f32::total_cmp);
        prop_assert_eq!(absmean(&w).unwrap(), scale);
    }

    #[test]
    fn codes_are_within_half_a_step(x in vec(-1e3f32..1e3, 1..100)) {
        let mut codes = vec![0; x.len()];
        let s = quantize_activations(&x, &mut codes);
        for (code, v) in codes.iter().zip(&x) {
            prop_assert!((f32::from(*code) - v * s).abs() <= 0.5);
            prop_assert!(*code >= -127);
        }
    }

    #[test]
    fn any_bits_of_activations_give_codes_or_nan(bits in vec(any::<u32>(), 1..50)) {
        let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let mut codes = vec![0; x.len()];
        let s = quantize_activations(&x, &mut codes);
        prop_assert_eq!(s.is_nan(), x.iter().any(|v| !v.is_finite()));
    }

    #[test]
    fn matmul_is_matvec_of_every_token(t in trits(7 * 13), x in vec(any::<i8>(), 3 * 13)) {
        let mut all = vec![0; 3 * 7];
        reference::matmul(&t, &x, 3, &mut all);
        for token in 0..3 {
            let mut one = vec![0; 7];
            reference::matvec(&t, &x[token * 13..][..13], &mut one);
            prop_assert_eq!(&all[token * 7..][..7], &one);
        }
    }

    #[test]
    fn bitlinear_is_the_product_of_the_dequantized(w in vec(-1f32..1.0, 5 * 11), x in vec(-9f32..9.0, 11)) {
        let m = TernaryMatrix::from_weights(&w, 5, 11).unwrap();
        let mut y = vec![0.0; 5];
        reference::bitlinear(&m, &x, &mut y);
        let mut codes = vec![0; 11];
        let s = quantize_activations(&x, &mut codes);
        for (row, y) in m.dequantize().chunks(11).zip(y) {
            let expected: f64 = row.iter().zip(&codes)
                .map(|(w, c)| f64::from(*w) * f64::from(*c) / f64::from(s)).sum();
            prop_assert!((expected - f64::from(y)).abs() <= 1e-4 * expected.abs().max(1.0));
        }
    }
}
