//! ggml's block-quantized numbers: a scale for a few numbers, and a small integer for each.
//!
//! They hold embeddings and heads in 3.4 to 8.5 bits a number: [`q8_0`], [`q6_k`], [`q4_0`] and [`q3_k`].
//! This is the arithmetic of single blocks; [`Dtype`](crate::Dtype) has the types among all others, and
//! [`DenseTensor`](crate::DenseTensor) whole tensors. Every number is computed in f32 in one order,
//! so that the bytes do not depend on the machine.

mod grid;
pub mod q3_k;
pub mod q4_0;
pub mod q6_k;
pub mod q8_0;

/// The first magnitude that rounds to no finite f16.
const F16_LIMIT: f32 = 65_520.0;

/// What numbers are multiplied by for a scale `d`: 0 where `d` is 0 or so small that its reciprocal
/// is no number, as such a scale is 0 in f16 anyway.
fn reciprocal(d: f32) -> f32 {
    let inverse = 1.0 / d;
    if inverse.is_finite() { inverse } else { 0.0 }
}
