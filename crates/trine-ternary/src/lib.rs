//! The definition of a ternary weight.
//!
//! A ternary weight is one of -1, 0, +1 (a *trit*) times a scale shared by its matrix.
//! This crate says, once, how trits and scale come from full-precision weights, how activations
//! become int8, how trits lie in bytes, and what their product is.
//! Every other crate calls this definition or is tested bit for bit against it.
//! It knows nothing of files, tensors libraries, threads or SIMD; it has no dependencies.
//!
//! # The formulas (BitNet b1.58, arXiv 2402.17764; the Training Tips paper; transformers `bitnet`)
//!
//! Weights, per matrix `W`:
//!
//! ```text
//! scale = max(mean(|W|), 1e-5)                              f32, `absmean`
//! Wt    = clamp(round_half_even(W * (1 / scale)), -1, 1)    trits, `ternarize`
//! Wq    = Wt * scale                                        what the product sees
//! ```
//!
//! Activations, per token `x` (a row):
//!
//! ```text
//! s  = 127 * (1 / max(max(|x|), 1e-5))                      f32, `quantize_activations`
//! xi = clamp(round_half_even(x * s), -128, 127)             int8
//! xq = xi / s
//! ```
//!
//! The product: `y = (xi . Wt) * (scale / s)`; the integer sum is exact, so its order is free, and
//! the float part ([`rescale`]) has this one order.
//!
//! Four details matter, because implementations differ in them:
//!
//! - The activation scale is 127 times the rounded reciprocal, two roundings: what `127 / tensor`
//!   computes in PyTorch, and so what every model trained there has seen. A true division differs
//!   in the last place for about every third row, and then in a code near a tie.
//! - Rounding is half to even, and the weight is multiplied by the reciprocal, not divided by the
//!   scale: the two differ at ties.
//! - The mean is summed in f64 and rounded to f32 once. The result does not depend on the order of
//!   the sum (but for a sum within 1e-13 of a rounding boundary, where the order documented at
//!   [`absmean`] decides), so every thread count and ISA finds the same trits.
//! - Scale and rounding are separate functions. A stored model carries trits and scale and is never
//!   quantized again: absmean is not idempotent, it would shrink the scale by the share of zeros.
//!
//! # Values that are not ordinary numbers
//!
//! | input | policy |
//! | --- | --- |
//! | NaN or infinity among weights | [`absmean`] and [`ternarize`] refuse, naming the index: such a tensor has no meaningful scale |
//! | NaN or infinity in a row of activations | codes are 0 and the scale is NaN, so the row's whole output is NaN: poison spreads visibly, as in float arithmetic, and nothing panics |
//! | an all-zero matrix, or mean below 1e-5 | scale is 1e-5, trits are what rounding gives (all 0 for zeros) |
//! | an all-zero row of activations | s = 127 * (1 / 1e-5), codes 0, output 0 |
//! | denormals | ordinary numbers; nothing flushes to zero |
//! | a stored scale that is NaN, infinite or negative | refused by [`TernaryMatrix`] |
//! | a packed byte that encodes no trits | refused by the unpackers, naming the byte |

#![forbid(unsafe_code)]

mod activation;
mod ambiguity;
mod error;
mod masters;
mod matrix;
pub mod pack;
pub mod reference;
mod round;
mod weight;

pub use activation::{quantize_activations, rescale};
pub use ambiguity::Ambiguity;
pub use error::TernaryError;
pub use masters::Precision;
pub use matrix::TernaryMatrix;
pub use weight::{absmean, ternarize};

/// Lower bound of the weight scale and of the largest activation magnitude of a token.
pub const EPSILON: f32 = 1e-5;

/// Largest int8 code of a quantized activation; the scale of a token is `ACT_MAX / max(|x|)`.
pub const ACT_MAX: f32 = 127.0;
