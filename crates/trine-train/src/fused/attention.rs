//! Causal attention with rotary positions and grouped queries, forward and backward.
//!
//! A task is one head of one sequence, of which rows are gathered first. The backward pass computes the
//! softmax weights again, for some queries at a time: memory is linear in T.

use std::cell::RefCell;

use trine_kernels::bf16::{Left, Right, multiply};
use trine_kernels::gemm::{Matrix, Store, matmul};
use trine_kernels::nn::{self, Blocks, Causal};
use trine_kernels::parallel;

use super::Extent;
use super::products::{plain, turned};
use crate::Bitnet;

/// Queries of which the backward pass makes scores at a time.
const QUERIES: usize = 96;

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    extent: Extent,
    heads: usize,
    kv_heads: usize,
    d: usize,
}

impl Sizes {
    fn new(model: &Bitnet, extent: Extent) -> Self {
        let config = model.config();
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        Self { extent, heads, kv_heads, d: config.head_dim }
    }

    /// The rows of head `head` of sequence `b`, `(T, d)`; `x` is `(M, heads d)`.
    fn gather(&self, x: &[f32], heads: usize, b: usize, head: usize) -> Vec<f32> {
        let (width, d, tokens) = (heads * self.d, self.d, self.extent.tokens);
        let mut rows = Vec::with_capacity(tokens * d);
        for t in 0..tokens {
            rows.extend_from_slice(&x[(b * tokens + t) * width + head * d..][..d]);
        }
        rows
    }

    /// The reverse of [`Self::gather`], for all heads of all sequences in order.
    fn scatter(&self, parts: &[Vec<f32>], heads: usize, x: &mut [f32]) {
        let (width, d, tokens) = (heads * self.d, self.d, self.extent.tokens);
        parallel::for_each_chunk(x, width, |row, x| {
            let (b, t) = (row / tokens, row % tokens);
            for (head, x) in x.chunks_exact_mut(d).enumerate() {
                x.copy_from_slice(&parts[b * heads + head][t * d..][..d]);
            }
        });
    }
}

/// Rotates `q` `(M, H d)` and `k` `(M, K d)`, and computes `y` `(M, H d)`.
pub(super) fn forward(
    model: &Bitnet,
    extent: Extent,
    q: &mut [f32],
    k: &mut [f32],
    v: &[f32],
    y: &mut [f32],
) {
    let s = Sizes::new(model, extent);
    rotate(model, s, q, s.heads, false);
    rotate(model, s, k, s.kv_heads, false);
    let (q, k) = (&*q, &*k);
    let mut parts = vec![Vec::new(); extent.batch * s.heads];
    parallel::for_each(&mut parts, |i, part| {
        let (b, head) = (i / s.heads, i % s.heads);
        let kv_head = head / (s.heads / s.kv_heads);
        let mut keys = Blocks::new(s.d);
        s.gather(k, s.kv_heads, b, kv_head).chunks_exact(s.d).for_each(|key| keys.push(key));
        let (queries, values) =
            (s.gather(q, s.heads, b, head), s.gather(v, s.kv_heads, b, kv_head));
        let head = Causal { queries: &queries, keys: &keys, values: &values, starts: None };
        *part = vec![0.0; queries.len()];
        nn::attention_causal(head, 0, part, &mut Vec::new());
    });
    s.scatter(&parts, s.heads, y);
}

/// Rotates all heads of `x` `(M, heads d)`; backwards when `inverse`.
fn rotate(model: &Bitnet, s: Sizes, x: &mut [f32], heads: usize, inverse: bool) {
    let half = s.d / 2;
    let (cos, sin) = model.rope();
    let negated: Vec<f32>;
    let sin = if inverse {
        negated = sin[..s.extent.tokens * half].iter().map(|s| -s).collect();
        &negated
    } else {
        sin
    };
    parallel::for_each_chunk(x, heads * s.d, |row, x| {
        let at = row % s.extent.tokens * half;
        nn::rope(x, &cos[at..][..half], &sin[at..][..half]);
    });
}

/// From `dy`, the gradient of [`forward`]'s output, to those of the unrotated queries, keys and values,
/// in the places of the rotated ones.
pub(super) fn backward(
    model: &Bitnet,
    extent: Extent,
    bf16: bool,
    [q, k, v]: [&mut [f32]; 3],
    dy: &[f32],
) {
    let s = Sizes::new(model, extent);
    let group = s.heads / s.kv_heads;
    let mut parts: Vec<Group> = Vec::new();
    parts.resize_with(extent.batch * s.kv_heads, Group::default);
    let (from_q, from_k, from_v) = (&*q, &*k, &*v);
    parallel::for_each(&mut parts, |i, part| {
        let (b, kv_head) = (i / s.kv_heads, i % s.kv_heads);
        let keys = s.gather(from_k, s.kv_heads, b, kv_head);
        let values = s.gather(from_v, s.kv_heads, b, kv_head);
        part.dk = vec![0.0; keys.len()];
        part.dv = vec![0.0; keys.len()];
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.take_keys(bf16, &keys, &values, s.d);
            for head in kv_head * group..(kv_head + 1) * group {
                let queries = s.gather(from_q, s.heads, b, head);
                let dy = s.gather(dy, s.heads, b, head);
                let mut dq = vec![0.0; queries.len()];
                let side = Side { bf16, d: s.d, keys: &keys, values: &values };
                for (block, dq) in dq.chunks_mut(QUERIES * s.d).enumerate() {
                    let at = block * QUERIES * s.d;
                    let (queries, dy) = (&queries[at..][..dq.len()], &dy[at..][..dq.len()]);
                    scratch.block(side, block * QUERIES, queries, dy, dq, part);
                }
                part.dq.push(dq);
            }
        });
    });
    let mut dq = Vec::with_capacity(extent.batch * s.heads);
    let (mut dk, mut dv) = (Vec::new(), Vec::new());
    for part in parts {
        dq.extend(part.dq);
        dk.push(part.dk);
        dv.push(part.dv);
    }
    s.scatter(&dq, s.heads, q);
    s.scatter(&dk, s.kv_heads, k);
    s.scatter(&dv, s.kv_heads, v);
    rotate(model, s, q, s.heads, true);
    rotate(model, s, k, s.kv_heads, true);
}

/// Gradients of one key/value head and the query heads that read it, `(T, d)` each.
#[derive(Default)]
struct Group {
    dq: Vec<Vec<f32>>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// What a head's queries meet.
#[derive(Clone, Copy)]
struct Side<'a> {
    bf16: bool,
    d: usize,
    /// `(T, d)`
    keys: &'a [f32],
    values: &'a [f32],
}

/// Memory of a thread, for the scores of some queries and the sides of products.
#[derive(Default)]
struct Scratch {
    left: Left,
    rows: Right,
    /// Keys and values as columns, and keys as lines.
    key_columns: Right,
    value_columns: Right,
    key_lines: Right,
    scores: Vec<f32>,
    slopes: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Scratch {
    fn take_keys(&mut self, bf16: bool, keys: &[f32], values: &[f32], d: usize) {
        if bf16 {
            let tokens = keys.len() / d;
            self.key_columns.fill_columns(keys, tokens, d);
            self.value_columns.fill_columns(values, tokens, d);
            self.key_lines.fill_rows(keys, tokens, d);
        }
    }

    /// Queries `first..`, `(n, d)`, of which `dy` is the gradient of the outputs.
    fn block(
        &mut self,
        side: Side<'_>,
        first: usize,
        queries: &[f32],
        dy: &[f32],
        dq: &mut [f32],
        part: &mut Group,
    ) {
        let Side { bf16, d, keys, values } = side;
        let n = queries.len() / d;
        let seen = first + n;
        let (mut scores, mut slopes) =
            (std::mem::take(&mut self.scores), std::mem::take(&mut self.slopes));
        scores.resize(n * seen, 0.0);
        slopes.resize(n * seen, 0.0);
        let (keys, values) = (&keys[..seen * d], &values[..seen * d]);
        if bf16 {
            self.left.fill_rows(queries, n, d);
            multiply(&self.left, self.key_columns.part(d, seen), 1.0, Store::Set, &mut scores);
            self.left.fill_rows(dy, n, d);
            multiply(&self.left, self.value_columns.part(d, seen), 1.0, Store::Set, &mut slopes);
        } else {
            matmul([n, d, seen], plain(queries), turned(keys), Store::Set, &mut scores);
            matmul([n, d, seen], plain(dy), turned(values), Store::Set, &mut slopes);
        }
        let scale = 1.0 / (d as f32).sqrt();
        let rows = scores.chunks_exact_mut(seen).zip(slopes.chunks_exact_mut(seen));
        for (t, (scores, slopes)) in rows.enumerate() {
            nn::attention_slopes(scores, slopes, 0..first + t + 1, scale);
        }
        // dK = dS^T Q, dV = P^T dY, dQ = dS K.
        let (dk, dv) = (&mut part.dk[..seen * d], &mut part.dv[..seen * d]);
        for (from, with, to) in [(&slopes, queries, dk), (&scores, dy, dv)] {
            if bf16 {
                self.left.fill_columns(from, n, seen, &[1.0; QUERIES][..n]);
                self.rows.fill_rows(with, n, d);
                multiply(&self.left, self.rows.all(), 1.0, Store::Add, to);
            } else {
                let from = Matrix { data: from, transposed: true };
                matmul([seen, n, d], from, plain(with), Store::Add, to);
            }
        }
        if bf16 {
            self.left.fill_rows(&slopes, n, seen);
            multiply(&self.left, self.key_lines.part(seen, d), 1.0, Store::Set, dq);
        } else {
            matmul([n, seen, d], plain(&slopes), plain(keys), Store::Set, dq);
        }
        (self.scores, self.slopes) = (scores, slopes);
    }
}
