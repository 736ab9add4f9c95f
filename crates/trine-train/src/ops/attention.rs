//! Causal self-attention with rotary positions and grouped queries, in one operation.
//!
//! Query head `h` reads key/value head `h / (H / K)` (arXiv 2305.13245); positions enter by the
//! rotary embedding of queries and keys (arXiv 2104.09864). A task is one head of one sequence, or
//! those that read the same keys. The backward pass computes the softmax weights again, for some queries at a
//! time, so memory is linear in T. Products are those of f32 or, in a step of training, of bfloat16.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use trine_kernels::bf16::{
    Left, Right, Scale, Softmax, Triangle, exps, multiply_triangle, softmax_slopes,
};
use trine_kernels::gemm::{Matrix, Store, matmul};
use trine_kernels::nn::{self, Blocks, Causal};
use trine_kernels::parallel::{self, Strip};

use super::{contiguous, view};

/// Cosines and sines of the rotary embedding, `(positions, d/2)` each.
pub type RopeTables = Arc<(Vec<f32>, Vec<f32>)>;

/// Queries whose scores exist at a time, but in the forward pass in f32.
const QUERIES: usize = 96;

/// Tasks for each thread, at least, so that threads are done at about the same time.
const TASKS_PER_THREAD: usize = 4;

/// Causal attention from projected queries `(B, T, H * d)`, keys and values `(B, T, K * d)`, as the
/// projections give them; the result is `(B, T, H * d)`. With `starts` `(B, T)`, a query sees nothing
/// before its start.
///
/// # Errors
/// Shapes that do not fit, or more tokens than the tables have positions.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    head_dim: usize,
    rope: &RopeTables,
    starts: Option<&Arc<Vec<u32>>>,
) -> Result<Tensor> {
    let op = Op { head_dim, rope: rope.clone(), starts: starts.cloned() };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

/// Attention as an operation of Candle's graph.
struct Op {
    head_dim: usize,
    rope: RopeTables,
    starts: Option<Arc<Vec<u32>>>,
}

impl Op {
    fn attention(&self, q: &Shape, k: &Shape, v: &Shape) -> Result<Attention<'_>> {
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
        let starts = self.starts.as_deref().map(|starts| &starts[..]);
        if starts.is_some_and(|starts| starts.len() != batch * tokens) {
            candle_core::bail!("attention: starts are not ({batch}, {tokens})");
        }
        Ok(Attention { tokens, heads, kv_heads, d, rope: &self.rope, starts })
    }
}

impl CustomOp3 for Op {
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
        let attention = self.attention(q_layout.shape(), k_layout.shape(), v_layout.shape())?;
        let mut q = contiguous(q, q_layout)?.to_vec();
        let mut k = contiguous(k, k_layout)?.to_vec();
        let mut y = vec![0.0; q.len()];
        attention.forward(false, [&mut q, &mut k], contiguous(v, v_layout)?, &mut y);
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
        let attention = self.attention(q.shape(), k.shape(), v.shape())?;
        let [mut dq, mut dk, mut dv] = [view(q)?.to_vec(), view(k)?.to_vec(), view(v)?.to_vec()];
        attention.rotate(&mut dq, attention.heads);
        attention.rotate(&mut dk, attention.kv_heads);
        let dy = dy.contiguous()?;
        attention.backward(false, [&mut dq, &mut dk, &mut dv], &view(&dy)?);
        let tensor = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

/// One call: sizes, positions, and what queries see.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a> {
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) d: usize,
    pub(crate) rope: &'a RopeTables,
    /// The first position that a query sees, `(B, T)`.
    pub(crate) starts: Option<&'a [u32]>,
}

impl Attention<'_> {
    /// The starts of sequence `b`, `(T,)`.
    fn starts(&self, b: usize) -> Option<&[u32]> {
        self.starts.map(|starts| &starts[b * self.tokens..][..self.tokens])
    }

    /// The rows of head `head` of sequence `b`; `x` is `(M, heads d)`.
    fn rows(self, x: &[f32], heads: usize, b: usize, head: usize) -> nn::Rows<'_> {
        let stride = heads * self.d;
        let sequence = &x[b * self.tokens * stride..][..self.tokens * stride];
        nn::Rows { data: &sequence[head * self.d..], stride }
    }

    /// [`Self::rows`], `(T, d)`.
    fn gather(self, x: &[f32], heads: usize, b: usize, head: usize, to: &mut Vec<f32>) {
        let rows = self.rows(x, heads, b, head);
        to.clear();
        (0..self.tokens).for_each(|t| to.extend_from_slice(rows.row(t, self.d)));
    }

    /// Rotates `q` `(M, H d)` and `k` `(M, K d)`, and computes `y` `(M, H d)`.
    pub(crate) fn forward(self, bf16: bool, [q, k]: [&mut [f32]; 2], v: &[f32], y: &mut [f32]) {
        self.rotate(q, self.heads);
        self.rotate(k, self.kv_heads);
        match bf16 {
            true => self.forward_in_bf16([q, k, v], y),
            false => self.forward_in_f32([q, k, v], y),
        }
    }

    fn forward_in_f32(self, [q, k, v]: [&[f32]; 3], y: &mut [f32]) {
        let s = self;
        let mut heads = parallel::strips(y, s.heads * s.d, s.tokens, s.d);
        parallel::for_each(&mut heads, |i, y| {
            let (b, head) = (i / s.heads, i % s.heads);
            let kv_head = head / (s.heads / s.kv_heads);
            SCRATCH.with_borrow_mut(|Scratch { rows, .. }| {
                let Rows { values, scratch, .. } = rows;
                let (queries, rows) =
                    (s.rows(q, s.heads, b, head), s.rows(k, s.kv_heads, b, kv_head));
                let mut keys = Blocks::new(s.d);
                (0..s.tokens).for_each(|t| keys.push(rows.row(t, s.d)));
                s.gather(v, s.kv_heads, b, kv_head, values);
                let head = Causal { queries, keys: &keys, values, starts: s.starts(b) };
                nn::attention_causal(head, 0, y, scratch);
            });
        });
    }

    fn forward_in_bf16(self, [q, k, v]: [&[f32]; 3], y: &mut [f32]) {
        let s = self;
        // Heads that read the same keys are one task, unless that makes too few.
        let together = s.heads / s.kv_heads;
        let sequences = y.len() / (s.tokens * s.heads * s.d);
        let few = sequences * s.kv_heads < TASKS_PER_THREAD * parallel::threads();
        let group = if few { 1 } else { together };
        let mut groups = parallel::strips(y, s.heads * s.d, s.tokens, group * s.d);
        parallel::for_each(&mut groups, |i, y| {
            let (b, first) = (i / (s.heads / group), i % (s.heads / group) * group);
            let kv_head = first / together;
            SCRATCH.with_borrow_mut(|Scratch { rows, products }| {
                let Products { key_columns, value_lines, .. } = products;
                let [k, v] = [k, v].map(|x| s.rows(x, s.kv_heads, b, kv_head));
                key_columns.fill_each_column(s.tokens, s.d, |t| k.row(t, s.d));
                value_lines.fill_each_row(s.tokens, s.d, |t| v.row(t, s.d), |_| 1.0);
                let out = &mut rows.dq;
                out.resize(s.tokens * s.d, 0.0);
                for head in first..first + group {
                    let q = s.rows(q, s.heads, b, head);
                    for (block, out) in out.chunks_mut(QUERIES * s.d).enumerate() {
                        let at = block * QUERIES;
                        products.outputs(s.starts(b), at, |t| q.row(at + t, s.d), out);
                    }
                    put(out, y, (head - first) * s.d);
                }
            });
        });
    }

    /// Rotates all heads of `x` `(M, heads d)`.
    pub(crate) fn rotate(self, x: &mut [f32], heads: usize) {
        self.turn(x, heads, &self.rope.1);
    }

    /// Undoes [`Self::rotate`].
    pub(crate) fn turn_back(self, x: &mut [f32], heads: usize) {
        self.turn(x, heads, &self.negative_sines());
    }

    fn turn(self, x: &mut [f32], heads: usize, sin: &[f32]) {
        let (half, cos) = (self.d / 2, &self.rope.0);
        parallel::for_each_chunk(x, heads * self.d, |row, x| {
            let at = row % self.tokens * half;
            nn::rope(x, &cos[at..][..half], &sin[at..][..half]);
        });
    }

    /// What rotates backwards.
    fn negative_sines(self) -> Vec<f32> {
        self.rope.1[..self.tokens * self.d / 2].iter().map(|sin| -sin).collect()
    }

    /// From `dy`, the gradient of [`forward`]'s output, to those of the unrotated queries, keys and values,
    /// in the places of the rotated ones.
    pub(crate) fn backward(self, bf16: bool, [q, k, v]: [&mut [f32]; 3], dy: &[f32]) {
        let s = self;
        let group = s.heads / s.kv_heads;
        let back = s.negative_sines();
        let q = parallel::strips(q, s.heads * s.d, s.tokens, group * s.d);
        let [k, v] = [k, v].map(|x| parallel::strips(x, s.kv_heads * s.d, s.tokens, s.d));
        let mut work: Vec<_> = q.into_iter().zip(k).zip(v).collect();
        parallel::for_each(&mut work, |i, ((q, k), v)| {
            let (b, kv_head) = (i / s.kv_heads, i % s.kv_heads);
            SCRATCH.with_borrow_mut(|Scratch { rows, products }| {
                let Rows { queries, keys, values, dy: dys, dq, dk, dv, .. } = rows;
                for d in [&mut *dk, &mut *dv] {
                    d.clear();
                    d.resize(s.tokens * s.d, 0.0);
                }
                dq.resize(s.tokens * s.d, 0.0);
                match bf16 {
                    true => products.take_keys(k, v),
                    false => {
                        take(k, 0, s.d, keys);
                        take(v, 0, s.d, values);
                    }
                }
                for head in 0..group {
                    let of_all = kv_head * group + head;
                    if !bf16 {
                        take(q, head * s.d, s.d, queries);
                        s.gather(dy, s.heads, b, of_all, dys);
                    }
                    let dy = s.rows(dy, s.heads, b, of_all);
                    for (block, dq) in dq.chunks_mut(QUERIES * s.d).enumerate() {
                        let (first, starts) = (block * QUERIES, s.starts(b));
                        let gradients = [dq, &mut *dk, &mut *dv];
                        match bf16 {
                            true => {
                                let query = |t| &q.row(first + t)[head * s.d..][..s.d];
                                let dy = |t| dy.row(first + t, s.d);
                                products.block_in_bf16(starts, first, (query, dy), gradients);
                            }
                            false => {
                                let block = first * s.d..first * s.d + gradients[0].len();
                                let given = [&queries[block.clone()], &dys[block]];
                                let side = Side { d: s.d, keys, values, starts };
                                products.block_in_f32(side, first, given, gradients);
                            }
                        }
                    }
                    s.turn(dq, 1, &back);
                    put(dq, q, head * s.d);
                }
                s.turn(dk, 1, &back);
                put(dk, k, 0);
                put(dv, v, 0);
            });
        });
    }
}

/// Columns `first..first + d` of a strip.
fn take(strip: &Strip<'_, f32>, first: usize, d: usize, rows: &mut Vec<f32>) {
    rows.clear();
    (0..strip.rows()).for_each(|t| rows.extend_from_slice(&strip.row(t)[first..][..d]));
}

/// The reverse of [`take`].
fn put(rows: &[f32], strip: &mut Strip<'_, f32>, first: usize) {
    let d = rows.len() / strip.rows();
    for (t, row) in rows.chunks_exact(d).enumerate() {
        strip.row_mut(t)[first..][..d].copy_from_slice(row);
    }
}

/// What a head's queries meet.
#[derive(Clone, Copy)]
struct Side<'a> {
    d: usize,
    /// `(T, d)`
    keys: &'a [f32],
    values: &'a [f32],
    /// `(T,)`
    starts: Option<&'a [u32]>,
}

/// Memory of a thread.
#[derive(Default)]
struct Scratch {
    rows: Rows,
    products: Products,
}

/// What belongs to a head, `(T, d)` each.
#[derive(Default)]
struct Rows {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    dy: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    /// Of the forward pass.
    scratch: Vec<f32>,
}

/// The scores of some queries and the sides of products.
#[derive(Default)]
struct Products {
    left: Left,
    rows: Right,
    /// Keys and values, as columns and as lines.
    key_columns: Right,
    value_columns: Right,
    key_lines: Right,
    value_lines: Right,
    /// Softmax weights, but for a factor of each row; these and the gradients of scores by key.
    weights: Left,
    weights_turned: Left,
    slopes_turned: Left,
    scores: Vec<f32>,
    slopes: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Products {
    /// The outputs `(n, d)` of queries `first..`, in bfloat16.
    fn outputs<'x>(
        &mut self,
        starts: Option<&[u32]>,
        first: usize,
        query: impl Fn(usize) -> &'x [f32] + Sync,
        out: &mut [f32],
    ) {
        let d = self.key_columns.k();
        let n = out.len() / d;
        let softmaxes = self.take_weights(starts, first, n, query, false);
        let shares: Vec<_> = softmaxes.iter().map(|softmax| 1.0 / softmax.sum).collect();
        let (scale, triangle) = (Scale::Rows(&shares), Triangle::TermsAfter(first));
        let values = self.value_lines.part(first + n, d);
        multiply_triangle(&self.weights, values, scale, Store::Set, triangle, out);
    }

    /// Takes the softmax weights of `n` queries `first..`, but for a factor of each row; also by key, if
    /// `turned`.
    fn take_weights<'x>(
        &mut self,
        starts: Option<&[u32]>,
        first: usize,
        n: usize,
        query: impl Fn(usize) -> &'x [f32] + Sync,
        turned: bool,
    ) -> Vec<Softmax> {
        let (d, seen) = (self.key_columns.k(), first + n);
        self.scores.resize(n * seen, 0.0);
        self.left.fill_each_row(n, d, query);
        let (keys, triangle) = (self.key_columns.part(d, seen), Triangle::Outputs(first));
        multiply_triangle(&self.left, keys, Scale::One, Store::Set, triangle, &mut self.scores);
        let weights_turned = turned.then_some(&mut self.weights_turned);
        let (scale, sees) = (scale(d), |t| sees(starts, first, t));
        exps(&self.scores, [n, seen], scale, sees, &mut self.weights, weights_turned)
    }

    /// Takes what the backward pass of a head reads of its keys and values, `(T, d)`.
    fn take_keys(&mut self, keys: &Strip<'_, f32>, values: &Strip<'_, f32>) {
        let (tokens, d) = (keys.rows(), keys.cols());
        self.key_columns.fill_each_column(tokens, d, |t| keys.row(t));
        self.value_columns.fill_each_column(tokens, d, |t| values.row(t));
        self.key_lines.fill_each_row(tokens, d, |t| keys.row(t), |_| 1.0);
    }

    /// Queries `first..`, of which `dy` is the gradient of the outputs: `dq` `(n, d)` becomes theirs, and
    /// their part is added to `dk` and `dv`, `(T, d)`.
    fn block_in_bf16<'x>(
        &mut self,
        starts: Option<&[u32]>,
        first: usize,
        (query, dy): (impl Fn(usize) -> &'x [f32] + Sync, impl Fn(usize) -> &'x [f32] + Sync),
        [dq, dk, dv]: [&mut [f32]; 3],
    ) {
        let d = self.key_columns.k();
        let n = dq.len() / d;
        let seen = first + n;
        let softmaxes = self.take_weights(starts, first, n, &query, true);
        let Self { left, rows, weights, weights_turned, slopes_turned, slopes, .. } = self;
        slopes.resize(n * seen, 0.0);
        left.fill_each_row(n, d, &dy);
        let (values, triangle) = (self.value_columns.part(d, seen), Triangle::Outputs(first));
        multiply_triangle(left, values, Scale::One, Store::Set, triangle, slopes);
        let sees = |t| sees(starts, first, t);
        softmax_slopes(weights, &softmaxes, slopes, sees, left, slopes_turned);
        // dK = dS^T Q, dV = P^T dY, dQ = dS K, with the factors of dS and P in the other side or the result.
        let shares = |scale: f32| softmaxes.iter().map(|softmax| scale / softmax.sum).collect();
        let [of_weights, of_slopes]: [Vec<_>; 2] = [shares(1.0), shares(scale(d))];
        let (triangle, len) = (Triangle::TermsBefore(first), seen * d);
        rows.fill_each_row(n, d, query, |t| of_slopes[t]);
        let to = &mut dk[..len];
        multiply_triangle(slopes_turned, rows.all(), Scale::One, Store::Add, triangle, to);
        rows.fill_each_row(n, d, dy, |t| of_weights[t]);
        let to = &mut dv[..len];
        multiply_triangle(weights_turned, rows.all(), Scale::One, Store::Add, triangle, to);
        let (keys, triangle) = (self.key_lines.part(seen, d), Triangle::TermsAfter(first));
        multiply_triangle(left, keys, Scale::Rows(&of_slopes), Store::Set, triangle, dq);
    }

    fn block_in_f32(
        &mut self,
        side: Side<'_>,
        first: usize,
        [queries, dy]: [&[f32]; 2],
        [dq, dk, dv]: [&mut [f32]; 3],
    ) {
        let Side { d, keys, values, starts, .. } = side;
        let n = queries.len() / d;
        let seen = first + n;
        let Self { scores, slopes, .. } = self;
        scores.resize(n * seen, 0.0);
        slopes.resize(n * seen, 0.0);
        let (keys, values) = (&keys[..seen * d], &values[..seen * d]);
        for (from, with, to) in [(queries, keys, &mut *scores), (dy, values, slopes)] {
            let (from, with) = (Matrix::plain(from), Matrix::turned(with));
            matmul([n, d, seen], from, with, Store::Set, to);
        }
        let rows = scores.chunks_exact_mut(seen).zip(slopes.chunks_exact_mut(seen));
        for (t, (scores, slopes)) in rows.enumerate() {
            nn::attention_slopes(scores, slopes, sees(starts, first, t), scale(d));
        }
        // dK = dS^T Q, dV = P^T dY, dQ = dS K.
        for (from, with, to) in [(&slopes, queries, dk), (&scores, dy, dv)] {
            let (from, with) = (Matrix::turned(from), Matrix::plain(with));
            matmul([seen, n, d], from, with, Store::Add, &mut to[..seen * d]);
        }
        matmul([n, seen, d], Matrix::plain(slopes), Matrix::plain(keys), Store::Set, dq);
    }
}

/// What scores are multiplied by.
fn scale(d: usize) -> f32 {
    1.0 / (d as f32).sqrt()
}

/// The positions that query `first + t` sees.
fn sees(starts: Option<&[u32]>, first: usize, t: usize) -> Range<usize> {
    starts.map_or(0, |starts| starts[first + t] as usize)..first + t + 1
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
        starts: Option<&[u32]>,
    ) -> Result<Tensor> {
        let (b, t, width) = q.dims3()?;
        let table = |x: &[f32]| Tensor::from_slice(&x[..t * d / 2], (t, d / 2), &Device::Cpu);
        let (cos, sin) = (table(&tables.0)?, table(&tables.1)?);
        let heads = |x: &Tensor| x.reshape((b, t, (), d))?.transpose(1, 2)?.contiguous();
        let (q, k, v) = (rope(&heads(q)?, &cos, &sin)?, rope(&heads(k)?, &cos, &sin)?, heads(v)?);
        let groups = q.dim(1)? / k.dim(1)?;
        let (k, v) = (repeat_heads(&k, groups)?, repeat_heads(&v, groups)?);
        let scores = (q.matmul(&k.t()?.contiguous()?)? * (1.0 / (d as f64).sqrt()))?;
        let start = |row: usize| starts.map_or(0, |starts| starts[row] as usize);
        let mask = |i: usize| {
            let (row, key) = (i / t, i % t);
            if key > row % t || key < start(row) { f32::NEG_INFINITY } else { 0.0 }
        };
        let shape = (b, 1, t, t);
        let mask = Tensor::from_vec((0..b * t * t).map(mask).collect(), shape, &Device::Cpu)?;
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
            let documents = (0..b * t).map(|i| (i % t - i % t % (3 + i / t)) as u32);
            let documents = Arc::new(documents.collect::<Vec<_>>());
            for starts in [None, Some(&documents)] {
                check(
                    &[input(heads, 1), input(kv_heads, 2), input(kv_heads, 3)],
                    |x| attention(&x[0], &x[1], &x[2], d, &tables, starts).unwrap(),
                    |x| {
                        let starts = starts.map(|starts| &starts[..]);
                        composition(&x[0], &x[1], &x[2], d, &tables, starts).unwrap()
                    },
                );
            }
        }
    }
    #[test]
    fn bfloats_are_near_f32() {
        for (b, t, heads, kv_heads, d) in
            [(1, 1, 1, 1, 2), (2, 5, 4, 2, 6), (1, 130, 3, 1, 64), (3, 99, 2, 2, 34)]
        {
            let angle = |i: usize| (i * 13 % 29) as f32 / 9.0;
            let table = |f: fn(f32) -> f32| (0..130 * d / 2).map(|i| f(angle(i))).collect();
            let tables = Arc::new((table(f32::cos), table(f32::sin)));
            let documents: Vec<_> =
                (0..b * t).map(|i| (i % t - i % t % (3 + i / t)) as u32).collect();
            for starts in [None, Some(&documents[..])] {
                let attention = Attention { tokens: t, heads, kv_heads, d, rope: &tables, starts };
                let numbers = |n, phase| view(&painted((b, t, n * d), phase)).unwrap().to_vec();
                let pass = |bf16| {
                    let (mut q, mut k) = (numbers(heads, 1), numbers(kv_heads, 2));
                    let mut v = numbers(kv_heads, 3);
                    let mut y = vec![f32::NAN; q.len()];
                    attention.forward(bf16, [&mut q, &mut k], &v, &mut y);
                    attention.backward(bf16, [&mut q, &mut k, &mut v], &numbers(heads, 4));
                    [y, q, k, v]
                };
                for (i, (found, expected)) in pass(true).iter().zip(pass(false)).enumerate() {
                    let size = expected.iter().map(|x| x * x).sum::<f32>().sqrt();
                    let off = found.iter().zip(&expected).map(|(a, b)| (a - b).powi(2));
                    let off = off.sum::<f32>().sqrt() / size.max(1e-6);
                    assert!(off < 1e-2, "{b} x {t}, heads of {d}, result {i}: {off}");
                }
            }
        }
    }
}
