// Causal attention in bf16, forward, with what only sm_90a has: products of 64 rows by four warps at once,
// which read shared memory by themselves and run beside other work (wgmma). Inputs and outputs as in attention.cu.
//
// A block has 128 queries, 64 for each of its two groups of four warps; keys and values come in tiles of 128.
// While a group's weights of one tile are multiplied by the values, the weights of the next tile are
// computed from its scores, which were multiplied just before (FlashAttention-3, Shah et al. 2024, arXiv
// 2407.08608, section 3.2).
#if defined(EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace attention_hopper {

// ---- What is new in sm_90a; the emulation is in emulate.hpp. ----
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

// c (64 x 128) = a (64 x 16) times b (128 x 16) transposed, or that added to c. Warp w of a group has rows
// 16 w .., c[n] of them and of columns 8 n .. as `multiply_add` has them. a and b are described by `matrix`.
__device__ __forceinline__ void group_multiply(float (&c)[16][4], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_0 ", " NAMES_32
                 "}, %64, %65, p, 1, 1, 0, 0;}"
                 : SUMS_0, SUMS_8 : "l"(a), "l"(b), "r"(add));
}
// c (64 x 128, or x 64) += a (64 x 16) b (16 x 128, or x 64). Each warp has its rows of a as `multiply_add` has them.
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
// Lets nothing that uses x pass from one side of this line to the other.
__device__ __forceinline__ void keep_place(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void keep_place(u32& x) { asm volatile("" : "+r"(x)::"memory"); }
#undef SUM
#undef SUMS_0
#undef SUMS_8
#undef NAMES_0
#undef NAMES_32
#else
__device__ __forceinline__ void keep_place(float&) {}
__device__ __forceinline__ void keep_place(u32&) {}
#endif

constexpr u32 QUERIES = 128; // of a block
constexpr u32 KEYS = 128; // of a tile
constexpr u32 THREADS = 256;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// Tiles have 128 rows. Their columns lie in panels of 64, which is 128 bytes a row, one panel after the other;
// pieces of 16 bytes change places within these 128, as wgmma wants it.
constexpr u32 PANEL = 128 * 64;
__device__ __forceinline__ u32 place(u32 row, u32 piece) {
    return piece / 8 * PANEL + row * 64 + (piece % 8 ^ row % 8) * 8;
}

// A matrix in such a tile, from address `at` on: 8 rows are 1024 bytes, and a panel is PANEL elements.
__device__ __forceinline__ u64 matrix(u32 at) {
    constexpr u64 rows = 1024, panel = PANEL * 2, in_128_bytes = 1;
    return (u64)(at >> 4) | panel >> 4 << 16 | rows >> 4 << 32 | in_128_bytes << 62;
}

// Rows `first` and on of a matrix of width d to a tile, without waiting for them; zeros beyond row T and column d.
template <u32 D>
__device__ __forceinline__ void copy_tile(bf16* tile, const bf16* x, u32 first, u32 T, u32 d, u32 ld) {
    constexpr u32 PIECES = D / 8, STEP = THREADS / PIECES; // STEP is a multiple of 8: places change alike
    const u32 row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    bf16* to = tile + place(row, piece);
    const bf16* from = x + ((u64)(first + row) * ld + piece * 8);
    const u32 end = 8 * piece < d ? T : 0;
#pragma unroll
    for (u32 i = 0; i < 128; i += STEP) copy_async(to + i * 64, from + (u64)i * ld, first + row + i < end);
}

template <u32 D>
__device__ __forceinline__ void forward(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse,
                                        const u32* starts, u32 T, u32 H, u32 K, u32 d, u32 ld, u32 ldo, float scale) {
    DYNAMIC_SHARED(memory);
    constexpr u32 TILE = 128 * D;
    bf16* const queries = (bf16*)(memory + (1024 - shared_address(memory) % 1024) % 1024); // tiles begin at 1024
    bf16* const tiles = queries + TILE; // keys, keys, values, values
    u32* const see_from = (u32*)(tiles + 4 * TILE); // the first key that each query sees
    const auto keys = [&](u32 key) { return tiles + key / KEYS % 2 * TILE; };
    const auto values = [&](u32 key) { return tiles + (2 + key / KEYS % 2) * TILE; };
    const u32 b = blockIdx.y / H, h = blockIdx.y % H;
    q += (u64)b * T * ld + h * d;
    k += (u64)b * T * ld + h / (H / K) * d;
    v += (u64)b * T * ld + h / (H / K) * d;

    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 block_first = (gridDim.x - 1 - blockIdx.x) * QUERIES; // those with most to do come first
    const u32 first = block_first + warp * 16; // of the warp's queries
    // The tiles of keys that some query of the block sees.
    const u32 keys_end = min(block_first + QUERIES, T);
    const u32 keys_first = starts ? starts[(u64)b * T + block_first] / KEYS * KEYS : 0;

    copy_tile<D>(queries, q, block_first, T, d, ld);
    copy_tile<D>(keys(keys_first), k, keys_first, T, d, ld);
    copy_commit();
    copy_tile<D>(values(keys_first), v, keys_first, T, d, ld);
    if (keys_first + KEYS < keys_end) copy_tile<D>(keys(keys_first + KEYS), k, keys_first + KEYS, T, d, ld);
    copy_commit();
    if (threadIdx.x < QUERIES)
        see_from[threadIdx.x] = starts ? starts[(u64)b * T + min(block_first + threadIdx.x, T - 1)] : 0;

    // Queries are the rows g and 8 + g of the warp: `[half]`. `most` is the largest score so far times `factor`,
    // finite lest a row that sees nothing yet give NaN.
    float s[KEYS / 8][4], sum[D / 8][4] = {};
    u32 weights[KEYS / 16][4];
    float most[2] = {-1e38f, -1e38f}, total[2] = {}, kept[2];
    const float factor = scale * LOG2_E;

    const auto multiply_keys = [&](u32 key) {
        const u32 x = shared_address(queries) + warp / 4 * (64 * 128), y = shared_address(keys(key));
#pragma unroll
        for (u32 c = 0; c < D / 16; c++) {
            const u32 at = c / 4 * (PANEL * 2) + c % 4 * 32;
            group_multiply(s, matrix(x + at), matrix(y + at), c > 0);
        }
        group_commit();
    };
    const auto multiply_values = [&](u32 key) {
        const u32 y = shared_address(values(key));
#pragma unroll
        for (u32 c = 0; c < KEYS / 16; c++) group_multiply_add(sum, weights[c], matrix(y + c * (16 * 128)));
        group_commit();
    };
    // Scores become weights, in place; `kept` is what the sums up to now are multiplied by.
    const auto softmax = [&](u32 key) {
        if (key + KEYS > first + 1 || key < see_from[warp * 16 + 15]) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                // Numbers of keys from this lane's first one on: those from `start` to `last` are seen.
                const u32 own = 8 * half + g, lane_first = key + 2 * t;
                const int last = (int)(first + own) - (int)lane_first;
                const int start = (int)see_from[warp * 16 + own] - (int)lane_first;
#pragma unroll
                for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (u32 j = 0; j < 2; j++) {
                        const int at = 8 * n + j;
                        if (at > last || at < start) s[n][2 * half + j] = -INFINITY;
                    }
            }
        }
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float now = -INFINITY;
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++) now = fmaxf(now, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            now = fmaxf(now, __shfl_xor_sync(ALL_LANES, now, 1));
            now = fmaxf(now, __shfl_xor_sync(ALL_LANES, now, 2));
            now = fmaxf(now * factor, most[half]);
            kept[half] = exp2_fast(most[half] - now);
            most[half] = now;
            total[half] *= kept[half];
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (u32 j = 0; j < 2; j++) {
                    s[n][2 * half + j] = exp2_fast(s[n][2 * half + j] * factor - now);
                    total[half] += s[n][2 * half + j];
                }
        }
    };
    const auto pack_weights = [&] {
#pragma unroll
        for (u32 c = 0; c < KEYS / 16; c++)
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const float* pair = &s[2 * c + j / 2][j % 2 * 2];
                weights[c][j] = pack_bf16(pair[0], pair[1]);
            }
    };
    const auto keep_scores = [&] {
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (u32 j = 0; j < 4; j++) keep_place(s[n][j]);
    };
    const auto keep_sums = [&] {
#pragma unroll
        for (u32 n = 0; n < D / 8; n++)
#pragma unroll
            for (u32 j = 0; j < 4; j++) keep_place(sum[n][j]);
    };

    copy_wait<1>();
    shared_fence();
    __syncthreads();
    group_fence();
    multiply_keys(keys_first);
    group_wait<0>();
    keep_scores();
    softmax(keys_first);

    u32 key = keys_first;
    for (;;) {
        // Waiting here, and not at the end of the loop, keeps the compiler from waiting before the softmax.
        group_wait<0>();
        keep_sums();
        // Where no maximum grew, and both factors are 1, the sums stay as they are.
        if (__any_sync(ALL_LANES, fminf(kept[0], kept[1]) < 1.0f))
#pragma unroll
            for (u32 n = 0; n < D / 8; n++)
#pragma unroll
                for (u32 j = 0; j < 4; j++) sum[n][j] *= kept[j / 2];
        pack_weights();
        copy_wait<0>();
        shared_fence();
        __syncthreads(); // these values and the next keys are here; these keys and the values before are done with
        if (key + KEYS >= keys_end) break;
        if (key + 2 * KEYS < keys_end) copy_tile<D>(keys(key), k, key + 2 * KEYS, T, d, ld);
        copy_tile<D>(values(key + KEYS), v, key + KEYS, T, d, ld);
        copy_commit();
        keep_scores();
        keep_sums();
        group_fence();
        multiply_keys(key + KEYS);
        multiply_values(key);
        group_wait<1>();
        keep_scores();
        softmax(key + KEYS);
        keep_scores();
        key += KEYS;
    }
    keep_sums();
    group_fence();
    multiply_values(key);
    group_wait<0>();
    keep_sums();

    // Outputs take the place of the warp's own queries, to be written in whole pieces of 16 bytes.
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 own = 8 * half + g, row = first + own;
        float all = total[half];
        all += __shfl_xor_sync(ALL_LANES, all, 1);
        all += __shfl_xor_sync(ALL_LANES, all, 2);
        if (t == 0 && row < T) lse[(u64)blockIdx.y * T + row] = (most[half] + __log2f(all)) * LN_2;
        const float inverse = __fdividef(1.0f, all);
#pragma unroll
        for (u32 n = 0; n < D / 8; n++)
            *(u32*)(queries + place(warp * 16 + own, n) + 2 * t) =
                pack_bf16(sum[n][2 * half] * inverse, sum[n][2 * half + 1] * inverse);
    }
    __syncwarp();
    constexpr u32 PIECES = D / 8;
    out += (u64)b * T * ldo + h * d;
#pragma unroll 4
    for (u32 i = lane; i < 16 * PIECES; i += 32) {
        const u32 row = i / PIECES, piece = i % PIECES;
        if (first + row < T && piece * 8 < d)
            *(Words*)(out + (u64)(first + row) * ldo + piece * 8) = *(const Words*)(queries + place(warp * 16 + row, piece));
    }
}

} // namespace attention_hopper

// For d <= D. Grid (ceil(T / 128), B H), 256 threads, 1280 D + 1536 bytes of dynamic shared memory.
#define ATTENTION_FORWARD_HOPPER(name, D)                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                             \
    name(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, bf16* __restrict__ out, \
         float* __restrict__ lse, const u32* __restrict__ starts, u32 T, u32 H, u32 K, u32 d, u32 ld, u32 ldo,       \
         float scale) {                                                                                              \
        attention_hopper::forward<D>(q, k, v, out, lse, starts, T, H, K, d, ld, ldo, scale);                         \
    }
ATTENTION_FORWARD_HOPPER(attention_forward_hopper_d64, 64)
ATTENTION_FORWARD_HOPPER(attention_forward_hopper_d128, 128)

#endif
