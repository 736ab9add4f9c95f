//! The parts of a block, and how a position is written; see the module above for the layout.

use trine_ternary::quantize_activations;

use super::{BLOCK_CHUNKS, QUERY_OFFSET};
use crate::arch::{Kernel, LANES, Simd};
use crate::nn::kv::{KV_BLOCK, KvLayout};
use crate::packed::{Line, PANEL};

/// Lines before the keys.
const HEAD: usize = 12;

/// Lines of a group of values.
pub(super) const VALUE_LINES: usize = KV_BLOCK / 4;

pub(super) fn key_lines(d: usize) -> usize {
    d.div_ceil(4)
}

pub(super) fn groups(d: usize) -> usize {
    d.div_ceil(PANEL)
}

/// Lines before the values.
fn values_at(d: usize) -> usize {
    HEAD + BLOCK_CHUNKS * key_lines(d)
}

pub(in super::super) fn block_bytes(d: usize) -> usize {
    (values_at(d) + VALUE_LINES * groups(d)) * size_of::<Line>()
}

/// The parts of a block.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    pub(super) lines: &'a [Line],
    pub(super) d: usize,
}

impl<'a> Block<'a> {
    #[inline(always)]
    pub(super) fn new(bytes: &'a [u8], d: usize) -> Self {
        Self { lines: bytes.as_chunks().0, d }
    }

    /// What the key codes of 16 positions stand for, f32.
    #[inline(always)]
    pub(super) fn key_units(&self, chunk: usize) -> &'a Line {
        &self.lines[chunk]
    }

    /// What the integer scores of 16 positions start with, i32.
    #[inline(always)]
    pub(super) fn starts(&self, chunk: usize) -> &'a Line {
        &self.lines[BLOCK_CHUNKS + chunk]
    }

    /// What the value codes of 16 positions stand for, f32.
    #[inline(always)]
    pub(super) fn value_units(&self, chunk: usize) -> &'a Line {
        &self.lines[2 * BLOCK_CHUNKS + chunk]
    }

    /// Keys of 32 positions: a line of the first 16, one of the others, and so on.
    #[inline(always)]
    pub(super) fn keys(&self, pair: usize) -> &'a [Line] {
        let lines = 2 * key_lines(self.d);
        &self.lines[HEAD + pair * lines..][..lines]
    }

    /// Values of `groups` groups of 16 features, line by line: of two, from an even one on, or of the last.
    #[inline(always)]
    pub(super) fn values(&self, group: usize, groups: usize) -> &'a [Line] {
        &self.lines[values_at(self.d) + group * VALUE_LINES..][..groups * VALUE_LINES]
    }
}

/// Writes position `at` of a block.
pub(in super::super) struct Write<'a> {
    pub(in super::super) block: &'a mut [u8],
    pub(in super::super) at: usize,
    pub(in super::super) key: &'a [f32],
    pub(in super::super) value: &'a [f32],
}

impl Kernel for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { block, at, key, value } = self;
        let d = key.len();
        let lines: &mut [Line] = block.as_chunks_mut().0;
        let mut codes = [0; KvLayout::MAX_HEAD_DIM];
        let (chunk, r) = (at / LANES, at % LANES);

        let unit = 1.0 / quantize_activations(key, &mut codes[..d]);
        lines[chunk][4 * r..][..4].copy_from_slice(&unit.to_le_bytes());
        let sum: i32 = codes[..d].iter().map(|code| i32::from(*code)).sum();
        let start = -QUERY_OFFSET * sum;
        lines[BLOCK_CHUNKS + chunk][4 * r..][..4].copy_from_slice(&start.to_le_bytes());
        let keys =
            lines[HEAD + chunk / 2 * 2 * key_lines(d)..].iter_mut().skip(chunk % 2).step_by(2);
        for (line, word) in keys.zip(codes[..4 * key_lines(d)].as_chunks::<4>().0) {
            line[4 * r..][..4].copy_from_slice(&word.map(|code| code as u8));
        }

        codes[..d].fill(0);
        let unit = 1.0 / quantize_activations(value, &mut codes[..d]);
        lines[2 * BLOCK_CHUNKS + chunk][4 * r..][..4].copy_from_slice(&unit.to_le_bytes());
        let values = &mut lines[values_at(d)..];
        for (g, codes) in codes[..groups(d) * PANEL].as_chunks::<PANEL>().0.iter().enumerate() {
            // The last may be alone.
            let together = 2.min(groups(d) - g / 2 * 2);
            let line = &mut values[g / 2 * 2 * VALUE_LINES + at / 4 * together + g % 2];
            for (word, code) in line.as_chunks_mut::<4>().0.iter_mut().zip(codes) {
                word[at % 4] = *code as u8;
            }
        }
    }
}
