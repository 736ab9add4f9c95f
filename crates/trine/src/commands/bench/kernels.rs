//! Single products, at the shapes of a model, beside what memory and arithmetic allow.
//!
//! Weights are random, and so many copies of them that the caches hold none: each product gets the
//! next copy, as a model's layers follow each other. With one token a product is bound by memory,
//! with hundreds by arithmetic; what it reaches of either is what is left to win.

use std::time::Instant;

use half::{bf16, f16};
use serde_json::{Value, json};
use trine_export::RandomTrits;
use trine_format::{BoxError, Dtype, ModelConfig, Projection, TensorSource, names};
use trine_kernels::limits::{Limits, Rate};
use trine_kernels::{
    Activations, BlockMatrix, DenseData, PackedMatrix, bitlinear, block_matmul, dense_matmul,
};
use trine_runtime::block_kind;
use trine_ternary::{TernaryMatrix, reference};

use super::report::better;
use super::traffic::Formats;

/// Tokens that are multiplied together: decode, a batch, a prompt.
const TOKENS: [usize; 3] = [1, 8, 512];

/// Tokens that a head is multiplied with: of decode, and of a batch or a guess.
const HEAD_TOKENS: usize = 8;

/// Bytes of all copies of a matrix together, at least: many times what the caches hold.
const COPIES_BYTES: usize = 256 << 20;

/// Seconds that a sample takes, at least.
const SAMPLE_SECONDS: f64 = 0.01;

/// Samples of a product.
const SAMPLES: usize = 7;

/// Products of the scalar reference, at most: it is slow.
const REFERENCE_MACS: usize = 1 << 24;

/// A product, and what the machine could do right before and right after it.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) timed: Timed,
    pub(crate) limits: [Limits; 2],
}

/// A product that was timed.
#[derive(Clone, Debug)]
pub(crate) struct Timed {
    pub(crate) name: String,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) tokens: usize,
    /// Products a second.
    pub(crate) calls: Rate,
    /// Bytes of weights that one product reads.
    pub(crate) bytes: usize,
    /// Whether its arithmetic is int8.
    pub(crate) int8: bool,
    /// How many times faster than the scalar reference on one thread.
    pub(crate) speedup: Option<f64>,
}

impl Timed {
    /// Multiplications of one product.
    pub(crate) fn macs(&self) -> f64 {
        (self.rows * self.cols * self.tokens) as f64
    }

    /// Bytes a second.
    pub(crate) fn bandwidth(&self) -> f64 {
        self.bytes as f64 * self.calls.median
    }

    /// Multiplications a second.
    pub(crate) fn macs_per_second(&self) -> f64 {
        self.macs() * self.calls.median
    }
}

impl Kernel {
    /// The share of the read bandwidth.
    pub(crate) fn share_of_bandwidth(&self) -> f64 {
        self.timed.bandwidth() / better(&self.limits, |limits| limits.bandwidth)
    }

    /// The share of the peak of int8 products, where its arithmetic is int8.
    pub(crate) fn share_of_int8_peak(&self) -> Option<f64> {
        let share = || self.timed.macs_per_second() / better(&self.limits, |limits| limits.int8);
        self.timed.int8.then(share)
    }

    /// As an element of an array.
    pub(crate) fn json(&self) -> Value {
        let timed = &self.timed;
        json!({
            "kernel": timed.name,
            "rows": timed.rows,
            "cols": timed.cols,
            "tokens": timed.tokens,
            "seconds": 1.0 / timed.calls.median,
            "gb_s": timed.bandwidth() / 1e9,
            "fraction_of_bandwidth": self.share_of_bandwidth(),
            "gmac_s": timed.macs_per_second() / 1e9,
            "fraction_of_int8_peak": self.share_of_int8_peak(),
            "times_scalar_reference": timed.speedup,
        })
    }
}

/// The ternary products of a model of this shape: one projection of each shape, with the names of all.
pub(crate) fn shapes(config: &ModelConfig) -> Vec<(String, Projection)> {
    let mut found: Vec<(String, Projection)> = Vec::new();
    for p in Projection::ALL {
        let name = format!("{p:?}").to_lowercase();
        let same = |(_, q): &&mut (String, Projection)| {
            config.projection_shape(*q) == config.projection_shape(p)
        };
        match found.iter_mut().find(same) {
            Some((names, _)) => *names = format!("{names}, {name}"),
            None => found.push((name, p)),
        }
    }
    found
}

/// Times the ternary products of one projection.
pub(crate) fn ternary(
    config: &ModelConfig,
    (name, projection): &(String, Projection),
    formats: Formats,
) -> Result<Vec<Timed>, BoxError> {
    let matrix = RandomTrits::new(config.clone(), 0).projection(0, *projection)?;
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let scalar = reference_macs_per_second(&matrix);
    let bytes = PackedMatrix::new(&matrix, formats.weights).bytes().len();
    // One after another, as the matrices of a model; clones of one would share its memory.
    let shapes = vec![(rows, cols); COPIES_BYTES.div_ceil(bytes.max(1))];
    let copies =
        PackedMatrix::pack_all(&shapes, formats.weights, |_| Ok::<_, BoxError>(matrix.clone()))?;
    let time = |tokens: usize| {
        let x = Activations::quantize(&numbers(tokens * cols), tokens, cols);
        let mut out = vec![0.0; tokens * rows];
        let mut copies = copies.iter().cycle();
        let calls = calls_per_second(|| {
            if let Some(weights) = copies.next() {
                bitlinear(weights, &x, &mut out);
            }
        });
        let name = name.clone();
        let mut timed = Timed { name, rows, cols, tokens, calls, bytes, int8: true, speedup: None };
        timed.speedup = Some(timed.macs_per_second() / scalar);
        timed
    };
    Ok(TOKENS.map(time).into())
}

/// Multiplies some tokens.
type Multiply<'a> = &'a dyn Fn(&[f32], usize, &mut [f32]);

/// Times the head, on one token and on several.
pub(crate) fn head(config: &ModelConfig, formats: Formats) -> Result<Vec<Timed>, BoxError> {
    let (rows, cols) = (config.vocab_size, config.hidden_size);
    let random = RandomTrits::new(config.clone(), 0);
    let tensor = random.dense(names::EMBED)?;
    let data = tensor.convert(formats.head)?;
    let x = numbers(HEAD_TOKENS * cols);
    let mut out = vec![0.0; HEAD_TOKENS * rows];
    let mut time = |multiply: Multiply<'_>| {
        [1, HEAD_TOKENS].map(|tokens| {
            let (x, out) = (&x[..tokens * cols], &mut out[..tokens * rows]);
            let calls = calls_per_second(|| multiply(x, tokens, out));
            let (name, bytes) = ("head".to_owned(), data.len());
            Timed { name, rows, cols, tokens, calls, bytes, int8: false, speedup: None }
        })
    };
    let mut dense = |weights: DenseData<'_>| {
        time(&|x, tokens, out| dense_matmul(weights, rows, cols, x, tokens, out))
    };
    let timed = match (formats.head, block_kind(formats.head)) {
        (_, Some(kind)) => {
            let weights = BlockMatrix::new(kind, rows, cols, &data);
            time(&|x, tokens, out| block_matmul(&weights, x, tokens, out))
        }
        (Dtype::F16, _) => dense(DenseData::F16(&halves(&data, f16::from_le_bytes))),
        (Dtype::BF16, _) => dense(DenseData::Bf16(&halves(&data, bf16::from_le_bytes))),
        _ => dense(DenseData::F32(&tensor.to_f32())),
    };
    Ok(timed.into())
}

fn halves<T>(bytes: &[u8], number: impl Fn([u8; 2]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|pair| number(*pair)).collect()
}

/// Multiplications a second of the scalar reference, on rows of the matrix with one token.
fn reference_macs_per_second(matrix: &TernaryMatrix) -> f64 {
    let cols = matrix.cols();
    let rows = (REFERENCE_MACS / cols.max(1)).clamp(1, matrix.rows());
    let mut trits = vec![0; rows * cols];
    for (r, row) in trits.chunks_exact_mut(cols).enumerate() {
        matrix.unpack_row(r, row);
    }
    let x: Vec<i8> = (0..cols).map(|i| (i % 255) as i8).collect();
    let mut out = vec![0; rows];
    let calls = calls_per_second(|| {
        reference::matvec(std::hint::black_box(&trits), &x, &mut out);
        std::hint::black_box(&out);
    });
    (rows * cols) as f64 * calls.median
}

/// How often a second `work` can be done: the samples of some milliseconds each, after a warm-up.
fn calls_per_second(mut work: impl FnMut()) -> Rate {
    let mut sample = |calls: usize| {
        let begin = Instant::now();
        (0..calls).for_each(|_| work());
        begin.elapsed().as_secs_f64().max(1e-9)
    };
    // As many calls as fill a sample, found by doubling; that is the warm-up.
    let mut calls = 1;
    while sample(calls) < SAMPLE_SECONDS {
        calls *= 2;
    }
    let samples = (0..SAMPLES).map(|_| calls as f64 / sample(calls)).collect();
    Rate::of(samples).unwrap_or(Rate { median: f64::NAN, low: f64::NAN, high: f64::NAN })
}

/// Numbers between -1 and 1 that repeat late.
fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i * 7919 % 8191) as f32 / 4095.5 - 1.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::synth_model::Shape;
    use trine_kernels::limits::Pattern;

    #[test]
    fn projections_of_one_shape_are_one_kernel() {
        let names = |shape: Shape| -> Vec<String> {
            shapes(&shape.config()).into_iter().map(|(name, _)| name).collect()
        };
        assert_eq!(names(Shape::B2), ["q, o", "k, v", "gate, up", "down"]);
        // As many heads for keys as for queries.
        assert_eq!(names(Shape::M700), ["q, k, v, o", "gate, up", "down"]);
    }

    #[test]
    fn what_a_kernel_does_is_counted_from_its_shape() {
        let rate = |median| Rate { median, low: 1.0, high: 2.0 * median };
        let timed = Timed {
            name: "down".into(),
            rows: 4,
            cols: 8,
            tokens: 2,
            calls: rate(1000.0),
            bytes: 8,
            int8: true,
            speedup: None,
        };
        assert_eq!((timed.macs(), timed.macs_per_second()), (64.0, 64_000.0));
        assert_eq!(timed.bandwidth(), 8000.0);
        let limits = |bandwidth, int8| Limits {
            bandwidth: rate(bandwidth),
            pattern: Pattern::Linear,
            int8: rate(int8),
            f32: rate(1.0),
            bf16: None,
            handover: None,
        };
        let kernel = Kernel { timed, limits: [limits(16_000.0, 1.0), limits(1.0, 256_000.0)] };
        let json = kernel.json();
        assert_eq!(json["fraction_of_bandwidth"], 0.5);
        assert_eq!(json["fraction_of_int8_peak"], 0.25);
    }
}
