//! A buffer that starts on a cache line, and in large pages where it is large.
//!
//! A 64-byte load that crosses a cache line costs two, and a weight matrix in pages of 4 KiB costs a
//! walk of the page table for every 4 KiB that are read. Both are speed here and never soundness: the
//! kernels use loads that accept any address, so this needs no unsafe code.

use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use memmap2::MmapMut;

/// Bytes in a cache line, and in the widest vector.
const LINE: usize = 64;

/// From this many bytes on, a buffer is memory of the system's own, in large pages if it has them.
const LARGE: usize = 2 << 20;

/// Elements of which the first lies on a multiple of 64 bytes.
#[derive(Debug)]
pub struct AlignedBuf<T> {
    storage: Storage,
    len: usize,
    element: std::marker::PhantomData<T>,
}

#[derive(Debug)]
enum Storage {
    /// With room before the elements to move their start, the offset, to a cache line.
    Small(Vec<u8>, usize),
    /// Pages.
    Large(MmapMut),
}

impl<T: Pod> AlignedBuf<T> {
    /// `len` zeros.
    ///
    /// # Panics
    /// When their bytes are more than an address can count.
    pub fn new(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>()).expect("a buffer within the address space");
        Self { storage: Storage::new(bytes), len, element: std::marker::PhantomData }
    }

    /// Makes it `len` elements, of any value, in the memory it has where that is enough.
    ///
    /// # Panics
    /// As [`Self::new`].
    pub fn resize(&mut self, len: usize) {
        let bytes = len.checked_mul(size_of::<T>()).expect("a buffer within the address space");
        if bytes <= self.storage.room() {
            self.len = len;
        } else {
            // What is given up first need not be there beside the new one.
            *self = Self::default();
            *self = Self::new(len);
        }
    }
}

impl<T: Pod> Default for AlignedBuf<T> {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Storage {
    fn new(bytes: usize) -> Self {
        if bytes >= LARGE
            && let Ok(map) = MmapMut::map_anon(bytes)
        {
            // A system without large pages is only slower.
            #[cfg(all(target_os = "linux", not(miri)))]
            let _ = map.advise(memmap2::Advice::HugePage);
            return Self::Large(map);
        }
        let storage = vec![0; bytes + LINE - 1];
        // `align_offset` may give up and return `usize::MAX`; any start is then as good, as long as
        // the elements themselves are aligned: those wider than a byte get it from the allocator.
        let start = storage.as_ptr().align_offset(LINE);
        let start = if start < LINE { start } else { 0 };
        Self::Small(storage, start)
    }

    /// Bytes that there is room for.
    fn room(&self) -> usize {
        match self {
            Self::Small(storage, start) => storage.len() - start,
            Self::Large(map) => map.len(),
        }
    }
}

impl<T: Pod> Deref for AlignedBuf<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        let bytes = self.len * size_of::<T>();
        bytemuck::cast_slice(match &self.storage {
            Storage::Small(storage, start) => &storage[*start..][..bytes],
            Storage::Large(map) => &map[..bytes],
        })
    }
}

impl<T: Pod> DerefMut for AlignedBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let bytes = self.len * size_of::<T>();
        bytemuck::cast_slice_mut(match &mut self.storage {
            Storage::Small(storage, start) => &mut storage[*start..][..bytes],
            Storage::Large(map) => &mut map[..bytes],
        })
    }
}

impl<T: Pod> Clone for AlignedBuf<T> {
    fn clone(&self) -> Self {
        let mut buf = Self::new(self.len);
        buf.copy_from_slice(self);
        buf
    }
}

impl<T: Pod + PartialEq> PartialEq for AlignedBuf<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_shrinks_and_grows_keeps_its_memory() {
        for large in [64, LARGE / 4 + 64] {
            let mut buf = AlignedBuf::<u32>::new(large);
            let start = buf.as_ptr();
            for len in [3, 0, large] {
                buf.resize(len);
                assert_eq!((buf.len(), buf.as_ptr()), (len, start));
            }
            buf.resize(2 * large);
            buf.fill(7);
            assert_eq!(buf.len(), 2 * large);
        }
    }

    #[test]
    fn buffers_start_on_a_cache_line() {
        for len in [0, 1, 63, 64, 65, 4096, LARGE / 4, LARGE + 1] {
            if cfg!(miri) && len > 4096 {
                continue;
            }
            let mut buf = AlignedBuf::<i32>::new(len);
            assert!(buf.iter().all(|v| *v == 0));
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
