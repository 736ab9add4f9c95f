//! `vdpbf16ps`: two products of bfloats added to each of sixteen sums.

use std::arch::x86_64::*;
use std::hint::black_box;

use crate::bf16::{COLS, Pair, ROWS, STEP};

/// Proof that the CPU has AVX-512 F and BF16.
#[derive(Clone, Copy)]
pub(in crate::arch) struct Avx512Bf16(());

impl Avx512Bf16 {
    /// The proof, where the CPU has the instructions.
    #[inline]
    pub(in crate::arch) fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
        has.then_some(Self(()))
    }

    /// As [`tile`](super::super::bfloat::tile).
    #[inline]
    pub(in crate::arch) fn tile<const BY_ROWS: bool>(
        self,
        a: &[Pair],
        b: &[Pair],
        sums: &mut [[f32; COLS]; ROWS],
    ) {
        assert_eq!(a.len() / ROWS, b.len() / COLS, "sides differ in pairs");
        // SAFETY: `self` exists.
        unsafe { tile::<BY_ROWS>(a, b, sums) }
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
fn tile<const BY_ROWS: bool>(a: &[Pair], b: &[Pair], sums: &mut [[f32; COLS]; ROWS]) {
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
    for r in 0..ROWS {
        for c in 0..2 {
            let to = &mut sums[r][c * COLS / 2..][..COLS / 2];
            // SAFETY: as above; the store is the slice.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), acc[r][c]) };
        }
    }
}

/// The same bits.
#[inline(always)]
fn bfloats(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of which any are valid.
    unsafe { std::mem::transmute(bits) }
}
