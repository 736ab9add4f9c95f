//! What an engine does, in numbers that others may read at any time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counters since the start, and the state after the last pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests that wait.
    pub waiting: u64,
    /// Requests that run.
    pub running: u64,
    /// Bytes of keys and values, of requests and of the prefix cache.
    pub kv_bytes: u64,
    /// Ids of prompts that went through the model.
    pub prompt_tokens: u64,
    /// Ids of prompts that the prefix cache had.
    pub cached_tokens: u64,
    /// Ids generated.
    pub generated_tokens: u64,
    /// Passes through the model.
    pub passes: u64,
    /// Time that they took; the rest of an answer's is choosing ids, and all that is not the engine's.
    pub pass_time: Duration,
    /// Requests that ended by themselves.
    pub finished: u64,
    /// Requests that were given up: nobody wanted them any more, or their deadline passed.
    pub cancelled: u64,
}

/// [`Stats`] that the engine's thread writes.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) waiting: AtomicU64,
    pub(super) running: AtomicU64,
    pub(super) kv_bytes: AtomicU64,
    pub(super) prompt_tokens: AtomicU64,
    pub(super) cached_tokens: AtomicU64,
    pub(super) generated_tokens: AtomicU64,
    pub(super) passes: AtomicU64,
    pub(super) pass_nanoseconds: AtomicU64,
    pub(super) finished: AtomicU64,
    pub(super) cancelled: AtomicU64,
}

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

/// Says what is the case.
pub(super) fn set(gauge: &AtomicU64, n: usize) {
    gauge.store(n as u64, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn read(&self) -> Stats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            waiting: read(&self.waiting),
            running: read(&self.running),
            kv_bytes: read(&self.kv_bytes),
            prompt_tokens: read(&self.prompt_tokens),
            cached_tokens: read(&self.cached_tokens),
            generated_tokens: read(&self.generated_tokens),
            passes: read(&self.passes),
            pass_time: Duration::from_nanos(read(&self.pass_nanoseconds)),
            finished: read(&self.finished),
            cancelled: read(&self.cancelled),
        }
    }
}
