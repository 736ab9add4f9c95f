//! A buffer that starts on a cache line.
//!
//! A 64-byte load that crosses a cache line costs two. Alignment is speed here and never soundness:
//! the kernels use loads that accept any address, so this needs no unsafe code.

use std::ops::{Deref, DerefMut};

/// Bytes in a cache line, and in the widest vector.
const LINE: usize = 64;

/// One-byte elements of which the first lies on a multiple of 64.
#[derive(Debug)]
pub(crate) struct AlignedBuf<T> {
    /// The elements, with room before them to move their start to a cache line.
    storage: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy + Default> AlignedBuf<T> {
    /// `len` default elements.
    pub(crate) fn new(len: usize) -> Self {
        const { assert!(size_of::<T>() == 1) };
        let storage = vec![T::default(); len + LINE - 1];
        // `align_offset` may give up and return `usize::MAX`; any start is then as good.
        let start = storage.as_ptr().align_offset(LINE).min(LINE - 1);
        Self { storage, start, len }
    }
}

impl<T> Deref for AlignedBuf<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.storage[self.start..][..self.len]
    }
}

impl<T> DerefMut for AlignedBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.storage[self.start..][..self.len]
    }
}

impl<T: Copy + Default> Clone for AlignedBuf<T> {
    fn clone(&self) -> Self {
        // A copied vector may lie elsewhere relative to a cache line, so the start is found anew.
        let mut buf = Self::new(self.len);
        buf.copy_from_slice(self);
        buf
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_start_on_a_cache_line() {
        for len in [0, 1, 63, 64, 65, 4096] {
            let mut buf = AlignedBuf::<i8>::new(len);
            buf.fill(7);
            let copy = buf.clone();
            assert_eq!(*copy, *buf);
            for buf in [&buf, &copy] {
                assert_eq!(buf.as_ptr().align_offset(LINE), 0);
                assert_eq!(buf.len(), len);
            }
        }
    }
}
