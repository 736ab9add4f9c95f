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

#define SUM(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define SUMS_0 SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7)
#define SUMS_8 SUM(8), SUM(9), SUM(10), SUM(11), SUM(12), SUM(13), SUM(14), SUM(15)
#define NAMES_0                                                                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                         \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_32                                                                                                     \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                               \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// c (64 x 128, or x 64) = a (64 x 16) times b (128 x 16, or 64 x 16) transposed, or that added to c. Warp w of a group
// has rows 16 w .., c[n] of them and of columns 8 n .. as `multiply_add` has them. a and b are described by `matrix`;
// or each warp has its rows of a as `multiply_add` has them.
__device__ __forceinline__ void group_multiply(float (&c)[16][4], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_0 ", " NAMES_32
                 "}, %64, %65, p, 1, 1, 0, 0;}"
                 : SUMS_0, SUMS_8 : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void group_multiply(float (&c)[8][4], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_0 "}, %32, %33, p, 1, 1, 0, 0;}"
                 : SUMS_0 : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void group_multiply(float (&c)[8][4], const u32 (&a)[4], u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_0
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;}"
                 : SUMS_0 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
// c (64 x 128, or x 64) += a (64 x 16) b (16 x 128, or x 64), a in registers.
__device__ __forceinline__ void group_multiply_add(float (&c)[16][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_0 ", " NAMES_32
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : SUMS_0, SUMS_8 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void group_multiply_add(float (&c)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_0
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : SUMS_0 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef SUM
#undef SUMS_0
#undef SUMS_8
#undef NAMES_0
#undef NAMES_32
// Lets nothing that uses x pass from one side of this line to the other.
__device__ __forceinline__ void keep_place(float& x) { asm volatile("" : "+f"(x)::"memory"); }
#else
__device__ __forceinline__ void keep_place(float&) {}
#endif
template <int N> __device__ __forceinline__ void keep_place(float (&x)[N][4]) {
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
    constexpr u32 PIECES = D / 8, STEP = THREADS / PIECES;
    static_assert(STEP % 8 == 0, "places change alike");
    const u32 row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    bf16* to = tile + place<ROWS>(row, piece);
    const bf16* from = x + ((u64)(first + row) * ld + piece * 8);
    const u32 end = 8 * piece < d ? T : 0;
#pragma unroll
    for (u32 i = 0; i < ROWS; i += STEP)
        if (i + STEP <= ROWS || i + row < ROWS) copy_async(to + i * 64, from + (u64)i * ld, first + row + i < end);
}

// As copy_async, 4 bytes: numbers of rows begin anywhere.
__device__ __forceinline__ void copy_word_async(void* shared, const void* global, bool valid) {
#ifndef EMULATED
    const int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
#else
    *(u32*)shared = valid ? *(const u32*)global : 0;
#endif
}

// A warp's 16 rows and D columns of a result, times two factors, of rows 0 to 7 and 8 to 15, by way of rows `own` and
// on of a tile, which are the warp's alone. `out` is where the first of them goes; `count` of them are stored.
template <u32 D, u32 ROWS>
__device__ __forceinline__ void store_rows(bf16* out, u32 ld, u32 count, u32 d, const float (&c)[D / 8][4], float x,
                                           float y, bf16* tile, u32 own) {
    constexpr u32 PIECES = D / 8;
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 n = 0; n < PIECES; n++) {
        *(u32*)(tile + place<ROWS>(own + g, n) + 2 * t) = pack_bf16(c[n][0] * x, c[n][1] * x);
        *(u32*)(tile + place<ROWS>(own + g + 8, n) + 2 * t) = pack_bf16(c[n][2] * y, c[n][3] * y);
    }
    __syncwarp();
#pragma unroll 4
    for (u32 i = lane; i < 16 * PIECES; i += 32) {
        const u32 row = i / PIECES, piece = i % PIECES;
        if (row < count && piece * 8 < d)
            *(Words*)(out + (u64)row * ld + piece * 8) = *(const Words*)(tile + place<ROWS>(own + row, piece));
    }
}

// 16 columns of accumulators as the left factor of a product.
template <int N> __device__ __forceinline__ void as_left(u32 (&a)[4], const float (&c)[N][4], u32 first) {
#pragma unroll
    for (u32 j = 0; j < 4; j++) a[j] = pack_bf16(c[first + j / 2][j % 2 * 2], c[first + j / 2][j % 2 * 2 + 1]);
}

// Which part a block does. Blocks start in the order of their numbers: of SECTION heads (of all sequences)
// first all tiles 0, then all tiles 1 and so on. So those with the most work begin first, and no more is in
// use at a time than the L2 cache holds.
struct Part {
    u32 tile, head, sequence;
};
__device__ __forceinline__ Part part_of_block() {
    constexpr u32 SECTION = 64;
    const u32 number = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const u32 section = number / (SECTION * gridDim.x), rest = number % (SECTION * gridDim.x);
    const u32 heads = min(SECTION, gridDim.y * gridDim.z - section * SECTION);
    const u32 head = section * SECTION + rest % heads;
    return {rest / heads, head % gridDim.y, head / gridDim.y};
}

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

} // namespace wgmma

#endif
