//! Ternary x int8 products, and the float products around them, on CPUs.
//!
//! A BitLinear layer is an integer product between two thin float steps: activations become int8
//! codes, codes are multiplied by trits and summed in i32, and one multiplication per output turns
//! the sum back into a float.
//! `trine-ternary` defines all three; this crate does the same, exactly, as fast as the CPU allows.
//! It knows nothing of models, files or training.
//!
//! ```text
//! TernaryMatrix ─► PackedMatrix ─┐
//!                                ├─► matmul_i32 (exact sums) ─► bitlinear (floats)
//! floats ─► Activations ─────────┘
//! ```
//!
//! # The same bits everywhere
//!
//! Integer sums are exact, so their order is free: [`matmul_i32`] and [`bitlinear`] return the same
//! bits on every instruction set and thread count, those of `trine_ternary::reference`.
//! Float sums are not, so [`dot`] and [`dense_matmul`] have one documented order, which the widest
//! instruction set can follow without loss and the narrowest can imitate.
//! Hence a model generates the same text on a laptop and on a server.
//!
//! # How it is laid out
//!
//! | where | what |
//! | --- | --- |
//! | `packed`, `trits5`, `activations` | the two operands, in the layout that the kernels load |
//! | `ternary`, `dense` | the algorithms, each written once over the private trait `Simd` |
//! | `sums` | outputs of ternary products in 16 bits, exactly |
//! | `block` | the same for weights in blocks of 4 to 8 bits and inputs of 16 |
//! | `low_rank` | what adapters add to a projection |
//! | [`nn`] | norms, rotary embedding, attention, gates: what stands between the products |
//! | [`bf16`], [`gemm`], [`int8`] | products in bfloat16, f32 and int8, of which gradients are made |
//! | `product` | what products of dense weights share: tiles and cache blocks |
//! | [`parallel`] | the threads |
//! | `arch` | the traits; one file per instruction set, all of the same shape |
//! | [`limits`] | what this machine can do at most, for comparison |
//! | `isa` | which instruction set runs, and how to force a lower one (`TRINE_ISA`) |
//!
//! Unsafe code exists only under `arch` and in `parallel`. A value such as `Avx2` can be made only where the CPU has
//! the instructions; holding one is the proof that makes every call of its methods safe.

#![deny(unsafe_code)]

mod activations;
mod aligned;
mod arch;
pub mod bf16;
mod block;
mod dense;
pub mod gemm;
pub mod int8;
mod isa;
pub mod limits;
mod low_rank;
pub mod nn;
mod packed;
pub mod parallel;
mod product;
mod sums;
mod ternary;
#[cfg(test)]
mod tests;
mod tiling;
mod trits5;

pub use activations::Activations;
pub use aligned::AlignedBuf;
pub use block::{BlockKind, BlockMatrix, HeadRows, Largest, TwoStageHead, block_matmul};
pub use dense::{DenseData, dense_matmul, dot};
pub use isa::{Isa, IsaError, available, isa, select};
pub use low_rank::{LowRank, LowRankProduct, LowRankType, low_rank_add};
pub use packed::{PackedMatrix, Packing};
pub use parallel::threads;
pub use sums::{bitlinear_sums, rescale_sums};
pub use ternary::{bitlinear, bitlinear_add, bitlinear_all, bitlinear_gated, matmul_i32};
