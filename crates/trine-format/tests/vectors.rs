//! Layouts against vectors made with gguf-py, transformers and bitnet.cpp's own code.

#![allow(clippy::unwrap_used)]

mod common;

use safetensors::SafeTensors;
use trine_format::gguf::TernaryType;
use trine_format::gguf::i2_s::{self, Order};
use trine_format::hf_packed;
use trine_ternary::TernaryMatrix;

/// Calls `check` with each matrix of the vectors, and what reads a named tensor of it.
fn for_each_matrix(check: impl Fn(&TernaryMatrix, &dyn Fn(&str) -> Vec<u8>)) {
    let bytes = std::fs::read(common::data("vectors/pack_vectors.safetensors")).unwrap();
    let st = SafeTensors::deserialize(&bytes).unwrap();
    for name in ["a", "b", "c"] {
        let get = |kind: &str| st.tensor(&format!("{name}.{kind}")).unwrap().data().to_vec();
        let shape = st.tensor(&format!("{name}.ternary_i8")).unwrap().shape().to_vec();
        let trits: Vec<i8> = get("ternary_i8").into_iter().map(|b| b as i8).collect();
        let scale = f32::from_le_bytes(get("scale_f32").try_into().unwrap());
        check(&TernaryMatrix::from_trits(&trits, shape[0], shape[1], scale).unwrap(), &get);
    }
}

#[test]
fn i2_s_matches_bitnet_cpp() {
    for_each_matrix(|matrix, get| {
        let expected = get("I2_S_x86");
        assert_eq!(i2_s::encode(matrix).unwrap(), expected);
        assert_eq!(&i2_s::decode(&expected, matrix.rows(), matrix.cols()).unwrap(), matrix);
    });
}

#[test]
fn every_order_of_i2_s_is_read() {
    for_each_matrix(|matrix, get| {
        for (name, order) in [
            ("I2_S_x86", Order::Blocks128),
            ("I2_S_arm", Order::Blocks64),
            ("I2_S_x86_noactparallel", Order::Rows4),
        ] {
            let (rows, cols) = (matrix.rows(), matrix.cols());
            let read = |order| i2_s::decode_ordered(&get(name), rows, cols, order).unwrap();
            assert_eq!(&read(order), matrix, "{name}");
            let others = Order::ALL.into_iter().filter(|&other| other != order);
            assert!(others.map(read).all(|other| other != *matrix), "{name}");
        }
    });
}

#[test]
fn i2_s_ignores_what_bitnet_cpp_leaves_in_the_tail() {
    for_each_matrix(|matrix, get| {
        let mut bytes = get("I2_S_x86");
        let unused = bytes.len() - 28;
        bytes[unused..].fill(0xff);
        assert_eq!(&i2_s::decode(&bytes, matrix.rows(), matrix.cols()).unwrap(), matrix);
    });
}

#[test]
fn tq_types_match_gguf_py() {
    for_each_matrix(|matrix, get| {
        for (kind, name) in [(TernaryType::Tq1_0, "TQ1_0"), (TernaryType::Tq2_0, "TQ2_0")] {
            let expected = get(name);
            assert_eq!(kind.encode(matrix).unwrap(), expected, "{name}");
            let decoded = kind.decode(&expected, matrix.rows(), matrix.cols()).unwrap();
            assert_eq!(decoded.trits(), matrix.trits(), "{name}");
            let values: Vec<u8> =
                decoded.dequantize().iter().flat_map(|v| (v + 0.0).to_le_bytes()).collect();
            let plus_zero: Vec<u8> = get(&format!("{name}.dequant_f32"))
                .as_chunks()
                .0
                .iter()
                .flat_map(|&b| (f32::from_le_bytes(b) + 0.0).to_le_bytes())
                .collect();
            assert_eq!(values, plus_zero, "{name}");
        }
    });
}

#[test]
fn hf_packing_matches_transformers() {
    for_each_matrix(|matrix, get| {
        let expected = get("hf_packed");
        assert_eq!(hf_packed::encode(matrix), expected);
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let decoded = hf_packed::decode(&expected, rows, cols, matrix.scale()).unwrap();
        assert_eq!(&decoded, matrix);
    });
}
