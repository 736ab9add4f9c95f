//! The KV cache in blocks of 64 positions, and attention over it.
//!
//! A [`KvLayout`] says how the keys and values of one key/value head at 64 positions lie in a block
//! of bytes; who owns the bytes, and which sequences share them, is the runtime's business. A
//! position's place depends on nothing but its index in the sequence, and so does the order of every
//! sum: [`attention_kv`] gives a token the same bits whether it comes alone or among hundreds, beside
//! other sequences or not, on any number of threads and any instruction set.
//!
//! | [`KvType`] | bytes a position and head, `d` features | attention |
//! | --- | --- | --- |
//! | `F32` | `8 d` | that of [`attention`](super::attention), bit for bit |
//! | `F16` | `4 d` | the same, of keys and values rounded to f16 |
//! | `Int8` | `2 d + 12` | integer products, see `int8` |
//!
//! # Parallelism
//!
//! A task is a band of query rows of one key/value head: the heads that share it, for some tokens, so
//! that a block is read once for all of them. With few tokens and a long past, bands are too few for
//! the threads, and those of `Int8` are divided along the past as well: into spans of 256 positions,
//! whose results are merged in the order of positions, always. `F32` and `F16` have one softmax over
//! the whole past and are divided by heads only.

mod float;
mod int8;

use std::cell::Cell;
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;

use super::{Isa, dispatch, isa};
use crate::aligned::AlignedBuf;
use crate::parallel::{self, SharedMut};

/// Positions in a block.
pub const KV_BLOCK: usize = 64;

/// Query rows of a band, at most.
const BAND: usize = 32;

/// Tasks for each thread, at least, where there is enough to divide.
const TASKS: usize = 8;

/// Products from which on threads are worth their start.
const PARALLEL_WORK: usize = 1 << 14;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// As they are.
    F32,
    /// Rounded to half precision.
    F16,
    /// int8 codes with a scale for each position and head.
    Int8,
}

impl KvType {
    /// All types.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Int8];

    /// A name, which parses back.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }
}

impl fmt::Display for KvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for KvType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            format!("unknown KV type {name:?}: expected one of {known}")
        })
    }
}

/// How the keys and values of one key/value head at [`KV_BLOCK`] positions lie in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    kind: KvType,
    d: usize,
}

impl KvLayout {
    /// The widest head; up to it no integer sum can overflow.
    pub const MAX_HEAD_DIM: usize = 1024;

    /// The layout of heads with `head_dim` features; `None` where that is 0 or above
    /// [`Self::MAX_HEAD_DIM`].
    pub fn new(kind: KvType, head_dim: usize) -> Option<Self> {
        (1..=Self::MAX_HEAD_DIM).contains(&head_dim).then_some(Self { kind, d: head_dim })
    }

    /// How keys and values are stored.
    pub fn kind(self) -> KvType {
        self.kind
    }

    /// Features of a head.
    pub fn head_dim(self) -> usize {
        self.d
    }

    /// Bytes of a block: a multiple of 64.
    pub fn block_bytes(self) -> usize {
        match self.kind {
            KvType::F32 => float::block_bytes::<f32>(self.d),
            KvType::F16 => float::block_bytes::<f16>(self.d),
            KvType::Int8 => int8::block_bytes(self.d),
        }
    }

    /// Writes the key and the value, `(d,)` each, of position `position % 64` of a block.
    ///
    /// # Panics
    /// When the lengths are not those of the layout, or the block is not aligned as [`KvPage`] is.
    pub fn write(self, block: &mut [u8], position: usize, key: &[f32], value: &[f32]) {
        self.write_on(isa(), block, position, key, value);
    }

    pub(crate) fn write_on(
        self,
        isa: Isa,
        block: &mut [u8],
        position: usize,
        key: &[f32],
        value: &[f32],
    ) {
        assert_eq!((key.len(), value.len()), (self.d, self.d), "key or value is not (d,)");
        assert_eq!(block.len(), self.block_bytes(), "not a block of this layout");
        let at = position % KV_BLOCK;
        match self.kind {
            KvType::F32 => float::write::<f32>(block, at, key, value),
            KvType::F16 => float::write::<f16>(block, at, key, value),
            KvType::Int8 => dispatch(isa, int8::Write { block, at, key, value }),
        }
    }
}

/// Zeroed memory for blocks, which starts on a cache line.
#[derive(Clone, Debug)]
pub struct KvPage(AlignedBuf<u8>);

impl KvPage {
    /// `bytes` zeros.
    pub fn new(bytes: usize) -> Self {
        Self(AlignedBuf::new(bytes))
    }
}

impl Deref for KvPage {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for KvPage {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// Some consecutive tokens of one sequence, and what they may look at: all positions up to their own.
#[derive(Clone, Copy, Debug)]
pub struct KvSequence<'a> {
    /// For every 64 positions, bytes among which lie those of the layer in question: the blocks of
    /// all its key/value heads, one after another.
    pub pages: &'a [&'a [u8]],
    /// Where in each page the layer's first block begins.
    pub offset: usize,
    /// Position of the first token. Keys and values of all tokens are in the cache already.
    pub start: usize,
    /// Number of tokens.
    pub tokens: usize,
}

/// Causal attention of some sequences' tokens over their caches, on the threads of the pool.
///
/// `q` and `out` are `(T, heads, d)`, with the tokens of all sequences one after another; query heads
/// `G k..G (k + 1)` share key/value head `k`, where `G = heads / kv_heads`.
/// `out = sum over j of softmax(q . key_j / sqrt(d)) * value_j`, over the positions `j` up to the
/// token's own. NaN and infinity in a query, key or value make NaN of the outputs that depend on them,
/// and of no others.
///
/// # Panics
/// When the shapes do not fit together, a page is too short or too few, or (`F16` and `F32`) blocks
/// are not aligned to their elements, which those of a [`KvPage`] are.
pub fn attention_kv(
    layout: KvLayout,
    heads: usize,
    kv_heads: usize,
    sequences: &[KvSequence<'_>],
    q: &[f32],
    out: &mut [f32],
) {
    attention_kv_on(isa(), layout, heads, kv_heads, sequences, q, out);
}

pub(crate) fn attention_kv_on(
    isa: Isa,
    layout: KvLayout,
    heads: usize,
    kv_heads: usize,
    sequences: &[KvSequence<'_>],
    q: &[f32],
    out: &mut [f32],
) {
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads on {kv_heads}");
    let tokens: usize = sequences.iter().map(|s| s.tokens).sum();
    assert_eq!(q.len(), tokens * heads * layout.d, "queries are not (T, heads, d)");
    assert_eq!(q.len(), out.len(), "queries and output differ in length");
    let bytes = layout.block_bytes();
    for s in sequences {
        let pages = (s.start + s.tokens).div_ceil(KV_BLOCK);
        assert!(s.pages.len() >= pages, "{} pages where {pages} are used", s.pages.len());
        let long_enough = |page: &&[u8]| page.len() >= s.offset + kv_heads * bytes;
        assert!(s.pages[..pages].iter().all(long_enough), "page shorter than its blocks");
    }
    let out = SharedMut::new(out);
    let plan = Plan::new(layout, heads, kv_heads, sequences, q);
    let done: Vec<AtomicUsize> = plan.bands.iter().map(|_| AtomicUsize::new(0)).collect();
    let mut buffer = PARTIALS.take();
    if buffer.len() < plan.partials {
        buffer = AlignedBuf::new(plan.partials.next_power_of_two());
    }
    let partials = SharedMut::new(&mut buffer[..plan.partials]);
    let run = |i: usize| {
        let task = &plan.tasks[i];
        let band = &plan.bands[task.band];
        // A thread takes one task after another, but for the end of its share.
        let then = plan.tasks.get(i + 1);
        let then = then.map(|task| (&plan.bands[task.band], task.spans.start));
        match layout.kind {
            KvType::F32 => dispatch(isa, float::Band::<f32>::new(band, &out)),
            KvType::F16 => dispatch(isa, float::Band::<f16>::new(band, &out)),
            KvType::Int8 if task.spans.len() == band.spans => {
                dispatch(isa, int8::Attend { band, to: int8::To::Outputs(&out), then });
            }
            KvType::Int8 => {
                let len = band.rows * int8::partial_len(layout.d);
                let (first, spans) = (task.spans.start, task.spans.len());
                // SAFETY: every span of every band has its own partials, and is part of one task.
                #[allow(unsafe_code)]
                let part = unsafe { partials.slice(band.partials + first * len, spans * len) };
                let to = int8::To::Partials(task.spans.clone(), part);
                dispatch(isa, int8::Attend { band, to, then });
                if done[task.band].fetch_add(spans, Ordering::AcqRel) + spans == band.spans {
                    // SAFETY: this was the last task of the band, and none touches its partials again.
                    #[allow(unsafe_code)]
                    let partials = unsafe { partials.slice(band.partials, band.spans * len) };
                    dispatch(isa, int8::Merge { band, partials, out: &out });
                }
            }
        }
    };
    match plan.work {
        0..PARALLEL_WORK => (0..plan.tasks.len()).for_each(run),
        _ => parallel::run(plan.tasks.len(), run),
    }
    PARTIALS.set(buffer);
}

thread_local! {
    /// Results of the tasks of the loop that a thread has asked for.
    static PARTIALS: Cell<AlignedBuf<f32>> = Cell::default();
}

/// Query rows of one key/value head of a sequence. Row `r` is head `r % group` of token `r / group`.
struct Band<'a> {
    layout: KvLayout,
    pages: &'a [&'a [u8]],
    /// Where in each page the block of the key/value head begins.
    offset: usize,
    /// `(tokens of the call, heads, d)`
    q: &'a [f32],
    heads: usize,
    /// Heads that share the key/value head, and the first of them.
    group: usize,
    first_head: usize,
    /// The sequence's first token, and its position.
    first_token: usize,
    start: usize,
    first_row: usize,
    rows: usize,
    /// Spans that the band looks at, and where the results of each begin.
    spans: usize,
    partials: usize,
}

impl<'a> Band<'a> {
    /// The block of positions `64 i..64 (i + 1)`.
    #[inline(always)]
    fn block(&self, i: usize) -> &'a [u8] {
        &self.pages[i][self.offset..][..self.layout.block_bytes()]
    }

    /// Where in `q` and in the output row `r` of the band begins.
    #[inline(always)]
    fn at(&self, r: usize) -> usize {
        let row = self.first_row + r;
        let (token, head) = (self.first_token + row / self.group, row % self.group);
        (token * self.heads + self.first_head + head) * self.layout.d
    }

    /// Row `r` of the band, `(d,)`.
    #[inline(always)]
    fn query(&self, r: usize) -> &'a [f32] {
        &self.q[self.at(r)..][..self.layout.d]
    }

    /// How many positions row `r` of the band looks at; the last row looks at the most.
    #[inline(always)]
    fn seen(&self, r: usize) -> usize {
        self.start + (self.first_row + r) / self.group + 1
    }

    /// The output of row `r`, `(d,)`.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    fn out<'o>(&self, out: &'o SharedMut<'_, f32>, r: usize) -> &'o mut [f32] {
        // SAFETY: every row is in one band, and one task writes the outputs of a band, once.
        #[allow(unsafe_code)]
        unsafe {
            out.slice(self.at(r), self.layout.d)
        }
    }
}

/// What one thread takes at a time: a band, or some spans of the past for it.
struct Task {
    band: usize,
    spans: Range<usize>,
}

struct Plan<'a> {
    bands: Vec<Band<'a>>,
    tasks: Vec<Task>,
    /// Length of all partial results.
    partials: usize,
    /// Products, roughly.
    work: usize,
}

impl<'a> Plan<'a> {
    fn new(
        layout: KvLayout,
        heads: usize,
        kv_heads: usize,
        sequences: &'a [KvSequence<'a>],
        q: &'a [f32],
    ) -> Self {
        let group = heads / kv_heads;
        let mut plan = Self { bands: Vec::new(), tasks: Vec::new(), partials: 0, work: 0 };
        let mut first_token = 0;
        for s in sequences {
            let rows = s.tokens * group;
            // Later tokens look at more: they go first, so that no thread ends long after another.
            for first_row in (0..rows).step_by(BAND).rev() {
                for k in 0..kv_heads {
                    let mut band = Band {
                        layout,
                        pages: s.pages,
                        offset: s.offset + k * layout.block_bytes(),
                        q,
                        heads,
                        group,
                        first_head: k * group,
                        first_token,
                        start: s.start,
                        first_row,
                        rows: BAND.min(rows - first_row),
                        spans: 0,
                        partials: 0,
                    };
                    let seen = band.seen(band.rows - 1);
                    band.spans = seen.div_ceil(int8::SPAN);
                    plan.work += band.rows * seen * layout.d;
                    plan.bands.push(band);
                }
            }
            first_token += s.tokens;
        }
        plan.divide(layout);
        plan
    }

    /// Makes tasks of the bands, divided where there would be too few.
    fn divide(&mut self, layout: KvLayout) {
        let spans: usize = self.bands.iter().map(|band| band.spans).sum();
        let run = match (layout.kind, parallel::threads()) {
            (KvType::Int8, threads @ 2..) => (spans / (TASKS * threads)).max(1),
            _ => usize::MAX,
        };
        for (index, band) in self.bands.iter_mut().enumerate() {
            let run = run.min(band.spans);
            for first in (0..band.spans).step_by(run) {
                let spans = first..band.spans.min(first + run);
                self.tasks.push(Task { band: index, spans });
            }
            if run < band.spans {
                band.partials = self.partials;
                self.partials += band.spans * band.rows * int8::partial_len(layout.d);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for kind in KvType::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        let error = "q8".parse::<KvType>().unwrap_err();
        assert_eq!(error, "unknown KV type \"q8\": expected one of f32, f16, int8");
    }

    #[test]
    fn blocks_are_as_large_as_documented() {
        for (d, per_position) in [(128, [1024, 512, 268]), (64, [512, 256, 140])] {
            for (kind, bytes) in KvType::ALL.into_iter().zip(per_position) {
                assert_eq!(KvLayout::new(kind, d).unwrap().block_bytes(), bytes * KV_BLOCK);
            }
        }
        for kind in KvType::ALL {
            assert_eq!(KvLayout::new(kind, 0), None);
            assert_eq!(KvLayout::new(kind, 1025), None);
            assert_eq!(KvLayout::new(kind, 13).unwrap().block_bytes() % 64, 0);
        }
    }
}
