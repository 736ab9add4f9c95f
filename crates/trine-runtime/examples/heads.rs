//! What a head costs in each type: time of one token, of two, four and eight, and errors of logits; and how
//! long the largest logits take in two stages.
//!
//! ```text
//! cargo run --release -p trine-runtime --example heads -- 128256 2560
//! ```
//!
//! Weights and inputs are Gaussian, so logits are too; errors are against f32 weights, relative to the
//! standard deviation of the logits. `RAYON_NUM_THREADS` says how many threads, `TRINE_ISA` which
//! instruction set.

use std::time::Instant;

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use trine_format::{DenseTensor, Dtype};
use trine_kernels::limits::{Options, measure};
use trine_kernels::{
    BlockKind, BlockMatrix, DenseData, HeadRows, Largest, TwoStageHead, block_matmul, dense_matmul,
    isa, threads,
};
use trine_runtime::block_kind;

/// Tokens of the batches.
const BATCHES: [usize; 4] = [1, 2, 4, BATCH];
const BATCH: usize = 8;

/// A product with some tokens.
type Matmul<'a> = dyn Fn(&[f32], usize, &mut [f32]) + 'a;

fn main() {
    let mut sizes = std::env::args().skip(1).map(|size| size.parse().expect("rows and columns"));
    let (rows, cols) = (sizes.next().unwrap_or(128_256), sizes.next().unwrap_or(2560));
    println!("({rows}, {cols}), {} threads, {}", threads(), isa());

    let mut weights = vec![0.0; rows * cols];
    weights.par_chunks_mut(cols).enumerate().for_each(|(r, row)| gaussian(r as u64, row));
    let mut x = vec![0.0; BATCH * cols];
    gaussian(u64::MAX, &mut x);
    let mut exact = vec![0.0; BATCH * rows];
    dense_matmul(DenseData::F32(&weights), rows, cols, &x, BATCH, &mut exact);
    let squares: f64 = exact.iter().map(|y| f64::from(*y).powi(2)).sum();
    let deviation = (squares / exact.len() as f64).sqrt();

    let report = |name: &str, bytes: usize, matmul: &Matmul<'_>| {
        // The machine may be shared: the best of each, within seconds of each other.
        let bandwidth = measure(isa(), &Options::new(threads())).bandwidth.high / 1e9;
        let mut out = vec![0.0; BATCH * rows];
        let times = BATCHES.map(|tokens| {
            fastest(|| matmul(&x[..tokens * cols], tokens, &mut out[..tokens * rows]))
        });
        let errors = out.iter().zip(&exact).map(|(a, b)| f64::from(a - b).abs() / deviation);
        let largest = errors.clone().fold(0.0, f64::max);
        let rms = (errors.map(|e| e * e).sum::<f64>() / out.len() as f64).sqrt();
        let speed = bytes as f64 / times[0] / 1e9;
        println!(
            "{name:5} {:4} MB, {speed:5.1} GB/s = {:3.0} % of {bandwidth:.1}, {}, error {rms:.2e} rms {largest:.2e} max",
            bytes / 1_000_000,
            speed / bandwidth * 100.0,
            milliseconds(&times),
        );
    };
    let half: Vec<_> = weights.par_iter().map(|&w| f16::from_f32(w)).collect();
    report("f16", 2 * half.len(), &|x, tokens, out| {
        dense_matmul(DenseData::F16(&half), rows, cols, x, tokens, out);
    });
    let two_stages = |head: HeadRows<'_>| {
        let begin = Instant::now();
        let sketch = TwoStageHead::new(head, rows, cols);
        println!("      sketch of {} MB in {:.2?}", sketch.bytes() / 1_000_000, begin.elapsed());
        let mut out = vec![0.0; BATCH * rows];
        for count in [1, 10, 40] {
            let (mut computed, largest) = (0, Largest { count, within: 0.0 });
            let times = BATCHES.map(|tokens| {
                let (x, out) = (&x[..tokens * cols], &mut out[..tokens * rows]);
                fastest(|| computed = sketch.largest(head, x, largest, out))
            });
            let share = 100.0 * computed as f64 / (BATCH * rows) as f64;
            println!("      top {count} by it: {}, {share:.2} % of the rows", milliseconds(&times));
        }
    };
    two_stages(HeadRows::Dense(DenseData::F16(&half)));
    drop(half);
    let tensor = DenseTensor::from_f32("head", &[rows, cols], &weights);
    for dtype in Dtype::ALL {
        let Some(kind) = block_kind(dtype) else { continue };
        let begin = Instant::now();
        let bytes = tensor.convert(dtype).expect("numbers that fit");
        let encoded = begin.elapsed();
        let matrix = BlockMatrix::new(kind, rows, cols, &bytes);
        let laid_out = begin.elapsed() - encoded;
        report(dtype.name(), matrix.bytes(), &|x, tokens, out| {
            block_matmul(&matrix, x, tokens, out);
        });
        println!("      encoded in {encoded:.2?}, laid out in {laid_out:.2?}");
        if matches!(kind, BlockKind::Q8_0 | BlockKind::Q6_K) {
            two_stages(HeadRows::Blocks(&matrix));
        }
    }
}

/// What so many tokens took.
fn milliseconds(times: &[f64; BATCHES.len()]) -> String {
    let times = BATCHES.iter().zip(times);
    let times: Vec<_> = times.map(|(n, time)| format!("{n}: {:.2} ms", time * 1e3)).collect();
    format!("tokens {}", times.join(", "))
}

/// Seconds of the fastest of some calls, after a warm-up.
fn fastest(mut work: impl FnMut()) -> f64 {
    let mut seconds = || {
        let begin = Instant::now();
        work();
        begin.elapsed().as_secs_f64()
    };
    seconds();
    (0..20).map(|_| seconds()).fold(f64::MAX, f64::min)
}

/// Numbers of a normal distribution, from pairs of uniform ones (Box and Muller).
fn gaussian(seed: u64, out: &mut [f32]) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for pair in out.chunks_mut(2) {
        let (u, v): (f32, f32) = (1.0 - rng.random::<f32>(), rng.random());
        let (radius, angle) = ((-2.0 * u.ln()).sqrt(), 2.0 * std::f32::consts::PI * v);
        let both = [radius * angle.cos(), radius * angle.sin()];
        pair.iter_mut().zip(both).for_each(|(out, both)| *out = both);
    }
}
