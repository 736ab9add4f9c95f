//! Kernels compile for the cards that are supported, where CUDA's run-time compiler is installed.

use trine_cuda::CudaError;
use trine_cuda::compile::{for_architecture, has_compiler};

#[test]
fn kernels_compile_for_cards() {
    if !has_compiler() {
        eprintln!("skipped: libnvrtc was not found");
        return;
    }
    // Ampere, Hopper, Blackwell.
    for architecture in ["sm_80", "sm_90a", "sm_120"] {
        let code = for_architecture(architecture).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(code[..4], *b"\x7fELF", "{architecture}");
    }
    let error = for_architecture("sm_1").unwrap_err();
    assert!(matches!(&error, CudaError::Compile { .. }) && error.to_string().contains("sm_1"));
}
