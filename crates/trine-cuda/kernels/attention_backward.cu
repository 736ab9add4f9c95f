// The gradients of causal attention, from its inputs and what the forward pass keeps of each row's sum.
// After FlashAttention-2 (Dao, arXiv 2307.08691), without its atomic sums: one kernel has a block per tile of
// keys and goes over the queries that see it, for dK and dV; another has a block per tile of queries and goes
// over the keys it sees, for dQ. So S and dP are computed twice, and every sum has one order.
//
//   S = scale Q K^T   P = exp(S - lse)   dV = P^T dO   dP = dO V^T   dS = P (dP - delta)
//   dK = scale dS^T Q   dQ = scale dS K
//
// A warp owns rows of the result. What it computes of P and dS as sums (accumulators of the tensor cores) lies
// in its registers just as the next product wants its left factor.

namespace attention_backward {

using namespace attention;

// Tiles in shared memory have their pieces where those of attention.cu have them, but count in bytes, which takes fewer
// registers here. The byte at which a piece begins:
template <int D> __device__ __forceinline__ u32 place(u32 row, u32 piece) {
    if (D == 32) return row * 64 + ((piece ^ (row >> 1 & 3)) << 4);
    return row * (2 * D) + ((piece ^ (row & 7)) << 4);
}
// From the byte of piece 0 or 1 to that of the piece 2k further.
template <int D> __device__ __forceinline__ u32 further(u32 byte, int k) {
    return (byte ^ (u32)(k & (D >= 64 ? 3 : 1)) << 5) + (k >> 2) * 128;
}

// ROWS rows of a tile from global memory; zeros from row `rows` and from column `d` on.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void copy_tile(u8* tile, const bf16* x, u32 ld, u32 rows, u32 d) {
    constexpr u32 PIECES = D / 8, STEP = THREADS / PIECES;
    static_assert(ROWS % STEP == 0, "whole steps");
    const u32 piece = threadIdx.x % PIECES, first = threadIdx.x / PIECES;
#pragma unroll
    for (u32 i = 0; i < ROWS / STEP; i++) {
        const u32 row = first + i * STEP;
        const bool valid = row < rows && piece * 8 < d;
        copy_async(tile + place<D>(row, piece), valid ? x + (u64)row * ld + piece * 8 : x, valid);
    }
}

// Where a lane reads matrices in a tile: as the left factor of a product, or as the right one that is to be
// transposed (rows 0 to 15, piece 0, then piece 1); as the right factor (rows 0 to 7, pieces 0 and 1, then
// rows 8 to 15).
template <int D> __device__ __forceinline__ u32 left_place() {
    const u32 lane = threadIdx.x % 32;
    return place<D>(lane & 15, lane >> 4);
}
template <int D> __device__ __forceinline__ u32 right_place() {
    const u32 lane = threadIdx.x % 32;
    return place<D>((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
}

// Left factors of 16 M rows.
template <int M> struct Left {
    u32 x[M][4];
};

// c (16 M x 8 N) += a b^T, over D columns. `left(k)` gives columns 16 k to 16 k + 15 of a; b's rows are at `b`,
// `right` is right_place. `beside(k)` is other work, to be done while the tensor cores are busy.
template <int D, int M, int N, class A, class Beside>
__device__ __forceinline__ void multiply_rows(float (&c)[M][N][4], A left, const u8* b, u32 right, Beside beside) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const Left<M> a = left(k);
        const u8* const from = b + further<D>(right, k);
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
            u32 y[4];
            load_matrices(y, from + j * 32 * D);
#pragma unroll
            for (int m = 0; m < M; m++) {
                multiply_add(c[m][2 * j], a.x[m], y[0], y[1]);
                multiply_add(c[m][2 * j + 1], a.x[m], y[2], y[3]);
            }
        }
        beside(k);
    }
}

// The 16 columns from 8 n of accumulators, as a left factor.
template <int M, int N> __device__ __forceinline__ Left<M> as_left(const float (&c)[M][N][4], int n) {
    Left<M> a;
#pragma unroll
    for (int m = 0; m < M; m++) ::as_left(a.x[m], c[m], n);
    return a;
}

// c (16 M x 8 N) += a b, a of 16 columns, b of 16 rows at `b`; `left` is left_place.
template <int D, int M, int N>
__device__ __forceinline__ void multiply_columns(float (&c)[M][N][4], const Left<M>& a, const u8* b, u32 left) {
#pragma unroll
    for (int j = 0; j < N / 2; j++) {
        u32 y[4];
        load_matrices_transposed(y, b + further<D>(left, j));
#pragma unroll
        for (int m = 0; m < M; m++) {
            multiply_add(c[m][2 * j], a.x[m], y[0], y[1]);
            multiply_add(c[m][2 * j + 1], a.x[m], y[2], y[3]);
        }
    }
}

template <int M, int N> __device__ __forceinline__ void clear(float (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[m][n][i] = 0.0f;
}

// A warp's 16 M rows and 8 N columns, the first of them `column`, of a result, times `factor`, by way of a tile
// whose rows and columns are the warp's own. Of `out` and the tile the first row is the warp's.
template <int D, int M, int N>
__device__ __forceinline__ void store_rows(bf16* out, u32 ld, u32 rows, u32 column, u32 d, const float (&c)[M][N][4],
                                           float factor, u8* tile) {
    const auto at = [&](u32 row, u32 piece) { return (bf16*)(tile + place<D>(row, piece)); };
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
        put_rows(c[m], factor, factor, [&](u32 row, u32 piece) { return at(row, column / 8 + piece) + m * 16 * D; });
    __syncwarp();
    store_pieces<16 * M, N>(out, ld, rows, column / 8, d, at);
}

// Waits until two warps, 2n and 2n + 1, are here.
__device__ __forceinline__ void pair_barrier() {
#ifndef EMULATED
    asm volatile("bar.sync %0, 64;" ::"r"(1 + threadIdx.x / 64) : "memory");
#else
    __syncthreads();
#endif
}

// Shared memory: K and V of a tile of KEYS = 16 M WARPS / SHARE keys; twice Q and dO of QUERIES queries, and their
// Rows; where warps share keys, what each gives the other of P and dS, as left factors.
template <int D, int M, int WARPS, int SHARE, int QUERIES, int CHUNK> constexpr u32 keys_shared_bytes() {
    return 2 * 16 * M * WARPS / SHARE * 2 * D + 2 * (2 * QUERIES * 2 * D + sizeof(Rows<QUERIES>)) +
           (SHARE > 1 ? WARPS * 2 * CHUNK / 16 * M * 512 : 0);
}

// dK and dV of a tile of keys of one key head and sequence. A warp owns 16 M keys and takes CHUNK queries at
// a time: the transposes of S, P, dP and dS are computed, with a row per key.
//
// At D = 128 there are registers for 16 rows only, and every product would read its whole right factor from
// shared memory for those few: it would wait for that memory. So two warps SHARE 32 keys. Each computes P and dS
// of half the queries of a tile and gives them to the other, and owns half the columns of dK and dV.
template <int D, int M, int WARPS, int SHARE, int QUERIES, int CHUNK>
__device__ __forceinline__ void of_keys(const bf16* q, const bf16* k, const bf16* v, const bf16* dout,
                                        const float* lse, const float* delta, const u32* starts, bf16* dk, bf16* dv,
                                        u32 T, u32 H, u32 K, u32 d, u32 ld, u32 ldo, float scale) {
    constexpr int THREADS = 32 * WARPS, KEYS = 16 * M * WARPS / SHARE, N = CHUNK / 8, COLUMNS = D / SHARE;
    constexpr u32 ROW = 2 * D, STAGE = 2 * QUERIES * ROW;
    static_assert(SHARE == 1 || (SHARE == 2 && QUERIES == 2 * CHUNK && COLUMNS == 64), "halves");
    DYNAMIC_SHARED(shared);
    u8 *const keys = shared, *const values = keys + KEYS * ROW, *const stages = values + KEYS * ROW;
    Rows<QUERIES>* const rows = (Rows<QUERIES>*)(stages + 2 * STAGE);
    Words* const given = (Words*)(rows + 2); // (WARPS, CHUNK / 16, 2, M, lane)

    const Part part = part_of_block();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 group = H / K, key0 = part.tile * KEYS, row0 = part.sequence * T;
    const u32 own = warp / SHARE * 16 * M, half = warp % SHARE;
    const u32 key_first = key0 + own, key_last = key_first + 16 * M - 1; // the warp's

    const u32 first = key0 / QUERIES, last = end_of_sight<QUERIES, THREADS>(starts, row0, first, T, key0 + KEYS);
    if (!starts)
        for (u32 i = threadIdx.x; i < 2 * QUERIES; i += THREADS) rows[i / QUERIES].start[i % QUERIES] = 0;
    auto fetch = [&](u32 head, u32 tile, u32 stage) {
        const u32 query0 = tile * QUERIES;
        u8* const to = stages + stage * STAGE;
        copy_tile<D, QUERIES, THREADS>(to, q + (u64)(row0 + query0) * ld + head * d, ld, T - query0, d);
        copy_tile<D, QUERIES, THREADS>(to + QUERIES * ROW, dout + (u64)(row0 + query0) * ldo + head * d, ldo,
                                       T - query0, d);
        const u64 at = ((u64)part.sequence * H + head) * T;
        copy_numbers<QUERIES, THREADS>(rows[stage], lse + at, delta + at, starts ? starts + row0 : nullptr, query0, T);
        copy_commit();
    };

    float sum_k[M][COLUMNS / 8][4], sum_v[M][COLUMNS / 8][4];
    clear(sum_k);
    clear(sum_v);
    const u32 left = left_place<D>(), right = right_place<D>();
    auto load_left = [&](const u8* from, int k) {
        Left<M> a;
#pragma unroll
        for (int m = 0; m < M; m++) load_matrices(a.x[m], from + further<D>(own * ROW + left, k) + m * 16 * ROW);
        return a;
    };
    const float factor = scale * LOG2_E;

    copy_tile<D, KEYS, THREADS>(keys, k + (u64)(row0 + key0) * ld + part.head * d, ld, T - key0, d);
    copy_tile<D, KEYS, THREADS>(values, v + (u64)(row0 + key0) * ld + part.head * d, ld, T - key0, d);
    u32 tile = first, head = part.head * group, stage = 0;
    const u32 heads_end = head + group;
    fetch(head, tile, 0);
    while (head < heads_end) {
        copy_wait<0>();
        __syncthreads(); // the tile is there, and no warp is at the one before it
        const u32 query0 = tile * QUERIES;
        if (++tile == last) tile = first, head++;
        if (head < heads_end) fetch(head, tile, stage ^ 1);

        const u8* const queries = stages + stage * STAGE;
        const u8* const gradients = queries + QUERIES * ROW;
        const Rows<QUERIES>& r = rows[stage];
        // Whether any of the CHUNK queries from the c-th sees any of the warp's keys.
        auto seen = [&](u32 c) {
            return key_first <= query0 + c + CHUNK - 1 && query0 + c < T && r.start[c] <= key_last;
        };
        // Of those queries, P, and the sums dP - delta.
        auto score = [&](u32 c, float(&p)[M][N][4], float(&s)[M][N][4]) {
            const u32 query = query0 + c;
            clear(p);
            multiply_rows<D>(
                p, [&](int k) { return load_left(keys, k); }, queries + c * ROW, right, [](int) {});
#pragma unroll
            for (int n = 0; n < N; n++) {
                const Two y = *(const Two*)&r.delta[c + 8 * n + 2 * t];
#pragma unroll
                for (int m = 0; m < M; m++) s[m][n][0] = s[m][n][2] = -y.x, s[m][n][1] = s[m][n][3] = -y.y;
            }
            multiply_rows<D>(
                s, [&](int k) { return load_left(values, k); }, gradients + c * ROW, right,
                [&](int k) { // P, a part beside each step
                    constexpr int EACH = N * 16 / D > 0 ? N * 16 / D : 1;
#pragma unroll
                    for (int n = k * EACH; n < (k + 1) * EACH && n < N; n++) {
                        const Two y = *(const Two*)&r.lse[c + 8 * n + 2 * t];
                        const float x0 = y.x * LOG2_E, x1 = y.y * LOG2_E;
#pragma unroll
                        for (int m = 0; m < M; m++) {
                            p[m][n][0] = exp2_fast(p[m][n][0] * factor - x0);
                            p[m][n][1] = exp2_fast(p[m][n][1] * factor - x1);
                            p[m][n][2] = exp2_fast(p[m][n][2] * factor - x0);
                            p[m][n][3] = exp2_fast(p[m][n][3] * factor - x1);
                        }
                    }
                });
            if (key_last > query || key_first < r.start[c + CHUNK - 1]) { // some are not seen
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const TwoWords y = *(const TwoWords*)&r.start[c + 8 * n + 2 * t];
                    const u32 column = query + 8 * n + 2 * t;
#pragma unroll
                    for (int m = 0; m < M; m++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const u32 key = key_first + 16 * m + g + i / 2 * 8;
                            if (key > column + i % 2 || key < (i % 2 ? y.y : y.x)) p[m][n][i] = 0.0f;
                        }
                }
            }
        };
        auto multiply = [](float(&s)[M][N][4], const float(&p)[M][N][4], int n) { // 16 columns of dS
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[m][n][i] *= p[m][n][i], s[m][n + 1][i] *= p[m][n + 1][i];
        };
        // To dV and dK, what the 16 queries from the c-th give.
        auto add = [&](u32 c, const Left<M>& p, const Left<M>& ds) {
            multiply_columns<D>(sum_v, p, gradients + c * ROW + half * 128, left);
            multiply_columns<D>(sum_k, ds, queries + c * ROW + half * 128, left);
        };

        if (SHARE == 1) {
#pragma unroll 1
            for (u32 c = 0; c < QUERIES; c += CHUNK) {
                if (!seen(c)) continue;
                float p[M][N][4], s[M][N][4];
                score(c, p, s);
#pragma unroll
                for (int n = 0; n < N; n += 2) {
                    multiply(s, p, n);
                    add(c + 8 * n, as_left(p, n), as_left(s, n));
                }
            }
        } else {
            const u32 c = half * CHUNK, other = CHUNK - c;
            if (seen(c)) {
                float p[M][N][4], s[M][N][4];
                score(c, p, s);
                Left<M> left_p[N / 2], left_s[N / 2];
                Words* const to = given + warp * (N * M * 32) + lane;
#pragma unroll
                for (int n = 0; n < N; n += 2) {
                    multiply(s, p, n);
                    left_p[n / 2] = as_left(p, n), left_s[n / 2] = as_left(s, n);
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        const u32(&x)[4] = left_p[n / 2].x[m], (&y)[4] = left_s[n / 2].x[m];
                        to[(n * M + m) * 32] = {x[0], x[1], x[2], x[3]};
                        to[(n * M + M + m) * 32] = {y[0], y[1], y[2], y[3]};
                    }
                }
#pragma unroll
                for (int n = 0; n < N; n += 2) add(c + 8 * n, left_p[n / 2], left_s[n / 2]);
            }
            pair_barrier();
            if (seen(other)) {
                const Words* const from = given + (warp ^ 1) * (N * M * 32) + lane;
#pragma unroll
                for (int n = 0; n < N; n += 2) {
                    Left<M> a, b;
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        const Words x = from[(n * M + m) * 32], y = from[(n * M + M + m) * 32];
#pragma unroll
                        for (int i = 0; i < 4; i++) a.x[m][i] = x.x[i], b.x[m][i] = y.x[i];
                    }
                    add(other + 8 * n, a, b);
                }
            }
        }
        stage ^= 1;
    }

    if (SHARE > 1) pair_barrier(); // the other warp is done with the keys
    if (key_first >= T) return;
    const u64 out = (u64)(row0 + key_first) * ld + part.head * d;
    store_rows<D>(dk + out, ld, T - key_first, half * COLUMNS, d, sum_k, scale, keys + own * ROW);
    store_rows<D>(dv + out, ld, T - key_first, half * COLUMNS, d, sum_v, 1.0f, values + own * ROW);
}

// Shared memory: Q and dO of a tile of QUERIES = 16 M WARPS queries; twice K and V of KEYS keys; Rows.
template <int D, int M, int WARPS, int KEYS> constexpr u32 queries_shared_bytes() {
    return 2 * 16 * M * WARPS * 2 * D + 2 * 2 * KEYS * 2 * D + sizeof(Rows<16 * M * WARPS>);
}

// dQ of a tile of queries of one head and sequence. A warp owns 16 M queries and takes KEYS keys at a time;
// with HELD it has its rows of Q and dO in registers.
template <int D, int M, int WARPS, int KEYS, bool HELD>
__device__ __forceinline__ void of_queries(const bf16* q, const bf16* k, const bf16* v, const bf16* dout,
                                           const float* lse, const float* delta, const u32* starts, bf16* dq, u32 T,
                                           u32 H, u32 K, u32 d, u32 ld, u32 ldo, float scale) {
    constexpr int THREADS = 32 * WARPS, QUERIES = 16 * M * WARPS, N = KEYS / 8;
    constexpr u32 ROW = 2 * D, STAGE = 2 * KEYS * ROW;
    DYNAMIC_SHARED(shared);
    u8 *const queries = shared, *const gradients = queries + QUERIES * ROW;
    u8* const stages = gradients + QUERIES * ROW;
    Rows<QUERIES>& rows = *(Rows<QUERIES>*)(stages + 2 * STAGE);

    const Part part = part_of_block();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // The last tile has the most work.
    const u32 query0 = (gridDim.x - 1 - part.tile) * QUERIES, row0 = part.sequence * T;
    const u32 query_first = query0 + 16 * M * warp, query_last = query_first + 16 * M - 1; // the warp's
    const u32 key_head = part.head / (H / K);

    copy_tile<D, QUERIES, THREADS>(queries, q + (u64)(row0 + query0) * ld + part.head * d, ld, T - query0, d);
    copy_tile<D, QUERIES, THREADS>(gradients, dout + (u64)(row0 + query0) * ldo + part.head * d, ldo, T - query0, d);
    const u64 at = ((u64)part.sequence * H + part.head) * T;
    copy_numbers<QUERIES, THREADS>(rows, lse + at, delta + at, starts ? starts + row0 : nullptr, query0, T);
    if (!starts)
        for (u32 i = threadIdx.x; i < QUERIES; i += THREADS) rows.start[i] = 0;
    auto fetch = [&](u32 tile, u32 stage) {
        const u32 key0 = tile * KEYS;
        u8* const to = stages + stage * STAGE;
        const u64 from = (u64)(row0 + key0) * ld + key_head * d;
        copy_tile<D, KEYS, THREADS>(to, k + from, ld, T - key0, d);
        copy_tile<D, KEYS, THREADS>(to + KEYS * ROW, v + from, ld, T - key0, d);
        copy_commit();
    };
    auto start_of = [&](u32 row) { return starts ? starts[row0 + min(row, T - 1)] : 0u; };
    u32 tile = start_of(query0) / KEYS, stage = 0;
    const u32 last = min(query0 + QUERIES - 1, T - 1) / KEYS;
    fetch(tile, 0);

    const u32 start_first = start_of(query_first), start_last = start_of(query_last); // the warp's

    float sum[M][D / 8][4];
    clear(sum);
    const u32 left = left_place<D>(), right = right_place<D>();
    const u32 own = 16 * M * warp * ROW + left, own_row = 16 * M * warp + g;
    const float factor = scale * LOG2_E;
    auto load_left = [&](const u8* from, int k) {
        Left<M> a;
#pragma unroll
        for (int m = 0; m < M; m++) load_matrices(a.x[m], from + further<D>(own, k) + m * 16 * ROW);
        return a;
    };
    Left<M> held_queries[HELD ? D / 16 : 1], held_gradients[HELD ? D / 16 : 1];
    if (HELD) {
        copy_wait<0>();
        __syncthreads();
#pragma unroll
        for (int i = 0; i < (HELD ? D / 16 : 1); i++) {
            held_queries[i] = load_left(queries, i);
            held_gradients[i] = load_left(gradients, i);
        }
    }

    for (; tile <= last; tile++, stage ^= 1) {
        copy_wait<0>();
        __syncthreads(); // the tile is there, and no warp is at the one before it
        if (tile < last) fetch(tile + 1, stage ^ 1);
        const u32 key0 = tile * KEYS;
        if (key0 > query_last || query_first >= T || key0 + KEYS <= start_first) continue;
        const u8 *const keys = stages + stage * STAGE, *const values = keys + KEYS * ROW;

        float p[M][N][4], s[M][N][4];
        clear(p);
        multiply_rows<D>(
            p, [&](int k) { return HELD ? held_queries[HELD ? k : 0] : load_left(queries, k); }, keys, right,
            [](int) {});
        float row_lse[M][2];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 row = own_row + 16 * m + 8 * half;
                const float y = -rows.delta[row];
                row_lse[m][half] = rows.lse[row] * LOG2_E;
#pragma unroll
                for (int n = 0; n < N; n++) s[m][n][2 * half] = s[m][n][2 * half + 1] = y;
            }
        multiply_rows<D>(
            s, [&](int k) { return HELD ? held_gradients[HELD ? k : 0] : load_left(gradients, k); }, values, right,
            [&](int k) { // P, a part beside each step
                constexpr int EACH = M * N * 16 / D > 0 ? M * N * 16 / D : 1;
#pragma unroll
                for (int i = k * EACH; i < (k + 1) * EACH && i < M * N; i++) {
                    const int m = i % M, n = i / M;
                    p[m][n][0] = exp2_fast(p[m][n][0] * factor - row_lse[m][0]);
                    p[m][n][1] = exp2_fast(p[m][n][1] * factor - row_lse[m][0]);
                    p[m][n][2] = exp2_fast(p[m][n][2] * factor - row_lse[m][1]);
                    p[m][n][3] = exp2_fast(p[m][n][3] * factor - row_lse[m][1]);
                }
            });
        if (key0 + KEYS - 1 > query_first || key0 < start_last) { // some are not seen
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const u32 row = own_row + 16 * m + 8 * half, start = rows.start[row];
#pragma unroll
                    for (int n = 0; n < N; n++)
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            const u32 key = key0 + 8 * n + 2 * t + i;
                            if (key > query0 + row || key < start) p[m][n][2 * half + i] = 0.0f;
                        }
                }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[m][n][i] *= p[m][n][i];
#pragma unroll
        for (int n = 0; n < N; n += 2) multiply_columns<D>(sum, as_left(s, n), keys + n * 8 * ROW, left);
    }

    if (query_first >= T) return;
    store_rows<D>(dq + (u64)(row0 + query_first) * ld + part.head * d, ld, T - query_first, 0, d, sum, scale,
                  queries + 16 * M * warp * ROW);
}

} // namespace attention_backward

// q, k, v: columns of one buffer (B T, ld), ld = (H + 2 K) d, of H query heads and K key heads of d columns, d
// a multiple of 8 and at most D; query head h uses key head h / (H / K). dout (B T, ldo), H heads of d columns.
// lse (B, H, T): ln of the sum of e^(scale q k) of a row; delta (B, H, T): of a row, the sum of dout times the
// result. starts (B T), or null: row t of a sequence sees keys starts[t] to t; never falls in a sequence.
// dq, dk, dv: columns of one buffer (B T, ld). All begin at multiples of 16 bytes.
//
// Grids are (T / rows of a tile, rounded up; heads; B), heads being K for ..._kv and H for ..._q. Rows of a tile,
// threads of a block, and bytes of dynamic shared memory:
//   kv d32           128  128   34304
//   kv d64           128  128   67072
//   kv d128          128  256  165376
//   kv d128_narrow    64  128   99840   for cards on which a block has no more than 99 KiB
//   q  d32           128  128   26112
//   q  d64           128  128   50688
//   q  d128          128  128   99840

#define ATTENTION_BACKWARD_KV(NAME, D, M, WARPS, SHARE, QUERIES, CHUNK, BLOCKS)                                        \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) attention_backward_kv_bf16_##NAME(                \
        const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse, const float* delta,           \
        const u32* starts, bf16* dk, bf16* dv, u32 T, u32 H, u32 K, u32 d, u32 ld, u32 ldo, float scale) {             \
        attention_backward::of_keys<D, M, WARPS, SHARE, QUERIES, CHUNK>(q, k, v, dout, lse, delta, starts, dk, dv,     \
                                                                        T, H, K, d, ld, ldo, scale);                   \
    }
#define ATTENTION_BACKWARD_Q(NAME, D, M, WARPS, KEYS, HELD, BLOCKS)                                                    \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) attention_backward_q_bf16_##NAME(                 \
        const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse, const float* delta,           \
        const u32* starts, bf16* dq, u32 T, u32 H, u32 K, u32 d, u32 ld, u32 ldo, float scale) {                       \
        attention_backward::of_queries<D, M, WARPS, KEYS, HELD>(q, k, v, dout, lse, delta, starts, dq, T, H, K, d,     \
                                                                ld, ldo, scale);                                       \
    }

// D; M, of the 16 M rows of a warp; warps; for kv, how many share keys, and the queries in shared memory; how many
// of the other side a warp takes at a time; for q, whether registers hold Q and dO; blocks that run at once.
ATTENTION_BACKWARD_KV(d32, 32, 2, 4, 1, 64, 32, 3)
ATTENTION_BACKWARD_KV(d64, 64, 2, 4, 1, 64, 32, 2)
ATTENTION_BACKWARD_KV(d128, 128, 2, 8, 2, 64, 32, 1)
ATTENTION_BACKWARD_KV(d128_narrow, 128, 1, 4, 1, 64, 64, 1)
ATTENTION_BACKWARD_Q(d32, 32, 2, 4, 32, true, 3)
ATTENTION_BACKWARD_Q(d64, 64, 2, 4, 32, true, 2)
ATTENTION_BACKWARD_Q(d128, 128, 2, 4, 32, false, 2)

namespace attention_backward {
static_assert(keys_shared_bytes<32, 2, 4, 1, 64, 32>() == 34304 && keys_shared_bytes<64, 2, 4, 1, 64, 32>() == 67072 &&
                  keys_shared_bytes<128, 2, 8, 2, 64, 32>() == 165376 &&
                  keys_shared_bytes<128, 1, 4, 1, 64, 64>() == 99840 && queries_shared_bytes<32, 2, 4, 32>() == 26112 &&
                  queries_shared_bytes<64, 2, 4, 32>() == 50688 && queries_shared_bytes<128, 2, 4, 32>() == 99840,
              "as the table says");
} // namespace attention_backward
