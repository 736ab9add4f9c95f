//! Kernels, compiled for the card at hand when it is opened: no toolkit is needed to build this crate.

use std::ffi::CString;

use cudarc::nvrtc::{result as nvrtc, sys};

use crate::error::{CudaError, Result};

/// All kernels. They are one program, in this order.
const SOURCE: &str = concat!(
    include_str!("../kernels/device.cuh"),
    include_str!("../kernels/rows.cuh"),
    include_str!("../kernels/norm.cu"),
    include_str!("../kernels/gate.cu"),
    include_str!("../kernels/rope.cu"),
    include_str!("../kernels/loss.cu"),
    include_str!("../kernels/embedding.cu"),
    include_str!("../kernels/weights.cu"),
    include_str!("../kernels/attention_f32.cu"),
    include_str!("../kernels/attention_delta.cu"),
    include_str!("../kernels/attention.cu"),
    include_str!("../kernels/wgmma.cuh"),
    include_str!("../kernels/attention_hopper.cu"),
    include_str!("../kernels/attention_backward.cu"),
    include_str!("../kernels/attention_backward_hopper.cu"),
);

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
    let failed = |e: nvrtc::NvrtcError| CudaError::Call {
        what: "CUDA's run-time compiler".to_owned(),
        message: e.to_string(),
    };
    let source = CString::new(SOURCE).expect("kernels have no zero byte");
    let name = CString::new("trine.cu").expect("a name without a zero byte");
    let program = nvrtc::create_program(&source, Some(&name)).map_err(failed)?;
    let options = [
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_owned(),
        "--device-as-default-execution-space".to_owned(),
    ];
    // SAFETY: the program is the one that was made, and destroyed after this.
    let compiled = unsafe {
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
    };
    compiled
}

/// # Safety
/// A program that was compiled.
unsafe fn machine_code(program: sys::nvrtcProgram) -> std::result::Result<Vec<u8>, nvrtc::NvrtcError> {
    let mut bytes = 0;
    // SAFETY: the size is written to a number of that type.
    unsafe { sys::nvrtcGetCUBINSize(program, &raw mut bytes) }.result()?;
    let mut code = vec![0u8; bytes];
    // SAFETY: as many bytes are written as were asked about.
    unsafe { sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()) }.result()?;
    Ok(code)
}
