// CUDA on a CPU: what a kernel of `../kernels` needs of its compiler and its card, for tests.
//
// Put before device.cuh with `g++ -O2 -std=c++17 -DEMULATED`. The threads of a block are fibers of one
// thread of the system, which run one after another until each comes to a barrier or to something that a
// warp does together; several blocks run at once, each in its own thread of the system. What only shows
// by chance on a card shows here always, or is refused, with a message and `abort`:
// - a barrier that not every thread of a block reaches; a shuffle, ldmatrix or mma that not all 32 lanes
//   reach, or in whose place some lane does something else;
// - ldmatrix or copy_async with an address that is not a multiple of 16 bytes, copy_word_async with one that is not
//   of 4 (other 16-byte accesses fault; `-fsanitize=alignment -fsanitize-undefined-trap-on-error` finds them all);
// - memory written past the end of the dynamic shared memory.
// Dynamic shared memory is full of NaN before each block, and what copy_async writes is NaN until copy_wait; a copy
// by TMA comes when no thread can go on without it. Blocks of odd number run their threads backwards, so that a
// missing barrier shows.
#pragma once

#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>
#if !defined(__x86_64__) || defined(EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __shared__ static thread_local
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __grid_constant__
#define DYNAMIC_SHARED(name) unsigned char* const name = emulation::own_shared()
#define __cluster_dims__(...)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
};

namespace emulation {

constexpr size_t STACK = 256 << 10;
constexpr size_t PAGE = 4096;
constexpr unsigned MAX_THREADS = 1024;

// ---- Fibers ----

#if defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
// Puts the registers that a function must keep on the stack, stores the stack's address in `*from`, and goes
// on with the stack `to`.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.weak emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");
struct Context {
    void* stack;
    void prepare(char* bottom, char* top, void (*entry)()) {
        (void)bottom;
        void** p = (void**)((uintptr_t)top & ~(uintptr_t)15);
        *--p = nullptr; // as if `entry` had been called
        *--p = (void*)entry;
        for (int i = 0; i < 6; i++) *--p = nullptr;
        stack = p;
    }
    static void change(Context& from, Context& to) { emulation_switch(&from.stack, to.stack); }
};
#else
struct Context {
    ucontext_t context;
    void prepare(char* bottom, char* top, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = bottom;
        context.uc_stack.ss_size = top - bottom;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// A copy on its way to shared memory.
struct Copy {
    void* to;
    const void* from; // null for zeros
    unsigned bytes, group;
};

// A product that runs beside other work: c (16 x 8 tiles for each warp) = a b, or that added to c.
struct Product {
    float* c;
    int tiles;
    bool in_registers; // a; else `a` describes it, and b's rows are columns of c
    unsigned registers[4];
    unsigned long long a, b;
    bool add;
    unsigned group;
    int* sums; // instead of c, where the elements of a and b are bytes
};

// A box of a matrix on its way to shared memory, and the barrier to which its bytes will come.
struct Transfer {
    unsigned char* to;
    unsigned long long* barrier;
    const unsigned long long* map;
    unsigned row, column;
};

// What an mbarrier is in shared memory.
struct Barrier {
    unsigned count, missing; // arrivals of a phase, and those that have not come
    int bytes; // expected
    unsigned phase;
};

struct Fiber {
    Context context;
    uint3 thread;
    uint3 block;
    unsigned index; // among all of the cluster
    unsigned rank; // of the block in the cluster
    const unsigned long long* waits; // for a phase of this parity
    unsigned parity;
    unsigned group; // of copies, the one that is open
    std::vector<Copy> copies;
    bool unfenced; // copies have come since the last shared_fence
    unsigned product_group;
    std::vector<Product> products;
};

// What a lane gives to the others of its warp.
struct Slot {
    unsigned words[6];
    const void* pointer;
};

struct Warp {
    unsigned lanes;   // that exist
    unsigned ready;   // can run
    unsigned waiting; // have come to what the warp does together
    unsigned phase;   // which of the slots are filled next
    const char* operation;
    Slot slots[2][32];
};

constexpr unsigned MAX_CLUSTER = 8;

// One thread of the system, which runs block after block, or cluster after cluster.
struct Worker {
    const char* kernel;
    void (*call)(void**);
    void** args;
    dim3 blocks, threads;
    unsigned cluster; // blocks in it, which lie side by side
    unsigned block_count; // threads of a block
    unsigned count, warp_count; // of the whole cluster
    unsigned at_barrier[MAX_CLUSTER], at_cluster_barrier, done;
    std::vector<Transfer> transfers; // the next one last
    std::vector<Barrier> barriers;
    bool backwards;
    Fiber* current;
    unsigned char* shared;
    size_t shared_bytes, shared_room; // of a block; blocks lie one after the other
    Context home;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    char* stacks;
    unsigned char* shared_pages;
    size_t shared_capacity;
};

inline thread_local Worker* worker = nullptr;

// The dynamic shared memory of the block whose thread runs.
inline unsigned char* own_shared() { return worker->shared + worker->current->rank * worker->shared_room; }

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    Worker* w = worker;
    va_list list;
    va_start(list, format);
    char text[512];
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (w && w->current)
        fprintf(stderr, "emulation: kernel %s, block (%u, %u, %u), thread %u: %s\n", w->kernel, w->current->block.x,
                w->current->block.y, w->current->block.z, w->current->index % w->block_count, text);
    else
        fprintf(stderr, "emulation: %s: %s\n", w ? w->kernel : "", text);
    fflush(stderr);
    abort();
}

// A memory fault in a kernel tells which kernel it was.
inline void on_fault(int signal) {
    Worker* w = worker;
    if (w && w->current) {
        char text[256];
        int n = snprintf(text, sizeof text,
                         "emulation: kernel %s, block (%u, %u, %u), thread %u: %s\n", w->kernel, w->current->block.x,
                         w->current->block.y, w->current->block.z, w->current->index % w->block_count,
                         signal == SIGILL ? "a misaligned access" : "a bad or misaligned access");
        if (write(2, text, n) < 0) {}
    }
    struct sigaction plain = {};
    plain.sa_handler = SIG_DFL;
    sigaction(signal, &plain, nullptr);
}

// ---- Who runs next ----

inline int pick(unsigned ready, unsigned after, bool backwards) {
    if (!ready) return -1;
    if (!backwards) {
        unsigned later = after >= 31 ? 0 : ready & (~0u << (after + 1));
        return __builtin_ctz(later ? later : ready);
    }
    unsigned earlier = ready & ((1u << after) - 1);
    return 31 - __builtin_clz(earlier ? earlier : ready);
}

// The next fiber that can run, the own warp's first; null where there is none.
inline Fiber* next_fiber(Worker* w) {
    const unsigned warp = w->current->index / 32;
    for (unsigned i = 0; i < w->warp_count; i++) {
        const unsigned n = w->warp_count;
        const unsigned j = w->backwards ? (warp + n - i) % n : (warp + i) % n;
        const unsigned after = i == 0 ? w->current->index % 32 : (w->backwards ? 0 : 31);
        const int lane = pick(w->warps[j].ready, after, w->backwards);
        if (lane >= 0) return &w->fibers[j * 32 + lane];
    }
    return nullptr;
}

inline bool finish_transfer(Worker* w);

__attribute__((noinline)) inline void leave(Worker* w) {
    Fiber* from = w->current;
    Fiber* to = next_fiber(w);
    while (!to && finish_transfer(w)) to = next_fiber(w);
    if (!to) {
        if (w->done == w->count) {
            w->current = nullptr;
            Context::change(from->context, w->home);
        }
        unsigned at_barrier = w->at_cluster_barrier;
        for (unsigned i = 0; i < w->cluster; i++) at_barrier += w->at_barrier[i];
        for (unsigned i = 0; i < w->warp_count; i++)
            if (w->warps[i].waiting)
                fail("warp %u comes to %s with lanes %08x only; of %u threads %u wait at a barrier, %u have ended", i,
                     w->warps[i].operation, w->warps[i].waiting, w->count, at_barrier, w->done);
        for (unsigned i = 0; i < w->count; i++)
            if (w->fibers[i].waits)
                fail("thread %u waits for a phase that does not end; of %u threads %u wait at a barrier, %u have ended", i,
                     w->count, at_barrier, w->done);
        fail("a barrier that %u of %u threads have reached; %u have ended", at_barrier, w->count, w->done);
    }
    w->current = to;
    Context::change(from->context, to->context);
}

inline void fiber_main() {
    worker->call(worker->args);
    Worker* w = worker;
    w->done++;
    Warp& warp = w->warps[w->current->index / 32];
    warp.ready &= ~(1u << w->current->index % 32);
    leave(w);
    abort();
}

inline void barrier() {
    Worker* w = worker;
    Warp& warp = w->warps[w->current->index / 32];
    warp.ready &= ~(1u << w->current->index % 32);
    const unsigned rank = w->current->rank, warps = w->warp_count / w->cluster;
    if (++w->at_barrier[rank] == w->block_count) {
        w->at_barrier[rank] = 0;
        for (unsigned i = rank * warps; i < (rank + 1) * warps; i++) w->warps[i].ready = w->warps[i].lanes;
        return;
    }
    leave(w);
}

// Comes to what a warp does together; the last lane to come does `finish` before any goes on.
template <class Finish> inline void together(Worker* w, Warp& warp, const char* operation, Finish finish) {
    const unsigned bit = 1u << w->current->index % 32;
    if (warp.lanes != 0xffffffffu) fail("%s in a warp of fewer than 32 threads", operation);
    if (!warp.waiting)
        warp.operation = operation;
    else if (strcmp(warp.operation, operation) != 0)
        fail("%s where other lanes do %s", operation, warp.operation);
    warp.waiting |= bit;
    warp.ready &= ~bit;
    if (warp.waiting == warp.lanes) {
        finish(warp.slots[warp.phase]);
        warp.waiting = 0;
        warp.ready = warp.lanes;
        warp.phase ^= 1;
        return;
    }
    leave(w);
}

struct Lane {
    Worker* w;
    Warp& warp;
    unsigned lane;
    Slot (&slots)[32];
    Slot& own;
    Lane()
        : w(worker), warp(w->warps[w->current->index / 32]), lane(w->current->index % 32),
          slots(warp.slots[warp.phase]), own(slots[lane]) {}
    void meet(const char* operation) {
        together(w, warp, operation, [](Slot*) {});
    }
};

inline void full(unsigned mask) {
    if (mask != 0xffffffffu) fail("a mask %08x: only whole warps are emulated", mask);
}

template <class T> inline T exchange(const char* operation, unsigned mask, T x, int (*source)(int, int, int), int by, int width) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "of 4 or 8 bytes");
    full(mask);
    Lane l;
    memcpy(l.own.words, &x, sizeof x);
    l.meet(operation);
    const int lane = l.lane, start = lane & ~(width - 1);
    const int from = source(lane - start, by, width);
    T y;
    memcpy(&y, l.slots[from < 0 || from >= width ? lane : start + from].words, sizeof y);
    return y;
}

inline unsigned ballot(unsigned mask, bool x) {
    full(mask);
    Lane l;
    l.own.words[0] = x;
    l.meet("a vote");
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= l.slots[i].words[0] << i;
    return y;
}

inline float bits_float(unsigned x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
inline unsigned float_bits(float x) {
    unsigned y;
    memcpy(&y, &x, 4);
    return y;
}

// ---- Launches ----

struct Kernel {
    const char* name;
    void (*call)(void**);
    unsigned cluster;
};
inline std::vector<Kernel>& kernels() {
    static std::vector<Kernel> list;
    return list;
}
struct Registration {
    Registration(const char* name, void (*call)(void**), unsigned cluster = 1) { kernels().push_back({name, call, cluster}); }
};

template <class... A, size_t... I>
inline void call_with(void (*f)(A...), void** args, std::index_sequence<I...>) {
    (void)args;
    f(*(std::remove_reference_t<A>*)args[I]...);
}
template <auto F> struct Call;
template <class... A, void (*F)(A...)> struct Call<F> {
    static void run(void** args) { call_with(F, args, std::index_sequence_for<A...>()); }
};

// Workers whose memory is kept for the next launch.
inline std::mutex pool_lock;
inline std::vector<Worker*>& pool() {
    static std::vector<Worker*>* list = new std::vector<Worker*>;
    return *list;
}
inline Worker* take_worker() {
    std::lock_guard<std::mutex> guard(pool_lock);
    if (!pool().empty()) {
        Worker* w = pool().back();
        pool().pop_back();
        return w;
    }
    Worker* w = new Worker();
    w->stacks = (char*)mmap(nullptr, STACK * MAX_THREADS, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (w->stacks == MAP_FAILED) fail("no memory for stacks");
    w->fibers.resize(MAX_THREADS);
    w->warps.resize(MAX_THREADS / 32);
    return w;
}
inline void give_worker(Worker* w) {
    std::lock_guard<std::mutex> guard(pool_lock);
    pool().push_back(w);
}

inline void run_block(Worker* w, unsigned long long number) {
    w->backwards = number & 1;
    w->at_cluster_barrier = w->done = 0;
    for (unsigned& threads : w->at_barrier) threads = 0;
    w->transfers.clear();
    w->barriers.clear();
    const size_t room = w->shared_room;
    memset(w->shared, 0xff, room * w->cluster);
    for (unsigned i = 0; i < w->warp_count; i++) {
        Warp& warp = w->warps[i];
        const unsigned left = w->count - 32 * i;
        warp.lanes = warp.ready = left >= 32 ? 0xffffffffu : (1u << left) - 1;
        warp.waiting = warp.phase = 0;
    }
    for (unsigned i = 0; i < w->count; i++) {
        Fiber& f = w->fibers[i];
        f.index = i;
        f.rank = i / w->block_count;
        const unsigned j = i % w->block_count;
        f.thread = {j % w->threads.x, j / w->threads.x % w->threads.y, j / w->threads.x / w->threads.y};
        const unsigned long long block = number * w->cluster + f.rank;
        f.block = {(unsigned)(block % w->blocks.x), (unsigned)(block / w->blocks.x % w->blocks.y),
                   (unsigned)(block / w->blocks.x / w->blocks.y)};
        f.waits = nullptr;
        f.group = 0;
        f.copies.clear();
        f.unfenced = false;
        f.product_group = 0;
        f.products.clear();
        // Stacks begin at different offsets, lest all meet in the same lines of the cache.
        char* bottom = w->stacks + i * STACK;
        f.context.prepare(bottom + PAGE, bottom + STACK - i % 64 * 192, fiber_main);
    }
    w->current = &w->fibers[w->backwards ? w->count - 1 : 0];
    Context::change(w->home, w->current->context);
    for (unsigned rank = 0; rank < w->cluster; rank++)
        for (size_t i = w->shared_bytes; i < room; i++)
            if (w->shared[rank * room + i] != 0xff) {
                const uint3 block = w->fibers[rank * w->block_count].block;
                fail("block (%u, %u, %u) wrote past its dynamic shared memory", block.x, block.y, block.z);
            }
}

inline void launch(const Kernel& kernel, dim3 blocks, dim3 threads, unsigned shared_bytes, void** args) {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_handler = on_fault;
        sigaction(SIGBUS, &action, nullptr);
        sigaction(SIGSEGV, &action, nullptr);
        sigaction(SIGILL, &action, nullptr);
    });
    const unsigned long long total = 1ull * blocks.x * blocks.y * blocks.z / kernel.cluster;
    std::atomic<unsigned long long> next{0};
    auto work = [&] {
        Worker* w = take_worker();
        Worker* before = worker;
        worker = w;
        w->kernel = kernel.name;
        w->call = kernel.call;
        w->args = args;
        w->blocks = blocks;
        w->threads = threads;
        w->cluster = kernel.cluster;
        w->block_count = threads.x * threads.y * threads.z;
        w->count = w->block_count * w->cluster;
        w->current = nullptr;
        if (w->count == 0 || w->count > MAX_THREADS) fail("%u threads in a block", w->block_count);
        if (blocks.x % w->cluster) fail("a grid of %u blocks in clusters of %u", blocks.x, w->cluster);
        if (w->cluster > 1 && w->block_count % 32) fail("%u threads in a block of a cluster", w->block_count);
        if (total == 0 || blocks.y > 65535 || blocks.z > 65535) fail("a grid of %u x %u x %u", blocks.x, blocks.y, blocks.z);
        if (shared_bytes > 227 * 1024) fail("%u bytes of shared memory", shared_bytes);
        w->warp_count = (w->count + 31) / 32;
        for (unsigned i = 0; i < w->count; i++)
            if (mprotect(w->stacks + i * STACK + PAGE, STACK - PAGE, PROT_READ | PROT_WRITE)) fail("no memory for stacks");
        // The shared memory ends where a page begins that cannot be touched.
        w->shared_room = (shared_bytes + 127) / 128 * 128 + (w->cluster > 1 ? 128 : 0);
        const size_t room = w->shared_room * w->cluster, pages = (room + PAGE - 1) / PAGE * PAGE;
        if (pages + PAGE > w->shared_capacity) {
            if (w->shared_pages) munmap(w->shared_pages, w->shared_capacity);
            w->shared_capacity = pages + PAGE;
            w->shared_pages = (unsigned char*)mmap(nullptr, w->shared_capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (w->shared_pages == MAP_FAILED) fail("no shared memory");
            mprotect(w->shared_pages + pages, PAGE, PROT_NONE);
        }
        w->shared = w->shared_pages + (w->shared_capacity - PAGE) - room;
        w->shared_bytes = shared_bytes;
        for (;;) {
            const unsigned long long i = next.fetch_add(1);
            if (i >= total) break;
            run_block(w, i);
        }
        worker = before;
        give_worker(w);
    };
    unsigned helpers = std::thread::hardware_concurrency();
    if (helpers > total) helpers = (unsigned)total;
    std::vector<std::thread> others;
    for (unsigned i = 1; i < helpers; i++) others.emplace_back(work);
    work();
    for (auto& t : others) t.join();
}

// 0, or 1 where no kernel has that name.
inline int launch_named(const char* name, dim3 blocks, dim3 threads, unsigned shared_bytes, void** args) {
    for (const Kernel& k : kernels())
        if (strcmp(k.name, name) == 0) {
            launch(k, blocks, threads, shared_bytes, args);
            return 0;
        }
    return 1;
}

} // namespace emulation

// Makes a kernel known by its name.
#define KERNEL(name) static const emulation::Registration registration_##name(#name, emulation::Call<name>::run);

// A kernel of clusters of so many blocks.
#define KERNEL_OF_CLUSTERS(name, cluster)                                                                              \
    static const emulation::Registration registration_##name(#name, emulation::Call<name>::run, cluster);

#define threadIdx (emulation::worker->current->thread)
#define blockIdx (emulation::worker->current->block)
#define blockDim (emulation::worker->threads)
#define gridDim (emulation::worker->blocks)
#define warpSize 32

// ---- What CUDA's compiler knows without a header ----

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulation::full(mask);
    emulation::Lane().meet("__syncwarp");
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T> inline T __shfl_xor_sync(unsigned mask, T x, int by, int width = 32) {
    return emulation::exchange("__shfl_xor_sync", mask, x, [](int lane, int by, int) { return lane ^ by; }, by, width);
}
template <class T> inline T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
    return emulation::exchange("__shfl_sync", mask, x, [](int, int from, int width) { return from & (width - 1); }, from, width);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T x, int by, int width = 32) {
    return emulation::exchange("__shfl_down_sync", mask, x, [](int lane, int by, int) { return lane + by; }, by, width);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T x, int by, int width = 32) {
    return emulation::exchange("__shfl_up_sync", mask, x, [](int lane, int by, int) { return lane - by; }, by, width);
}
inline unsigned __ballot_sync(unsigned mask, int x) { return emulation::ballot(mask, x != 0); }
inline int __any_sync(unsigned mask, int x) { return emulation::ballot(mask, x != 0) != 0; }
inline int __all_sync(unsigned mask, int x) { return emulation::ballot(mask, x != 0) == 0xffffffffu; }

inline float __uint_as_float(unsigned x) { return emulation::bits_float(x); }
inline float __int_as_float(int x) { return emulation::bits_float((unsigned)x); }
inline unsigned __float_as_uint(float x) { return emulation::float_bits(x); }
inline int __float_as_int(float x) { return (int)emulation::float_bits(x); }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline unsigned __float2uint_rn(float x) { return (unsigned)rintf(x); }
inline unsigned __float2uint_rz(float x) { return (unsigned)x; }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned)((unsigned long long)x * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)((unsigned __int128)x * y >> 64);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned z = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned s = selector >> 4 * i;
        unsigned byte = both >> 8 * (s & 7) & 0xff;
        if (s & 8) byte = byte & 0x80 ? 0xff : 0;
        z |= byte << 8 * i;
    }
    return z;
}
inline int __dp4a(int x, int y, int z) {
    for (int i = 0; i < 4; i++) z += (int)(signed char)(x >> 8 * i) * (int)(signed char)(y >> 8 * i);
    return z;
}

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcg(T* p, T x) { *p = x; }
template <class T> inline void __stcs(T* p, T x) { *p = x; }
// Of whole numbers only: their sums do not depend on an order.
template <class T> inline T atomicAdd(T* p, T x) {
    static_assert(T(1) / 2 == 0, "sums of floats must have one order");
    return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
template <class T> inline T atomicOr(T* p, T x) { return __atomic_fetch_or(p, x, __ATOMIC_RELAXED); }
template <class T> inline T atomicMax(T* p, T x) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (old < x && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}

#define EMULATION_MIN_MAX(T)                                   \
    inline T min(T x, T y) { return y < x ? y : x; }           \
    inline T max(T x, T y) { return x < y ? y : x; }
EMULATION_MIN_MAX(int)
EMULATION_MIN_MAX(unsigned)
EMULATION_MIN_MAX(long)
EMULATION_MIN_MAX(unsigned long)
EMULATION_MIN_MAX(long long)
EMULATION_MIN_MAX(unsigned long long)
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }
// As CUDA has them: with one unsigned number, both are.
inline unsigned min(int x, unsigned y) { return min((unsigned)x, y); }
inline unsigned min(unsigned x, int y) { return min(x, (unsigned)y); }
inline unsigned max(int x, unsigned y) { return max((unsigned)x, y); }
inline unsigned max(unsigned x, int y) { return max(x, (unsigned)y); }

// ---- The twins of the end of device.cuh, where their meaning is told ----

inline unsigned shared_address(const void* p) { return (unsigned)((const unsigned char*)p - emulation::own_shared()); }

namespace emulation {
inline void aligned(const char* operation, const void* p, unsigned bytes) {
    if ((uintptr_t)p % bytes) fail("%s with an address that is not a multiple of %u (%p)", operation, bytes, p);
}
inline unsigned short element(const Slot* slots, int matrix, int row, int column) {
    unsigned short x;
    memcpy(&x, (const char*)slots[8 * matrix + row].pointer + 2 * column, 2);
    return x;
}
} // namespace emulation

inline void load_matrices(unsigned (&r)[4], const void* row) {
    emulation::aligned("load_matrices", row, 16);
    emulation::Lane l;
    l.own.pointer = row;
    l.meet("load_matrices");
    const int g = l.lane / 4, t = l.lane % 4;
    for (int i = 0; i < 4; i++)
        r[i] = emulation::element(l.slots, i, g, 2 * t) | (unsigned)emulation::element(l.slots, i, g, 2 * t + 1) << 16;
}

inline void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    emulation::aligned("load_matrices_transposed", row, 16);
    emulation::Lane l;
    l.own.pointer = row;
    l.meet("load_matrices_transposed");
    const int g = l.lane / 4, t = l.lane % 4;
    for (int i = 0; i < 4; i++)
        r[i] = emulation::element(l.slots, i, 2 * t, g) | (unsigned)emulation::element(l.slots, i, 2 * t + 1, g) << 16;
}

inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulation::Lane l;
    memcpy(l.own.words, a, 16);
    l.own.words[4] = b0;
    l.own.words[5] = b1;
    l.own.pointer = c;
    emulation::together(l.w, l.warp, "multiply_add", [](emulation::Slot* slots) {
        float x[16][16], y[16][8], z[16][8];
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = lane % 4;
            const unsigned* words = slots[lane].words;
            for (int i = 0; i < 4; i++) {
                float* p = &x[g + i % 2 * 8][2 * t + i / 2 * 8];
                p[0] = emulation::bits_float(words[i] << 16);
                p[1] = emulation::bits_float(words[i] & 0xffff0000u);
            }
            for (int i = 0; i < 2; i++) {
                y[2 * t + 8 * i][g] = emulation::bits_float(words[4 + i] << 16);
                y[2 * t + 8 * i + 1][g] = emulation::bits_float(words[4 + i] & 0xffff0000u);
            }
            const float* c = (const float*)slots[lane].pointer;
            z[g][2 * t] = c[0], z[g][2 * t + 1] = c[1], z[g + 8][2 * t] = c[2], z[g + 8][2 * t + 1] = c[3];
        }
        for (int row = 0; row < 16; row++)
            for (int k = 0; k < 16; k++)
                for (int column = 0; column < 8; column++) z[row][column] += x[row][k] * y[k][column];
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = lane % 4;
            float* c = (float*)slots[lane].pointer;
            c[0] = z[g][2 * t], c[1] = z[g][2 * t + 1], c[2] = z[g + 8][2 * t], c[3] = z[g + 8][2 * t + 1];
        }
    });
}

namespace emulation {
inline void begin_copy(void* shared, const void* global, bool valid, unsigned bytes) {
    memset(shared, 0xff, bytes);
    Fiber* f = worker->current;
    f->copies.push_back({shared, valid ? global : nullptr, bytes, f->group});
}
} // namespace emulation

inline void copy_async(void* shared, const void* global, bool valid) {
    emulation::aligned("copy_async to shared memory", shared, 16);
    if (valid) emulation::aligned("copy_async from global memory", global, 16);
    emulation::begin_copy(shared, global, valid, 16);
}
inline void copy_word_async(void* shared, const void* global, bool valid) {
    emulation::aligned("copy_word_async to shared memory", shared, 4);
    if (valid) emulation::aligned("copy_word_async from global memory", global, 4);
    emulation::begin_copy(shared, global, valid, 4);
}
inline void copy_commit() { emulation::worker->current->group++; }
template <int N> inline void copy_wait() {
    emulation::Fiber* f = emulation::worker->current;
    size_t kept = 0;
    for (const emulation::Copy& c : f->copies) {
        if (c.group + N < f->group) {
            f->unfenced = true;
            if (c.from)
                memcpy(c.to, c.from, c.bytes);
            else
                memset(c.to, 0, c.bytes);
        } else {
            f->copies[kept++] = c;
        }
    }
    f->copies.resize(kept);
}

inline float exp2_fast(float x) { return exp2f(x); }

// ---- The twins of the beginning of wgmma.cuh ----
//
// Products are done when they are waited for, and so read what is then in shared memory.

namespace emulation {
// Where shared memory has the element of a row (along which 64 elements make 128 bytes) in a matrix that `x`
// describes, its pieces of 16 bytes having changed places.
inline const unsigned char* described_byte(unsigned long long x, unsigned row, unsigned byte, bool panels) {
    const unsigned start = (unsigned)(x & 0x3fff) << 4, panel = (unsigned)(x >> 16 & 0x3fff) << 4;
    const unsigned rows = (unsigned)(x >> 32 & 0x3fff) << 4;
    if (x >> 62 != 1 || (x >> 49 & 7) != 0) fail("a matrix that is not in 128 bytes (%016llx)", x);
    if (start % 1024 >= 128) fail("a matrix that does not begin with 8 rows (%016llx)", x);
    unsigned at = start + row / 8 * rows + row % 8 * 128 + (panels ? byte / 128 * panel + byte % 128 : byte);
    at ^= (at >> 7 & 7) << 4;
    if (at + 2 > worker->shared_bytes) fail("a matrix beyond shared memory (%016llx)", x);
    return own_shared() + at;
}
inline float described(unsigned long long x, unsigned row, unsigned column, bool panels) {
    unsigned short bits;
    memcpy(&bits, described_byte(x, row, 2 * column, panels), 2);
    return bits_float((unsigned)bits << 16);
}

// c (16 x 8 tiles) of a warp, of bytes: 32 of a row.
inline void multiply_bytes(Worker* w, unsigned warp, size_t number) {
    Fiber* lanes = &w->fibers[warp * 32];
    const Product& p = lanes[0].products[number];
    const int width = 8 * p.tiles;
    static thread_local int y[32][256];
    for (int n = 0; n < width; n++)
        for (int piece = 0; piece < 2; piece++) { // 16 bytes stay together
            const signed char* bytes = (const signed char*)described_byte(p.b, n, 16 * piece, false);
            for (int k = 0; k < 16; k++) y[16 * piece + k][n] = bytes[k];
        }
    for (int row = 0; row < 16; row++) {
        int z[256] = {};
        int* c[4];
        for (int t = 0; t < 4; t++) c[t] = lanes[row % 8 * 4 + t].products[number].sums + row / 8 * 2;
        if (p.add)
            for (int n = 0; n < width; n++) z[n] = c[n % 8 / 2][n / 8 * 4 + n % 2];
        for (int k = 0; k < 32; k++) {
            const int x = (signed char)*described_byte(p.a, warp % (w->warp_count / w->cluster) % 4 * 16 + row, k, false);
            for (int n = 0; n < width; n++) z[n] += x * y[k][n];
        }
        for (int n = 0; n < width; n++) c[n % 8 / 2][n / 8 * 4 + n % 2] = z[n];
    }
}

inline void multiply_group(Worker* w, unsigned warp, size_t number) {
    Fiber* lanes = &w->fibers[warp * 32];
    const Product& p = lanes[0].products[number];
    if (p.sums) return multiply_bytes(w, warp, number);
    float x[16][16], y[16][256];
    const int width = 8 * p.tiles;
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++) {
            if (p.in_registers) {
                const Product& q = lanes[row % 8 * 4 + k % 8 / 2].products[number];
                const unsigned word = q.registers[row / 8 + k / 8 * 2];
                x[row][k] = bits_float(k % 2 ? word & 0xffff0000u : word << 16);
            } else {
                x[row][k] = described(p.a, warp % (w->warp_count / w->cluster) % 4 * 16 + row, k, false);
            }
        }
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < width; n++) y[k][n] = p.in_registers ? described(p.b, k, n, true) : described(p.b, n, k, false);
    for (int row = 0; row < 16; row++) {
        float z[256] = {};
        float* c[4];
        for (int t = 0; t < 4; t++) c[t] = lanes[row % 8 * 4 + t].products[number].c + row / 8 * 2;
        if (p.add)
            for (int n = 0; n < width; n++) z[n] = c[n % 8 / 2][n / 8 * 4 + n % 2];
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < width; n++) z[n] += x[row][k] * y[k][n];
        for (int n = 0; n < width; n++) c[n % 8 / 2][n / 8 * 4 + n % 2] = z[n];
    }
}

inline void begin_product(Product p) {
    Fiber* f = worker->current;
    if (f->unfenced) fail("a product after copies without shared_fence");
    p.group = f->product_group;
    f->products.push_back(p);
}
} // namespace emulation

inline void shared_fence() { emulation::worker->current->unfenced = false; }
inline void group_fence() {}
inline void group_commit() { emulation::worker->current->product_group++; }
template <int N> inline void group_wait() {
    emulation::Lane l;
    emulation::Worker* w = l.w;
    const unsigned warp = w->current->index / 32;
    emulation::together(w, l.warp, "group_wait", [w, warp](emulation::Slot*) {
        emulation::Fiber* lanes = &w->fibers[warp * 32];
        size_t done = 0;
        while (done < lanes[0].products.size() && lanes[0].products[done].group + N < lanes[0].product_group) {
            for (int i = 0; i < 32; i++)
                if (lanes[i].products.size() != lanes[0].products.size()) emulation::fail("lanes with different products");
            emulation::multiply_group(w, warp, done++);
        }
        for (int i = 0; i < 32; i++) lanes[i].products.erase(lanes[i].products.begin(), lanes[i].products.begin() + done);
    });
}
template <int TILES> inline void group_multiply(float (&c)[TILES][4], unsigned long long a, unsigned long long b, int add) {
    emulation::begin_product({&c[0][0], TILES, false, {}, a, b, add != 0, 0, nullptr});
}
template <int TILES> inline void group_multiply(int (&c)[TILES][4], unsigned long long a, unsigned long long b, int add) {
    emulation::begin_product({nullptr, TILES, false, {}, a, b, add != 0, 0, &c[0][0]});
}
template <int TILES> inline void group_multiply_add(float (&c)[TILES][4], const unsigned (&a)[4], unsigned long long b) {
    emulation::begin_product({&c[0][0], TILES, true, {a[0], a[1], a[2], a[3]}, 0, b, true, 0, nullptr});
}

// ---- The twins of the beginning of product_int8.cu ----
//
// Copies come when no thread can go on without them, the last one first. A map is
// (address, columns, rows, bytes from row to row, columns of a box, rows of a box).

namespace emulation {
inline Barrier& barrier_at(const unsigned long long* p) {
    Worker* w = worker;
    const size_t number = *p;
    if (number >= w->barriers.size()) fail("a barrier that is none");
    return w->barriers[number];
}
inline void arrive(unsigned long long* p, unsigned arrivals, int bytes) {
    Worker* w = worker;
    Barrier& b = barrier_at(p);
    if (arrivals > b.missing) fail("more arrivals at a barrier than it has");
    b.missing -= arrivals;
    b.bytes += bytes;
    if (b.missing || b.bytes) return;
    b.missing = b.count;
    b.phase++;
    for (unsigned i = 0; i < w->count; i++) {
        Fiber& f = w->fibers[i];
        if (!f.waits || &barrier_at(f.waits) != &b || b.phase % 2 == f.parity) continue;
        f.waits = nullptr;
        w->warps[i / 32].ready |= 1u << i % 32;
    }
}
inline bool finish_transfer(Worker* w) {
    if (w->transfers.empty()) return false;
    const Transfer t = w->transfers.back();
    w->transfers.pop_back();
    const unsigned long long columns = t.map[1], rows = t.map[2], width = t.map[4], height = t.map[5];
    for (unsigned long long i = 0; i < height; i++)
        for (unsigned long long j = 0; j < width; j++) {
            const bool inside = t.row + i < rows && t.column + j < columns;
            const unsigned char* from = (const unsigned char*)t.map[0] + (t.row + i) * t.map[3] + t.column + j;
            t.to[i * width + (j ^ i % 8 * 16)] = inside ? *from : 0;
        }
    arrive(t.barrier, 0, -(int)(width * height));
    return true;
}
// To the block of this number, and the barrier of that block.
inline void begin_transfer(unsigned char* to, const unsigned long long* map, unsigned row, unsigned column,
                           unsigned long long* barrier, unsigned block) {
    Worker* w = worker;
    if (block >= w->cluster) fail("a copy to block %u of a cluster of %u", block, w->cluster);
    if (map[0] % 16 || map[3] % 16 || map[4] != 128 || map[5] > 256) fail("a map that cannot be");
    if (shared_address(to) % 1024) fail("a box that does not begin with 8 rows");
    const size_t there = w->shared_room * block;
    unsigned char* shared = w->shared + there;
    unsigned char* place = shared + shared_address(to);
    if (shared_address(to) + map[4] * map[5] > w->shared_bytes) fail("a copy beyond shared memory");
    memset(place, 0xff, map[4] * map[5]);
    w->transfers.push_back({place, (unsigned long long*)(shared + shared_address(barrier)), map, row, column});
}
} // namespace emulation

inline void barrier_init(unsigned long long* barrier, unsigned count) {
    *barrier = emulation::worker->barriers.size();
    emulation::worker->barriers.push_back({count, count, 0, 0});
}
inline void barrier_init_fence() {}
inline void barrier_expect(unsigned long long* barrier, unsigned bytes) { emulation::arrive(barrier, 1, (int)bytes); }
inline void barrier_arrive(unsigned long long* barrier, unsigned block) {
    emulation::Worker* w = emulation::worker;
    if (block >= w->cluster) emulation::fail("an arrival at block %u of a cluster of %u", block, w->cluster);
    emulation::arrive((unsigned long long*)(w->shared + w->shared_room * block + shared_address(barrier)), 1, 0);
}
inline void barrier_wait(unsigned long long* barrier, unsigned parity) {
    emulation::Worker* w = emulation::worker;
    if (emulation::barrier_at(barrier).phase % 2 != parity) return;
    emulation::Fiber* f = w->current;
    f->waits = barrier;
    f->parity = parity;
    w->warps[f->index / 32].ready &= ~(1u << f->index % 32);
    emulation::leave(w);
}
inline void cluster_barrier() {
    emulation::Worker* w = emulation::worker;
    const unsigned index = w->current->index;
    w->warps[index / 32].ready &= ~(1u << index % 32);
    if (++w->at_cluster_barrier == w->count) {
        w->at_cluster_barrier = 0;
        for (unsigned i = 0; i < w->warp_count; i++) w->warps[i].ready = w->warps[i].lanes;
        return;
    }
    emulation::leave(w);
}
template <class Map>
inline void copy_box(unsigned char* to, const Map& map, unsigned row, unsigned column, unsigned long long* barrier) {
    emulation::begin_transfer(to, map.words, row, column, barrier, emulation::worker->current->rank);
}
template <class Map>
inline void copy_box_to_both(unsigned char* to, const Map& map, unsigned row, unsigned column, unsigned long long* barrier) {
    for (unsigned block = 0; block < 2; block++) emulation::begin_transfer(to, map.words, row, column, barrier, block);
}
