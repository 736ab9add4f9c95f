//! `vdpbf16ps`: two products of bfloats added to each of sixteen sums.

use std::arch::x86_64::*;
use std::hint::black_box;
use std::ops::Range;

use crate::arch::bfloat::Target;
use crate::arch::{EXP2, EXP2_LEAST};
use crate::bf16::{COLS, GROUP, Pair, ROWS, STEP, To, Two, WIDTH};

/// Proof that the CPU has AVX-512 F, BW and BF16.
#[derive(Clone, Copy)]
pub(in crate::arch) struct Avx512Bf16(());

impl Avx512Bf16 {
    /// The proof, where the CPU has the instructions.
    #[inline]
    pub(in crate::arch) fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16");
        has.then_some(Self(()))
    }

    /// As [`tile`](super::super::bfloat::tile).
    #[inline]
    pub(in crate::arch) fn tile<const BY_ROWS: bool>(
        self,
        a: &[Pair],
        b: &[Pair],
        to: &mut Target<'_>,
    ) {
        assert_eq!(a.len() / ROWS, b.len() / COLS, "sides differ in pairs");
        // SAFETY: `self` exists.
        unsafe { tile::<BY_ROWS>(a, b, to) }
    }

    /// As [`join_row`](super::super::bfloat::join_row).
    #[inline]
    pub(in crate::arch) fn join_row(self, row: &[f32], to: &mut [Pair], every: usize) {
        // SAFETY: `self` exists.
        unsafe { join_row(row, to, every) }
    }

    /// As [`join_lines`](super::super::bfloat::join_lines).
    #[inline]
    pub(in crate::arch) fn join_lines<const W: usize>(
        self,
        lines: [&[f32; GROUP]; 2],
        to: &mut [Pair],
        every: usize,
    ) {
        // SAFETY: `self` exists.
        unsafe { join_lines::<W>(lines, to, every) }
    }

    /// As [`largest`](super::super::bfloat::largest).
    #[inline]
    pub(in crate::arch) fn largest(self, x: &[f32]) -> f32 {
        // SAFETY: `self` exists.
        unsafe { largest(x) }
    }

    /// As [`join_exps`](super::super::bfloat::join_exps).
    #[inline]
    pub(in crate::arch) fn join_exps(
        self,
        two: Two<'_>,
        largest: [f32; 2],
        scale: f32,
        at: usize,
        to: To<'_>,
        sums: &mut [[f32; STEP]; 2],
    ) {
        // SAFETY: `self` exists.
        unsafe { join_exps(two, largest, scale, at, to, sums) }
    }

    /// As [`join_slopes`](super::super::bfloat::join_slopes).
    #[inline]
    pub(in crate::arch) fn join_slopes(
        self,
        two: Two<'_>,
        exps: &[Pair],
        means: [f32; 2],
        at: usize,
        to: To<'_>,
    ) {
        // SAFETY: `self` exists.
        unsafe { join_slopes(two, exps, means, at, to) }
    }

    /// As [`product`](super::super::bfloat::product).
    #[inline]
    pub(in crate::arch) fn product(self, exps: &[Pair], x: &[f32], seen: Range<usize>) -> f32 {
        // SAFETY: `self` exists.
        unsafe { product(exps, x, seen) }
    }
}

/// Independent chains: more than the latency of an instruction times how many start in a cycle.
const CHAINS: usize = 16;

impl Avx512Bf16 {
    /// As [`bf16`](super::super::peak::bf16).
    pub(in crate::arch) fn peak(self, steps: usize) -> u64 {
        // SAFETY: `self` exists.
        unsafe { peak(steps) }
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn peak(steps: usize) -> u64 {
    let (a, b) = (black_box(_mm512_set1_epi32(0x3f80_3f80)), black_box(_mm512_set1_epi32(0x3c00)));
    let mut sums = [_mm512_setzero_ps(); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, bfloats(a), bfloats(b));
        }
    }
    black_box(sums);
    (4 * steps * CHAINS * 16) as u64
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn tile<const BY_ROWS: bool>(a: &[Pair], b: &[Pair], to: &mut Target<'_>) {
    for row in &to.rows {
        // Lines that are written at the end come while the sums are made.
        for half in row.chunks(COLS / 2) {
            _mm_prefetch::<_MM_HINT_ET0>(half.as_ptr().cast());
        }
    }
    let (a, rest) = a.as_chunks::<{ ROWS * STEP }>();
    assert!(rest.is_empty(), "pairs are no whole steps");
    let b = b.as_chunks::<COLS>().0.as_chunks::<STEP>().0;
    let mut acc = [[_mm512_setzero_ps(); 2]; ROWS];
    for (a, b) in a.iter().zip(b) {
        for p in 0..STEP {
            // SAFETY: the CPU has the instructions, as this function is compiled for them; the loads
            // are the two halves of `b[p]`.
            unsafe {
                let columns = [
                    _mm512_loadu_si512(b[p].as_ptr().cast()),
                    _mm512_loadu_si512(b[p].as_ptr().add(COLS / 2).cast()),
                ];
                for r in 0..ROWS {
                    let at = if BY_ROWS { r * STEP + p } else { p * ROWS + r };
                    let row = _mm512_set1_epi32(a[at] as i32);
                    for c in 0..2 {
                        acc[r][c] = _mm512_dpbf16_ps(acc[r][c], bfloats(row), bfloats(columns[c]));
                    }
                }
            }
        }
    }
    for ((row, acc), scale) in to.rows.iter_mut().zip(acc).zip(to.scales) {
        let scale = _mm512_set1_ps(scale);
        for (half, acc) in row.chunks_mut(COLS / 2).zip(acc) {
            let mask = first(half.len());
            // SAFETY: as above; the elements that are read and written are those of the slice.
            unsafe {
                let mut sum = _mm512_mul_ps(acc, scale);
                if to.add {
                    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, half.as_ptr()));
                }
                _mm512_mask_storeu_ps(half.as_mut_ptr(), mask, sum);
            }
        }
    }
}

/// The mask of the first `n` of sixteen.
#[inline(always)]
fn first(n: usize) -> __mmask16 {
    if n < 16 { (1 << n) - 1 } else { !0 }
}

/// The mask of what is in a range, of sixteen from `at` on.
#[inline(always)]
fn within(range: &Range<usize>, at: usize) -> __mmask16 {
    first(range.end.saturating_sub(at)) & !first(range.start.saturating_sub(at))
}

/// The first sixteen of `x`, or all and then zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn sixteen(x: &[f32]) -> __m512 {
    // SAFETY: the CPU has the instruction, as this function is compiled for it; what is read is `x`.
    unsafe { _mm512_maskz_loadu_ps(first(x.len()), x.as_ptr()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn join_row(row: &[f32], to: &mut [Pair], every: usize) {
    let mut numbers = row.chunks(2 * STEP);
    for to in to.chunks_mut(every) {
        let numbers = numbers.next().unwrap_or_default();
        let (low, high) = numbers.split_at(STEP.min(numbers.len()));
        let pairs = _mm512_cvtne2ps_pbh(sixteen(high), sixteen(low));
        let to = &mut to[..STEP];
        // SAFETY: as above; the store is the slice, of sixteen pairs.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), bits(pairs)) };
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn join_lines<const W: usize>(lines: [&[f32; GROUP]; 2], to: &mut [Pair], every: usize) {
    // Sixteen bfloats of the even line, then sixteen of the odd one, become pairs.
    let order = std::array::from_fn::<u16, 32, _>(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: both are 512 bits of which any are valid.
    let order: __m512i = unsafe { std::mem::transmute(order) };
    let [even, odd] = lines.map(|line| line.chunks_exact(W));
    for ((even, odd), to) in even.zip(odd).zip(to.chunks_mut(every)) {
        let halves = even.chunks(16).zip(odd.chunks(16)).zip(to[..W].chunks_mut(16));
        for ((even, odd), to) in halves {
            let bfloats = _mm512_cvtne2ps_pbh(sixteen(odd), sixteen(even));
            // SAFETY: as above; the store is the slice.
            unsafe {
                let pairs = _mm512_permutexvar_epi16(order, bits(bfloats));
                _mm512_mask_storeu_epi32(to.as_mut_ptr().cast(), first(to.len()), pairs);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn largest(x: &[f32]) -> f32 {
    let mut most = [_mm512_set1_ps(f32::NEG_INFINITY); 4];
    let (chunks, rest) = x.as_chunks::<64>();
    for chunk in chunks {
        for (most, x) in most.iter_mut().zip(chunk.chunks(16)) {
            *most = _mm512_max_ps(sixteen(x), *most);
        }
    }
    for (most, x) in most.iter_mut().zip(rest.chunks(16)) {
        *most = _mm512_mask_max_ps(*most, first(x.len()), sixteen(x), *most);
    }
    let [a, b, c, d] = most;
    _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d)))
}

/// `2^x` of what is not above 0, as [`exp2`](crate::arch::exp2), but that products and sums are not rounded
/// apart, and that it is never 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn exp2(x: __m512) -> __m512 {
    let x = _mm512_max_ps(_mm512_set1_ps(EXP2_LEAST), x);
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let r = _mm512_sub_ps(x, n);
    let mut p = _mm512_set1_ps(EXP2[0]);
    for c in &EXP2[1..] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
    }
    _mm512_scalef_ps(p, n)
}

/// Sixteen numbers of a row from `at` on and the next sixteen, which are 0 where they are not seen.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn load_seen(row: &[f32], at: usize, seen: [__mmask16; 2]) -> [__m512; 2] {
    let mut x = [_mm512_setzero_ps(); 2];
    for half in 0..2 {
        let from = row.as_ptr().wrapping_add(at + 16 * half);
        // SAFETY: the CPU has the instruction; what is read is seen, so it is in the row.
        x[half] = unsafe { _mm512_maskz_loadu_ps(seen[half], from) };
    }
    x
}

/// What is seen of thirty-two columns.
#[inline(always)]
fn seen_of(seen: &Range<usize>, at: usize) -> [__mmask16; 2] {
    [within(seen, at), within(seen, at + 16)]
}

/// Puts thirty-two columns of two rows to their steps in `block`, and to `joined`, where they are pairs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn put_two(rows: [__m512i; 2], block: &mut [Pair], joined: &mut [Pair; WIDTH]) {
    let mut order = [[0u16; 32]; 2];
    for (i, to) in order.as_flattened_mut().iter_mut().enumerate() {
        *to = (i / 2 + i % 2 * 32) as u16;
    }
    // SAFETY: both are 512 bits of which any are valid, twice.
    let order: [__m512i; 2] = unsafe { std::mem::transmute(order) };
    let block = block[..2 * STEP].as_chunks_mut::<STEP>().0;
    let joined = joined.as_chunks_mut::<16>().0;
    for i in 0..2 {
        // SAFETY: the CPU has the instructions; every store is sixteen pairs.
        unsafe {
            _mm512_storeu_si512(block[i].as_mut_ptr().cast(), rows[i]);
            let pairs = _mm512_permutex2var_epi16(rows[0], order[i], rows[1]);
            _mm512_storeu_si512(joined[i].as_mut_ptr().cast(), pairs);
        }
    }
}

/// Checks what loads of [`load_seen`] rely on.
#[inline(always)]
fn check_seen(two: &Two<'_>) {
    let inside = |i: usize| two.seen[i].end <= two.rows[i].len();
    assert!(inside(0) && inside(1), "a row sees what it has not");
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn join_exps(
    two: Two<'_>,
    largest: [f32; 2],
    scale: f32,
    at: usize,
    to: To<'_>,
    sums: &mut [[f32; STEP]; 2],
) {
    check_seen(&two);
    let factor = _mm512_set1_ps(scale * std::f32::consts::LOG2_E);
    let largest = [_mm512_set1_ps(largest[0]), _mm512_set1_ps(largest[1])];
    let mut lanes = [_mm512_setzero_ps(); 2];
    let steps = to.joined.as_chunks_mut().0.iter_mut().zip(to.block.chunks_mut(ROWS * STEP));
    for (s, (joined, block)) in steps.enumerate() {
        let at = at + s * WIDTH;
        let mut rows = [_mm512_setzero_si512(); 2];
        for i in 0..2 {
            let seen = seen_of(&two.seen[i], at);
            if seen == [0; 2] {
                continue;
            }
            let mut x = load_seen(two.rows[i], at, seen);
            for half in 0..2 {
                let y = _mm512_mul_ps(_mm512_sub_ps(x[half], largest[i]), factor);
                x[half] = _mm512_maskz_mov_ps(seen[half], exp2(y));
            }
            lanes[i] = _mm512_add_ps(lanes[i], _mm512_add_ps(x[0], x[1]));
            rows[i] = bits(_mm512_cvtne2ps_pbh(x[1], x[0]));
        }
        put_two(rows, block, joined);
    }
    for i in 0..2 {
        // SAFETY: the CPU has the instructions; what is read and written is the array.
        unsafe {
            let sums = sums[i].as_mut_ptr();
            _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), lanes[i]));
        }
    }
}

/// The thirty-two bfloats of a step.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn widened(step: &[Pair; STEP]) -> [__m512; 2] {
    // SAFETY: the CPU has the instructions; the loads are the halves of the step.
    unsafe {
        let halves = [step.as_ptr(), step.as_ptr().add(STEP / 2)];
        let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(halves[0].cast()));
        let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(halves[1].cast()));
        [
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(low)),
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(high)),
        ]
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn join_slopes(two: Two<'_>, exps: &[Pair], means: [f32; 2], at: usize, to: To<'_>) {
    check_seen(&two);
    let means = [_mm512_set1_ps(means[0]), _mm512_set1_ps(means[1])];
    let steps = to.joined.as_chunks_mut().0.iter_mut().zip(to.block.chunks_mut(ROWS * STEP));
    for (s, ((joined, block), exps)) in steps.zip(exps.chunks(ROWS * STEP)).enumerate() {
        let at = at + s * WIDTH;
        let exps = exps[..2 * STEP].as_chunks::<STEP>().0;
        let mut rows = [_mm512_setzero_si512(); 2];
        for i in 0..2 {
            let seen = seen_of(&two.seen[i], at);
            if seen == [0; 2] {
                continue;
            }
            // What is not seen has an exponential of 0.
            let (mut x, exps) = (load_seen(two.rows[i], at, seen), widened(&exps[i]));
            for half in 0..2 {
                x[half] = _mm512_mul_ps(exps[half], _mm512_sub_ps(x[half], means[i]));
            }
            rows[i] = bits(_mm512_cvtne2ps_pbh(x[1], x[0]));
        }
        put_two(rows, block, joined);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn product(exps: &[Pair], x: &[f32], seen: Range<usize>) -> f32 {
    assert!(seen.end <= x.len(), "a row sees what it has not");
    let mut sums = [_mm512_setzero_ps(); 2];
    let first = seen.start / WIDTH;
    for (s, step) in exps.chunks(ROWS * STEP).enumerate().skip(first) {
        let at = s * WIDTH;
        if at >= seen.end {
            break;
        }
        let Some(step) = step.first_chunk() else { break };
        let (x, exps) = (load_seen(x, at, seen_of(&seen, at)), widened(step));
        for half in 0..2 {
            sums[half] = _mm512_fmadd_ps(exps[half], x[half], sums[half]);
        }
    }
    _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]))
}

/// The same bits.
#[inline(always)]
fn bfloats(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of which any are valid.
    unsafe { std::mem::transmute(bits) }
}

/// The same bits.
#[inline(always)]
fn bits(bfloats: __m512bh) -> __m512i {
    // SAFETY: as of [`bfloats`].
    unsafe { std::mem::transmute(bfloats) }
}
