// The gradients of causal attention in bf16 with wgmma, for sm_90a. Inputs, outputs and formulas as in
// attention_backward.cu: one kernel has a block per tile of keys, for dK and dV, another one a block per tile of
// queries, for dQ; every sum has one order.
//
// A group of four warps owns 64 rows of the result, and takes 64 rows of the other side at a time. P and dS lie in
// its registers just as the next product wants its left factor, so they never pass through shared memory. The
// tensor cores are kept busy by the next product while the last one's numbers are worked on (as FlashAttention-3,
// Shah et al. 2024, arXiv 2407.08608): for dK and dV, dS beside P^T dO; for dQ, P beside dP. More than that takes more
// registers, and what was faster on an H200 is here.
#if defined(EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace attention_backward_hopper {
using namespace wgmma;
using namespace attention;

constexpr u32 OTHERS = 64; // rows of the other side in a tile
constexpr u32 STAGES = 3; // tiles in shared memory: one that products may still read, the present one, the next one

// c = a b^T over D columns; a is 64 rows of a tile of ROWS rows, the group's; b is a tile of OTHERS rows.
template <u32 D, u32 ROWS>
__device__ __forceinline__ void multiply(float (&c)[OTHERS / 8][4], const bf16* a, const bf16* b, u32 group) {
    const u64 x = matrix<ROWS>(shared_address(a) + group * (64 * 128)), y = matrix<OTHERS>(shared_address(b));
#pragma unroll
    for (u32 i = 0; i < D / 16; i++)
        group_multiply(c, further(x, columns<ROWS>(i)), further(y, columns<OTHERS>(i)), i > 0);
    group_commit();
}

// sum += a b over OTHERS rows of b.
template <u32 D>
__device__ __forceinline__ void multiply_add(float (&sum)[D / 8][4], const u32 (&a)[OTHERS / 16][4], const bf16* b) {
    const u64 y = matrix<OTHERS>(shared_address(b));
#pragma unroll
    for (u32 c = 0; c < OTHERS / 16; c++) group_multiply_add(sum, a[c], further(y, rows(c)));
    group_commit();
}

// Shared memory of either kernel: to begin at 1024; two tiles of 64 GROUPS rows; stages of two tiles; Rows, of each
// stage or of the tile of queries.
template <u32 D, u32 GROUPS> constexpr u32 shared_bytes() {
    static_assert(GROUPS <= STAGES, "as many Rows as stages are enough");
    return 1024 + 2 * 64 * GROUPS * 2 * D + STAGES * 2 * OTHERS * 2 * D + STAGES * sizeof(Rows<OTHERS>);
}

// dK and dV of a tile of keys of one key head and sequence: the transposes of S, P, dP and dS are computed.
template <u32 D, u32 GROUPS>
__device__ __forceinline__ void of_keys(const bf16* q, const bf16* k, const bf16* v, const bf16* dout,
                                        const float* lse, const float* delta, const u32* starts, bf16* dk, bf16* dv,
                                        u32 T, u32 H, u32 K, u32 d, u32 ld, u32 ldo, float scale) {
    constexpr u32 THREADS = 128 * GROUPS, KEYS = 64 * GROUPS, QUERIES = OTHERS, TILE = OTHERS * D;
    DYNAMIC_SHARED(memory);
    bf16* const keys = (bf16*)(memory + before_tiles(shared_address(memory)));
    bf16 *const values = keys + KEYS * D, *const stages = values + KEYS * D;
    Rows<QUERIES>* const numbers = (Rows<QUERIES>*)(stages + STAGES * 2 * TILE);

    const Part part = part_of_block();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 group = of_warp(threadIdx.x / 128), key0 = part.tile * KEYS;
    const u64 row0 = (u64)part.sequence * T;
    const u32 key_first = key0 + group * 64, key_last = key_first + 63; // the group's

    const u32 first = key0 / QUERIES;
    const u32 last = end_of_sight<QUERIES, THREADS>(starts, row0, first, T, key0 + KEYS);

    const u32 heads = H / K, end = (part.head + 1) * heads;
    u32 head = part.head * heads, tile = first, stage = 0;
    const auto copy = [&](u32 head, u32 tile, u32 stage) {
        bf16* const to = stages + stage * (2 * TILE);
        copy_tile<D, QUERIES, THREADS>(to, q + row0 * ld + head * d, tile * QUERIES, T, d, ld);
        copy_tile<D, QUERIES, THREADS>(to + TILE, dout + row0 * ldo + head * d, tile * QUERIES, T, d, ldo);
        const u64 at = ((u64)part.sequence * H + head) * T;
        copy_numbers<QUERIES, THREADS>(numbers[stage], lse + at, delta + at, starts ? starts + row0 : nullptr,
                                       tile * QUERIES, T);
        copy_commit();
    };
    copy_tile<D, KEYS, THREADS>(keys, k + row0 * ld + part.head * d, key0, T, d, ld);
    copy_tile<D, KEYS, THREADS>(values, v + row0 * ld + part.head * d, key0, T, d, ld);
    copy(head, tile, 0);
    if (!starts)
        for (u32 i = threadIdx.x; i < STAGES * QUERIES; i += THREADS) numbers[i / QUERIES].start[i % QUERIES] = 0;

    float sum_k[D / 8][4] = {}, sum_v[D / 8][4] = {}, s[QUERIES / 8][4], dp[QUERIES / 8][4];
    u32 left_p[QUERIES / 16][4], left_s[QUERIES / 16][4];
    const float factor = scale * LOG2_E;

    for (;;) {
        copy_wait<0>();
        shared_fence();
        __syncthreads(); // the tile is here, and all products that read the one two before are done
        const bf16 *const queries = stages + of_warp(stage) * (2 * TILE), *const gradients = queries + TILE;
        const Rows<QUERIES>& r = numbers[stage];
        const u32 query = tile * QUERIES, following = stage == STAGES - 1 ? 0 : stage + 1;
        tile++;
        if (tile == last) tile = first, head++;
        if (head < end) copy(head, tile, following);

        if (key_first < query + QUERIES && key_last >= r.start[0] && key_first < T) {
            group_fence();
            multiply<D, KEYS>(s, keys, queries, group);
            group_wait<0>();
            keep_place(s); // dP waits until P is rounded: both and the sums would want too many registers
#pragma unroll
            for (u32 n = 0; n < QUERIES / 8; n++) {
                const Two x = *(const Two*)&r.lse[8 * n + 2 * t], y = {x.x * -LOG2_E, x.y * -LOG2_E};
                s[n][0] = exp2_fast(s[n][0] * factor + y.x), s[n][1] = exp2_fast(s[n][1] * factor + y.y);
                s[n][2] = exp2_fast(s[n][2] * factor + y.x), s[n][3] = exp2_fast(s[n][3] * factor + y.y);
            }
            if (key_last > query || key_first < r.start[QUERIES - 1]) { // some are not seen
                const u32 own = key0 + 16 * warp + g;
#pragma unroll
                for (u32 n = 0; n < QUERIES / 8; n++) {
                    const TwoWords y = *(const TwoWords*)&r.start[8 * n + 2 * t];
                    const u32 column = query + 8 * n + 2 * t;
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        const u32 key = own + i / 2 * 8;
                        if (key > column + i % 2 || key < (i % 2 ? y.y : y.x)) s[n][i] = 0.0f;
                    }
                }
            }
#pragma unroll
            for (u32 c = 0; c < QUERIES / 16; c++) as_left(left_p[c], s, 2 * c);
            group_fence();
            multiply<D, KEYS>(dp, values, gradients, group);
            multiply_add<D>(sum_v, left_p, gradients);
            group_wait<1>();
            keep_place(dp);
#pragma unroll
            for (u32 n = 0; n < QUERIES / 8; n++) {
                const Two y = *(const Two*)&r.delta[8 * n + 2 * t];
                // P as it was rounded, so that its floats need no registers while dP is computed.
                const u32* const x = &left_p[n / 2][n % 2 * 2];
                s[n][0] = low_bf16(x[0]), s[n][1] = high_bf16(x[0]);
                s[n][2] = low_bf16(x[1]), s[n][3] = high_bf16(x[1]);
                dp[n][0] = s[n][0] * (dp[n][0] - y.x), dp[n][1] = s[n][1] * (dp[n][1] - y.y);
                dp[n][2] = s[n][2] * (dp[n][2] - y.x), dp[n][3] = s[n][3] * (dp[n][3] - y.y);
            }
#pragma unroll
            for (u32 c = 0; c < QUERIES / 16; c++) as_left(left_s[c], dp, 2 * c);
            group_fence();
            multiply_add<D>(sum_k, left_s, queries);
        } else {
            group_wait<0>(); // as the barrier after the next one promises
        }
        if (head >= end) break;
        stage = following;
    }
    group_wait<0>();
    keep_place(sum_k);
    keep_place(sum_v);
    __syncthreads(); // none reads keys and values any more
    if (key0 + 16 * warp >= T) return;
    const u64 out = (row0 + key0 + 16 * warp) * ld + part.head * d;
    const u32 count = T - key0 - 16 * warp;
    store_rows<D, KEYS>(dk + out, ld, count, d, sum_k, scale, scale, keys, 16 * warp);
    store_rows<D, KEYS>(dv + out, ld, count, d, sum_v, 1.0f, 1.0f, values, 16 * warp);
}

// dQ of a tile of queries of one head and sequence. If LEAN, the last product of a tile is waited for at once and not
// beside the next tile's first ones, which takes fewer registers.
template <u32 D, bool LEAN>
__device__ __forceinline__ void of_queries(const bf16* q, const bf16* k, const bf16* v, const bf16* dout,
                                           const float* lse, const float* delta, const u32* starts, bf16* dq, u32 T,
                                           u32 H, u32 K, u32 d, u32 ld, u32 ldo, float scale) {
    constexpr u32 THREADS = 256, QUERIES = 128, KEYS = OTHERS, TILE = OTHERS * D;
    DYNAMIC_SHARED(memory);
    bf16* const queries = (bf16*)(memory + before_tiles(shared_address(memory)));
    bf16 *const gradients = queries + QUERIES * D, *const stages = gradients + QUERIES * D;
    Rows<QUERIES>& r = *(Rows<QUERIES>*)(stages + STAGES * 2 * TILE); // lse times -log2(e)

    const Part part = part_of_block();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 group = of_warp(threadIdx.x / 128);
    const u32 query0 = (gridDim.x - 1 - part.tile) * QUERIES; // the last tile has the most work
    const u64 row0 = (u64)part.sequence * T;
    const u32 query_first = query0 + group * 64, query_last = query_first + 63; // the group's
    const u32 key_head = part.head / (H / K);
    const auto copy = [&](u32 tile, u32 stage) {
        bf16* const to = stages + stage * (2 * TILE);
        copy_tile<D, KEYS, THREADS>(to, k + row0 * ld + key_head * d, tile * KEYS, T, d, ld);
        copy_tile<D, KEYS, THREADS>(to + TILE, v + row0 * ld + key_head * d, tile * KEYS, T, d, ld);
        copy_commit();
    };
    const auto start_of = [&](u32 row) { return starts ? starts[row0 + min(row, T - 1)] : 0u; };
    u32 tile = start_of(query0) / KEYS, stage = 0;
    const u32 last = min(query0 + QUERIES - 1, T - 1) / KEYS;
    copy_tile<D, QUERIES, THREADS>(queries, q + row0 * ld + part.head * d, query0, T, d, ld);
    copy_tile<D, QUERIES, THREADS>(gradients, dout + row0 * ldo + part.head * d, query0, T, d, ldo);
    copy(tile, 0);

    const u32 start_first = start_of(query_first), start_last = start_of(query_last);
    if (threadIdx.x < QUERIES) {
        const u32 row = query0 + threadIdx.x;
        const u64 at = ((u64)part.sequence * H + part.head) * T + row;
        r.lse[threadIdx.x] = row < T ? lse[at] * -LOG2_E : 0.0f;
        r.delta[threadIdx.x] = row < T ? delta[at] : 0.0f;
        r.start[threadIdx.x] = start_of(row);
    }

    float sum[D / 8][4] = {}, s[KEYS / 8][4], dp[KEYS / 8][4];
    u32 left[KEYS / 16][4];
    const float factor = scale * LOG2_E;

    for (;; tile++) {
        copy_wait<0>();
        shared_fence();
        __syncthreads(); // the tile is here, and all products that read the one two before are done
        const bf16 *const keys = stages + of_warp(stage) * (2 * TILE), *const values = keys + TILE;
        const u32 key0 = tile * KEYS;
        stage = stage == STAGES - 1 ? 0 : stage + 1;
        if (tile < last) copy(tile + 1, stage);

        if (key0 <= query_last && query_first < T && key0 + KEYS > start_first) {
            group_fence();
            multiply<D, QUERIES>(s, queries, keys, group);
            multiply<D, QUERIES>(dp, gradients, values, group);
            group_wait<1>();
            keep_place(s);
            const u32 own = 16 * warp + g; // and 8 on: the thread's rows
            const float row_lse[2] = {r.lse[own], r.lse[own + 8]};
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) s[n][i] = exp2_fast(s[n][i] * factor + row_lse[i / 2]);
            if (key0 + KEYS - 1 > query_first || key0 < start_last) { // some are not seen
                const u32 start[2] = {r.start[own], r.start[own + 8]};
#pragma unroll
                for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        const u32 key = key0 + 8 * n + 2 * t + i % 2;
                        if (key > query0 + own + i / 2 * 8 || key < start[i / 2]) s[n][i] = 0.0f;
                    }
            }
            group_wait<0>();
            keep_place(dp);
            const float row_delta[2] = {r.delta[own], r.delta[own + 8]};
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) dp[n][i] = s[n][i] * (dp[n][i] - row_delta[i / 2]);
#pragma unroll
            for (u32 c = 0; c < KEYS / 16; c++) as_left(left[c], dp, 2 * c);
            group_fence();
            multiply_add<D>(sum, left, keys);
            if (LEAN) {
                group_wait<0>();
                keep_place(sum);
            }
        } else {
            group_wait<0>(); // as the barrier after the next one promises
        }
        if (tile >= last) break;
    }
    group_wait<0>();
    keep_place(sum);
    __syncthreads(); // none reads queries any more
    if (query0 + 16 * warp >= T) return;
    store_rows<D, QUERIES>(dq + (row0 + query0 + 16 * warp) * ld + part.head * d, ld, T - query0 - 16 * warp, d, sum,
                           scale, scale, queries, 16 * warp);
}

} // namespace attention_backward_hopper

// For d <= D; arguments as in attention_backward.cu. Grids are (T / rows of a tile, rounded up; heads; B), heads
// being K for ..._kv and H for ..._q. Rows of a tile, threads of a block, and bytes of dynamic shared memory:
//   kv d64    64  128   68864
//   kv d128  128  256  167168
//   q  d64   128  256   85248
//   q  d128  128  256  167168

#define ATTENTION_BACKWARD_HOPPER_KV(NAME, D, GROUPS, BLOCKS)                                                          \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS, BLOCKS) attention_backward_kv_hopper_##NAME(            \
        const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse, const float* delta,           \
        const u32* starts, bf16* dk, bf16* dv, u32 T, u32 H, u32 K, u32 d, u32 ld, u32 ldo, float scale) {             \
        attention_backward_hopper::of_keys<D, GROUPS>(q, k, v, dout, lse, delta, starts, dk, dv, T, H, K, d, ld, ldo,  \
                                                      scale);                                                          \
    }
#define ATTENTION_BACKWARD_HOPPER_Q(NAME, D, LEAN, BLOCKS)                                                             \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) attention_backward_q_hopper_##NAME(                      \
        const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse, const float* delta,           \
        const u32* starts, bf16* dq, u32 T, u32 H, u32 K, u32 d, u32 ld, u32 ldo, float scale) {                       \
        attention_backward_hopper::of_queries<D, LEAN>(q, k, v, dout, lse, delta, starts, dq, T, H, K, d, ld, ldo,     \
                                                       scale);                                                         \
    }

// D; for kv, groups of four warps; for q, LEAN; blocks that run at once.
ATTENTION_BACKWARD_HOPPER_KV(d64, 64, 1, 3)
ATTENTION_BACKWARD_HOPPER_KV(d128, 128, 2, 1)
ATTENTION_BACKWARD_HOPPER_Q(d64, 64, true, 2)
ATTENTION_BACKWARD_HOPPER_Q(d128, 128, false, 1)

namespace attention_backward_hopper {
static_assert(shared_bytes<64, 1>() == 68864 && shared_bytes<128, 2>() == 167168 && shared_bytes<64, 2>() == 85248,
              "as the table says");
} // namespace attention_backward_hopper

#endif
