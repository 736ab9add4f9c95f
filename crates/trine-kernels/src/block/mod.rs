//! Products of matrices in blocks: the head and the embedding of a model that is stored in 3 to 8 bits.
//!
//! Four types of ggml (see [`BlockKind`]) hold a small integer for every number, its code, and a
//! scale for some columns of a row. A [`BlockMatrix`] has the same codes and the same scales in the
//! order in which they are multiplied (`layout`), so nothing is lost and all but nothing grows. Numbers that
//! meet it are split into two int8 parts, 15 bits and a sign (`inputs`), so products of codes are
//! exact integers and the errors of a product are those of its weights alone.
//!
//! # The order of a sum
//!
//! For every block of 32 or 256 columns, with `x[c] = (256 * high[c] + low[c]) * x_scale`,
//!
//! ```text
//! q8_0, q4_0:  h = sum of q[c] * high[c]                 l = sum of q[c] * low[c]
//! q6_k, q3_k:  h = sum of s[c / 16] * q[c] * high[c]     l = sum of s[c / 16] * q[c] * low[c]
//!
//! y += ((l + h * 256) * x_scale) * d
//! ```
//!
//! where `q` is a code less that of 0. `h` and `l` are exact and fit an i32; they are rounded to f32,
//! and every product and sum of the last line is rounded by itself, in the order of the parentheses,
//! from the first block to the last. So the bits are the same on every instruction set and for any
//! number of threads and tokens.
//!
//! # What a head costs
//!
//! A head of 2B4T's shape, (128256, 2560), with Gaussian weights and inputs. Errors of logits are those
//! against f32 weights, relative to the standard deviation of the logits;
//! `cargo run --release -p trine-runtime --example heads` makes them, and measures the time, which for
//! one token is that of reading the bytes from memory.
//!
//! | type | bits a weight | MB | error, root mean square | largest of a million |
//! | --- | --- | --- | --- | --- |
//! | f16 | 16 | 656 | 0.0002 | 0.001 |
//! | q8_0 | 8.5 | 348 | 0.0054 | 0.028 |
//! | q6_k | 6.5625 | 269 | 0.0165 | 0.088 |
//! | q4_0 | 4.5 | 184 | 0.0859 | 0.416 |
//! | q3_k | 3.4375, in memory 3.5625 | 146 | 0.1438 | 0.797 |

mod inputs;
mod layout;
mod product;
mod sketch;
mod two_stage;

pub use layout::{BlockKind, BlockMatrix};
pub use product::block_matmul;
#[cfg(test)]
pub(crate) use product::block_matmul_on;
pub use two_stage::{HeadRows, Largest, TwoStageHead};
