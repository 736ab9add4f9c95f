//! Threads for work that lasts microseconds.
//!
//! Decoding one token is some two hundred parallel loops of a few dozen microseconds each, with a
//! little work of one thread in between. A general pool puts its threads to sleep there and spends
//! as long waking them as they then work. Here a worker spins for some microseconds before it
//! sleeps, and a loop never waits for a worker that has not come.
//!
//! Every thread begins with its own share of the indices, which follow each other, and takes them one by
//! one: what lies one after another in memory is read one after another, and in every loop over the same
//! data by the same thread. A thread that has done its share takes half of what is left of the largest
//! other, so that a core that is slower, or busy with something else, only does less.
//!
//! There is one pool for the process, of as many threads as rayon's global pool has, which does the
//! work that is not urgent. A loop inside a loop, or beside one of another thread, runs on the thread
//! that asked for it: the pool never has more runnable threads than it was made with.

#![allow(unsafe_code)]

mod slices;

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, TryLockError};
use std::thread::{self, JoinHandle};

pub(crate) use slices::SharedMut;
pub use slices::{Strip, strips};

/// How often a worker looks for work before it sleeps: some 50 microseconds.
const SPINS: u32 = 4000;

/// Threads that run loops together: a caller's own, and workers that end with the pool.
pub struct Pool {
    shared: Arc<Shared>,
    /// Held by the thread whose loop is running.
    busy: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// The loop that is open to workers; null when none is.
    job: AtomicPtr<Job<'static>>,
    /// What is left of the loop: a share for each thread, the caller's first.
    shares: Box<[Share]>,
    /// Workers that may be looking at `job`.
    inside: AtomicUsize,
    /// Counts loops, so that a worker sees that there is a new one.
    epoch: AtomicUsize,
    /// Workers that sleep or are about to.
    sleepers: AtomicUsize,
    wake: Condvar,
    sleep: Mutex<()>,
    stop: AtomicBool,
}

/// Indices that no thread has begun, on a cache line of its own: its thread takes them from the front,
/// others from the back.
#[derive(Default)]
#[repr(align(128))]
struct Share(
    /// Start and end, 32 bits each. Every change is to what it holds as a whole, so that an index is
    /// given out once, whatever a thread has seen before.
    AtomicU64,
);

impl Share {
    fn put(&self, indices: Range<u64>) {
        self.0.store(indices.start << 32 | indices.end, Ordering::Relaxed);
    }

    fn left(&self) -> u64 {
        let indices = self.0.load(Ordering::Relaxed);
        (indices & MAX_TASKS) - (indices >> 32)
    }

    /// Takes the first index.
    fn take(&self) -> Option<usize> {
        let taken = self.change(|Range { start, end }| (start < end).then_some(start + 1..end))?;
        Some(taken.start as usize)
    }

    /// Takes the second half, or the last index.
    fn take_half(&self) -> Option<Range<u64>> {
        let middle = |Range { start, end }: &Range<u64>| start + (end - start) / 2;
        let taken = self.change(|all| (all.start < all.end).then(|| all.start..middle(&all)))?;
        Some(middle(&taken)..taken.end)
    }

    /// Puts what `rest` leaves of the indices, if anything is to be taken, and returns what they were.
    fn change(&self, rest: impl Fn(Range<u64>) -> Option<Range<u64>>) -> Option<Range<u64>> {
        let pair = |indices: u64| indices >> 32..indices & MAX_TASKS;
        let rest = |indices| rest(pair(indices)).map(|rest| rest.start << 32 | rest.end);
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest);
        before.ok().map(pair)
    }
}

/// Most indices of a loop.
const MAX_TASKS: u64 = u32::MAX as u64;

/// A loop.
struct Job<'a> {
    body: &'a (dyn Fn(usize) + Sync),
    shares: &'a [Share],
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
}

impl Job<'_> {
    /// Takes indices until there are none, on the thread that owns share `own`.
    fn work(&self, own: usize) {
        let outer = NESTED.replace(true);
        let own = &self.shares[own];
        let done = catch_unwind(AssertUnwindSafe(|| {
            loop {
                while let Some(task) = own.take() {
                    (self.body)(task);
                }
                let largest = self.shares.iter().max_by_key(|share| share.left());
                match largest.filter(|share| share.left() > 0) {
                    None => break,
                    Some(other) => other.take_half().into_iter().for_each(|half| own.put(half)),
                }
            }
        }));
        NESTED.set(outer);
        if let Err(payload) = done {
            // Nobody need begin what is left.
            self.shares.iter().for_each(|share| share.put(0..0));
            let mut first = lock(&self.panic);
            match &*first {
                None => *first = Some(payload),
                // To drop it could panic too, and nothing here may unwind.
                Some(_) => std::mem::forget(payload),
            }
        }
    }
}

impl Pool {
    /// A pool of `threads` threads, of which the caller of a loop is one.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared::new(threads.max(1)));
        let spawn = |i| {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name(format!("trine-{i}")).spawn(move || shared.serve(i))
        };
        // A system without threads, or out of them, gets a smaller pool.
        let workers = (1..threads.max(1)).map_while(|i| spawn(i).ok()).collect();
        Self { shared, busy: Mutex::new(()), workers }
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body` once with each of `0..tasks`, in any order and on any of the threads.
    ///
    /// # Panics
    /// When `body` does, after all threads have left it; when there are 2^32 tasks or more.
    pub fn run(&self, tasks: usize, body: impl Fn(usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() || NESTED.get() {
            return (0..tasks).for_each(body);
        }
        let guard = match self.busy.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if guard.is_none() {
            return (0..tasks).for_each(body);
        }
        let (all, shares) = (tasks as u64, &self.shared.shares[..self.threads()]);
        assert!(all <= MAX_TASKS, "a loop of {all} tasks");
        let bound = |i: usize| all * i as u64 / self.threads() as u64;
        for (i, share) in shares.iter().enumerate() {
            share.put(bound(i)..bound(i + 1));
        }
        let job = Job { body: &body, shares, panic: Mutex::new(None) };
        self.shared.open(&job);
        job.work(0);
        self.shared.close();
        drop(guard);
        let panic = lock(&job.panic).take();
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Runs `work` with this pool in the place of the process's, on this thread.
    pub fn install<R>(self: &Arc<Self>, work: impl FnOnce() -> R) -> R {
        struct Restore(Option<Arc<Pool>>);
        impl Drop for Restore {
            fn drop(&mut self) {
                INSTALLED.with_borrow_mut(|installed| *installed = self.0.take());
            }
        }
        let _restore = Restore(INSTALLED.replace(Some(Arc::clone(self))));
        work()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.announce();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of loops and has none of its own.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn new(threads: usize) -> Self {
        Self {
            job: AtomicPtr::default(),
            shares: (0..threads).map(|_| Share::default()).collect(),
            inside: AtomicUsize::new(0),
            epoch: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            wake: Condvar::new(),
            sleep: Mutex::new(()),
            stop: AtomicBool::new(false),
        }
    }

    /// Lets workers into `job`, until [`Self::close`].
    fn open(&self, job: &Job<'_>) {
        // The lifetime is forgotten, for `close` is called before it ends: `Job::work` does not
        // unwind, and nothing else stands between the two.
        self.job.store(std::ptr::from_ref(job).cast_mut().cast(), Ordering::SeqCst);
        self.announce();
    }

    fn announce(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _lock = lock(&self.sleep);
            self.wake.notify_all();
        }
    }

    /// Returns when no worker can reach the job any more.
    fn close(&self) {
        // A worker says that it is inside before it looks at `job`. So either it is counted below, or
        // it will find null. That needs this write to come before the next read, everywhere: a swap,
        // as qemu's emulation of AArch64 lets the read pass a plain store, whatever its ordering.
        self.job.swap(std::ptr::null_mut(), Ordering::SeqCst);
        let mut spins = 0;
        while self.inside.load(Ordering::SeqCst) != 0 {
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                // It has most likely lost its core, perhaps to this thread.
                thread::yield_now();
            }
        }
    }

    /// The life of the worker that owns share `own`.
    fn serve(&self, own: usize) {
        let mut seen = 0;
        while !self.stop.load(Ordering::SeqCst) {
            self.wait(seen);
            seen = self.epoch.load(Ordering::SeqCst);
            self.inside.fetch_add(1, Ordering::SeqCst);
            let job = self.job.load(Ordering::SeqCst);
            if !job.is_null() {
                // SAFETY: the job was open when this worker was already inside, so its owner stays
                // in `close`, and the job alive, until `inside` is counted down.
                unsafe { (*job).work(own) };
            }
            self.inside.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Returns when `epoch` is no longer `seen`, or the pool ends.
    fn wait(&self, seen: usize) {
        let unchanged = || self.epoch.load(Ordering::SeqCst) == seen;
        for _ in 0..SPINS {
            if !unchanged() {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = lock(&self.sleep);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while unchanged() && !self.stop.load(Ordering::SeqCst) {
            guard = self.wake.wait(guard).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The lock; a panic elsewhere does not make what these locks guard any worse.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

thread_local! {
    /// Whether this thread is inside a loop.
    static NESTED: Cell<bool> = const { Cell::new(false) };
    static INSTALLED: RefCell<Option<Arc<Pool>>> = const { RefCell::new(None) };
}

fn with_current<R>(f: impl FnOnce(&Pool) -> R) -> R {
    static GLOBAL: OnceLock<Pool> = OnceLock::new();
    match INSTALLED.with_borrow(Clone::clone) {
        Some(pool) => f(&pool),
        None => f(GLOBAL.get_or_init(|| Pool::new(rayon::current_num_threads()))),
    }
}

/// Number of threads that a loop would use: one inside of another loop.
pub fn threads() -> usize {
    if NESTED.get() { 1 } else { with_current(Pool::threads) }
}

/// Calls `body` once with each of `0..tasks`, on the threads of the pool; see [`Pool::run`].
pub fn run(tasks: usize, body: impl Fn(usize) + Sync) {
    // A worker of a pool knows nothing of where that is installed, and need not.
    if tasks <= 1 || NESTED.get() {
        return (0..tasks).for_each(body);
    }
    with_current(|pool| pool.run(tasks, body));
}

/// Calls `body` with each item and its index, on the threads of the pool.
pub fn for_each<T: Send>(items: &mut [T], body: impl Fn(usize, &mut T) + Sync) {
    for_each_chunk(items, 1, |i, item| body(i, &mut item[0]));
}

/// Calls `body` with each chunk of `len` elements (the last may be shorter) and its index, on the
/// threads of the pool.
///
/// # Panics
/// When `len` is 0.
pub fn for_each_chunk<T: Send>(data: &mut [T], len: usize, body: impl Fn(usize, &mut [T]) + Sync) {
    let total = data.len();
    let chunks = total.div_ceil(len);
    let shared = SharedMut::new(data);
    run(chunks, |i| {
        let start = i * len;
        // SAFETY: an index is given out once, and chunks of different indices do not overlap.
        body(i, unsafe { shared.slice(start, len.min(total - start)) });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_is_run_once_by_any_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            // Often enough that workers are met spinning, asleep, and just falling asleep.
            for round in 0..if cfg!(miri) { 3 } else { 2000 } {
                let tasks = [0, 1, 2, 7, 64][round % 5];
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                if round % 500 == 499 {
                    thread::sleep(std::time::Duration::from_millis(2));
                }
            }
        }
    }

    #[test]
    fn a_share_is_taken_from_the_front_and_halved_from_the_back() {
        let share = Share::default();
        assert_eq!((share.take(), share.take_half(), share.left()), (None, None, 0));
        share.put(7..13);
        assert_eq!((share.take(), share.take_half(), share.left()), (Some(7), Some(10..13), 2));
        assert_eq!((share.take_half(), share.take_half()), (Some(9..10), Some(8..9)));
        assert_eq!((share.take(), share.take_half(), share.left()), (None, None, 0));
    }

    #[test]
    fn a_thread_that_is_held_up_leaves_its_share_to_others() {
        let pool = Pool::new(2);
        let done = AtomicUsize::new(0);
        pool.run(9, |i| {
            while i == 0 && done.load(Ordering::Relaxed) < 8 {
                thread::yield_now();
            }
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 9);
    }

    #[test]
    fn chunks_cover_a_slice_and_do_not_overlap() {
        let pool = Arc::new(Pool::new(3));
        pool.install(|| {
            for (total, len) in [(0, 4), (1, 4), (8, 4), (9, 4), (1000, 1)] {
                let mut data = vec![0; total];
                for_each_chunk(&mut data, len, |i, chunk| {
                    assert!(!chunk.is_empty() && chunk.len() <= len);
                    chunk.iter_mut().for_each(|v| *v += i + 1);
                });
                assert!(data.iter().enumerate().all(|(i, v)| *v == i / len + 1));
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(4);
        for _ in 0..if cfg!(miri) { 2 } else { 50 } {
            let panicking = || pool.run(100, |i| assert_ne!(i, 37, "the thirty-seventh"));
            let payload = catch_unwind(AssertUnwindSafe(panicking)).unwrap_err();
            assert!(payload.downcast_ref::<String>().unwrap().contains("thirty-seventh"));
            let sum = AtomicUsize::new(0);
            pool.run(10, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    /// A payload that panics when it is dropped, on every thread at once.
    #[test]
    fn panics_of_all_threads_leave_the_pool_usable() {
        struct Sharp;
        impl Drop for Sharp {
            fn drop(&mut self) {
                panic!("dropped");
            }
        }
        let pool = Pool::new(3);
        for _ in 0..if cfg!(miri) { 1 } else { 50 } {
            let barrier = std::sync::Barrier::new(3);
            let panicking = || {
                pool.run(3, |_| {
                    barrier.wait();
                    std::panic::panic_any(Sharp);
                });
            };
            std::mem::forget(catch_unwind(AssertUnwindSafe(panicking)).unwrap_err());
            let sum = AtomicUsize::new(0);
            pool.run(10, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn a_loop_inside_a_loop_has_one_thread() {
        let pool = Arc::new(Pool::new(3));
        pool.install(|| {
            assert_eq!(threads(), 3);
            run(7, |_| assert_eq!(threads(), 1));
            assert_eq!(threads(), 3);
        });
    }

    #[test]
    fn loops_inside_and_beside_loops_are_run() {
        let pool = Arc::new(Pool::new(3));
        let sum = AtomicUsize::new(0);
        let add = |i| {
            sum.fetch_add(i, Ordering::Relaxed);
        };
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| pool.install(|| run(10, |_| run(10, add))));
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), 3 * 10 * 45);
    }
}
