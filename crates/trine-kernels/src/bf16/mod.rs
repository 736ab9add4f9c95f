//! Products of matrices in bfloat16, with sums in f32, and softmaxes between them: what a backward pass is
//! made of, and attention and head of a training step.
//!
//! The gradients of a BitLinear layer are `dX = dY W_q` and `dW = dY^T X_q`. Trits and int8 codes are
//! exact in bfloat16, so only `dY` is rounded, to 8 bits. Such products run at twice the rate of f32 where
//! the CPU has a fast `vdpbf16ps` ([`is_fast`]).
//!
//! `out = left right` is `(rows, cols)`, summed over `k`:
//!
//! - [`Left`] holds twelve rows at a time, [`Right`] thirty-two columns at a time, both by pairs along
//!   `k`, as the instruction takes them. What is missing at the edges is 0.
//! - A tile of 12 rows and 32 columns stays in 24 registers from the first pair to the last; a step
//!   loads two registers of the right side and broadcasts twelve pairs of the left.
//! - The right side's columns of a task stay in the second-level cache while rows pass by.
//!
//! Unlike all other products of this crate these do not have the same bits on every CPU: the
//! instruction rounds its sums in its own way, and without it products and sums are those of f32.
//! They serve training, whose steps nothing is compared with bit for bit.

mod exps;
mod operand;
mod product;

pub use exps::{Softmax, exps, softmax_slopes};
pub(crate) use exps::{To, Two};
pub use operand::{Left, Right, RightPart};
pub use product::{Scale, Triangle, multiply, multiply_triangle};

pub use crate::gemm::Store;

use crate::arch::bfloat as arch;
use crate::int8;
pub(crate) use crate::tiling::{COLS, ROWS};

/// Pairs along `k` that a step of a tile takes; sides are padded to whole steps.
pub(crate) const STEP: usize = 16;

/// Numbers along `k` that these are.
pub(crate) const WIDTH: usize = 2 * STEP;

/// Most columns of a side that are made together: some hundred bytes of every line.
pub(crate) const GROUP: usize = 192;

/// Two bfloats: the even index of `k` in the low half.
pub(crate) type Pair = u32;

/// Whether products use the CPU's instruction for bfloats; false where `TRINE_ISA` forces less.
pub(crate) fn is_native() -> bool {
    int8::is_fast() && arch::has()
}

/// Whether products of bfloats are faster than those of f32: where the CPU's instruction is.
pub fn is_fast() -> bool {
    is_native() && arch::is_fast()
}
