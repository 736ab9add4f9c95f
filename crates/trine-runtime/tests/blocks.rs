//! Matrices in blocks have the numbers of the files: the format's codecs define them, the kernels
//! multiply them.

use trine_format::{DenseTensor, Dtype};
use trine_kernels::{BlockKind, BlockMatrix, block_matmul};

const KINDS: [(Dtype, BlockKind); 4] = [
    (Dtype::Q8_0, BlockKind::Q8_0),
    (Dtype::Q6_K, BlockKind::Q6_K),
    (Dtype::Q4_0, BlockKind::Q4_0),
    (Dtype::Q3_K, BlockKind::Q3_K),
];

/// Rows of several panels, columns of several blocks.
const ROWS: usize = 35;
const COLS: usize = 768;

fn floats(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 % 1009) as f32 - 504.3) * [1e-4, 3e-3, 0.02][i / 50 % 3]).collect()
}

#[test]
fn rows_of_a_block_matrix_are_those_of_the_tensor() {
    let values = floats(ROWS * COLS);
    let tensor = DenseTensor::from_f32("head", &[ROWS, COLS], &values);
    for (dtype, kind) in KINDS {
        let stored = tensor.convert(dtype).unwrap();
        let matrix = BlockMatrix::new(kind, ROWS, COLS, &stored);
        assert_eq!(dtype.bytes(&[kind.block()]), Some(kind.block_bytes()));
        let stored = DenseTensor { dtype, data: stored, ..tensor.clone() };
        let mut row = vec![0.0; COLS];
        for (r, expected) in stored.to_f32().chunks_exact(COLS).enumerate() {
            matrix.row(r, &mut row);
            let bits = |row: &[f32]| row.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&row), bits(expected), "{kind:?} row {r}");
        }
    }
}

#[test]
fn products_with_blocks_are_those_of_their_numbers() {
    let values = floats(ROWS * COLS);
    let tensor = DenseTensor::from_f32("head", &[ROWS, COLS], &values);
    let x: Vec<f32> = (0..COLS).map(|i| (i * 31 % 97) as f32 / 48.0 - 1.0).collect();
    for (dtype, kind) in KINDS {
        let stored = tensor.convert(dtype).unwrap();
        let mut found = vec![0.0; ROWS];
        block_matmul(&BlockMatrix::new(kind, ROWS, COLS, &stored), &x, 1, &mut found);
        let stored = DenseTensor { dtype, data: stored, ..tensor.clone() };
        for (row, found) in stored.to_f32().chunks_exact(COLS).zip(found) {
            let products = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            let spread = products.clone().map(|p| p * p).sum::<f64>().sqrt();
            let error = (f64::from(found) - products.sum::<f64>()).abs();
            assert!(error < 2e-4 * spread, "{kind:?}: {error} of {spread}");
        }
    }
}
