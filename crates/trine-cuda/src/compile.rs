//! Kernels, compiled for the card at hand when it is opened: no toolkit is needed to build this crate.

use std::ffi::CString;

use cudarc::nvrtc::{result as nvrtc, sys};

use crate::error::{CudaError, Result};
use crate::{cache, sources};

/// Whether there is a compiler.
pub fn has_compiler() -> bool {
    // SAFETY: the library may be loaded at any time.
    unsafe { sys::is_culib_present() }
}

/// Machine code for an architecture such as `sm_90`. Needs the compiler, NVRTC, but no device.
///
/// # Errors
/// No compiler, one that does not know the architecture, or kernels that it refuses.
pub fn for_architecture(architecture: &str) -> Result<Vec<u8>> {
    let source = CString::new(sources::program()).expect("kernels have no zero byte");
    let name = CString::new("trine.cu").expect("a name without a zero byte");
    let program = nvrtc::create_program(&source, Some(&name)).map_err(failed)?;
    let options = [
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_owned(),
        "--device-as-default-execution-space".to_owned(),
    ];
    // SAFETY: the program is the one that was made, and destroyed after this.
    unsafe {
        let compiled = match nvrtc::compile_program(program, &options) {
            Ok(()) => machine_code(program).map_err(failed),
            Err(_) => {
                let log = nvrtc::get_program_log(program).map_err(failed)?;
                let log = log.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect::<Vec<_>>();
                let log = String::from_utf8_lossy(&log).into_owned();
                Err(CudaError::Compile { architecture: architecture.to_owned(), log })
            }
        };
        nvrtc::destroy_program(program).map_err(failed)?;
        compiled
    }
}

/// As [`for_architecture`], kept from one start to the next.
pub(crate) fn kept_for_architecture(architecture: &str) -> Result<Vec<u8>> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the two numbers are written where they are.
    unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result().map_err(failed)?;
    let compiler = format!("NVRTC {major}.{minor}");
    let source = sources::program();
    let key = [source.as_bytes(), architecture.as_bytes(), compiler.as_bytes()];
    cache::of(&key, || for_architecture(architecture))
}

fn failed(e: nvrtc::NvrtcError) -> CudaError {
    CudaError::Call { what: "CUDA's run-time compiler".to_owned(), message: e.to_string() }
}

/// # Safety
/// A program that was compiled.
unsafe fn machine_code(
    program: sys::nvrtcProgram,
) -> std::result::Result<Vec<u8>, nvrtc::NvrtcError> {
    let mut bytes = 0;
    // SAFETY: the size is written to a number of that type.
    unsafe { sys::nvrtcGetCUBINSize(program, &raw mut bytes) }.result()?;
    let mut code = vec![0u8; bytes];
    // SAFETY: as many bytes are written as were asked about.
    unsafe { sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()) }.result()?;
    Ok(code)
}
