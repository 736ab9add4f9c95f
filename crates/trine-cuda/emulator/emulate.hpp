// CUDA on a CPU: what a kernel of `../kernels` needs of its compiler and its card, for tests.
//
// Put before device.cuh with `g++ -O2 -std=c++17 -DEMULATED`; instructions are in instructions.hpp. The threads of a
// block are fibers of one thread of the system, which run one after another until each comes to a barrier or to
// something that a warp does together; several blocks run at once, each in its own thread of the system. What only
// shows by chance on a card shows here always, or is refused, with a message and `abort`:
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

#include "instructions.hpp"
