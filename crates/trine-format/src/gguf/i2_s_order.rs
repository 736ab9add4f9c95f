//! Telling the orders of I2_S apart by the weights themselves.
//!
//! No key of a file names the order, and every byte of one is valid in the others. But a trained
//! network has structure that only the right order shows: an intermediate channel whose rows in
//! `gate` and `up` hold many zeros is one whose column in `down` does (or does not; what counts is
//! that they depend on each other), and so for the channels between `v` and `o`. A wrong order pairs
//! rows with columns of other channels, and the dependence is gone. On the trained ternary model
//! that this was tried on (8 layers, width 256), the sum of z^2 over all pairs is about six times as
//! large in the right order as in another.

use super::i2_s::{Order, unpack};
use super::{GgmlType, Gguf};
use crate::names::{Part, TensorId};
use crate::{ModelConfig, Projection};

/// Layers that are looked at, spread over the model.
const LAYERS: usize = 4;
/// Rows, or columns, that are counted in a matrix.
const SAMPLE: usize = 512;
/// How much larger than by chance the dependence must be, and than in the order of x86.
const BY_CHANCE: f64 = 8.0;
const THAN_X86: f64 = 2.0;

/// The order of the I2_S tensors of a file: that of x86, unless shapes or weights speak for another.
pub(super) fn recognize(gguf: &Gguf, config: &ModelConfig) -> Order {
    let tensor = |layer, p| gguf.tensor(&TensorId::Layer(layer, Part::Projection(p)).gguf());
    let shapes = Projection::ALL.map(|p| config.projection_shape(p));
    let fits = |order: Order| shapes.iter().all(|&(rows, cols)| order.holds(rows, cols));
    // What was written here says so by keys of its own.
    if gguf.is_ours() {
        return Order::default();
    }
    if !fits(Order::Blocks128) && fits(Order::Blocks64) {
        return Order::Blocks64;
    }
    let layers = config.num_hidden_layers;
    let step = layers.div_ceil(LAYERS);
    // The sum over all pairs, and the number of pairs.
    let evidence = |order: Order| -> (f64, usize) {
        let (mut sum, mut pairs) = (0.0, 0);
        for layer in (0..layers).step_by(step) {
            let counts = |p, by_row| {
                let info = tensor(layer, p).filter(|info| info.kind == GgmlType::I2_S)?;
                Some(nonzeros(gguf.bytes(info), config.projection_shape(p), order, by_row))
            };
            let down = counts(Projection::Down, false);
            let values = counts(Projection::V, true).map(|v| per_query_head(&v, config));
            let between = [
                (counts(Projection::Gate, true), &down),
                (counts(Projection::Up, true), &down),
                (values, &counts(Projection::O, false)),
            ];
            for (rows, columns) in between {
                let (Some(rows), Some(columns)) = (rows, columns) else { continue };
                sum += z_squared(&rows, columns);
                pairs += 1;
            }
        }
        (sum, pairs)
    };
    let (x86, pairs) = evidence(Order::Blocks128);
    let others = Order::ALL.into_iter().filter(|&order| order != Order::Blocks128 && fits(order));
    let best = others
        .map(|order| (order, evidence(order).0))
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .filter(|&(_, found)| found > BY_CHANCE * pairs as f64 && found > THAN_X86 * x86);
    best.map_or(Order::default(), |(order, _)| order)
}

/// Non-zeros of every row, or of every column, in a sample of the matrix.
fn nonzeros(data: &[u8], (rows, cols): (usize, usize), order: Order, by_row: bool) -> Vec<f64> {
    // At most `SAMPLE` are added up, so that 16 bits hold every sum.
    let mut sums = vec![0_u16; if by_row { rows } else { cols }];
    // Of a row a contiguous stretch, so that whole blocks are counted and their order does not
    // matter.
    let mut trits = vec![0; if by_row { cols.min(SAMPLE) } else { cols }];
    let step = if by_row { 1 } else { rows.div_ceil(SAMPLE) };
    for row in (0..rows).step_by(step) {
        unpack(data, order, row, cols, &mut trits);
        let nonzero = trits.iter().map(|&trit| u16::from(trit != 0));
        if by_row {
            sums[row] = nonzero.sum();
        } else {
            sums.iter_mut().zip(nonzero).for_each(|(sum, one)| *sum += one);
        }
    }
    sums.into_iter().map(f64::from).collect()
}

/// Counts of value channels, repeated for the query heads that share them.
fn per_query_head(values: &[f64], config: &ModelConfig) -> Vec<f64> {
    let group = config.num_attention_heads / config.num_key_value_heads;
    let head = |h: usize| &values[h / group * config.head_dim..][..config.head_dim];
    (0..config.num_attention_heads).flat_map(|h| head(h).iter().copied()).collect()
}

/// The squared z value of a correlation: about 1 for numbers that have nothing to do with each other.
fn z_squared(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len() as f64;
    let mean = |x: &[f64]| x.iter().sum::<f64>() / n;
    let (ma, mb) = (mean(a), mean(b));
    let (mut aa, mut bb, mut ab) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        let (x, y) = (x - ma, y - mb);
        (aa, bb, ab) = (aa + x * x, bb + y * y, ab + x * y);
    }
    if aa == 0.0 || bb == 0.0 {
        return 0.0;
    }
    let r2 = (ab * ab / (aa * bb)).min(1.0 - 1e-9);
    r2 * (n - 2.0) / (1.0 - r2)
}
