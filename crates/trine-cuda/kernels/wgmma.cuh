// What only sm_90a has: products of 64 rows by a group of four warps at once, which read shared memory by
// themselves and run beside other work (wgmma), and the tiles in shared memory that they read.
#if defined(EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace wgmma {

// ---- The instructions; their emulation is in emulate.hpp. ----
#ifndef EMULATED
// Before products, where registers that they use have been written since the last ones.
__device__ __forceinline__ void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a sequence of products.
__device__ __forceinline__ void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the last N sequences are done.
template <int N> __device__ __forceinline__ void group_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// After what this thread wrote to shared memory, and before the barrier that products by other warps follow.
__device__ __forceinline__ void shared_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define SUM(type, i) "+" type(c[i][0]), "+" type(c[i][1]), "+" type(c[i][2]), "+" type(c[i][3])
#define SUMS(type, i)                                                                                                \
    SUM(type, i), SUM(type, i + 1), SUM(type, i + 2), SUM(type, i + 3), SUM(type, i + 4), SUM(type, i + 5),          \
        SUM(type, i + 6), SUM(type, i + 7)
#define NAMES_0                                                                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                         \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_32                                                                                                     \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                               \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_64                                                                                                     \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                               \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                               \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                   \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// Warp w of a group has rows 16 w .. of a product c, c[n] of them and of columns 8 n .. as `multiply_add` has them.

// c (64 x 64) = a (64 x 16) times b (64 x 16) transposed, or that added to c; a and b are described by `matrix`.
__device__ __forceinline__ void group_multiply(float (&c)[8][4], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_0 "}, %32, %33, p, 1, 1, 0, 0;}"
                 : SUMS("f", 0) : "l"(a), "l"(b), "r"(add));
}
// c (64 x 256) = a (64 x 32) times b (256 x 32) transposed, or that added to c, of int8 and in int32.
__device__ __forceinline__ void group_multiply(int (&c)[32][4], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %130, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" NAMES_0 ", " NAMES_32 ", " NAMES_64
                 "}, %128, %129, p;}"
                 : SUMS("r", 0), SUMS("r", 8), SUMS("r", 16), SUMS("r", 24) : "l"(a), "l"(b), "r"(add));
}
// c (64 x 64, or x 128) += a (64 x 16) b (16 x 64, or x 128); each warp has its rows of a as `multiply_add` has them.
__device__ __forceinline__ void group_multiply_add(float (&c)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_0
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : SUMS("f", 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void group_multiply_add(float (&c)[16][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_0 ", " NAMES_32
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : SUMS("f", 0), SUMS("f", 8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef SUM
#undef SUMS
#undef NAMES_0
#undef NAMES_32
#undef NAMES_64

// Lets nothing that uses x pass from one side of this line to the other.
__device__ __forceinline__ void keep_place(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void keep_place(int& x) { asm volatile("" : "+r"(x)::"memory"); }
#else
template <class T> __device__ __forceinline__ void keep_place(T&) {}
#endif
template <class T, int N> __device__ __forceinline__ void keep_place(T (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) keep_place(x[n][j]);
}

// x, which all threads of a warp have, where the compiler does not know that they have.
__device__ __forceinline__ u32 of_warp(u32 x) { return __shfl_sync(ALL_LANES, x, 0); }

// ---- Tiles ----

// The columns of a tile of ROWS rows lie in panels of 64, which is 128 bytes a row, one panel after the other;
// pieces of 16 bytes change places within these 128, as wgmma wants it. Tiles begin at multiples of 1024 bytes.

// Bytes from an address in shared memory to where a tile may begin.
__device__ __forceinline__ u32 before_tiles(u32 address) { return (1024 - address % 1024) % 1024; }

// Elements from the beginning of a tile to a piece of a row.
template <u32 ROWS> __device__ __forceinline__ u32 place(u32 row, u32 piece) {
    return piece / 8 * (ROWS * 64) + row * 64 + (piece % 8 ^ row % 8) * 8;
}

// A matrix in such a tile, from address `at` on: 8 rows are 1024 bytes, and a panel is 128 ROWS.
template <u32 ROWS> __device__ __forceinline__ u64 matrix(u32 at) {
    constexpr u64 rows = 1024, panel = ROWS * 128, in_128_bytes = 1;
    return (u64)(at >> 4) | panel >> 4 << 16 | rows >> 4 << 32 | in_128_bytes << 62;
}
// The matrix that begins `bytes` further on.
__device__ __forceinline__ u64 further(u64 matrix, u32 bytes) {
    return (matrix & 0xffffffff00000000ull) | ((u32)matrix + (bytes >> 4));
}
// Bytes to 16 c columns, and to 16 c rows, further on.
template <u32 ROWS> __device__ __forceinline__ u32 columns(u32 c) { return c / 4 * (ROWS * 128) + c % 4 * 32; }
__device__ __forceinline__ u32 rows(u32 c) { return c * 16 * 128; }

// Rows `first` and on of a matrix of width d to a tile, without waiting for them; zeros beyond row T and column d.
template <u32 D, u32 ROWS, u32 THREADS>
__device__ __forceinline__ void copy_tile(bf16* tile, const bf16* x, u32 first, u32 T, u32 d, u32 ld) {
    bf16* const to = tile + place<ROWS>(threadIdx.x / (D / 8), threadIdx.x % (D / 8));
    copy_pieces<D, ROWS, THREADS, 64>(to, x, first, T, d, ld);
}

// A warp's 16 rows of a result, times x in rows 0 to 7 and times y in rows 8 to 15, by way of rows `own` and on of a
// tile, which are the warp's alone. `out` is where the first of them goes; `count` of them are stored.
template <u32 D, u32 ROWS>
__device__ __forceinline__ void store_rows(bf16* out, u32 ld, u32 count, u32 d, const float (&c)[D / 8][4], float x,
                                           float y, bf16* tile, u32 own) {
    const auto at = [&](u32 row, u32 piece) { return tile + place<ROWS>(own + row, piece); };
    put_rows(c, x, y, at);
    __syncwarp();
    store_pieces<16, D / 8>(out, ld, count, 0, d, at);
}

} // namespace wgmma

#endif
