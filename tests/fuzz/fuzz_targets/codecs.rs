//! Every decoder of bytes: what it accepts must encode to the same bytes, or to equal trits.
//!
//! The first byte picks the decoder, the next two are rows and columns, the rest is the data. With
//! the highest bit of the first byte set the data is cut or filled up to the size that the shape
//! asks for, so that the fuzzer need not find it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use trine_format::gguf::i2_s::{self, Order};
use trine_format::gguf::{GgmlType, TernaryType};
use trine_format::{DenseTensor, Dtype, hf_packed};
use trine_ternary::pack::{
    pack_2bit, pack_base3, row_bytes_2bit, row_bytes_base3, unpack_2bit, unpack_base3,
};
use trine_ternary::{TernaryError, TernaryMatrix};

/// Columns of blocks come in these units, so that blocks of 256 are met.
const UNIT: usize = 64;

fuzz_target!(|input: &[u8]| {
    let Some((&[pick, rows, cols], data)) = input.split_first_chunk() else { return };
    let (rows, cols, fit) = (usize::from(rows), usize::from(cols), pick & 128 != 0);
    let wide = cols / 32 * UNIT;
    match pick % 16 {
        0 => ternary(TernaryType::I2S, data, rows, cols, fit),
        1 => ternary(TernaryType::I2S, data, rows, wide, fit),
        2 => ternary(TernaryType::Tq1_0, data, rows, wide, fit),
        3 => ternary(TernaryType::Tq2_0, data, rows, wide, fit),
        4 => ternary(TernaryType::Trn2, data, rows, cols, fit),
        5 => ordered(Order::Blocks64, data, rows, cols, fit),
        6 => ordered(Order::Rows4, data, rows, cols, fit),
        7 => ordered(Order::Blocks128, data, rows, wide, fit),
        8 => packed(data, rows, cols, fit),
        9 => dense(Dtype::Q8_0, data, rows, wide),
        10 => dense(Dtype::Q6_K, data, rows, wide),
        11 => dense(Dtype::Q4_0, data, rows, wide),
        12 => dense([Dtype::F32, Dtype::F16, Dtype::BF16][cols % 3], data, rows, cols),
        13 => rows_of_bytes(data, cols, unpack_2bit, pack_2bit, row_bytes_2bit, fit),
        14 => rows_of_bytes(data, cols, unpack_base3, pack_base3, row_bytes_base3, fit),
        _ => canonical(data, rows, cols, fit),
    }
});

/// The data, cut or filled up to a size where that is wanted.
fn sized(data: &[u8], size: Option<usize>, fit: bool) -> Vec<u8> {
    let mut data = data.to_vec();
    if fit {
        data.resize(size.unwrap_or(data.len()), 0);
    }
    data
}

/// The layouts with a scale in every block.
const TQ: [TernaryType; 2] = [TernaryType::Tq1_0, TernaryType::Tq2_0];

/// A matrix is stored and read again as it is, in every layout that holds its shape and scale.
fn round_trips(matrix: &TernaryMatrix) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    for kind in [TernaryType::I2S, TernaryType::Tq1_0, TernaryType::Tq2_0, TernaryType::Trn2] {
        let Ok(bytes) = kind.encode(matrix) else { continue };
        let again = kind.decode(&bytes, rows, cols).unwrap();
        // The TQ types have no trits in a block of scale 0: whatever they are, its values are 0.
        let vanishes = matrix.scale() == 0.0 && TQ.contains(&kind);
        assert!(again.trits() == matrix.trits() || vanishes, "{kind:?}");
    }
    let bytes = hf_packed::encode(matrix);
    assert!(hf_packed::decode(&bytes, rows, cols, matrix.scale()).as_ref() == Ok(matrix));
    let again = TernaryMatrix::from_packed(matrix.packed().to_vec(), rows, cols, matrix.scale());
    assert!(again.as_ref() == Ok(matrix));
}

fn ternary(kind: TernaryType, data: &[u8], rows: usize, cols: usize, fit: bool) {
    let data = sized(data, kind.ggml_type().tensor_bytes(&[rows, cols]), fit);
    let Ok(matrix) = kind.decode(&data, rows, cols) else { return };
    round_trips(&matrix);
    let again = kind.encode(&matrix).unwrap();
    let decoded = kind.decode(&again, rows, cols).unwrap();
    assert!(decoded.trits() == matrix.trits(), "{kind:?}");
    assert_eq!(decoded.scale().to_bits(), matrix.scale().to_bits(), "{kind:?}");
    if kind == TernaryType::Trn2 {
        assert!(again == data);
    }
}

fn ordered(order: Order, data: &[u8], rows: usize, cols: usize, fit: bool) {
    let data = sized(data, GgmlType::I2_S.tensor_bytes(&[rows, cols]), fit);
    let Ok(matrix) = i2_s::decode_ordered(&data, rows, cols, order) else { return };
    round_trips(&matrix);
    // Each order has each code once.
    let mut codes = [0; 3];
    for byte in &data[..rows * cols / 4] {
        (0..4).for_each(|i| codes[usize::from(byte >> (2 * i) & 3)] += 1);
    }
    assert_eq!(codes, matrix.counts());
}

fn packed(data: &[u8], rows: usize, cols: usize, fit: bool) {
    let data = sized(data, Some(rows.div_ceil(4) * cols), fit);
    let Ok(matrix) = hf_packed::decode(&data, rows, cols, 0.5) else { return };
    round_trips(&matrix);
    if rows.is_multiple_of(4) {
        assert!(hf_packed::encode(&matrix) == data);
    }
}

fn canonical(data: &[u8], rows: usize, cols: usize, fit: bool) {
    let data = sized(data, Some(rows * row_bytes_2bit(cols)), fit);
    let Ok(matrix) = TernaryMatrix::from_packed(data.clone(), rows, cols, 1.0) else { return };
    let again = TernaryMatrix::from_trits(&matrix.trits(), rows, cols, 1.0).unwrap();
    assert!(again.packed() == data);
    round_trips(&matrix);
}

fn rows_of_bytes(
    data: &[u8],
    cols: usize,
    unpack: fn(&[u8], &mut [i8]) -> Result<(), TernaryError>,
    pack: fn(&[i8], &mut [u8]) -> Result<(), TernaryError>,
    bytes: fn(usize) -> usize,
    fit: bool,
) {
    let data = sized(data, Some(bytes(cols)), fit);
    let mut trits = vec![0; cols];
    if unpack(&data, &mut trits).is_ok() {
        let mut again = vec![0xff; bytes(cols)];
        pack(&trits, &mut again).unwrap();
        assert!(again == data);
    }
}

/// Plain numbers widen from any bytes, and what every type stores of them is close by.
fn dense(dtype: Dtype, data: &[u8], rows: usize, cols: usize) {
    let Some(size) = dtype.bytes(&[rows, cols]) else { return };
    let data = sized(data, Some(size), true);
    let tensor = DenseTensor {
        name: "t".to_owned(),
        dtype,
        shape: vec![rows, cols],
        data: data.as_slice().into(),
    };
    let values = tensor.to_f32();
    assert_eq!(values.len(), rows * cols);
    let whole = tensor.rows(0..rows).map(|rows| rows.to_f32());
    assert!(
        whole
            .is_none_or(|again| again.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()))
    );
    for to in Dtype::ALL {
        let Ok(converted) = tensor.convert(to) else { continue };
        assert_eq!(Some(converted.len()), to.bytes(&[rows, cols]));
        let again = DenseTensor {
            name: "t".to_owned(),
            dtype: to,
            shape: vec![rows, cols],
            data: converted.as_ref().into(),
        };
        if to == Dtype::F32 {
            let same =
                |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            assert!(again.to_f32().iter().zip(&values).all(same));
        }
        let finite = values.iter().all(|v| v.is_finite());
        assert!(!finite || again.to_f32().iter().all(|v| v.is_finite()), "{dtype:?} as {to:?}");
    }
}
