//! Numbers in blocks: gguf-py's bits, errors within bounds, tensors and models that hold them.

#![allow(clippy::unwrap_used)]

mod common;

use half::f16;
use safetensors::SafeTensors;
use trine_format::{DenseTensor, Dtype};

const BLOCKS: [Dtype; 4] = [Dtype::Q8_0, Dtype::Q6_K, Dtype::Q4_0, Dtype::Q3_K];

/// Numbers from a fixed sequence, each the sum of twelve even ones: close to a normal distribution.
fn normal(count: usize, deviation: f32) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| (0..12).map(|_| next()).sum::<f32>() * deviation).collect()
}

fn stored(dtype: Dtype, shape: &[usize], data: Vec<u8>) -> DenseTensor<'static> {
    DenseTensor { name: "x".to_owned(), dtype, shape: shape.to_vec(), data: data.into() }
}

/// `values` as another type and back.
fn rounded(values: &[f32], columns: usize, dtype: Dtype) -> Vec<f32> {
    let shape = [values.len() / columns, columns];
    let data = DenseTensor::from_f32("x", &shape, values).convert(dtype).unwrap().into_owned();
    assert_eq!(Some(data.len()), dtype.bytes(&shape));
    stored(dtype, &shape, data).to_f32()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn blocks_have_the_bits_of_gguf_py() {
    let bytes = std::fs::read(common::data("vectors/block_vectors.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let f32s = |name: &str| -> Vec<f32> {
        let data = file.tensor(name).unwrap().data();
        data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    for kind in BLOCKS {
        for source in ["gauss", "laplace", "corners", "random"] {
            let name = format!("{source}.{}", kind.ggml_type());
            let Ok(encoded) = file.tensor(&name) else {
                let encoded = !matches!(kind, Dtype::Q6_K | Dtype::Q3_K);
                assert!(!encoded && source != "random", "gguf-py has it: {name}");
                continue;
            };
            let tensor = stored(kind, &[1, 0], encoded.data().to_vec());
            let expected = f32s(&format!("{name}.f32"));
            assert_eq!(bits(&tensor.to_f32()), bits(&expected), "{name}");
            if source != "random" {
                let shape = file.tensor(&format!("{source}.x")).unwrap().shape().to_vec();
                let values = f32s(&format!("{source}.x"));
                let ours = DenseTensor::from_f32("x", &shape, &values);
                let ours = ours.convert(kind).unwrap();
                let differ = (0..ours.len()).find(|&i| ours[i] != encoded.data()[i]);
                assert_eq!((ours.len(), differ), (encoded.data().len(), None), "{name}");
            }
        }
    }
}

/// 3.31e-4 of Q6_K, where ggml's own quantizer has 3.55e-4, and 2.88e-3 of Q3_K; wrong scales or places of
/// codes have far more.
#[test]
fn blocks_with_many_scales_have_the_errors_that_their_search_is_for() {
    let values = normal(1 << 17, 0.02);
    for (dtype, bound) in [(Dtype::Q6_K, 3.4e-4), (Dtype::Q3_K, 2.9e-3)] {
        let found = rounded(&values, 256, dtype);
        let square = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
        let sum: f64 = values.iter().zip(&found).map(square).sum();
        let error = (sum / values.len() as f64).sqrt();
        assert!(error < bound, "{dtype:?}: {error}");
    }
}

/// From where the scales are subnormal f16 to large numbers, the error is about half a step.
#[test]
fn blocks_of_every_magnitude_are_held() {
    for (dtype, share, smallest) in
        [(Dtype::Q8_0, 127.0, 1e-5), (Dtype::Q6_K, 31.0, 1e-7), (Dtype::Q4_0, 7.0, 1e-6)]
    {
        let mut deviation = smallest;
        while deviation < 1e4 {
            let values = normal(1024, deviation);
            let found = rounded(&values, 256, dtype);
            for (a, b) in values.chunks(32).zip(found.chunks(32)) {
                let largest = a.iter().fold(0f32, |max, v| max.max(v.abs()));
                // Half a step, and where the scale is a subnormal f16, half a step of that.
                let step = f16::from_f32(largest / share).to_f32().max(6e-8);
                let worst = a.iter().zip(b).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
                let scale_step = 6e-8 * if dtype == Dtype::Q6_K { 0.0 } else { 0.5 * share };
                assert!(worst <= step * 1.25 + scale_step, "{dtype:?} {deviation}: {worst}");
            }
            deviation *= 1.7;
        }
    }
}

#[test]
fn q6_k_keeps_zeros_extremes_and_codes() {
    let mut values = vec![0.0; 256];
    assert_eq!(bits(&rounded(&values, 256, Dtype::Q6_K)), bits(&values));
    // One number among zeros, of either sign, at every place.
    for at in 0..256 {
        for v in [0.7f32, -0.7] {
            values[at] = v;
            let found = rounded(&values, 256, Dtype::Q6_K);
            assert!((found[at] - v).abs() < 0.001 * v.abs(), "{at}: {}", found[at]);
            assert!(found.iter().enumerate().all(|(i, f)| i == at || *f == 0.0), "{at}");
        }
        values[at] = 0.0;
    }
    // Every code at every place, where one step fits all of 16 numbers.
    for shift in 0..64 {
        let values: Vec<f32> =
            (0..256).map(|i| ((i * 4 + i / 16 + shift) % 64) as f32 - 32.0).collect();
        let found = rounded(&values, 256, Dtype::Q6_K);
        let far = values.iter().zip(&found).find(|(a, b)| (*a - *b).abs() > 0.3);
        assert_eq!(far, None, "{shift}");
    }
}

#[test]
fn numbers_that_a_block_cannot_hold_are_named() {
    for dtype in BLOCKS {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e8, -f32::MAX] {
            let mut values = normal(1 << 16, 1.0);
            // The first of several, beyond what one thread converts at a time.
            for at in [40_000, 40_001, 65_000] {
                values[at] = bad;
            }
            let tensor = DenseTensor::from_f32("x", &[256, 256], &values);
            let error = tensor.convert(dtype).unwrap_err().to_string();
            assert!(error.contains(&format!("{bad} at 40000 ")), "{error}");
            assert!(error.contains(dtype.name()), "{error}");
        }
    }
}

#[test]
fn rows_that_are_no_whole_blocks_are_refused() {
    for (dtype, columns, multiple) in [
        (Dtype::Q8_0, 48, "32"),
        (Dtype::Q6_K, 128, "256"),
        (Dtype::Q4_0, 16, "32"),
        (Dtype::Q3_K, 128, "256"),
    ] {
        let values = vec![1.0; 32 * columns];
        let tensor = DenseTensor::from_f32("x", &[32, columns], &values);
        assert_eq!(dtype.bytes(&tensor.shape), None);
        let error = tensor.convert(dtype).unwrap_err().to_string();
        assert!(error.contains(multiple) && error.contains(dtype.name()), "{error}");
        assert!(error.contains(&columns.to_string()), "{error}");
    }
}

#[test]
fn the_same_type_is_carried_as_it_is_and_rows_are_converted_on_their_own() {
    let values = normal(100 * 256, 1.0);
    let source = DenseTensor::from_f32("x", &[100, 256], &values);
    for dtype in Dtype::ALL {
        let data = source.convert(dtype).unwrap().into_owned();
        let tensor = stored(dtype, &[100, 256], data);
        assert!(matches!(tensor.convert(dtype).unwrap(), std::borrow::Cow::Borrowed(_)));
        let whole = tensor.to_f32();
        for rows in [0..1, 3..70, 99..100, 5..5] {
            let part = tensor.rows(rows.clone()).unwrap();
            assert_eq!(part.shape, [rows.len(), 256]);
            assert!(part.to_f32() == whole[rows.start * 256..rows.end * 256], "{dtype:?}");
            let source = source.rows(rows).unwrap();
            assert!(source.convert(dtype).unwrap() == part.data, "{dtype:?}");
        }
        assert!(tensor.rows(99..101).is_none());
        // From blocks to blocks: by way of the numbers.
        for other in Dtype::ALL.into_iter().filter(|other| *other != dtype) {
            let direct = tensor.convert(other).unwrap();
            let plain = DenseTensor::from_f32("x", &[100, 256], &whole);
            assert!(direct == plain.convert(other).unwrap(), "{dtype:?} {other:?}");
        }
    }
}
