//! Causal self-attention with rotary positions and grouped queries, in one operation.
//!
//! Query head `h` reads key/value head `h / (H / K)` (arXiv 2305.13245); positions enter by the
//! rotary embedding of queries and keys (arXiv 2104.09864). The softmax weights of a query are
//! computed again in the backward pass, not kept: memory is linear in T. The gradients of the
//! rotated queries and keys are rotated back.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use trine_kernels::nn::{self, Blocks, Rows};

use super::{contiguous, view};

/// Cosines and sines of the rotary embedding, `(positions, d/2)` each.
pub type RopeTables = Arc<(Vec<f32>, Vec<f32>)>;

/// Causal attention from projected queries `(B, T, H * d)`, keys and values `(B, T, K * d)`, as the
/// projections give them; the result is `(B, T, H * d)`.
///
/// # Errors
/// Shapes that do not fit, or more tokens than the tables have positions.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    head_dim: usize,
    rope: &RopeTables,
) -> Result<Tensor> {
    let op = Attention { head_dim, rope: rope.clone() };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

struct Attention {
    head_dim: usize,
    rope: RopeTables,
}

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    d: usize,
}

impl Attention {
    fn sizes(&self, q: &Shape, k: &Shape, v: &Shape) -> Result<Sizes> {
        let d = self.head_dim;
        let ((batch, tokens, width), kv) = (q.dims3()?, k.dims3()?);
        let (heads, kv_heads) = (width / d, kv.2 / d);
        let fits = k == v
            && (kv.0, kv.1) == (batch, tokens)
            && (width, kv.2) == (heads * d, kv_heads * d)
            && kv_heads > 0
            && heads % kv_heads == 0;
        if !fits {
            candle_core::bail!("attention: q {q:?}, k {k:?}, v {v:?} with heads of {d}");
        }
        if tokens * d / 2 > self.rope.0.len() {
            candle_core::bail!("attention: {tokens} tokens, but fewer positions");
        }
        Ok(Sizes { batch, tokens, heads, kv_heads, d })
    }

    /// Rotates all heads of `x` `(B, T, n * d)`; backwards when `inverse`.
    fn rotate(&self, x: &mut [f32], tokens: usize, width: usize, inverse: bool) {
        let half = self.head_dim / 2;
        let (cos, sin) = &*self.rope;
        let negated: Vec<f32>;
        let sin = if inverse {
            negated = sin[..tokens * half].iter().map(|s| -s).collect();
            &negated
        } else {
            sin
        };
        x.par_chunks_exact_mut(width).enumerate().for_each(|(i, row)| {
            let at = i % tokens * half;
            for head in row.chunks_exact_mut(self.head_dim) {
                nn::rope(head, &cos[at..at + half], &sin[at..at + half]);
            }
        });
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let s = self.sizes(q_layout.shape(), k_layout.shape(), v_layout.shape())?;
        let mut q = contiguous(q, q_layout)?.to_vec();
        let mut k = contiguous(k, k_layout)?.to_vec();
        let v = contiguous(v, v_layout)?;
        let (width, kv_width) = (s.heads * s.d, s.kv_heads * s.d);
        self.rotate(&mut q, s.tokens, width, false);
        self.rotate(&mut k, s.tokens, kv_width, false);
        let keys: Vec<Blocks> =
            (0..s.batch * s.kv_heads).into_par_iter().map(|i| blocks(s, i, &k)).collect();
        let mut y = vec![0.0; q.len()];
        y.par_chunks_exact_mut(width).enumerate().for_each(|(i, y)| {
            let (b, t) = (i / s.tokens, i % s.tokens);
            let mut weights = vec![0.0; t + 1];
            for (h, out) in y.chunks_exact_mut(s.d).enumerate() {
                let kv_head = h / (s.heads / s.kv_heads);
                let query = &q[i * width + h * s.d..][..s.d];
                let values = &v[b * s.tokens * kv_width + kv_head * s.d..];
                let values = Rows { data: values, stride: kv_width };
                let keys = &keys[b * s.kv_heads + kv_head];
                nn::attention(query, keys, values, &mut weights, out);
            }
        });
        Ok((CpuStorage::F32(y), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let s = self.sizes(q.shape(), k.shape(), v.shape())?;
        let (width, kv_width) = (s.heads * s.d, s.kv_heads * s.d);
        let mut qs = view(q)?.to_vec();
        let mut ks = view(k)?.to_vec();
        self.rotate(&mut qs, s.tokens, width, false);
        self.rotate(&mut ks, s.tokens, kv_width, false);
        let dy = dy.contiguous()?;
        let (values, dys) = (view(v)?, view(&dy)?);
        let (values, dys): (&[f32], &[f32]) = (&values, &dys);

        // One task is one key/value head of one sequence with all its query heads: tasks share no
        // output.
        let groups: Vec<Group> = (0..s.batch * s.kv_heads)
            .into_par_iter()
            .map(|task| backward_of_group(s, task, &qs, &ks, values, dys))
            .collect();

        let (mut dq, mut dk, mut dv) =
            (vec![0.0; qs.len()], vec![0.0; ks.len()], vec![0.0; ks.len()]);
        let group_width = width / s.kv_heads;
        for (task, group) in groups.iter().enumerate() {
            let (b, kv_head) = (task / s.kv_heads, task % s.kv_heads);
            for t in 0..s.tokens {
                let row = b * s.tokens + t;
                let copy = |to: &mut [f32], from: &[f32], row_width: usize, n: usize| {
                    to[row * row_width + kv_head * n..][..n].copy_from_slice(&from[t * n..][..n]);
                };
                copy(&mut dq, &group.dq, width, group_width);
                copy(&mut dk, &group.dk, kv_width, s.d);
                copy(&mut dv, &group.dv, kv_width, s.d);
            }
        }
        self.rotate(&mut dq, s.tokens, width, true);
        self.rotate(&mut dk, s.tokens, kv_width, true);
        let tensor = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

/// The vectors of one key/value head of one sequence, in the kernels' layout: `task` counts heads
/// over all sequences, `x` is `(B, T, K * d)`.
fn blocks(s: Sizes, task: usize, x: &[f32]) -> Blocks {
    let (b, kv_head) = (task / s.kv_heads, task % s.kv_heads);
    let width = s.kv_heads * s.d;
    let mut blocks = Blocks::new(s.d);
    for t in 0..s.tokens {
        blocks.push(&x[(b * s.tokens + t) * width + kv_head * s.d..][..s.d]);
    }
    blocks
}

/// Gradients of one key/value head and the query heads that read it.
struct Group {
    /// `(T, H / K * d)`
    dq: Vec<f32>,
    /// `(T, d)`
    dk: Vec<f32>,
    /// `(T, d)`
    dv: Vec<f32>,
}

/// `q` and `k` are rotated already; so are the returned `dq` and `dk`.
fn backward_of_group(s: Sizes, task: usize, q: &[f32], k: &[f32], v: &[f32], dy: &[f32]) -> Group {
    let (b, kv_head) = (task / s.kv_heads, task % s.kv_heads);
    let (width, stride, d) = (s.heads * s.d, s.kv_heads * s.d, s.d);
    let group_heads = s.heads / s.kv_heads;
    let start = b * s.tokens * stride + kv_head * d;
    let (keys, key_blocks) = (Rows { data: &k[start..], stride }, blocks(s, task, k));
    let value_blocks = blocks(s, task, v);
    let mut group = Group {
        dq: vec![0.0; s.tokens * group_heads * d],
        dk: vec![0.0; s.tokens * d],
        dv: vec![0.0; s.tokens * d],
    };
    let (mut weights, mut slopes) = (vec![0.0; s.tokens], vec![0.0; s.tokens]);
    for t in 0..s.tokens {
        for h in 0..group_heads {
            let at = (b * s.tokens + t) * width + (kv_head * group_heads + h) * d;
            let (query, g) = (&q[at..][..d], &dy[at..][..d]);
            let (weights, slopes) = (&mut weights[..t + 1], &mut slopes[..t + 1]);
            nn::attention_weights(query, &key_blocks, weights);
            let dq = &mut group.dq[(t * group_heads + h) * d..][..d];
            let (dk, dv) = (&mut group.dk, &mut group.dv);
            let values = &value_blocks;
            nn::attention_backward(query, keys, values, weights, g, slopes, dq, dk, dv);
        }
    }
    group
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, painted};
    use super::*;
    use candle_core::{D, Device};

    fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let half = x.dim(D::Minus1)? / 2;
        let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
        let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
        let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
        Tensor::cat(&[first, second], D::Minus1)
    }

    /// `(B, K, T, d)` to `(B, K * n, T, d)`, each head `n` times in a row.
    fn repeat_heads(x: &Tensor, n: usize) -> Result<Tensor> {
        let (b, k, t, d) = x.dims4()?;
        x.unsqueeze(2)?.broadcast_as((b, k, n, t, d))?.reshape((b, k * n, t, d))
    }

    fn composition(
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        d: usize,
        tables: &RopeTables,
    ) -> Result<Tensor> {
        let (b, t, width) = q.dims3()?;
        let table = |x: &[f32]| Tensor::from_slice(&x[..t * d / 2], (t, d / 2), &Device::Cpu);
        let (cos, sin) = (table(&tables.0)?, table(&tables.1)?);
        let heads = |x: &Tensor| x.reshape((b, t, (), d))?.transpose(1, 2)?.contiguous();
        let (q, k, v) = (rope(&heads(q)?, &cos, &sin)?, rope(&heads(k)?, &cos, &sin)?, heads(v)?);
        let groups = q.dim(1)? / k.dim(1)?;
        let (k, v) = (repeat_heads(&k, groups)?, repeat_heads(&v, groups)?);
        let scores = (q.matmul(&k.t()?.contiguous()?)? * (1.0 / (d as f64).sqrt()))?;
        let mask = |i: usize| if i % t > i / t { f32::NEG_INFINITY } else { 0.0 };
        let mask = Tensor::from_vec((0..t * t).map(mask).collect(), (t, t), &Device::Cpu)?;
        let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
        weights.matmul(&v)?.transpose(1, 2)?.reshape((b, t, width))
    }

    #[test]
    fn attention_matches_composition() {
        for (b, t, heads, kv_heads, d) in
            [(1, 1, 1, 1, 2), (2, 5, 4, 2, 6), (1, 17, 3, 1, 10), (3, 8, 2, 2, 34)]
        {
            let angle = |i: usize| (i * 13 % 29) as f32 / 9.0;
            let table = |f: fn(f32) -> f32| (0..20 * d / 2).map(|i| f(angle(i))).collect();
            let tables = Arc::new((table(f32::cos), table(f32::sin)));
            let input = |n, phase| painted((b, t, n * d), phase);
            check(
                &[input(heads, 1), input(kv_heads, 2), input(kv_heads, 3)],
                |x| attention(&x[0], &x[1], &x[2], d, &tables).unwrap(),
                |x| composition(&x[0], &x[1], &x[2], d, &tables).unwrap(),
            );
        }
    }
}
