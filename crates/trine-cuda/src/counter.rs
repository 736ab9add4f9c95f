//! A device that computes nothing and counts the memory that is asked of it: what an engine will need.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard};

use crate::backend::{Address, Backend, BytesMap, Product};
use crate::error::Result;

/// A device without memory.
#[derive(Default)]
pub struct Counter {
    wgmma: bool,
    counted: Mutex<Counted>,
}

#[derive(Default)]
struct Counted {
    /// Bytes of what has been handed out, by address.
    allocated: BTreeMap<Address, usize>,
    /// Bytes now, and at most so far.
    now: usize,
    most: usize,
    next: Address,
}

impl Counter {
    /// Of a card with Hopper's instructions or without.
    pub fn new(wgmma: bool) -> Self {
        Self { wgmma, counted: Mutex::default() }
    }

    /// The most bytes that were in use at a time.
    pub fn most(&self) -> usize {
        self.counted().most
    }

    fn counted(&self) -> MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Backend for Counter {
    fn name(&self) -> String {
        "none".to_owned()
    }

    fn processors(&self) -> usize {
        132
    }

    fn shared_memory(&self) -> usize {
        99 << 10
    }

    fn has_wgmma(&self) -> bool {
        self.wgmma
    }

    fn memory(&self) -> Result<(usize, usize)> {
        Ok((usize::MAX, usize::MAX))
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        let mut counted = self.counted();
        let at = counted.next;
        counted.next += bytes.next_multiple_of(256) as Address;
        counted.allocated.insert(at, bytes);
        counted.now += bytes;
        counted.most = counted.most.max(counted.now);
        Ok(at)
    }

    fn free(&self, at: Address) {
        let mut counted = self.counted();
        counted.now -= counted.allocated.remove(&at).unwrap_or(0);
    }

    fn upload(&self, _to: Address, _from: &[u8]) -> Result<()> {
        Ok(())
    }

    fn download(&self, _from: Address, to: &mut [u8]) -> Result<()> {
        to.fill(0);
        Ok(())
    }

    fn clear(&self, _at: Address, _bytes: usize) -> Result<()> {
        Ok(())
    }

    fn launch(
        &self,
        _kernel: &str,
        _grid: [u32; 3],
        _block: u32,
        _shared: u32,
        _arguments: &mut [*mut c_void],
    ) -> Result<()> {
        Ok(())
    }

    fn bytes_map(&self, _at: Address, _: usize, _: usize, _: usize) -> Result<BytesMap> {
        Ok(BytesMap([0; 16]))
    }

    fn multiply(&self, _: &Product, _a: Address, _b: Address, _c: Address) -> Result<()> {
        Ok(())
    }
}
