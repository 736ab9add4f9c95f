//! Products with blocks, against their definition and against the numbers that they stand for.

use half::f16;

use super::assert_same_bits;
use crate::arch::{Kernel, Simd, dispatch};
use crate::block::block_matmul_on;
use crate::packed::Line;
use crate::{BlockKind, BlockMatrix, Isa};

/// `rows` rows of blocks of every byte, but for scales, which are small numbers.
pub(crate) fn blocks(kind: BlockKind, rows: usize, cols: usize) -> Vec<u8> {
    let (blocks, bytes) = (rows * (cols / kind.block()), kind.block_bytes());
    let mut all: Vec<u8> = (0..blocks * bytes).map(|i| (i * 167 % 251 * 89 % 257) as u8).collect();
    for (i, block) in all.chunks_exact_mut(bytes).enumerate() {
        let d = f16::from_f32(((i * 31 % 101) as f32 - 50.0) / 4096.0);
        let at = kind.scale_at();
        block[at..at + 2].copy_from_slice(&d.to_le_bytes());
    }
    all
}

/// Inputs of mixed signs, and magnitudes that differ from block to block.
fn inputs(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 % 1009) as f32 - 504.3) * [1e-3, 0.4, 30.0][i / 100 % 3]).collect()
}

/// Code less that of 0, scale of 16 columns (1 where there is none) and scale of column `c` of a row
/// in a file, straight from the documentation of the types.
fn stored(kind: BlockKind, row: &[u8], c: usize) -> (i32, i32, f32) {
    let (block, i) = (c / kind.block() * kind.block_bytes(), c % kind.block());
    let block = &row[block..][..kind.block_bytes()];
    let f16_at = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let half = |byte: u8, high: bool| i32::from(if high { byte >> 4 } else { byte & 15 });
    match kind {
        BlockKind::Q8_0 => (i32::from(block[2 + i] as i8), 1, f16_at(0)),
        BlockKind::Q4_0 => (half(block[2 + i % 16], i >= 16) - 8, 1, f16_at(0)),
        BlockKind::Q6_K => {
            let (group, j) = (i / 128, i % 128);
            let low = half(block[group * 64 + j % 64], j >= 64);
            let high = block[128 + group * 32 + j % 32] >> (2 * (j / 32)) & 3;
            let scale = block[192 + i / 16] as i8;
            (low + 16 * i32::from(high) - 32, i32::from(scale), f16_at(208))
        }
        BlockKind::Q3_K => {
            let low = block[32 + i / 128 * 32 + i % 32] >> (2 * (i % 128 / 32)) & 3;
            let high = block[i % 32] >> (i / 32) & 1;
            let s = i / 16;
            let scale = half(block[96 + s % 8], s >= 8);
            let scale = scale + 16 * i32::from(block[104 + s % 4] >> (2 * (s / 4)) & 3);
            (i32::from(low + 4 * high) - 4, scale - 32, f16_at(108))
        }
    }
}

/// A number's two parts times the step of its block, as the module `block` has it.
fn parts(x: &[f32]) -> (Vec<[i32; 2]>, f32) {
    let largest = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    if x.iter().any(|x| !x.is_finite()) {
        return (vec![[0; 2]; x.len()], f32::NAN);
    }
    if largest < 1e-30 {
        return (vec![[0; 2]; x.len()], 0.0);
    }
    let split = |&x: &f32| {
        let step = (x * (32639.0 / largest)).round_ties_even() as i32;
        let high = (f64::from(step) / 256.0 + 0.5).floor() as i32;
        [high, step - 256 * high]
    };
    (x.iter().map(split).collect(), largest / 32639.0)
}

fn scalar_product(kind: BlockKind, row: &[u8], x: &[f32]) -> f32 {
    let mut y = 0.0;
    for (b, x) in x.chunks(kind.block()).enumerate() {
        let (parts, x_scale) = parts(x);
        let mut sums = [0i64; 2];
        let mut d = 0.0;
        for (i, parts) in parts.iter().enumerate() {
            let (code, scale, block) = stored(kind, row, b * kind.block() + i);
            d = block;
            for p in 0..2 {
                sums[p] += i64::from(scale * code * parts[p]);
            }
        }
        let [h, l] = sums.map(|sum| i32::try_from(sum).unwrap() as f32);
        y += ((l + h * 256.0) * x_scale) * d;
    }
    y
}

fn shapes(kind: BlockKind) -> impl Iterator<Item = (usize, usize, usize)> {
    let block = kind.block();
    let small = [1, 15, 16, 17, 33].into_iter().flat_map(move |rows| {
        [1, 2, 3, 5, 8, 15].map(|tokens| (rows, (rows % 3 + 1) * block, tokens))
    });
    small.chain([(1031, 2 * block, 3), (2053, 4 * block, 1), (3, 11 * block, 17)])
}

pub(super) fn block_products_match_scalar(isa: Isa) {
    for kind in BlockKind::ALL {
        for (rows, cols, tokens) in shapes(kind) {
            let (stored, mut x) = (blocks(kind, rows, cols), inputs(tokens * cols));
            if tokens > 2 {
                x[cols - 1] = f32::NAN;
                x[cols..2 * cols].fill(0.0);
            }
            check(isa, kind, rows, cols, tokens, &stored, &x);
        }
        // The largest codes, scales and inputs of either sign.
        let cols = 2 * kind.block();
        for byte in [0, 0x7f, 0x80, 0xff, 0x0f, 0xf0] {
            let mut stored = blocks(kind, 16, cols);
            for block in stored.chunks_exact_mut(kind.block_bytes()) {
                let d = [block[kind.scale_at()], block[kind.scale_at() + 1]];
                block.fill(byte);
                block[kind.scale_at()..][..2].copy_from_slice(&d);
            }
            let x: Vec<_> =
                (0..8 * cols).map(|i| if i / cols % 2 == 0 { 3.0 } else { -3.0 }).collect();
            check(isa, kind, 16, cols, 8, &stored, &x);
            check(isa, kind, 16, cols, 1, &stored, &x[..cols]);
        }
    }
}

fn check(
    isa: Isa,
    kind: BlockKind,
    rows: usize,
    cols: usize,
    tokens: usize,
    stored: &[u8],
    x: &[f32],
) {
    let matrix = BlockMatrix::new(kind, rows, cols, stored);
    let mut found = vec![f32::MAX; tokens * rows];
    block_matmul_on(isa, &matrix, x, tokens, &mut found);
    let mut expected = Vec::with_capacity(tokens * rows);
    for x in x.chunks_exact(cols) {
        for row in stored.chunks_exact(stored.len() / rows) {
            expected.push(scalar_product(kind, row, x));
        }
    }
    assert_same_bits(&found, &expected);
}

/// The error of a product is that of splitting inputs, and smaller than anything that shows.
pub(super) fn block_products_are_those_of_the_numbers(isa: Isa) {
    for kind in BlockKind::ALL {
        let (rows, cols, tokens) = (100, 1024, 9);
        let matrix = BlockMatrix::new(kind, rows, cols, &blocks(kind, rows, cols));
        // Twelve uniform numbers make a normal one.
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1 << 24) - 0.5
        };
        let x: Vec<_> =
            (0..tokens * cols).map(|_| (0..12).map(|_| next()).sum::<f64>() as f32).collect();
        let mut found = vec![0.0; tokens * rows];
        block_matmul_on(isa, &matrix, &x, tokens, &mut found);
        let mut row = vec![0.0; cols];
        let (mut errors, mut squares) = (0.0f64, 0.0f64);
        for r in 0..rows {
            matrix.row(r, &mut row);
            for t in 0..tokens {
                let products = row.iter().zip(&x[t * cols..]);
                let exact: f64 = products.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                errors += (f64::from(found[t * rows + r]) - exact).powi(2);
                squares += exact * exact;
            }
        }
        let relative = (errors / squares).sqrt();
        assert!(relative < 5e-5, "{isa} {kind:?}: {relative}");
    }
}

/// The operations that only blocks use.
struct Operations<'a> {
    sums: [[i32; 16]; 2],
    scales: [u8; 16],
    lines: [&'a Line; 3],
    floats: [[f32; 16]; 2],
}

struct Results {
    sums: [[i32; 16]; 3],
    codes: [Line; 14],
    floats: [[f32; 16]; 3],
}

impl Kernel for Operations<'_> {
    type Output = Results;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Results {
        let [a, b] = self.sums.map(|sums| simd.load_i32(&sums));
        let [x, y] = self.floats.map(|floats| simd.load_f32(&floats));
        let [low, high, bits] = self.lines;
        let [c0, c1] = simd.unpack_nibbles(low);
        let sixes = simd.unpack_sixes([low, high], bits);
        let threes = simd.unpack_threes([low, high], bits);
        let mut codes = [c0; 14];
        let groups = [c1].into_iter().chain(sixes).chain(threes.into_iter().flatten());
        codes[1..].iter_mut().zip(groups).for_each(|(to, from)| *to = from);
        let store = |codes| {
            let mut line = [0; 64];
            simd.store_codes(codes, &mut line);
            line
        };
        Results {
            sums: [a, simd.splat_i32(self.sums[0][3]), simd.add_scaled(a, b, &self.scales)]
                .map(|sums| simd.to_i32(sums)),
            codes: codes.map(store),
            floats: [
                simd.sums_to_f32(a),
                simd.multiply_f32(x, y),
                simd.splat_f32(self.floats[0][5]),
            ]
            .map(|floats| simd.to_array(floats)),
        }
    }
}

pub(super) fn sixteen_sums_match_scalar(isa: Isa) {
    for k in 0..32usize {
        let sum = |i: usize| {
            [i32::MIN, i32::MAX, 16_777_217, -133_169_152, 7][(i + k) % 5]
                .wrapping_add((i * k) as i32)
        };
        let line = |m: usize| std::array::from_fn::<u8, 64, _>(|i| (i * m + k * 101 + i * i) as u8);
        let lines = [line(37), line(91), line(53)];
        let (a, b): ([i32; 16], [i32; 16]) =
            (std::array::from_fn(sum), std::array::from_fn(|i| sum(3 * i + 1)));
        let scales: [u8; 16] = std::array::from_fn(|i| (i * 77 + k * 13 + 128) as u8);
        let floats = [a.map(|v| v as f32 * 0.37), b.map(|v| v as f32 * 1e-3)];
        let operations = Operations { sums: [a, b], scales, lines: lines.each_ref(), floats };
        let found = dispatch(isa, operations);
        let scaled = |r: usize| a[r].wrapping_add(b[r].wrapping_mul(i32::from(scales[r] as i8)));
        assert_eq!(found.sums, [a, [a[3]; 16], std::array::from_fn(scaled)]);
        let nibble = |m: usize, i: usize| lines[m / 2][i] >> (4 * (m % 2)) & 15;
        for i in 0..64 {
            for m in 0..2 {
                assert_eq!(found.codes[m][i], nibble(m, i));
            }
            for m in 0..4 {
                assert_eq!(found.codes[2 + m][i], nibble(m, i) + 16 * (lines[2][i] >> (2 * m) & 3));
            }
            for (g, q) in (0..2).flat_map(|g| (0..4).map(move |q| (g, q))) {
                let low = lines[g][i] >> (2 * q) & 3;
                let high = lines[2][i] >> (2 * q + g) & 1;
                assert_eq!(found.codes[6 + 4 * g + q][i], low + 4 * high);
            }
        }
        assert_same_bits(&found.floats[0], &a.map(|v| v as f32));
        let products: Vec<_> = (0..16).map(|i| floats[0][i] * floats[1][i]).collect();
        assert_same_bits(&found.floats[1], &products);
        assert_same_bits(&found.floats[2], &[floats[0][5]; 16]);
    }
}
