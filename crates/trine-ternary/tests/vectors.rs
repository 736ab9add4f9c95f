//! The definition against vectors made with PyTorch, transformers and gguf-py.
//!
//! `tests/data/vectors` at the repository's root; its README names versions and generator.

#![allow(clippy::unwrap_used)]

use safetensors::{Dtype, SafeTensors};
use trine_ternary::{EPSILON, absmean, quantize_activations, ternarize};

fn load() -> Vec<u8> {
    let path =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/vectors/quant_vectors.safetensors");
    std::fs::read(path).unwrap()
}

fn f32s(st: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let t = st.tensor(name).unwrap();
    assert_eq!(t.dtype(), Dtype::F32);
    t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn i8s(st: &SafeTensors<'_>, name: &str) -> Vec<i8> {
    let t = st.tensor(name).unwrap();
    assert_eq!(t.dtype(), Dtype::I8);
    t.data().iter().map(|&b| b as i8).collect()
}

/// Distance in units in the last place.
fn ulps(a: f32, b: f32) -> u32 {
    a.to_bits().abs_diff(b.to_bits())
}

#[test]
fn activations_match_transformers() {
    let bytes = load();
    let st = SafeTensors::deserialize(&bytes).unwrap();
    let (x, scales) = (f32s(&st, "act.x_f32"), f32s(&st, "act.scale_f32"));
    let (codes, values) =
        (i8s(&st, "act.int8_half_even"), f32s(&st, "act.dequant_f32_transformers"));
    let half_up = i8s(&st, "act.int8_half_up_onebitllms");
    assert_ne!(codes, half_up, "the vectors must tell the rounding rules apart");
    for (row, scale) in scales.iter().enumerate() {
        let at = row * 8..(row + 1) * 8;
        let mut out = [0; 8];
        assert_eq!(quantize_activations(&x[at.clone()], &mut out), *scale, "row {row}");
        assert_eq!(out, codes[at.clone()], "row {row}");
        for (code, value) in out.iter().zip(&values[at]) {
            assert_eq!(f32::from(*code) / scale, *value, "row {row}");
        }
    }
}

#[test]
fn weights_match_transformers() {
    let bytes = load();
    let st = SafeTensors::deserialize(&bytes).unwrap();
    let mut differs_from_half_up = false;
    for i in 0..5 {
        let w = f32s(&st, &format!("w{i}.w_f32"));
        let expected = i8s(&st, &format!("w{i}.ternary_half_even"));
        let mean = f32s(&st, &format!("w{i}.absmean_f32"))[0].max(EPSILON);
        let scale = absmean(&w).unwrap();
        // PyTorch sums in f32, in its own order: the scale may differ in its last places.
        assert!(ulps(scale, mean) <= 2, "w{i}: {scale} against {mean}");
        for scale in [scale, mean] {
            let mut trits = vec![0; w.len()];
            ternarize(&w, scale, &mut trits).unwrap();
            assert_eq!(trits, expected, "w{i}");
        }
        let values = f32s(&st, &format!("w{i}.dequant_f32_transformers"));
        for (trit, value) in expected.iter().zip(values) {
            // transformers divides by the reciprocal where the definition multiplies by the scale.
            assert!(ulps((f32::from(*trit) * mean).abs(), value.abs()) <= 1, "w{i}");
        }
        differs_from_half_up |= expected != i8s(&st, &format!("w{i}.ternary_half_up_onebitllms"));
    }
    assert!(differs_from_half_up, "the vectors must tell the rounding rules apart");
}
