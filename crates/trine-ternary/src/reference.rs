//! The scalar integer product: the specification that every kernel is compared with.
//!
//! Shapes: `trits` is `(rows, cols)` row-major, one trit an element; `x` is `(tokens, cols)` int8
//! codes; the result is `(tokens, rows)` i32. A sum of 16 million products of magnitude 128 fits.

use crate::{TernaryMatrix, quantize_activations, rescale};

/// One matrix times one vector: `out[r] = sum over c of trits[r, c] * x[c]`.
///
/// # Panics
/// When the lengths do not fit together.
pub fn matvec(trits: &[i8], x: &[i8], out: &mut [i32]) {
    matmul(trits, x, 1, out);
}

/// One matrix times `tokens` vectors: `out[t, r] = sum over c of trits[r, c] * x[t, c]`.
///
/// # Panics
/// When the lengths do not fit together.
pub fn matmul(trits: &[i8], x: &[i8], tokens: usize, out: &mut [i32]) {
    if tokens == 0 || out.is_empty() {
        assert!(out.is_empty(), "no tokens, but room for their output");
        return;
    }
    let (rows, cols) = (out.len() / tokens, x.len() / tokens);
    assert_eq!(out.len(), tokens * rows, "output is not (tokens, rows)");
    assert_eq!(x.len(), tokens * cols, "activations are not (tokens, cols)");
    assert_eq!(trits.len(), rows * cols, "trits are not (rows, cols)");
    for t in 0..tokens {
        let x = &x[t * cols..][..cols];
        for r in 0..rows {
            let row = &trits[r * cols..][..cols];
            out[t * rows + r] = row.iter().zip(x).map(|(&w, &v)| i32::from(w) * i32::from(v)).sum();
        }
    }
}

/// The forward pass of a BitLinear layer on one token, straight from the definition.
///
/// `x` is `(cols,)`, `out` is `(rows,)`.
///
/// # Panics
/// When the lengths do not fit the matrix.
pub fn bitlinear(weights: &TernaryMatrix, x: &[f32], out: &mut [f32]) {
    let mut codes = vec![0; x.len()];
    let mut sums = vec![0; out.len()];
    let scale = quantize_activations(x, &mut codes);
    matvec(&weights.trits(), &codes, &mut sums);
    for (y, sum) in out.iter_mut().zip(sums) {
        *y = rescale(sum, weights.scale(), scale);
    }
}
