//! What this machine can do at most: the limits that kernels are compared with.
//!
//! Machines that are shared or virtual change from one minute to the next, so a speed says little
//! without the speed that was possible at the time. [`measure`] takes a second or two:
//!
//! | limit | how |
//! | --- | --- |
//! | read bandwidth | sums the bytes of a buffer far larger than the caches, in the order of several [`Pattern`]s, of which the best counts |
//! | int8 | independent chains of the widest int8 product of the instruction set, in registers |
//! | f32 | independent chains of multiply-adds in registers, fused where the instruction set has them |
//! | bf16 | the same of products of bfloats, where the CPU has them |
//! | handover | two threads write in turn what the other waits for: how far apart cores are, which is what a parallel loop costs at least |
//!
//! Work is dealt out in small pieces to whichever thread is free, so that a core that is slower for
//! a while makes a limit a little lower and does not halve it. A limit is the median of repeated
//! samples, of which the first, a warm-up, is not counted. Nothing is pinned: the kernels are not.

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use crate::aligned::AlignedBuf;
use crate::arch::{Kernel, Simd, dispatch, peak};
use crate::isa::Isa;

/// Bytes in a cache line.
const LINE: usize = 64;

type Line = [u8; LINE];

/// Lines in a piece of the buffer: 4 MiB.
const PIECE: usize = 1 << 16;

/// Lines that are read from one stream at a time.
const STEP: usize = 4;

/// Handovers of a sample.
const HANDOVERS: usize = if cfg!(test) { 1 << 6 } else { 1 << 13 };

/// How often a thread looks whether it is its turn before it lets others use its core.
const PATIENCE: usize = 1 << 12;

/// Pieces of arithmetic in a sample, for each thread.
const PIECES: usize = 64;

/// Steps of all chains in a piece of arithmetic: a fraction of a millisecond. Few in tests, which
/// also run in emulators.
const CHAIN_STEPS: usize = if cfg!(test) { 1 << 10 } else { 1 << 17 };

/// In which order memory is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// From the first byte of a piece to its last.
    Linear,
    /// Two halves of a piece in turn.
    TwoStreams,
    /// Four quarters of a piece in turn.
    FourStreams,
    /// As [`Self::Linear`], each line asked for some time before it is read.
    Prefetched,
    /// As [`Self::FourStreams`], each line asked for some time before it is read.
    FourPrefetched,
}

impl Pattern {
    /// All patterns.
    pub const ALL: [Self; 5] =
        [Self::Linear, Self::TwoStreams, Self::FourStreams, Self::Prefetched, Self::FourPrefetched];

    /// A name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::TwoStreams => "2 streams",
            Self::FourStreams => "4 streams",
            Self::Prefetched => "prefetched",
            Self::FourPrefetched => "4 streams, prefetched",
        }
    }
}

/// A speed that was measured several times, in units a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// The middle of the samples.
    pub median: f64,
    /// The lowest sample.
    pub low: f64,
    /// The highest sample.
    pub high: f64,
}

impl Rate {
    /// The median and range of `samples`, which are numbers; `None` of none.
    pub fn of(mut samples: Vec<f64>) -> Option<Self> {
        samples.sort_by(f64::total_cmp);
        let (&low, &high) = (samples.first()?, samples.last()?);
        let middle = samples.len() / 2;
        let median = match samples.len() % 2 {
            0 => (samples[middle - 1] + samples[middle]) / 2.0,
            _ => samples[middle],
        };
        Some(Self { median, low, high })
    }
}

/// What a number of threads can do at most.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes read from memory.
    pub bandwidth: Rate,
    /// The order in which they were read fastest.
    pub pattern: Pattern,
    /// Products of two int8 that are added to a sum.
    pub int8: Rate,
    /// Float operations in f32: a multiply-add is two.
    pub f32: Rate,
    /// Float operations in products of bfloats, as [`Self::f32`] counts them; `None` where they are no
    /// faster ([`bf16::is_fast`](crate::bf16::is_fast)).
    pub bf16: Option<Rate>,
    /// Handovers of a cache line from one thread to another; `None` where there is one thread. Virtual
    /// machines move between cores that share a cache and cores that do not.
    pub handover: Option<Rate>,
}

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Number of threads.
    pub threads: usize,
    /// Bytes of the buffer; far more than the caches hold.
    pub buffer: usize,
    /// Samples of each limit, after a warm-up.
    pub samples: usize,
}

impl Options {
    /// A buffer of 1 GiB, and enough samples for a median: one to two seconds.
    pub fn new(threads: usize) -> Self {
        Self { threads, buffer: 1 << 30, samples: 7 }
    }
}

/// Measures the limits on an instruction set.
///
/// # Panics
/// When the CPU does not have `isa`, or memory has no room for the buffer.
pub fn measure(isa: Isa, options: &Options) -> Limits {
    let Options { threads, samples, .. } = *options;
    let (pattern, bandwidth) = read_bandwidth(isa, options);
    let chains = |piece: fn(Isa, usize) -> u64| {
        let pieces = PIECES * threads.max(1);
        rate(threads, samples, pieces, |_| piece(isa, CHAIN_STEPS))
    };
    let handover = (threads > 1).then(|| handover(samples));
    let bf16 = crate::bf16::is_fast().then(|| chains(|_, steps| peak::bf16(steps)));
    Limits { bandwidth, pattern, int8: chains(peak::int8), f32: chains(peak::f32), bf16, handover }
}

fn handover(samples: usize) -> Rate {
    let samples = samples.max(1);
    let turns = (samples + 1) * HANDOVERS;
    let turn = Turn(AtomicUsize::new(0));
    // Takes every second turn, and returns when the samples began.
    let play = |first: usize| {
        let mut begins = Vec::new();
        for own in (first..=turns).step_by(2) {
            for looks in 1.. {
                if turn.0.load(Ordering::Acquire) == own {
                    break;
                }
                match looks % PATIENCE {
                    0 => thread::yield_now(),
                    _ => std::hint::spin_loop(),
                }
            }
            if own.is_multiple_of(HANDOVERS) {
                begins.push(Instant::now());
            }
            turn.0.store(own + 1, Ordering::Release);
        }
        begins
    };
    let begins = thread::scope(|scope| {
        scope.spawn(|| play(1));
        play(0)
    });
    // The first sample is the warm-up.
    let rates = begins[1..].windows(2).map(|pair| {
        let seconds = (pair[1] - pair[0]).as_secs_f64();
        HANDOVERS as f64 / seconds.max(1e-9)
    });
    Rate::of(rates.collect()).expect("at least one sample")
}

/// Whose turn it is, on a cache line of its own.
#[repr(align(128))]
struct Turn(AtomicUsize);

fn read_bandwidth(isa: Isa, options: &Options) -> (Pattern, Rate) {
    let bytes = options.buffer.next_multiple_of(PIECE * LINE);
    let mut buffer = AlignedBuf::<u8>::new(bytes);
    // Pages that were never written are all the same page of zeros.
    for (i, line) in buffer.as_chunks_mut::<LINE>().0.iter_mut().enumerate() {
        line.fill((i % 251) as u8);
    }
    let lines: &[Line] = buffer.as_chunks().0;
    let measure = |pattern| {
        let pieces = bytes / (PIECE * LINE);
        let rate = rate(options.threads, options.samples, pieces, |i| {
            black_box(sum(isa, pattern, &lines[i * PIECE..][..PIECE]));
            (PIECE * LINE) as u64
        });
        (pattern, rate)
    };
    let measured = Pattern::ALL.map(measure);
    let faster = |a: (Pattern, Rate), b: (Pattern, Rate)| {
        if b.1.median > a.1.median { b } else { a }
    };
    measured.into_iter().fold(measured[0], faster)
}

/// Samples of `pieces` pieces of work on some threads. A piece returns how many units it did.
fn rate(
    threads: usize,
    samples: usize,
    pieces: usize,
    piece: impl Fn(usize) -> u64 + Sync,
) -> Rate {
    let (threads, samples) = (threads.max(1), samples.max(1));
    let next: Vec<_> = (0..=samples).map(|_| AtomicUsize::new(0)).collect();
    let barrier = Barrier::new(threads);
    // One sample after another, on each of the threads; returns the units that this one did, and
    // how long all of them took.
    let work = || {
        let sample = |next: &AtomicUsize| {
            barrier.wait();
            let begin = Instant::now();
            let mut units = 0;
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= pieces {
                    break;
                }
                units += piece(i);
            }
            barrier.wait();
            (units, begin.elapsed())
        };
        next.iter().map(sample).collect::<Vec<_>>()
    };
    let done: Vec<_> = thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let own = work();
        let others = others.into_iter().map(|thread| thread.join().expect("work does not panic"));
        others.chain([own]).collect()
    });
    // The first sample is the warm-up.
    let rates = (1..=samples).map(|s| {
        let units: u64 = done.iter().map(|samples| samples[s].0).sum();
        let time = done.iter().map(|samples| samples[s].1).max().unwrap_or_default();
        units as f64 / time.as_secs_f64().max(1e-9)
    });
    Rate::of(rates.collect()).expect("at least one sample")
}

/// The bytes of a piece, summed into the bytes of a line; wraps. So every byte has to be read.
fn sum(isa: Isa, pattern: Pattern, piece: &[Line]) -> Line {
    match pattern {
        Pattern::Linear => dispatch(isa, Sum::<1, false>(piece)),
        Pattern::TwoStreams => dispatch(isa, Sum::<2, false>(piece)),
        Pattern::FourStreams => dispatch(isa, Sum::<4, false>(piece)),
        Pattern::Prefetched => dispatch(isa, Sum::<1, true>(piece)),
        Pattern::FourPrefetched => dispatch(isa, Sum::<4, true>(piece)),
    }
}

/// Lines, summed in `N` streams, each line asked for ahead if `PREFETCHED`.
struct Sum<'a, const N: usize, const PREFETCHED: bool>(&'a [Line]);

impl<const N: usize, const PREFETCHED: bool> Kernel for Sum<'_, N, PREFETCHED> {
    type Output = Line;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Line {
        let mut sums = [[0u8; LINE]; STEP];
        let streams = self.0.chunks_exact(self.0.len() / N);
        let mut parts: [&[[Line; STEP]]; N] = [&[]; N];
        for (part, stream) in parts.iter_mut().zip(streams) {
            *part = stream.as_chunks().0;
        }
        for i in 0..parts[0].len() {
            for part in parts {
                for (sum, line) in sums.iter_mut().zip(&part[i]) {
                    if PREFETCHED {
                        simd.prefetch_stream(line, S::stream_ahead(N));
                    }
                    for (sum, byte) in sum.iter_mut().zip(line) {
                        *sum = sum.wrapping_add(*byte);
                    }
                }
            }
        }
        let [a, b, c, d] = sums;
        std::array::from_fn(|i| a[i].wrapping_add(b[i]).wrapping_add(c[i]).wrapping_add(d[i]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::available;

    #[test]
    fn every_pattern_reads_every_byte() {
        let bytes: Vec<u8> = (0..PIECE * LINE).map(|i| (i % 251) as u8).collect();
        let lines: &[Line] = bytes.as_chunks().0;
        let expected: Line = std::array::from_fn(|i| {
            lines.iter().fold(0, |sum: u8, line| sum.wrapping_add(line[i]))
        });
        for isa in available() {
            for pattern in Pattern::ALL {
                assert_eq!(sum(isa, pattern, lines), expected, "{isa} {pattern:?}");
            }
        }
    }

    #[test]
    fn a_rate_is_the_median_of_its_samples() {
        let rate = |samples: &[f64]| Rate::of(samples.to_vec());
        assert_eq!(rate(&[]), None);
        assert_eq!(rate(&[3.0]), Some(Rate { median: 3.0, low: 3.0, high: 3.0 }));
        assert_eq!(rate(&[9.0, 1.0, 2.0]), Some(Rate { median: 2.0, low: 1.0, high: 9.0 }));
        assert_eq!(rate(&[4.0, 1.0, 2.0, 8.0]), Some(Rate { median: 3.0, low: 1.0, high: 8.0 }));
    }

    #[test]
    fn every_piece_is_done_once_in_every_sample() {
        for threads in [1, 3] {
            let done: Vec<_> = (0..10).map(|_| AtomicUsize::new(0)).collect();
            rate(threads, 4, done.len(), |i| {
                done[i].fetch_add(1, Ordering::Relaxed);
                1
            });
            let done: Vec<_> = done.into_iter().map(AtomicUsize::into_inner).collect();
            assert_eq!(done, [5; 10], "four samples and a warm-up");
        }
    }

    #[test]
    fn limits_are_measured_on_every_instruction_set() {
        for isa in available() {
            let limits = measure(isa, &Options { threads: 2, buffer: 1, samples: 1 });
            let handover = limits.handover.expect("there are two threads");
            for rate in [limits.bandwidth, limits.int8, limits.f32, handover] {
                assert!(rate.low.is_finite() && rate.low > 0.0, "{isa} {limits:?}");
            }
        }
    }
}
