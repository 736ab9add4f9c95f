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
use trine_kernels::limits::Rate;
use trine_kernels::{
    Activations, BlockKind, BlockMatrix, DenseData, PackedMatrix, bitlinear, block_matmul,
    dense_matmul,
};
use trine_ternary::{TernaryMatrix, reference};

use super::traffic::Formats;

/// Tokens that are multiplied together: decode, a batch, a prompt.
const TOKENS: [usize; 3] = [1, 8, 512];

/// Bytes of all copies of a matrix together, at least: many times what the caches hold.
const COPIES_BYTES: usize = 256 << 20;

/// Seconds that a sample takes, at least.
const SAMPLE_SECONDS: f64 = 0.01;

/// Samples of a product.
const SAMPLES: usize = 7;

/// Products of the scalar reference, at most: it is slow.
const REFERENCE_MACS: usize = 1 << 24;

/// A product that was timed.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
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

impl Kernel {
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

    /// As an element of an array; shares are of the given limits, in bytes and products a second.
    pub(crate) fn json(&self, bandwidth: f64, int8_peak: f64) -> Value {
        json!({
            "kernel": self.name,
            "rows": self.rows,
            "cols": self.cols,
            "tokens": self.tokens,
            "seconds": 1.0 / self.calls.median,
            "gb_s": self.bandwidth() / 1e9,
            "fraction_of_bandwidth": self.bandwidth() / bandwidth,
            "gmac_s": self.macs_per_second() / 1e9,
            "fraction_of_int8_peak": self.int8.then(|| self.macs_per_second() / int8_peak),
            "times_scalar_reference": self.speedup,
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
) -> Result<Vec<Kernel>, BoxError> {
    let matrix = RandomTrits::new(config.clone(), 0).projection(0, *projection)?;
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let scalar = reference_macs_per_second(&matrix);
    let packed = PackedMatrix::new(&matrix, formats.weights);
    let bytes = packed.bytes().len();
    let copies: Vec<_> = std::iter::repeat_n(packed, COPIES_BYTES.div_ceil(bytes.max(1))).collect();
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
        let mut kernel =
            Kernel { name, rows, cols, tokens, calls, bytes, int8: true, speedup: None };
        kernel.speedup = Some(kernel.macs_per_second() / scalar);
        kernel
    };
    Ok(TOKENS.map(time).into())
}

/// Times the head on one token.
pub(crate) fn head(config: &ModelConfig, formats: Formats) -> Result<Kernel, BoxError> {
    let (rows, cols) = (config.vocab_size, config.hidden_size);
    let random = RandomTrits::new(config.clone(), 0);
    let tensor = random.dense(names::EMBED)?;
    let data = tensor.convert(formats.head)?;
    let bytes = data.len();
    let x = numbers(cols);
    let mut out = vec![0.0; rows];
    let mut dense = |weights: DenseData<'_>| {
        calls_per_second(|| dense_matmul(weights, rows, cols, &x, 1, &mut out))
    };
    let blocks = match formats.head {
        Dtype::Q8_0 => Some(BlockKind::Q8_0),
        Dtype::Q6_K => Some(BlockKind::Q6_K),
        Dtype::Q4_0 => Some(BlockKind::Q4_0),
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => None,
    };
    let calls = match (formats.head, blocks) {
        (_, Some(kind)) => {
            let weights = BlockMatrix::new(kind, rows, cols, &data);
            calls_per_second(|| block_matmul(&weights, &x, 1, &mut out))
        }
        (Dtype::F16, _) => dense(DenseData::F16(&halves(&data, f16::from_le_bytes))),
        (Dtype::BF16, _) => dense(DenseData::Bf16(&halves(&data, bf16::from_le_bytes))),
        _ => dense(DenseData::F32(&tensor.to_f32())),
    };
    Ok(Kernel {
        name: "head".into(),
        rows,
        cols,
        tokens: 1,
        calls,
        bytes,
        int8: false,
        speedup: None,
    })
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
        let calls = Rate { median: 1000.0, low: 1.0, high: 2000.0 };
        let kernel = Kernel {
            name: "down".into(),
            rows: 4,
            cols: 8,
            tokens: 2,
            calls,
            bytes: 8,
            int8: true,
            speedup: None,
        };
        assert_eq!((kernel.macs(), kernel.macs_per_second()), (64.0, 64_000.0));
        assert_eq!(kernel.bandwidth(), 8000.0);
        let json = kernel.json(16_000.0, 256_000.0);
        assert_eq!(json["fraction_of_bandwidth"], 0.5);
        assert_eq!(json["fraction_of_int8_peak"], 0.25);
    }
}
