// What kernels are written with: types, conversions, sums over a warp or a block, and the few
// instructions that C++ has no name for.
//
// Compiled at run time by NVRTC, without a header of CUDA's, so that no toolkit has to be installed;
// and by an ordinary C++ compiler under EMULATED, with `emulate.hpp` before it, for tests on a CPU.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef EMULATED
#define INFINITY __int_as_float(0x7f800000)
// Memory of a block whose size is said at launch; 16-byte aligned.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]
#endif

// The upper half of an f32.
struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(int x) { return (float)x; }

// Rounds to nearest, ties to even.
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    bf16 y;
#ifndef EMULATED
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    u32 b = __float_as_uint(x);
    y.bits = (u16)((b & 0x7fffffff) > 0x7f800000 ? 0x7fff : (b + 0x7fff + ((b >> 16) & 1)) >> 16);
#endif
    return y;
}

// Two bf16 in a word, `low` in its lower half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
#ifndef EMULATED
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    return (u32)from_float<bf16>(low).bits | (u32)from_float<bf16>(high).bits << 16;
#endif
}
__device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Values that one thread moves at once: 16 bytes.
struct alignas(16) Words {
    u32 x[4];
};
template <class T> struct alignas(16) Vector {
    static constexpr int N = 16 / sizeof(T);
    T x[N];
};

constexpr u32 ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(ALL_LANES, x, mask);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, mask));
    return x;
}

// The sum, or the maximum, of a number of each thread of a block, in every thread; whole warps, at
// most 32 of them. In one fixed order.
template <bool MAX> __device__ __forceinline__ float block_reduce(float x) {
    __shared__ float parts[32];
    x = MAX ? warp_max(x) : warp_sum(x);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    x = lane < blockDim.x / 32 ? parts[lane] : (MAX ? -INFINITY : 0.0f);
    return MAX ? warp_max(x) : warp_sum(x);
}
__device__ __forceinline__ float block_sum(float x) { return block_reduce<false>(x); }
__device__ __forceinline__ float block_max(float x) { return block_reduce<true>(x); }

// SplitMix64's finalizer, as `trine_train`'s stochastic rounding and dropout have it.
__device__ __forceinline__ u64 mix(u64 x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// What the element at `at` is multiplied by where some are left out (dropout, `trine_train::adapters`): `kept`,
// or 0 where its number is below `below`.
__device__ __forceinline__ float share_kept(u64 key, u64 below, float kept, u64 at) {
    return mix(key + at) < below ? 0.0f : kept;
}

// The number behind a pointer that may be null, which stands for 1.
__device__ __forceinline__ float factor(const float* x) { return x ? *x : 1.0f; }
__device__ __forceinline__ float factor(const float* x, u32 row) { return x ? x[row] : 1.0f; }

#ifndef EMULATED
// ---- Tensor cores and asynchronous copies; their emulation is in emulate.hpp. ----

__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

// Four 8 x 8 matrices of bf16. Lane `l` gives the address of row `l % 8` of matrix `l / 8`, 16 bytes in
// shared memory; of matrix `i`, lane `l` gets elements `2 (l % 4)` and the next of row `l / 4` in `r[i]`.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)) : "memory");
}

// As `load_matrices`, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)) : "memory");
}

// c (16 x 8, f32) += a (16 x 16) b (16 x 8), bf16. Lane `l`, g = l / 4, t = l % 4: a[0] has row g, columns 2t
// and the next; a[1] row g + 8; a[2] row g, columns 2t + 8; a[3] row g + 8, columns 2t + 8; b[0] rows 2t and
// the next of column g, b[1] rows 2t + 8; c[0], c[1] row g, columns 2t and the next; c[2], c[3] row g + 8.
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, beside other work; zeros unless `valid`, and then nothing is read.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
// As that, 4 bytes, for what begins anywhere.
__device__ __forceinline__ void copy_word_async(void* shared, const void* global, bool valid) {
    const int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
// Ends a group of copies.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last N groups of this thread have arrived.
template <int N> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// 2 to the power of x.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif
