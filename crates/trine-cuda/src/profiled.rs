//! A device that is waited for after everything, so that each kernel and product has its own time.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::backend::{Address, Backend, BytesMap, Meeting, Product};
use crate::error::Result;

/// What a kernel, or the products of one shape, took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Time {
    /// The kernel's name, or the product's sizes.
    pub name: String,
    /// How often it ran.
    pub times: usize,
    /// Seconds, all together.
    pub seconds: f64,
    /// Operations of products, all together; none of kernels.
    pub operations: f64,
}

/// A device with a clock.
pub struct Profiled {
    device: Arc<dyn Backend>,
    /// Read to wait for what comes before.
    word: Address,
    is_on: AtomicBool,
    found: Mutex<BTreeMap<String, Time>>,
}

impl Profiled {
    /// A device that is not watched yet.
    ///
    /// # Errors
    /// When it has no memory left.
    pub fn new(device: Arc<dyn Backend>) -> Result<Self> {
        let word = device.allocate(4)?;
        Ok(Self { device, word, is_on: AtomicBool::new(false), found: Mutex::default() })
    }

    /// Watches `run`, and returns what took time in it, the longest first.
    ///
    /// # Errors
    /// Those of `run`.
    pub fn watch<E>(
        &self,
        run: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Vec<Time>, E> {
        self.is_on.store(true, Ordering::Relaxed);
        let ran = run();
        self.is_on.store(false, Ordering::Relaxed);
        let found = std::mem::take(&mut *self.found.lock().unwrap_or_else(|e| e.into_inner()));
        ran?;
        let mut found: Vec<_> = found.into_values().collect();
        found.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(found)
    }

    fn timed(
        &self,
        name: impl FnOnce() -> String,
        operations: f64,
        run: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if !self.is_on.load(Ordering::Relaxed) {
            return run();
        }
        let wait = || self.device.download(self.word, &mut [0; 4]);
        wait()?;
        let begin = Instant::now();
        run()?;
        wait()?;
        let seconds = begin.elapsed().as_secs_f64();
        let name = name();
        let mut found = self.found.lock().unwrap_or_else(|e| e.into_inner());
        let time = found.entry(name.clone()).or_insert(Time { name, ..Time::default() });
        time.times += 1;
        time.seconds += seconds;
        time.operations += operations;
        Ok(())
    }
}

impl Drop for Profiled {
    fn drop(&mut self) {
        self.device.free(self.word);
    }
}

impl Backend for Profiled {
    fn name(&self) -> String {
        self.device.name()
    }

    fn processors(&self) -> usize {
        self.device.processors()
    }

    fn shared_memory(&self) -> usize {
        self.device.shared_memory()
    }

    fn has_wgmma(&self) -> bool {
        self.device.has_wgmma()
    }

    fn memory(&self) -> Result<(usize, usize)> {
        self.device.memory()
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.device.allocate(bytes)
    }

    fn free(&self, at: Address) {
        self.device.free(at);
    }

    fn upload(&self, to: Address, from: &[u8]) -> Result<()> {
        self.device.upload(to, from)
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.device.download(from, to)
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        self.timed(|| "clear".to_owned(), 0.0, || self.device.clear(at, bytes))
    }

    fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let run = || self.device.launch(kernel, grid, block, shared, arguments);
        self.timed(|| kernel.to_owned(), 0.0, run)
    }

    fn bytes_map(
        &self,
        at: Address,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Result<BytesMap> {
        self.device.bytes_map(at, rows, columns, stride)
    }

    fn meeting(&self) -> Result<Option<Meeting>> {
        self.device.meeting()
    }

    fn meet(&self, meeting: &Meeting, rank: usize, size: usize) -> Result<()> {
        self.device.meet(meeting, rank, size)
    }

    fn sum_beside(&self, at: Address, count: usize) -> Result<()> {
        self.device.sum_beside(at, count)
    }

    fn join_sums(&self) -> Result<()> {
        self.timed(|| "sums over processes".to_owned(), 0.0, || self.device.join_sums())
    }

    fn leave(&self) {
        self.device.leave();
    }

    fn multiply(&self, product: &Product, a: Address, b: Address, c: Address) -> Result<()> {
        let Product { m, n, k, .. } = *product;
        let operations = 2.0 * m as f64 * n as f64 * k as f64;
        let name = || format!("product {m} x {n} x {k}, {:?}", product.result);
        self.timed(name, operations, || self.device.multiply(product, a, b, c))
    }
}
