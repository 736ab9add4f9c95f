//! A card: CUDA's driver, its run-time compiler and cuBLASLt, by way of cudarc.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};
use std::sync::Mutex;

use cudarc::cublaslt::{result as lt, sys as lt_sys};
use cudarc::driver::{result as cu, sys as cu_sys};

use crate::backend::{Address, BYTES_BOX, Backend, BytesMap, Kind, Meeting, Product, not_met};
use crate::compile;
use crate::error::{CudaError, Result};
use crate::nccl::{self, Others};

/// What cuBLASLt is given beside the matrices: what it is recommended to have on Hopper.
const WORKSPACE: usize = 64 << 20;

/// What addresses of matrices are multiples of, unless cuBLASLt is told otherwise.
const ALIGNMENT: u64 = 256;

/// Shared memory that a kernel has without being asked about it.
const SHARED: u32 = 48 << 10;

/// A card, with the kernels on it.
pub struct Driver {
    name: String,
    processors: usize,
    shared_memory: usize,
    wgmma: bool,
    context: cu_sys::CUcontext,
    device: cu_sys::CUdevice,
    module: cu_sys::CUmodule,
    blas: lt_sys::cublasLtHandle_t,
    workspace: Address,
    kernels: Mutex<HashMap<String, Kernel>>,
    /// By whether all addresses are multiples of [`ALIGNMENT`].
    plans: Mutex<HashMap<(Product, bool), Plan>>,
    /// The processes whose numbers are added up.
    others: Mutex<Option<Others>>,
}

struct Kernel {
    function: cu_sys::CUfunction,
    shared: u32,
}

/// How cuBLASLt computes a product.
struct Plan {
    description: lt_sys::cublasLtMatmulDesc_t,
    /// Of what cuBLASLt calls A, B and C.
    layouts: [lt_sys::cublasLtMatrixLayout_t; 3],
    algorithm: lt_sys::cublasLtMatmulAlgo_t,
}

// SAFETY: handles of CUDA may be used by any thread that has made the context its own, which every method
// does first; what changes is behind locks.
unsafe impl Send for Driver {}
// SAFETY: as above; a stream, here the context's own, takes work from several threads.
unsafe impl Sync for Driver {}

impl Driver {
    /// Card `index`, with all kernels compiled for it.
    ///
    /// # Errors
    /// A library that is missing, no such card, or kernels that do not compile for it.
    pub fn open(index: usize) -> Result<Self> {
        find_libraries()?;
        let no_device = |message: String| CudaError::NoDevice { index, message };
        cu::init().map_err(|e| no_device(message(e)))?;
        let count = cu::device::get_count().map_err(|e| no_device(message(e)))?;
        let ordinal = i32::try_from(index).ok().filter(|i| *i < count);
        let ordinal = ordinal.ok_or_else(|| no_device(format!("there are {count}")))?;
        let device = cu::device::get(ordinal).map_err(|e| no_device(message(e)))?;
        let name = cu::device::get_name(device).map_err(call("the name of the device"))?;
        use cu_sys::CUdevice_attribute as Attribute;
        let attribute = |attribute: Attribute| {
            // SAFETY: the device exists.
            unsafe { cu::device::get_attribute(device, attribute) }
                .map_err(call("an attribute of the device"))
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let processors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let shared_memory =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        if major < 8 {
            return Err(CudaError::Unsupported {
                what: "the card's compute capability",
                expected: "8.0 or higher, which has products of bfloat16".to_owned(),
                found: format!("{major}.{minor} ({name})"),
            });
        }
        let wgmma = (major, minor) == (9, 0);
        let architecture = format!("sm_{major}{minor}{}", if wgmma { "a" } else { "" });
        // SAFETY: the device exists, and its context is released when this is dropped.
        let context = unsafe { cu::primary_ctx::retain(device) }.map_err(call("the context"))?;
        let mut driver = Self {
            name,
            processors,
            shared_memory,
            wgmma,
            context,
            device,
            module: std::ptr::null_mut(),
            blas: std::ptr::null_mut(),
            workspace: 0,
            kernels: Mutex::default(),
            plans: Mutex::default(),
            others: Mutex::default(),
        };
        driver.enter()?;
        let image = compile::kept_for_architecture(&architecture)?;
        // SAFETY: the image is what the compiler returned, whole.
        driver.module = unsafe { cu::module::load_data(image.as_ptr().cast()) }
            .map_err(call("loading the kernels"))?;
        driver.blas = lt::create_handle().map_err(call("cuBLASLt"))?;
        driver.workspace = driver.allocate(WORKSPACE)?;
        Ok(driver)
    }

    /// Makes the context that of the calling thread.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as this.
        unsafe { cu::ctx::set_current(self.context) }.map_err(call("the context"))
    }

    /// Does something with the other processes, and leaves them where it fails.
    fn together(&self, run: impl FnOnce(&mut Others) -> Result<()>) -> Result<()> {
        self.enter()?;
        let mut others = self.others.lock().unwrap_or_else(|e| e.into_inner());
        let done = others.as_mut().map_or_else(|| Err(not_met()), run);
        if done.is_err() {
            *others = None;
        }
        done
    }

    /// How a product is computed, of matrices at multiples of [`ALIGNMENT`] or of 16 bytes.
    fn plan(&self, product: &Product, aligned: bool) -> Result<Plan> {
        use lt_sys::cublasLtMatmulDescAttributes_t as Description;
        let failed = |e: lt::CublasError| CudaError::Call {
            what: format!("an algorithm for the product {product:?}"),
            message: e.to_string(),
        };
        let kind = |kind: Kind| match kind {
            Kind::F32 => lt_sys::cudaDataType_t::CUDA_R_32F,
            Kind::Bf16 => lt_sys::cudaDataType_t::CUDA_R_16BF,
        };
        let transposed = |yes: bool| i32::from(yes).to_ne_bytes();
        // cuBLASLt has matrices column by column, so it computes `c` transposed, of `b` and `a` transposed.
        let Product { m, n, k, .. } = *product;
        let a = if product.b_transposed { (k, n) } else { (n, k) };
        let b = if product.a_transposed { (m, k) } else { (k, m) };
        let compute = lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        // SAFETY: descriptions are made by cuBLASLt, described by attributes of the size that they have,
        // and destroyed when this is dropped.
        unsafe {
            let description = lt::create_matmul_desc(compute, kind(Kind::F32)).map_err(failed)?;
            for (attribute, yes) in [
                (Description::CUBLASLT_MATMUL_DESC_TRANSA, product.b_transposed),
                (Description::CUBLASLT_MATMUL_DESC_TRANSB, product.a_transposed),
            ] {
                let value = transposed(yes);
                lt::set_matmul_desc_attribute(description, attribute, value.as_ptr().cast(), 4)
                    .map_err(failed)?;
            }
            let layout = |of: Kind, (rows, columns): (usize, usize), stride: usize| {
                lt::create_matrix_layout(kind(of), rows as u64, columns as u64, stride as i64)
                    .map_err(failed)
            };
            let layouts = [
                layout(product.factors, a, product.b_stride)?,
                layout(product.factors, b, product.a_stride)?,
                layout(product.result, (n, m), product.c_stride)?,
            ];
            let preference = lt::create_matmul_pref().map_err(failed)?;
            let most = lt_sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            let bytes = WORKSPACE.to_ne_bytes();
            lt::set_matmul_pref_attribute(preference, most, bytes.as_ptr().cast(), bytes.len())
                .map_err(failed)?;
            use lt_sys::cublasLtMatmulPreferenceAttributes_t as Preference;
            for least in [
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ] {
                let bytes = if aligned { ALIGNMENT as u32 } else { 16 }.to_ne_bytes();
                lt::set_matmul_pref_attribute(
                    preference,
                    least,
                    bytes.as_ptr().cast(),
                    bytes.len(),
                )
                .map_err(failed)?;
            }
            let [la, lb, lc] = layouts;
            let found =
                lt::get_matmul_algo_heuristic(self.blas, description, la, lb, lc, lc, preference);
            lt::destroy_matmul_pref(preference).map_err(failed)?;
            Ok(Plan { description, layouts, algorithm: found.map_err(failed)?.algo })
        }
    }
}

impl Backend for Driver {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn processors(&self) -> usize {
        self.processors
    }

    fn shared_memory(&self) -> usize {
        self.shared_memory
    }

    fn has_wgmma(&self) -> bool {
        self.wgmma
    }

    fn memory(&self) -> Result<(usize, usize)> {
        self.enter()?;
        cu::mem_get_info().map_err(call("the device's memory"))
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.enter()?;
        // SAFETY: the memory is given back by `free` alone.
        unsafe { cu::malloc_sync(bytes) }.or_else(|e| {
            let (free, total) = self.memory()?;
            let gb = |bytes: usize| bytes as f64 / 1e9;
            match e.0 {
                cu_sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    Err(CudaError::Memory { wanted: gb(bytes), free: gb(free), total: gb(total) })
                }
                _ => Err(call("memory of the device")(e)),
            }
        })
    }

    fn free(&self, at: Address) {
        // SAFETY: the memory came from `allocate`. What fails here has failed before.
        let _ = self.enter().map(|()| unsafe { cu::free_sync(at) });
    }

    fn upload(&self, to: Address, from: &[u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: the bytes are read before the call returns.
        unsafe { cu::memcpy_htod_sync(to, from) }.map_err(call("a copy to the device"))
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: the bytes are written before the call returns.
        unsafe { cu::memcpy_dtoh_sync(to, from) }.map_err(call("a copy from the device"))
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: it is memory of the device.
        unsafe { cu::memset_d8_async(at, 0, bytes, std::ptr::null_mut()) }
            .map_err(call("clearing memory of the device"))
    }

    fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        self.enter()?;
        let mut kernels = self.kernels.lock().unwrap_or_else(|e| e.into_inner());
        if !kernels.contains_key(kernel) {
            let name = CString::new(kernel).expect("names of kernels have no zero byte");
            // SAFETY: the module is loaded.
            let function =
                unsafe { cu::module::get_function(self.module, name) }.map_err(call(kernel))?;
            kernels.insert(kernel.to_owned(), Kernel { function, shared: SHARED });
        }
        let found = kernels.get_mut(kernel).expect("it has just been put there");
        if shared > found.shared {
            use cu_sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as Most;
            // SAFETY: the function belongs to the module that is loaded.
            unsafe { cu::function::set_function_attribute(found.function, Most, shared as i32) }
                .map_err(call(kernel))?;
            found.shared = shared;
        }
        let (grid, block) = ((grid[0], grid[1], grid[2]), (block, 1, 1));
        // SAFETY: arguments point to values of at least their size; what a kernel does with addresses
        // concerns memory of the device only.
        unsafe {
            let stream = std::ptr::null_mut();
            cu::launch_kernel(found.function, grid, block, shared, stream, arguments)
        }
        .map_err(call(kernel))
    }

    fn bytes_map(
        &self,
        at: Address,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Result<BytesMap> {
        self.enter()?;
        let mut map = BytesMap([0; 16]);
        let (sizes, strides) = ([columns as u64, rows as u64], [stride as u64]);
        let steps = [1u32; 2];
        // SAFETY: the map is as large and as aligned as a CUtensorMap, and all sizes are there.
        unsafe {
            cu_sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                cu_sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
                2,
                at as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                BYTES_BOX.as_ptr(),
                steps.as_ptr(),
                cu_sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                cu_sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                cu_sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                cu_sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(call("the map of a matrix of bytes"))?;
        Ok(map)
    }

    fn meeting(&self) -> Result<Option<Meeting>> {
        self.enter()?;
        nccl::meeting()
    }

    fn meet(&self, meeting: &Meeting, rank: usize, size: usize) -> Result<()> {
        self.enter()?;
        let others = Others::meet(meeting, rank, size)?;
        *self.others.lock().unwrap_or_else(|e| e.into_inner()) = Some(others);
        Ok(())
    }

    fn sum_beside(&self, at: Address, count: usize) -> Result<()> {
        self.together(|others| others.sum(at, count))
    }

    fn join_sums(&self) -> Result<()> {
        self.together(Others::join)
    }

    fn leave(&self) {
        if self.enter().is_ok() {
            *self.others.lock().unwrap_or_else(|e| e.into_inner()) = None;
        }
    }

    fn multiply(&self, product: &Product, a: Address, b: Address, c: Address) -> Result<()> {
        self.enter()?;
        let mut plans = self.plans.lock().unwrap_or_else(|e| e.into_inner());
        let key = (*product, (a | b | c).is_multiple_of(ALIGNMENT));
        if let Entry::Vacant(vacant) = plans.entry(key) {
            vacant.insert(self.plan(product, key.1)?);
        }
        let Plan { description, layouts: [la, lb, lc], algorithm } = &plans[&key];
        let (alpha, beta) = (1f32, if product.add { 1f32 } else { 0.0 });
        // SAFETY: the plan lives as long as this; matrices are memory of the device.
        unsafe {
            lt::matmul(
                self.blas,
                *description,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                b as *const c_void,
                *la,
                a as *const c_void,
                *lb,
                c as *const c_void,
                *lc,
                c as *mut c_void,
                *lc,
                algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                std::ptr::null_mut(),
            )
        }
        .map_err(|e| call::<lt::CublasError>(&format!("the product {product:?}"))(e))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        // First, since giving memory back waits for sums that are on their way.
        *self.others.get_mut().unwrap_or_else(|e| e.into_inner()) = None;
        // SAFETY: all of these were made by `open` and `plan`, and nothing uses them after this. What fails
        // here has failed before.
        unsafe {
            for plan in self.plans.get_mut().unwrap_or_else(|e| e.into_inner()).values() {
                let _ = lt::destroy_matmul_desc(plan.description);
                for layout in plan.layouts {
                    let _ = lt::destroy_matrix_layout(layout);
                }
            }
            if !self.blas.is_null() {
                let _ = lt::destroy_handle(self.blas);
            }
            if self.workspace != 0 {
                let _ = cu::free_sync(self.workspace);
            }
            if !self.module.is_null() {
                let _ = cu::module::unload(self.module);
            }
            let _ = cu::primary_ctx::release(self.device);
        }
    }
}

/// Looks for the libraries first: cudarc panics where one is missing.
fn find_libraries() -> Result<()> {
    let toolkit =
        "CUDA's toolkit (12 or 13), or the packages nvidia-cublas and nvidia-cuda-nvrtc of Python";
    // SAFETY: the libraries of CUDA may be loaded at any time.
    let found = unsafe {
        [
            ("libcuda", "NVIDIA's driver", cu_sys::is_culib_present()),
            ("libcublasLt", toolkit, lt_sys::is_culib_present()),
            ("libnvrtc", toolkit, compile::has_compiler()),
        ]
    };
    for (library, from, found) in found {
        if !found {
            return Err(CudaError::Library { library, from });
        }
    }
    Ok(())
}

fn message(e: cu::DriverError) -> String {
    let text = e.error_string().ok().map(|text| text.to_string_lossy().into_owned());
    text.unwrap_or_else(|| e.to_string())
}

/// Says what was to be done when a call failed.
pub(crate) fn call<E: std::fmt::Display>(what: &str) -> impl Fn(E) -> CudaError + use<'_, E> {
    move |e| CudaError::Call { what: what.to_owned(), message: e.to_string() }
}
