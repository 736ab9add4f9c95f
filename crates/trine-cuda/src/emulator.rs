//! The kernels on a CPU: compiled by an ordinary C++ compiler, which has to be installed, with what stands in
//! for a card in `emulator/`. What is right here is mostly right on a card; it is slow.

use std::ffi::{CString, c_char, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::Library;

use crate::backend::{Address, BYTES_BOX, Backend, BytesMap, Kind, Meeting, Product, not_met};
use crate::cache;
use crate::error::{CudaError, Result};
use crate::loopback::{Others, Place};
use crate::sources::{EMULATOR, KERNELS};

/// What runs a kernel: its name, grid, block, bytes of shared memory, arguments.
type Launch =
    unsafe extern "C" fn(*const c_char, u32, u32, u32, u32, u32, u32, u32, *mut *mut c_void) -> i32;

/// Bytes before memory that is handed out, which say how much it is.
const HEADER: usize = 256;

/// Shared memory of a block, as Hopper has it.
const SHARED: usize = 227 << 10;

/// A device that is this CPU. Memory is filled with NaN when it is handed out. Emulators of one machine, also of
/// one process, can meet.
pub struct Emulator {
    library: Library,
    wgmma: bool,
    group: Mutex<Group>,
}

/// Whom an emulator adds up numbers with.
#[derive(Default)]
enum Group {
    #[default]
    None,
    /// Where the others may meet it.
    Place(Place),
    Met(Others),
}

impl Emulator {
    /// The kernels of this crate, which are compiled when a process first asks for them; those of Hopper
    /// among them where `wgmma`.
    ///
    /// # Errors
    /// No C++ compiler, or kernels that it refuses.
    pub fn open(wgmma: bool) -> Result<Self> {
        static BUILT: OnceLock<std::result::Result<(tempfile::TempDir, PathBuf), String>> =
            OnceLock::new();
        let built = BUILT.get_or_init(build);
        let failed = |message: String| CudaError::Call { what: "the emulator".to_owned(), message };
        let (_, path) = built.as_ref().map_err(|e| failed(e.clone()))?;
        // SAFETY: the library is made of this crate's own sources and runs nothing when it is loaded.
        let library = unsafe { Library::new(path) }.map_err(|e| failed(e.to_string()))?;
        Ok(Self { library, wgmma, group: Mutex::default() })
    }

    /// Does something with the others, and leaves them where it fails.
    fn together(&self, run: impl FnOnce(&mut Others) -> Result<()>) -> Result<()> {
        let mut group = self.group.lock().unwrap_or_else(PoisonError::into_inner);
        let Group::Met(others) = &mut *group else { return Err(not_met()) };
        let done = run(others);
        if done.is_err() {
            *group = Group::None;
        }
        done
    }
}

/// The library, in a folder that stays as long as the process.
fn build() -> std::result::Result<(tempfile::TempDir, PathBuf), String> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let run = |command: &mut Command| {
        let output = command.output().map_err(|e| format!("{compiler}, a C++ compiler: {e}"))?;
        match output.status.success() {
            true => Ok(output.stdout),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    };
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let library = dir.path().join("libemulate.so");
    let version = run(Command::new(&compiler).arg("--version"))?;
    let texts = KERNELS.iter().chain(&EMULATOR).map(|(_, text)| text.as_bytes());
    let key: Vec<&[u8]> = texts.chain([compiler.as_bytes(), &version]).collect();
    let code = cache::of(&key, || {
        for (folder, files) in [("kernels", &KERNELS[..]), ("emulator", &EMULATOR)] {
            let folder = dir.path().join(folder);
            std::fs::create_dir(&folder).map_err(|e| e.to_string())?;
            for (name, text) in files {
                std::fs::write(folder.join(name), text).map_err(|e| e.to_string())?;
            }
        }
        let options = ["-O2", "-std=c++17", "-DEMULATED", "-shared", "-fPIC", "-pthread", "-o"];
        let source = dir.path().join("emulator/emulate.cpp");
        run(Command::new(&compiler).args(options).args([&library, &source]))?;
        std::fs::read(&library).map_err(|e| e.to_string())
    })?;
    std::fs::write(&library, code).map_err(|e| e.to_string())?;
    Ok((dir, library))
}

impl Backend for Emulator {
    fn name(&self) -> String {
        "CPU, emulating".to_owned()
    }

    fn processors(&self) -> usize {
        2
    }

    fn shared_memory(&self) -> usize {
        SHARED
    }

    fn has_wgmma(&self) -> bool {
        self.wgmma
    }

    fn memory(&self) -> Result<(usize, usize)> {
        Ok((usize::MAX, usize::MAX))
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        let layout = layout(bytes);
        // SAFETY: the layout has a size, as it has a header.
        let memory = unsafe { std::alloc::alloc(layout) };
        if memory.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        // SAFETY: the memory is as large as that.
        unsafe {
            memory.write_bytes(0xff, layout.size());
            memory.cast::<usize>().write(bytes);
            Ok(memory.add(HEADER) as Address)
        }
    }

    fn free(&self, at: Address) {
        let memory = (at as *mut u8).wrapping_sub(HEADER);
        // SAFETY: `allocate` has put its size there.
        unsafe { std::alloc::dealloc(memory, layout(memory.cast::<usize>().read())) }
    }

    fn upload(&self, to: Address, from: &[u8]) -> Result<()> {
        // SAFETY: callers stay within memory that was allocated.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        // SAFETY: callers stay within memory that was allocated.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        // SAFETY: callers stay within memory that was allocated.
        unsafe { (at as *mut u8).write_bytes(0, bytes) };
        Ok(())
    }

    fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let failed = |message: String| CudaError::Call { what: kernel.to_owned(), message };
        // As a card refuses it.
        if grid[1].max(grid[2]) > 65535
            || grid.contains(&0)
            || block > 1024
            || shared as usize > SHARED
        {
            return Err(failed(format!("grid {grid:?}, block {block}, {shared} bytes")));
        }
        let name = CString::new(kernel).expect("names of kernels have no zero byte");
        // SAFETY: the function has this type in `emulate.cpp`.
        let launch = unsafe { self.library.get::<Launch>(b"emulate_launch\0") }
            .map_err(|e| failed(e.to_string()))?;
        let [x, y, z] = grid;
        // SAFETY: arguments point to values of the kernel's parameters, as they do for a card.
        match unsafe { launch(name.as_ptr(), x, y, z, block, 1, 1, shared, arguments.as_mut_ptr()) }
        {
            0 => Ok(()),
            _ => Err(failed("there is no such kernel".to_owned())),
        }
    }

    fn bytes_map(
        &self,
        at: Address,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Result<BytesMap> {
        let mut map = BytesMap([0; 16]);
        let sizes = [at, columns as u64, rows as u64, stride as u64];
        map.0[..4].copy_from_slice(&sizes);
        map.0[4..6].copy_from_slice(&BYTES_BOX.map(u64::from));
        Ok(map)
    }

    fn meeting(&self) -> Result<Option<Meeting>> {
        let place = Place::open()?;
        let meeting = place.meeting()?;
        *self.group.lock().unwrap_or_else(PoisonError::into_inner) = Group::Place(place);
        Ok(Some(meeting))
    }

    fn meet(&self, meeting: &Meeting, rank: usize, size: usize) -> Result<()> {
        let mut group = self.group.lock().unwrap_or_else(PoisonError::into_inner);
        let place = match std::mem::take(&mut *group) {
            Group::Place(place) => Some(place),
            _ => None,
        };
        *group = Group::Met(Others::meet(meeting, place, rank, size)?);
        Ok(())
    }

    fn sum_beside(&self, at: Address, count: usize) -> Result<()> {
        self.together(|others| {
            others.sum(at, count);
            Ok(())
        })
    }

    fn join_sums(&self) -> Result<()> {
        self.together(Others::join)
    }

    fn leave(&self) {
        *self.group.lock().unwrap_or_else(PoisonError::into_inner) = Group::None;
    }

    fn multiply(&self, product: &Product, a: Address, b: Address, c: Address) -> Result<()> {
        let Product { m, n, k, .. } = *product;
        let element = |at: Address, kind: Kind, stride: usize, transposed: bool, i, j| {
            let (row, column) = if transposed { (j, i) } else { (i, j) };
            let at = (at as *const u8).wrapping_add((row * stride + column) * kind.bytes());
            // SAFETY: callers stay within memory that was allocated.
            unsafe {
                match kind {
                    Kind::F32 => at.cast::<f32>().read(),
                    Kind::Bf16 => f32::from_bits(u32::from(at.cast::<u16>().read()) << 16),
                }
            }
        };
        let mut right = vec![0f32; k * n];
        for (i, row) in right.chunks_exact_mut(n).enumerate() {
            for (j, x) in row.iter_mut().enumerate() {
                *x = element(b, product.factors, product.b_stride, product.b_transposed, i, j);
            }
        }
        let mut sums = vec![0f32; n];
        for i in 0..m {
            sums.fill(0.0);
            for (l, row) in right.chunks_exact(n).enumerate() {
                let x = element(a, product.factors, product.a_stride, product.a_transposed, i, l);
                sums.iter_mut().zip(row).for_each(|(sum, y)| *sum += x * y);
            }
            for (j, sum) in sums.iter().enumerate() {
                let at = i * product.c_stride + j;
                // SAFETY: callers stay within memory that was allocated.
                unsafe {
                    match product.result {
                        Kind::F32 => {
                            let at = (c as *mut f32).add(at);
                            at.write(sum + if product.add { at.read() } else { 0.0 });
                        }
                        Kind::Bf16 => {
                            let at = (c as *mut u16).add(at);
                            let before = f32::from_bits(u32::from(at.read()) << 16);
                            let sum = sum + if product.add { before } else { 0.0 };
                            let bits = sum.to_bits();
                            let even = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
                            let bits = if sum.is_nan() { 0x7fff_0000 } else { even };
                            at.write((bits >> 16) as u16);
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

fn layout(bytes: usize) -> std::alloc::Layout {
    std::alloc::Layout::from_size_align(bytes + HEADER, HEADER).expect("sizes are small in tests")
}
