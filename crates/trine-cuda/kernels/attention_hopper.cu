// Causal attention in bf16, forward, with what only sm_90a has: products of 64 rows by four warps at once,
// which read shared memory by themselves and run beside other work (wgmma). Inputs and outputs as in attention.cu.
//
// A block has 64 queries for each of its groups of four warps; keys and values come in tiles of 64. While a
// group's weights of one tile are multiplied by the values, the weights of the next tile are
// computed from its scores, which were multiplied just before (FlashAttention-3, Shah et al. 2024, arXiv
// 2407.08608, section 3.2).
#if defined(EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace attention_hopper {

using namespace wgmma;
using namespace attention;

constexpr u32 KEYS = 64; // of a tile

// Shared memory: to begin at 1024; the queries; twice keys and values; the first key that each query sees.
template <u32 D, u32 GROUPS> constexpr u32 shared_bytes() {
    return 1024 + 64 * GROUPS * 2 * D + 4 * KEYS * 2 * D + 64 * GROUPS * 4;
}

template <u32 D, u32 GROUPS>
__device__ __forceinline__ void forward(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse,
                                        const u32* starts, u32 T, u32 H, u32 K, u32 d, u32 ld, u32 ldo, float scale) {
    constexpr u32 QUERIES = 64 * GROUPS, THREADS = 128 * GROUPS;
    DYNAMIC_SHARED(memory);
    constexpr u32 TILE = KEYS * D;
    bf16* const queries = (bf16*)(memory + before_tiles(shared_address(memory)));
    bf16* const tiles = queries + QUERIES * D; // keys, keys, values, values
    u32* const see_from = (u32*)(tiles + 4 * TILE); // the first key that each query sees
    const auto keys = [&](u32 key) { return tiles + key / KEYS % 2 * TILE; };
    const auto values = [&](u32 key) { return tiles + (2 + key / KEYS % 2) * TILE; };
    const Part part = part_of_block();
    const u32 b = part.head / H, h = part.head % H;
    q += (u64)b * T * ld + h * d;
    k += (u64)b * T * ld + h / (H / K) * d;
    v += (u64)b * T * ld + h / (H / K) * d;

    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 group = of_warp(warp / 4);
    const u32 block_first = (gridDim.x - 1 - part.tile) * QUERIES; // those with most to do come first
    const u32 first = block_first + warp * 16; // of the warp's queries
    // The tiles of keys that some query of the block sees.
    const u32 keys_end = min(block_first + QUERIES, T);
    const u32 own_end = min(block_first + group * 64 + 64, keys_end); // for the group
    const u32 keys_first = starts ? starts[(u64)b * T + block_first] / KEYS * KEYS : 0;

    copy_tile<D, QUERIES, THREADS>(queries, q, block_first, T, d, ld);
    copy_tile<D, KEYS, THREADS>(keys(keys_first), k, keys_first, T, d, ld);
    copy_commit();
    copy_tile<D, KEYS, THREADS>(values(keys_first), v, keys_first, T, d, ld);
    if (keys_first + KEYS < keys_end)
        copy_tile<D, KEYS, THREADS>(keys(keys_first + KEYS), k, keys_first + KEYS, T, d, ld);
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
        const u64 x = matrix<QUERIES>(shared_address(queries) + group * (64 * 128));
        const u64 y = matrix<KEYS>(shared_address(keys(of_warp(key))));
#pragma unroll
        for (u32 c = 0; c < D / 16; c++)
            group_multiply(s, further(x, columns<QUERIES>(c)), further(y, columns<KEYS>(c)), c > 0);
        group_commit();
    };
    const auto multiply_values = [&](u32 key) {
        const u64 y = matrix<KEYS>(shared_address(values(of_warp(key))));
#pragma unroll
        for (u32 c = 0; c < KEYS / 16; c++) group_multiply_add(sum, weights[c], further(y, rows(c)));
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
        for (u32 c = 0; c < KEYS / 16; c++) as_left(weights[c], s, 2 * c);
    };
    copy_wait<1>();
    shared_fence();
    __syncthreads();
    group_fence();
    multiply_keys(keys_first);
    group_wait<0>();
    keep_place(s);
    softmax(keys_first);

    u32 key = keys_first;
    for (;;) {
        // Waiting here, and not at the end of the loop, keeps the compiler from waiting before the softmax.
        group_wait<0>();
        keep_place(sum);
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
        if (key + KEYS >= own_end) break;
        if (key + 2 * KEYS < keys_end) copy_tile<D, KEYS, THREADS>(keys(key), k, key + 2 * KEYS, T, d, ld);
        copy_tile<D, KEYS, THREADS>(values(key + KEYS), v, key + KEYS, T, d, ld);
        copy_commit();
        keep_place(s);
        keep_place(sum);
        group_fence();
        multiply_keys(key + KEYS);
        multiply_values(key);
        group_wait<1>();
        keep_place(s);
        softmax(key + KEYS);
        keep_place(s);
        key += KEYS;
    }
    keep_place(sum);
    group_fence();
    multiply_values(key);
    for (; key + KEYS < keys_end; key += KEYS) { // what other groups go on with
        if (key + 2 * KEYS < keys_end) copy_tile<D, KEYS, THREADS>(keys(key), k, key + 2 * KEYS, T, d, ld);
        copy_tile<D, KEYS, THREADS>(values(key + KEYS), v, key + KEYS, T, d, ld);
        copy_commit();
        copy_wait<0>();
        shared_fence();
        group_wait<0>();
        __syncthreads();
    }
    group_wait<0>();
    keep_place(sum);

    float inverse[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 own = 8 * half + g, row = first + own;
        float all = total[half];
        all += __shfl_xor_sync(ALL_LANES, all, 1);
        all += __shfl_xor_sync(ALL_LANES, all, 2);
        if (t == 0 && row < T) lse[(u64)part.head * T + row] = (most[half] + __log2f(all)) * LN_2;
        inverse[half] = __fdividef(1.0f, all);
    }
    if (first < T)
        store_rows<D, QUERIES>(out + ((u64)b * T + first) * ldo + h * d, ldo, T - first, d, sum, inverse[0], inverse[1],
                               queries, warp * 16);
}

} // namespace attention_hopper

// For d <= D. Grid (ceil(T / queries of a block), B H). Queries of a block, its threads, and bytes of dynamic shared
// memory:
//   d64    64  128   42240
//   d128  192  384  116480
#define ATTENTION_FORWARD_HOPPER(name, D, GROUPS, BLOCKS)                                                            \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS, BLOCKS)                                               \
    name(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, bf16* __restrict__ out, \
         float* __restrict__ lse, const u32* __restrict__ starts, u32 T, u32 H, u32 K, u32 d, u32 ld, u32 ldo,       \
         float scale) {                                                                                              \
        attention_hopper::forward<D, GROUPS>(q, k, v, out, lse, starts, T, H, K, d, ld, ldo, scale);                 \
    }
// D; groups of four warps, of 64 queries each; blocks that run at once.
ATTENTION_FORWARD_HOPPER(attention_forward_hopper_d64, 64, 1, 4)
ATTENTION_FORWARD_HOPPER(attention_forward_hopper_d128, 128, 3, 1)

namespace attention_hopper {
static_assert(shared_bytes<64, 1>() == 42240 && shared_bytes<128, 3>() == 116480, "as the table says");
} // namespace attention_hopper

#endif
