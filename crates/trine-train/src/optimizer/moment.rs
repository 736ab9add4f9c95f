//! One running mean of an optimizer: a number for every element of a parameter, in f32 or in a byte.
//!
//! In bytes (arXiv 2110.02861), 256 elements share a scale, so that an outlier spoils few. First
//! moments are codes with a sign. Second moments are kept as their roots, which is what an update
//! divides by: the seven decades of the code are then fourteen of the moment, and one that is not
//! zero never becomes zero. With plain codes a small `v` next to a large one would, and its `m` be
//! divided by `eps` alone, which is why bitsandbytes keeps embeddings in 32 bits.

use std::ops::Range;

use trine_kernels::AlignedBuf;

use super::CHUNK;
use super::code::{Code, SIGNED, UNSIGNED};
use crate::config::MomentStorage;

/// Elements that share a scale.
pub(crate) const BLOCK: usize = 256;

/// Parameters with fewer elements keep f32 moments, as in bitsandbytes: there is little to save.
const SMALLEST: usize = 4096;

/// Blocks of smaller numbers are zeros.
const SMALLEST_SCALE: f32 = 1e-37;

/// Running means of one parameter.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Moment {
    /// As they are, `(n,)`; in memory of the system's own, where large blocks of an allocator would leave
    /// gaps of up to a large page.
    F32(AlignedBuf<f32>),
    /// A code each, `(n,)`, and the largest magnitude of each [`BLOCK`], `(n / 256,)` rounded up.
    Int8 { meaning: Meaning, codes: Vec<u8>, scales: Vec<f32> },
}

/// What a byte says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// The number itself.
    Signed,
    /// The root of a number that is not negative.
    Root,
}

impl Moment {
    /// Zeros for a parameter of `n` elements.
    pub(crate) fn zeros(n: usize, meaning: Meaning, storage: MomentStorage) -> Self {
        match storage {
            MomentStorage::Int8 if n >= SMALLEST => {
                Self::Int8 { meaning, codes: vec![0; n], scales: vec![0.0; n.div_ceil(BLOCK)] }
            }
            _ => Self::F32(AlignedBuf::new(n)),
        }
    }

    /// The numbers, where they are kept as they are.
    pub(crate) fn as_f32(&self) -> Option<&[f32]> {
        match self {
            Self::F32(values) => Some(values),
            Self::Int8 { .. } => None,
        }
    }

    /// As [`Self::as_f32`], to be written.
    pub(crate) fn as_f32_mut(&mut self) -> Option<&mut [f32]> {
        match self {
            Self::F32(values) => Some(values),
            Self::Int8 { .. } => None,
        }
    }

    /// Parts of [`CHUNK`] elements, for as many threads as there are.
    pub(crate) fn parts(&mut self) -> Vec<Part<'_>> {
        match self {
            Self::F32(values) => values.chunks_mut(CHUNK).map(Part::F32).collect(),
            Self::Int8 { meaning, codes, scales } => {
                let chunks = codes.chunks_mut(CHUNK).zip(scales.chunks_mut(CHUNK / BLOCK));
                let meaning = *meaning;
                chunks.map(|(codes, scales)| Part::Int8 { meaning, codes, scales }).collect()
            }
        }
    }
}

/// A part of a [`Moment`] that one thread works on.
pub(crate) enum Part<'a> {
    F32(&'a mut [f32]),
    Int8 { meaning: Meaning, codes: &'a mut [u8], scales: &'a mut [f32] },
}

impl Part<'_> {
    /// Lets `change` rewrite the numbers, in pieces that it gets the place of.
    pub(crate) fn change(&mut self, mut change: impl FnMut(Range<usize>, &mut [f32])) {
        match self {
            Part::F32(values) => change(0..values.len(), values),
            Part::Int8 { meaning, codes, scales } => {
                let mut buffer = [0f32; BLOCK];
                for (i, (codes, scale)) in
                    codes.chunks_mut(BLOCK).zip(scales.iter_mut()).enumerate()
                {
                    let values = &mut buffer[..codes.len()];
                    decode(*meaning, codes, *scale, values);
                    change(i * BLOCK..i * BLOCK + values.len(), values);
                    *scale = encode(*meaning, values, codes);
                }
            }
        }
    }

    /// As [`Self::change`], for two moments of one parameter at once.
    pub(crate) fn change_both(
        &mut self,
        other: &mut Part<'_>,
        mut change: impl FnMut(Range<usize>, &mut [f32], &mut [f32]),
    ) {
        match (self, other) {
            (Part::F32(a), Part::F32(b)) => change(0..a.len(), a, b),
            (a, b) => a.change(|range, a| {
                let within = range.clone();
                b.change_block(range, |b| change(within.clone(), a, b));
            }),
        }
    }

    /// Lets `change` rewrite one block.
    fn change_block(&mut self, range: Range<usize>, mut change: impl FnMut(&mut [f32])) {
        match self {
            Part::F32(values) => change(&mut values[range]),
            Part::Int8 { meaning, codes, scales } => {
                let scale = &mut scales[range.start / BLOCK];
                let codes = &mut codes[range];
                let mut buffer = [0f32; BLOCK];
                let values = &mut buffer[..codes.len()];
                decode(*meaning, codes, *scale, values);
                change(values);
                *scale = encode(*meaning, values, codes);
            }
        }
    }
}

fn decode(meaning: Meaning, codes: &[u8], scale: f32, values: &mut [f32]) {
    let pairs = values.iter_mut().zip(codes);
    match meaning {
        Meaning::Signed => {
            let code: &Code = &SIGNED;
            pairs.for_each(|(value, byte)| *value = code.decode_signed(*byte) * scale);
        }
        Meaning::Root => {
            let code: &Code = &UNSIGNED;
            pairs.for_each(|(value, byte)| *value = (code.decode(*byte) * scale).powi(2));
        }
    }
}

/// Encodes a block and returns its scale.
fn encode(meaning: Meaning, values: &[f32], codes: &mut [u8]) -> f32 {
    let largest = values.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    let scale = match meaning {
        Meaning::Signed => largest,
        Meaning::Root => largest.sqrt(),
    };
    // What is smaller has no reciprocal; no root of an f32 is.
    if scale < SMALLEST_SCALE {
        codes.fill(0);
        return 0.0;
    }
    let inverse = 1.0 / scale;
    let pairs = codes.iter_mut().zip(values);
    // A product of two roundings may pass 1 by an ulp.
    match meaning {
        Meaning::Signed => {
            let code: &Code = &SIGNED;
            pairs.for_each(|(byte, value)| {
                *byte = code.encode_signed((value * inverse).clamp(-1.0, 1.0));
            });
        }
        Meaning::Root => {
            let code: &Code = &UNSIGNED;
            pairs.for_each(|(byte, value)| *byte = code.encode((value.sqrt() * inverse).min(1.0)));
        }
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sets all of a moment and reads it back.
    fn through(meaning: Meaning, values: &[f32]) -> Vec<f32> {
        let mut moment = Moment::zeros(values.len(), meaning, MomentStorage::Int8);
        assert!(matches!(moment, Moment::Int8 { .. }));
        let mut found = vec![0.0; values.len()];
        for set in [true, false] {
            for (chunk, mut part) in moment.parts().into_iter().enumerate() {
                part.change(|range, part| {
                    let at = chunk * CHUNK + range.start..chunk * CHUNK + range.end;
                    match set {
                        true => part.copy_from_slice(&values[at]),
                        false => found[at].copy_from_slice(part),
                    }
                });
            }
        }
        found
    }

    #[test]
    fn bytes_keep_every_block_to_its_own_scale() {
        // Blocks of very different size, and a last one that is not full.
        let n = CHUNK + 3 * BLOCK + 17;
        let size = |i: usize| 10f32.powi((i / BLOCK % 9) as i32 - 6);
        let value = |i: usize| (((i * 37) % 257) as f32 / 128.0 - 1.0) * size(i);
        let values: Vec<f32> = (0..n).map(value).collect();
        for (i, (found, value)) in through(Meaning::Signed, &values).iter().zip(&values).enumerate()
        {
            assert!((found - value).abs() <= 0.008 * size(i), "{i}: {found}, not {value}");
        }
        let squares: Vec<f32> = values.iter().map(|v| v * v).collect();
        for (i, (found, value)) in through(Meaning::Root, &squares).iter().zip(&squares).enumerate()
        {
            let error = (found.sqrt() - value.sqrt()).abs();
            assert!(error <= 0.004 * size(i), "{i}: {found}, not {value}");
        }
    }

    #[test]
    fn a_small_second_moment_beside_a_large_one_does_not_vanish() {
        let mut values = vec![0.0; SMALLEST];
        (values[0], values[1]) = (1.0, 1e-14);
        let found = through(Meaning::Root, &values);
        assert_eq!((found[0], found[2]), (1.0, 0.0));
        assert!(found[1] > 0.0 && found[1] < 1e-12, "{}", found[1]);
    }

    #[test]
    fn small_parameters_keep_f32() {
        let moment = Moment::zeros(SMALLEST - 1, Meaning::Signed, MomentStorage::Int8);
        assert_eq!(moment, Moment::F32(AlignedBuf::new(SMALLEST - 1)));
    }
}
