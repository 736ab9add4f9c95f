//! The measures of one projection.

use serde::Serialize;
use trine_ternary::TernaryMatrix;

/// Masters are near a threshold within so many scales.
const NEAR: f32 = 0.05;

/// The state of one projection after an update. Shares are in 0..1; what could not be measured is
/// none: of a full-precision run all but the gradient.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LayerDiagnostics {
    /// Share of trits that are -1.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "short")]
    pub negative: Option<f64>,
    /// Share of trits that are 0.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "short")]
    pub zero: Option<f64>,
    /// Share of trits that are +1.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "short")]
    pub positive: Option<f64>,
    /// Share of trits that differ from those of the last collection. A trit that flipped and
    /// flipped back is not counted.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "short")]
    pub flips: Option<f64>,
    /// Share of trits that this one update changed.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "short")]
    pub flips_by_update: Option<f64>,
    /// Share of masters whose magnitude is within 0.05 scales of the threshold, half the scale.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "short")]
    pub near_threshold: Option<f64>,
    /// Mean distance of a master's magnitude from the threshold, in scales.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "short")]
    pub threshold_distance: Option<f64>,
    /// The scale of the trits: the mean magnitude of the masters.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "short")]
    pub scale: Option<f64>,
    /// L2 norm of the gradient, before clipping.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "short")]
    pub grad_norm: Option<f64>,
    /// Share of activation codes at -127 or 127, on the first held-out sequence. The largest of
    /// every token is one by definition, so it is at least one in the number of inputs.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "short")]
    pub saturated: Option<f64>,
    /// Share of activation codes that are 0, on the same sequence.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "short")]
    pub zero_codes: Option<f64>,
}

/// Five digits: a line a collection has ten numbers for each of hundreds of projections.
fn short<S: serde::Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    let rounded = value.map(|value| format!("{value:.4e}").parse().unwrap_or(value));
    rounded.serialize(serializer)
}

impl LayerDiagnostics {
    /// What masters and their trits say on their own.
    pub(super) fn of_weights(masters: &[f32], trits: &TernaryMatrix) -> Self {
        let n = masters.len().max(1) as f64;
        let [negative, zero, positive] = trits.counts().map(|count| Some(count as f64 / n));
        let (near, distance) = thresholds(masters, trits.scale());
        Self {
            negative,
            zero,
            positive,
            near_threshold: Some(near as f64 / n),
            threshold_distance: Some(distance / n),
            scale: Some(f64::from(trits.scale())),
            ..Self::default()
        }
    }

    /// Means over projections, each weighing as much as it has weights; of the gradient the norm
    /// of all together.
    pub(super) fn mean<'a>(layers: impl Iterator<Item = (usize, &'a Self)> + Clone) -> Self {
        let mean = |field: fn(&Self) -> Option<f64>| {
            let known = layers.clone().filter_map(|(n, layer)| Some((n as f64, field(layer)?)));
            let (n, sum) = known.fold((0.0, 0.0), |(n, sum), (m, x)| (n + m, sum + m * x));
            (n > 0.0).then(|| sum / n)
        };
        let squares = layers.clone().filter_map(|(_, layer)| Some(layer.grad_norm?.powi(2)));
        let grad_norm = squares.reduce(|a, b| a + b).map(f64::sqrt);
        Self {
            negative: mean(|l| l.negative),
            zero: mean(|l| l.zero),
            positive: mean(|l| l.positive),
            flips: mean(|l| l.flips),
            flips_by_update: mean(|l| l.flips_by_update),
            near_threshold: mean(|l| l.near_threshold),
            threshold_distance: mean(|l| l.threshold_distance),
            scale: mean(|l| l.scale),
            grad_norm,
            saturated: mean(|l| l.saturated),
            zero_codes: mean(|l| l.zero_codes),
        }
    }
}

/// How many masters are near the threshold, and the sum of all distances from it in scales.
fn thresholds(masters: &[f32], scale: f32) -> (usize, f64) {
    let inverse = 1.0 / scale;
    let part = |part: &[f32]| {
        // Sixteen sums at a time, so that the loop is vectorized.
        let (mut near, mut sums) = ([0u32; 16], [0f32; 16]);
        let mut add = |i: usize, w: f32| {
            let distance = (w.abs() * inverse - 0.5).abs();
            near[i] += u32::from(distance < NEAR);
            sums[i] += distance;
        };
        let (blocks, rest) = part.as_chunks::<16>();
        for block in blocks {
            for i in 0..16 {
                add(i, block[i]);
            }
        }
        rest.iter().enumerate().for_each(|(i, w)| add(i, *w));
        (near.iter().sum::<u32>() as usize, f64::from(sums.iter().sum::<f32>()))
    };
    masters.chunks(4096).map(part).fold((0, 0.0), |(n, sum), (m, x)| (n + m, sum + x))
}

/// How many trits differ between two packings of the same matrix, 2 bits each.
pub(super) fn differing(a: &[u8], b: &[u8]) -> usize {
    // A code differs where either of its bits does.
    let count = |a: u64, b: u64| {
        let bits = a ^ b;
        ((bits | bits >> 1) & 0x5555_5555_5555_5555).count_ones() as usize
    };
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let words = a.iter().zip(b).map(|(a, b)| count(u64::from_le_bytes(*a), u64::from_le_bytes(*b)));
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| count(u64::from(*a), u64::from(*b)));
    words.chain(rest).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_distances_are_those_of_the_definition() {
        // Mean magnitude 1: the scale is 1, the threshold 0.5.
        let masters = [2.0, -1.5, 0.52, -0.48, 0.5, 1.0, 1.0, 1.0];
        let trits = TernaryMatrix::from_weights(&masters, 2, 4).unwrap();
        let layer = LayerDiagnostics::of_weights(&masters, &trits);
        assert_eq!(layer.scale, Some(1.0));
        assert_eq!(
            (layer.negative, layer.zero, layer.positive),
            (Some(1. / 8.), Some(2. / 8.), Some(5. / 8.))
        );
        assert_eq!(layer.near_threshold, Some(3. / 8.));
        let distance = (1.5 + 1.0 + 0.02 + 0.02 + 0.0 + 3.0 * 0.5) / 8.0;
        assert!((layer.threshold_distance.unwrap() - distance).abs() < 1e-6, "{layer:?}");
    }

    #[test]
    fn flips_are_counted_whatever_the_trits_were() {
        let trits = |shift: usize, n: usize| -> Vec<i8> {
            (0..n).map(|i| if i % 3 == 0 { ((i / 3 + shift) % 3) as i8 - 1 } else { 1 }).collect()
        };
        for (rows, cols) in [(1, 1), (3, 7), (5, 37), (16, 64)] {
            let packed = |shift| {
                let trits = trits(shift, rows * cols);
                TernaryMatrix::from_trits(&trits, rows, cols, 1.0).unwrap().packed().to_vec()
            };
            for shift in 0..3 {
                let expected = if shift == 0 { 0 } else { (rows * cols).div_ceil(3) };
                assert_eq!(differing(&packed(0), &packed(shift)), expected, "{rows}x{cols}");
            }
        }
    }

    #[test]
    fn means_weigh_projections_by_their_size() {
        let layer = |zero, grad_norm| LayerDiagnostics {
            zero: Some(zero),
            grad_norm: Some(grad_norm),
            ..Default::default()
        };
        let (small, large) = (layer(1.0, 3.0), layer(0.5, 4.0));
        let all = LayerDiagnostics::mean([(100, &small), (300, &large)].into_iter());
        assert_eq!((all.zero, all.grad_norm, all.flips), (Some(0.625), Some(5.0), None));
    }
}
