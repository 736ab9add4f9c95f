// The end of emulate.hpp: what CUDA's compiler knows without a header, and the twins of what the kernels' own headers
// write in a card's instructions, where their meaning is told.
#pragma once

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
