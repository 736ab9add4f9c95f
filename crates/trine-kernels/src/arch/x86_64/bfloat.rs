//! `vdpbf16ps`: two products of bfloats added to each of sixteen sums.

use std::arch::x86_64::*;
use std::hint::black_box;

use crate::arch::bfloat::Target;
use crate::bf16::{COLS, GROUP, Pair, ROWS, STEP};

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
    pub(in crate::arch) fn join_row(self, row: &[f32], scale: f32, to: &mut [Pair], every: usize) {
        // SAFETY: `self` exists.
        unsafe { join_row(row, scale, to, every) }
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
    let scale = _mm512_set1_ps(to.scale);
    for (row, acc) in to.rows.iter_mut().zip(acc) {
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

/// The first sixteen of `x`, or all and then zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn sixteen(x: &[f32]) -> __m512 {
    // SAFETY: the CPU has the instruction, as this function is compiled for it; what is read is `x`.
    unsafe { _mm512_maskz_loadu_ps(first(x.len()), x.as_ptr()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn join_row(row: &[f32], scale: f32, to: &mut [Pair], every: usize) {
    let scale = _mm512_set1_ps(scale);
    let mut numbers = row.chunks(2 * STEP);
    for to in to.chunks_mut(every) {
        let numbers = numbers.next().unwrap_or_default();
        let (low, high) = numbers.split_at(STEP.min(numbers.len()));
        let [low, high] = [low, high].map(|half| _mm512_mul_ps(sixteen(half), scale));
        let pairs = _mm512_cvtne2ps_pbh(high, low);
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
