//! Parts of a slice or of a matrix that do not overlap, for threads that write to them.

use std::marker::PhantomData;

/// Some columns of some rows of a matrix: what one thread has of it while others have the rest.
pub struct Strip<'a, T> {
    start: *mut T,
    rows: usize,
    cols: usize,
    /// From one row to the next.
    stride: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it is an exclusive reference to its elements, which need `T: Send`.
unsafe impl<T: Send> Send for Strip<'_, T> {}
// SAFETY: who shares it shares references to its elements, which need `T: Sync`.
unsafe impl<T: Sync> Sync for Strip<'_, T> {}

impl<T> Strip<'_, T> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `r`, `(cols,)`.
    ///
    /// # Panics
    /// When there is no row `r`.
    #[inline]
    pub fn row(&self, r: usize) -> &[T] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        // SAFETY: a row of the strip, which is borrowed for as long as the result.
        unsafe { std::slice::from_raw_parts(self.start.add(r * self.stride), self.cols) }
    }

    /// As [`Self::row`], to be written.
    ///
    /// # Panics
    /// As [`Self::row`].
    #[inline]
    pub fn row_mut(&mut self, r: usize) -> &mut [T] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        // SAFETY: as of `row`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(r * self.stride), self.cols) }
    }
}

/// Cuts `data` `(rows, width)` into strips of `height` rows and `cols` columns: those of the first rows
/// from left to right, then those of the next.
///
/// # Panics
/// When strips of this size do not fill the matrix.
pub fn strips<T>(data: &mut [T], width: usize, height: usize, cols: usize) -> Vec<Strip<'_, T>> {
    if data.is_empty() {
        return Vec::new();
    }
    let fits = height > 0 && cols > 0 && width.is_multiple_of(cols);
    assert!(fits && data.len().is_multiple_of(width * height), "strips fill a matrix");
    let (down, across) = (data.len() / (width * height), width / cols);
    let start = data.as_mut_ptr();
    let strip = |i: usize| Strip {
        // Within the slice, as the strips fill it; and no two of them share an element.
        start: start.wrapping_add(i / across * height * width + i % across * cols),
        rows: height,
        cols,
        stride: width,
        borrow: PhantomData,
    };
    (0..down * across).map(strip).collect()
}

/// A slice of which threads take parts that do not overlap.
pub(crate) struct SharedMut<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

impl<T> Clone for SharedMut<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedMut<'_, T> {}

// SAFETY: it gives out nothing but exclusive references, for which `T: Send` is what threads need.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), borrow: PhantomData }
    }

    /// Where element `index` is, or would be.
    pub(crate) fn address(&self, index: usize) -> *const T {
        self.start.wrapping_add(index)
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// While the slice is alive, no other of these elements may be taken.
    ///
    /// # Panics
    /// When they are not all in the slice.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part {start}+{len} of {}", self.len);
        // SAFETY: in bounds by the assertion, and exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::for_each;
    use super::*;

    #[test]
    fn strips_are_all_of_a_matrix_once() {
        let mut data = vec![0; 6 * 8];
        let mut parts = strips(&mut data, 8, 3, 2);
        for_each(&mut parts, |i, strip| {
            for r in 0..strip.rows() {
                assert_eq!(strip.row(r), [0, 0]);
                strip.row_mut(r).fill(10 * i + r);
            }
        });
        for (at, found) in data.iter().enumerate() {
            let (row, col) = (at / 8, at % 8);
            assert_eq!(*found, 10 * (row / 3 * 4 + col / 2) + row % 3);
        }
        assert!(strips(&mut [0u8; 0], 8, 3, 2).is_empty());
    }
}
