/// What can go wrong with a device.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// A library of CUDA that is not there.
    #[error(
        "CUDA needs {library}, which was not found: install {from}, and name the folder it lies in in \
         LD_LIBRARY_PATH"
    )]
    Library {
        /// Its name, without what the system puts around it.
        library: &'static str,
        /// Where it comes from.
        from: &'static str,
    },
    /// There is no such device.
    #[error("no CUDA device {index}: {message}")]
    NoDevice {
        /// The number that was asked for.
        index: usize,
        /// What the driver said, or how many there are.
        message: String,
    },
    /// A call that failed.
    #[error("{what}: {message}")]
    Call {
        /// What was to be done.
        what: String,
        /// What CUDA said.
        message: String,
    },
    /// Memory of the device that could not be had.
    #[error(
        "{wanted:.2} GB of the device's memory could not be had: {free:.2} of {total:.2} GB are free"
    )]
    Memory {
        /// GB.
        wanted: f64,
        /// GB.
        free: f64,
        /// GB.
        total: f64,
    },
    /// A kernel that the compiler refuses.
    #[error("the CUDA kernels do not compile for {architecture}:\n{log}")]
    Compile {
        /// Such as `sm_90a`.
        architecture: String,
        /// What the compiler said.
        log: String,
    },
    /// A model or batch that the engine does not compute.
    #[error("CUDA: {what}: expected {expected}, found {found}")]
    Unsupported {
        /// A key or a size.
        what: &'static str,
        /// What can be computed.
        expected: String,
        /// What was asked for.
        found: String,
    },
}

pub(crate) type Result<T> = std::result::Result<T, CudaError>;
