//! Products of plain f32 matrices, by the `gemm` crate: for training without quantization, and for
//! gradients where bfloat16 is not wanted. With feature `f32-gemm`; the runtime needs none of it.

/// What happens to outputs that are there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// They are replaced.
    Set,
    /// They are added to.
    Add,
}

/// A matrix of `(rows, cols)` numbers in the order of rows, or the transpose of one.
#[cfg(feature = "f32-gemm")]
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// The numbers.
    pub data: &'a [f32],
    /// Whether they are those of the transpose, in the order of its rows.
    pub transposed: bool,
}

#[cfg(feature = "f32-gemm")]
impl<'a> Matrix<'a> {
    /// The matrix of these numbers.
    pub fn plain(data: &'a [f32]) -> Self {
        Self { data, transposed: false }
    }

    /// The transpose of the matrix of these numbers.
    pub fn turned(data: &'a [f32]) -> Self {
        Self { data, transposed: true }
    }
}

/// `out = a b`, or that much more: `a` is `(m, k)`, `b` `(k, n)`, `out` `(m, n)` in the order of rows.
///
/// # Panics
/// When a slice is not of its shape.
#[cfg(feature = "f32-gemm")]
pub fn matmul([m, k, n]: [usize; 3], a: Matrix<'_>, b: Matrix<'_>, store: Store, out: &mut [f32]) {
    let lengths = [a.data.len(), b.data.len(), out.len()].map(Some);
    assert_eq!(lengths, [m.checked_mul(k), k.checked_mul(n), m.checked_mul(n)], "wrong shapes");
    let strides = |x: Matrix<'_>, rows: usize, cols: usize| match x.transposed {
        true => (rows as isize, 1),
        false => (1, cols as isize),
    };
    let ((a_cs, a_rs), (b_cs, b_rs)) = (strides(a, m, k), strides(b, k, n));
    let threads = crate::parallel::threads();
    let parallelism = match threads {
        1 => gemm::Parallelism::None,
        _ => gemm::Parallelism::Rayon(threads),
    };
    // SAFETY: the slices have the lengths of these shapes and strides, and `out` is borrowed alone.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            store == Store::Add,
            a.data.as_ptr(),
            a_cs,
            a_rs,
            b.data.as_ptr(),
            b_cs,
            b_rs,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(all(test, feature = "f32-gemm"))]
mod tests {
    use super::*;

    #[test]
    fn products_are_the_formula_in_every_order() {
        let (m, k, n) = (5, 7, 3);
        let number = |i: usize| (i * 37 % 19) as f32 - 9.0;
        let (a, b) = (|r, i| number(r * k + i), |i, c| number(5 + i * n + c));
        for (turn, store) in
            [Store::Set, Store::Add, Store::Set, Store::Add].into_iter().enumerate()
        {
            let (a_turned, b_turned) = (turn & 1 == 1, turn & 2 == 2);
            let a_data: Vec<_> = (0..m * k)
                .map(|x| if a_turned { a(x % m, x / m) } else { a(x / k, x % k) })
                .collect();
            let b_data: Vec<_> = (0..k * n)
                .map(|x| if b_turned { b(x % k, x / k) } else { b(x / n, x % n) })
                .collect();
            let mut out = vec![1.0; m * n];
            let matrix = |data, transposed| Matrix { data, transposed };
            let (left, right) = (matrix(&a_data[..], a_turned), matrix(&b_data[..], b_turned));
            matmul([m, k, n], left, right, store, &mut out);
            for (x, out) in out.iter().enumerate() {
                let sum: f32 = (0..k).map(|i| a(x / n, i) * b(i, x % n)).sum();
                assert_eq!(*out, if store == Store::Add { 1.0 + sum } else { sum });
            }
        }
    }
}
