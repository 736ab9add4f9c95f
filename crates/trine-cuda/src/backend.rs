//! What a device does for the engine: memory, kernels, products.

use std::ffi::c_void;
use std::sync::Arc;

use crate::error::{CudaError, Result};

/// A device's address.
pub type Address = u64;

/// How a number of a matrix is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Single precision.
    F32,
    /// The upper half of an f32.
    Bf16,
}

impl Kind {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// As in the names of kernels.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// `c (m, n) = a b`, or added to `c`; `a` is `(m, k)`, `b` is `(k, n)`, each of which may lie transposed.
/// All lie row by row, rows `stride` elements apart. Sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Product {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// How the factors are kept.
    pub factors: Kind,
    /// Whether `a` lies as `(k, m)`.
    pub a_transposed: bool,
    /// Whether `b` lies as `(n, k)`.
    pub b_transposed: bool,
    /// From one row to the next.
    pub a_stride: usize,
    /// From one row to the next.
    pub b_stride: usize,
    /// How the result is kept.
    pub result: Kind,
    /// From one row to the next.
    pub c_stride: usize,
    /// Whether it is added to what is there.
    pub add: bool,
}

impl Product {
    /// Of factors that lie as they are multiplied, with a result that is kept as they are.
    pub fn new(
        kind: Kind,
        [m, n, k]: [usize; 3],
        [a_stride, b_stride, c_stride]: [usize; 3],
    ) -> Self {
        let (a_transposed, b_transposed, add) = (false, false, false);
        let (factors, result) = (kind, kind);
        Self {
            m,
            n,
            k,
            factors,
            a_transposed,
            b_transposed,
            a_stride,
            b_stride,
            result,
            c_stride,
            add,
        }
    }
}

/// What a kernel is given of a matrix of bytes, by value.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct BytesMap(pub [u64; 16]);

/// Rows and columns of a box of such a matrix.
pub const BYTES_BOX: [u32; 2] = [128, 128];

/// A device. What is asked of it happens in order, but for [sums](Self::sum_beside) over processes; only
/// [`download`](Self::download) and [`join_sums`](Self::join_sums) wait.
///
/// Addresses are those of the device's memory. A kernel that misuses them spoils this memory or is stopped
/// by the device; memory of this process it cannot reach.
pub trait Backend: Send + Sync {
    /// Its name, for people.
    fn name(&self) -> String;

    /// Multiprocessors: how many blocks of one kernel have work at a time, at least.
    fn processors(&self) -> usize;

    /// Bytes of shared memory that a block may have.
    fn shared_memory(&self) -> usize;

    /// Whether warps multiply in groups of four (wgmma, of `sm_90a` alone).
    fn has_wgmma(&self) -> bool;

    /// Bytes of memory that are free, and of all.
    ///
    /// # Errors
    /// When the device has failed.
    fn memory(&self) -> Result<(usize, usize)>;

    /// Memory that may hold anything.
    ///
    /// # Errors
    /// When there is none left.
    fn allocate(&self, bytes: usize) -> Result<Address>;

    /// Gives memory back.
    fn free(&self, at: Address);

    /// Copies to the device.
    ///
    /// # Errors
    /// When the device has failed.
    fn upload(&self, to: Address, from: &[u8]) -> Result<()>;

    /// Waits for everything before it, and copies from the device.
    ///
    /// # Errors
    /// When the device has failed: in this or in anything before.
    fn download(&self, from: Address, to: &mut [u8]) -> Result<()>;

    /// Fills memory with zeros.
    ///
    /// # Errors
    /// When the device has failed.
    fn clear(&self, at: Address, bytes: usize) -> Result<()>;

    /// Runs a kernel over `grid` blocks of `block` threads with `shared` bytes of memory each. Each argument
    /// points to its value.
    ///
    /// # Errors
    /// A kernel that there is not, or a device that has failed.
    fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<()>;

    /// What kernels that copy a matrix of bytes themselves (the tensor memory accelerator) are given: it lies
    /// row by row, rows `stride` bytes apart, and is read in boxes of 128 rows of 128 bytes.
    ///
    /// # Errors
    /// A device that does not have it.
    fn bytes_map(
        &self,
        at: Address,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Result<BytesMap>;

    /// What other processes need to know to meet this one, if devices can add up numbers among themselves.
    ///
    /// # Errors
    /// When the library fails.
    fn meeting(&self) -> Result<Option<Meeting>> {
        Ok(None)
    }

    /// Meets the other processes, all of which do this at once: this is process `rank` of `size`.
    ///
    /// # Errors
    /// A device that cannot, or one that two processes have.
    fn meet(&self, _meeting: &Meeting, _rank: usize, _size: usize) -> Result<()> {
        Err(cannot_meet(self.name()))
    }

    /// Adds up `count` f32 over all processes that have met, in place: as they are after everything that was
    /// asked before, and beside what is asked after this, which leaves them alone until
    /// [`join_sums`](Self::join_sums). All processes ask for the same sums in the same order.
    ///
    /// # Errors
    /// When they have not met, or one has failed; then this one has left them.
    fn sum_beside(&self, _at: Address, _count: usize) -> Result<()> {
        Err(cannot_meet(self.name()))
    }

    /// Waits for all sums, and so for what was asked before them.
    ///
    /// # Errors
    /// As of [`sum_beside`](Self::sum_beside).
    fn join_sums(&self) -> Result<()> {
        Err(cannot_meet(self.name()))
    }

    /// Leaves the other processes, because this one fails: gives up sums that are on their way, for which memory
    /// could not be given back otherwise. As far as devices notice, the sums of the others fail too.
    fn leave(&self) {}

    /// Computes a product of matrices.
    ///
    /// # Errors
    /// A product that the library has no algorithm for, or a device that has failed.
    fn multiply(&self, product: &Product, a: Address, b: Address, c: Address) -> Result<()>;
}

fn cannot_meet(found: String) -> CudaError {
    CudaError::Unsupported {
        what: "sums over the devices of several processes",
        expected: "NVIDIA GPUs that have met, and NCCL".to_owned(),
        found,
    }
}

/// Of sums by a process that has met no others, or has left them.
pub(crate) fn not_met() -> CudaError {
    let message = "the processes have not met".to_owned();
    CudaError::Call { what: "a sum over processes".to_owned(), message }
}

/// What processes tell each other to add up numbers of their devices: NCCL's unique id, an emulator's address.
pub type Meeting = [u8; 128];

/// An argument of a kernel: at most eight bytes.
pub(crate) trait Argument: Copy {
    /// Its bytes, the first in the lowest.
    fn bits(self) -> u64;
}

impl Argument for u64 {
    fn bits(self) -> u64 {
        self
    }
}
impl Argument for u32 {
    fn bits(self) -> u64 {
        self.into()
    }
}
impl Argument for f32 {
    fn bits(self) -> u64 {
        self.to_bits().into()
    }
}
impl Argument for bool {
    fn bits(self) -> u64 {
        self.into()
    }
}
impl Argument for usize {
    /// Sizes are u32 in kernels.
    fn bits(self) -> u64 {
        debug_assert!(u32::try_from(self).is_ok(), "a size that kernels do not take");
        self as u64
    }
}
/// Memory that may not be there.
impl Argument for Option<u64> {
    fn bits(self) -> u64 {
        self.unwrap_or(0)
    }
}

/// Runs a kernel: `launch!(device, "name", [blocks], threads, shared; arguments...)`.
macro_rules! launch {
    ($device:expr, $kernel:expr, $grid:expr, $block:expr, $shared:expr; $($argument:expr),+ $(,)?) => {{
        let mut values = [$($crate::backend::Argument::bits($argument)),+];
        let mut pointers = values.each_mut().map(|value| std::ptr::from_mut(value).cast());
        let [x, y, z]: [usize; 3] = $grid;
        let grid = [x as u32, y as u32, z as u32];
        $device.launch($kernel, grid, $block as u32, $shared as u32, &mut pointers)
    }};
}
pub(crate) use launch;

/// Memory of a device, of which more is asked for where it is too small.
pub struct Buffer {
    device: Arc<dyn Backend>,
    at: Address,
    bytes: usize,
}

impl Buffer {
    /// Without memory yet.
    pub(crate) fn new(device: &Arc<dyn Backend>) -> Self {
        Self { device: device.clone(), at: 0, bytes: 0 }
    }

    /// Of `bytes`.
    ///
    /// # Errors
    /// When there is none left.
    pub fn with(device: &Arc<dyn Backend>, bytes: usize) -> Result<Self> {
        let mut buffer = Self::new(device);
        buffer.reserve(bytes)?;
        Ok(buffer)
    }

    /// Has at least `bytes`; what was there may be gone.
    pub(crate) fn reserve(&mut self, bytes: usize) -> Result<Address> {
        if bytes > self.bytes {
            self.release();
            self.at = self.device.allocate(bytes)?;
            self.bytes = bytes;
        }
        Ok(self.at)
    }

    fn release(&mut self) {
        if self.bytes > 0 {
            self.device.free(self.at);
            (self.at, self.bytes) = (0, 0);
        }
    }

    /// Where it lies.
    pub fn at(&self) -> Address {
        self.at
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.release();
    }
}
