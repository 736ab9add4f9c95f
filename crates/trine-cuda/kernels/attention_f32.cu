// Causal attention in f32 with grouped queries, forward and backward, without tensor cores: what the bf16
// kernels are compared with, and what precision f32 trains with. Head dimensions up to 256.
//
// The scores of a tile of queries and a tile of keys never leave the chip; the softmax runs over the tiles
// as they come (FlashAttention-2, Dao 2023, arXiv 2307.08691). Every sum has one order.
//
// Shapes, row-major: q, k, v are columns of one matrix of B T rows, `ld` apart; query head h has columns
// h d .. of q and reads key head h / (H / K). out and dout (B T, ldo), head h in columns h d ..; lse and
// delta (B, H, T). Row t of a sequence sees keys starts[b T + t] .. t; no starts stand for 0.
namespace attention_f32 {

constexpr u32 TILE = 32; // queries and keys of a tile
constexpr u32 THREADS = 256; // ty = thread / 16 has rows ty, ty + 16; tx = thread % 16 what is across
constexpr u32 WEIGHTS = TILE + 4; // floats from row to row of a tile of weights
constexpr int COLUMNS = 4; // times 64 are the columns of the widest head

// Floats from row to row of a tile in shared memory: an odd number of 16 bytes.
__device__ __forceinline__ u32 pitch(u32 d) { return ((d + 3) / 4 | 1) * 4; }

// Rows `first` and on, d wide; zeros beyond row T and in the columns that fill up 16 bytes.
__device__ __forceinline__ void load_tile(float* tile, const float* x, u32 first, u32 T, u32 d, u32 ld) {
    const u32 p = pitch(d), whole = (d + 3) / 4 * 4;
    for (u32 row = threadIdx.x / 32; row < TILE; row += THREADS / 32)
        for (u32 c = threadIdx.x % 32; c < whole; c += 32)
            tile[row * p + c] = first + row < T && c < d ? x[(u64)(first + row) * ld + c] : 0.0f;
}

// s[i][j] = row ty + 16 i of a, times row tx + 16 j of b.
__device__ __forceinline__ void products(float (&s)[2][2], const float* a, const float* b, u32 d) {
    const u32 p = pitch(d);
    a += threadIdx.x / 16 * p;
    b += threadIdx.x % 16 * p;
    s[0][0] = s[0][1] = s[1][0] = s[1][1] = 0.0f;
    for (u32 c = 0; c < d; c += 4) {
        Vector<float> x[2], y[2];
        for (int i = 0; i < 2; i++) {
            x[i] = *(const Vector<float>*)(a + 16 * i * p + c);
            y[i] = *(const Vector<float>*)(b + 16 * i * p + c);
        }
#pragma unroll
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 2; j++) s[i][j] += x[i].x[k] * y[j].x[k];
    }
}

// Row ty + 16 i of a tile of weights, in place of the products s.
__device__ __forceinline__ void store_weights(float* weights, const float (&s)[2][2]) {
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++)
            weights[(threadIdx.x / 16 + 16 * i) * WEIGHTS + threadIdx.x % 16 + 16 * j] = s[i][j];
}

// Rows ty + 16 i, columns 64 c + 4 tx and three more.
typedef float Sums[2][COLUMNS][4];

// sum += weights (TILE x TILE) times rows (TILE x d).
__device__ __forceinline__ void accumulate(Sums& sum, const float* weights, const float* rows, u32 d) {
    const u32 p = pitch(d), column = threadIdx.x % 16 * 4;
    weights += threadIdx.x / 16 * WEIGHTS;
    rows += column;
    for (u32 k = 0; k < TILE; k += 4) {
        const Vector<float> w[2] = {*(const Vector<float>*)(weights + k),
                                    *(const Vector<float>*)(weights + 16 * WEIGHTS + k)};
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                if (64 * c + column >= d) continue;
                const Vector<float> x = *(const Vector<float>*)(rows + (k + j) * p + 64 * c);
                for (int i = 0; i < 2; i++)
                    for (int n = 0; n < 4; n++) sum[i][c][n] += w[i].x[j] * x.x[n];
            }
    }
}

// Sums to rows `first` and on, each row times its factor.
__device__ __forceinline__ void store_rows(float* y, const Sums& sum, const float (&factor)[2], u32 first, u32 T, u32 d,
                                           u32 ld) {
    for (int i = 0; i < 2; i++) {
        const u32 row = first + threadIdx.x / 16 + 16 * i;
        if (row >= T) continue;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
            for (int n = 0; n < 4; n++) {
                const u32 column = 64 * c + threadIdx.x % 16 * 4 + n;
                if (column < d) y[(u64)row * ld + column] = sum[i][c][n] * factor[i];
            }
    }
}

__device__ __forceinline__ bool sees(const u32* starts, u32 query, u32 key, u32 T) {
    return query < T && key <= query && (!starts || starts[query] <= key);
}

// The 16 threads of a row: half a warp.
__device__ __forceinline__ float row_max(float x) {
    for (int mask = 8; mask > 0; mask >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, mask));
    return x;
}
__device__ __forceinline__ float row_sum(float x) {
    for (int mask = 8; mask > 0; mask >>= 1) x += __shfl_xor_sync(ALL_LANES, x, mask);
    return x;
}

} // namespace attention_f32

// out = softmax(scale q k^T) v, and lse, the natural logarithm of each row's sum of exponentials.
// Grid (ceil(T / 32), B H), 256 threads, 128 (2 pitch(d) + 36) bytes of dynamic shared memory, where
// pitch(d) = 4 (ceil(d / 4) | 1).
extern "C" __global__ void __launch_bounds__(256)
attention_forward_f32(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                      float* __restrict__ out, float* __restrict__ lse, const u32* __restrict__ starts, u32 T, u32 H,
                      u32 K, u32 d, u32 ld, u32 ldo, float scale) {
    using namespace attention_f32;
    DYNAMIC_SHARED(memory);
    float* queries = (float*)memory;
    float* keys = queries + TILE * pitch(d); // then values
    float* weights = keys + TILE * pitch(d);
    const u32 b = blockIdx.y / H, h = blockIdx.y % H;
    const u64 sequence = (u64)b * T;
    q += sequence * ld + h * d;
    k += sequence * ld + h / (H / K) * d;
    v += sequence * ld + h / (H / K) * d;
    if (starts) starts += sequence;
    const u32 first = (gridDim.x - 1 - blockIdx.x) * TILE; // those with most to do come first
    const u32 ty = threadIdx.x / 16, tx = threadIdx.x % 16;

    load_tile(queries, q, first, T, d, ld);
    Sums sum = {};
    float most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    for (u32 key = starts ? starts[first] / TILE * TILE : 0; key < first + TILE && key < T; key += TILE) {
        __syncthreads();
        load_tile(keys, k, key, T, d, ld);
        __syncthreads();
        float s[2][2];
        products(s, queries, keys, d);
        for (int i = 0; i < 2; i++) {
            for (int j = 0; j < 2; j++)
                s[i][j] = sees(starts, first + ty + 16 * i, key + tx + 16 * j, T) ? s[i][j] * scale : -INFINITY;
            const float now = fmaxf(most[i], row_max(fmaxf(s[i][0], s[i][1])));
            const float base = now == -INFINITY ? 0.0f : now; // a row that sees nothing yet
            const float kept = expf(most[i] - base);
            for (int j = 0; j < 2; j++) s[i][j] = expf(s[i][j] - base);
            total[i] = total[i] * kept + row_sum(s[i][0] + s[i][1]);
            most[i] = now;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                for (int n = 0; n < 4; n++) sum[i][c][n] *= kept;
        }
        store_weights(weights, s);
        __syncthreads();
        load_tile(keys, v, key, T, d, ld);
        __syncthreads();
        accumulate(sum, weights, keys, d);
    }
    const float factors[2] = {1.0f / total[0], 1.0f / total[1]};
    store_rows(out + sequence * ldo + h * d, sum, factors, first, T, d, ldo);
    for (int i = 0; i < 2; i++) {
        const u32 row = first + ty + 16 * i;
        if (tx == 0 && row < T) lse[(u64)blockIdx.y * T + row] = most[i] + logf(total[i]);
    }
}

// dq from dout, lse and delta; with the same starts and scale as forward. dq has the layout of q.
// Grid (ceil(T / 32), B H), 256 threads, 128 (4 pitch(d) + 36) bytes of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(256)
attention_backward_queries_f32(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                               const float* __restrict__ dout, const float* __restrict__ lse,
                               const float* __restrict__ delta, float* __restrict__ dq, const u32* __restrict__ starts,
                               u32 T, u32 H, u32 K, u32 d, u32 ld, u32 ldo, float scale) {
    using namespace attention_f32;
    DYNAMIC_SHARED(memory);
    float* queries = (float*)memory;
    float* douts = queries + TILE * pitch(d);
    float* keys = douts + TILE * pitch(d);
    float* values = keys + TILE * pitch(d);
    float* weights = values + TILE * pitch(d);
    const u32 b = blockIdx.y / H, h = blockIdx.y % H;
    const u64 sequence = (u64)b * T;
    q += sequence * ld + h * d;
    k += sequence * ld + h / (H / K) * d;
    v += sequence * ld + h / (H / K) * d;
    if (starts) starts += sequence;
    const u32 first = (gridDim.x - 1 - blockIdx.x) * TILE;
    const u32 ty = threadIdx.x / 16, tx = threadIdx.x % 16;

    load_tile(queries, q, first, T, d, ld);
    load_tile(douts, dout + sequence * ldo + h * d, first, T, d, ldo);
    float row_lse[2], row_delta[2];
    for (int i = 0; i < 2; i++) {
        const u32 row = first + ty + 16 * i;
        row_lse[i] = row < T ? lse[(u64)blockIdx.y * T + row] : 0.0f;
        row_delta[i] = row < T ? delta[(u64)blockIdx.y * T + row] : 0.0f;
    }
    Sums sum = {};
    for (u32 key = starts ? starts[first] / TILE * TILE : 0; key < first + TILE && key < T; key += TILE) {
        __syncthreads();
        load_tile(keys, k, key, T, d, ld);
        load_tile(values, v, key, T, d, ld);
        __syncthreads();
        float s[2][2], dp[2][2];
        products(s, queries, keys, d);
        products(dp, douts, values, d);
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 2; j++)
                s[i][j] = sees(starts, first + ty + 16 * i, key + tx + 16 * j, T)
                              ? expf(s[i][j] * scale - row_lse[i]) * (dp[i][j] - row_delta[i])
                              : 0.0f;
        store_weights(weights, s);
        __syncthreads();
        accumulate(sum, weights, keys, d);
    }
    const float factors[2] = {scale, scale};
    store_rows(dq + sequence * ld + h * d, sum, factors, first, T, d, ld);
}

// dk and dv from dout, lse and delta, over all query heads of the key head; they have the layout of k and v.
// Grid (ceil(T / 32), B K), 256 threads, 128 (4 pitch(d) + 72) bytes of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(256)
attention_backward_keys_f32(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                            const float* __restrict__ dout, const float* __restrict__ lse,
                            const float* __restrict__ delta, float* __restrict__ dk, float* __restrict__ dv,
                            const u32* __restrict__ starts, u32 T, u32 H, u32 K, u32 d, u32 ld, u32 ldo, float scale) {
    using namespace attention_f32;
    DYNAMIC_SHARED(memory);
    float* keys = (float*)memory;
    float* values = keys + TILE * pitch(d);
    float* queries = values + TILE * pitch(d);
    float* douts = queries + TILE * pitch(d);
    float* p = douts + TILE * pitch(d); // rows are keys, columns queries
    float* ds = p + TILE * WEIGHTS;
    const u32 b = blockIdx.y / K, head = blockIdx.y % K, group = H / K;
    const u64 sequence = (u64)b * T;
    q += sequence * ld;
    dout += sequence * ldo;
    if (starts) starts += sequence;
    const u32 first = blockIdx.x * TILE;
    const u32 ty = threadIdx.x / 16, tx = threadIdx.x % 16;

    load_tile(keys, k + sequence * ld + head * d, first, T, d, ld);
    load_tile(values, v + sequence * ld + head * d, first, T, d, ld);
    Sums dk_sum = {}, dv_sum = {};
    for (u32 h = head * group; h < (head + 1) * group; h++)
        for (u32 query = first; query < T; query += TILE) {
            if (starts && starts[query] >= first + TILE) break; // nor do later queries see these keys
            __syncthreads();
            load_tile(queries, q + h * d, query, T, d, ld);
            load_tile(douts, dout + h * d, query, T, d, ldo);
            __syncthreads();
            float s[2][2], dp[2][2];
            products(s, keys, queries, d);
            products(dp, values, douts, d);
            for (int j = 0; j < 2; j++) {
                const u32 row = query + tx + 16 * j;
                const u64 at = ((u64)b * H + h) * T + row;
                const float row_lse = row < T ? lse[at] : 0.0f, row_delta = row < T ? delta[at] : 0.0f;
                for (int i = 0; i < 2; i++) {
                    s[i][j] = sees(starts, row, first + ty + 16 * i, T) ? expf(s[i][j] * scale - row_lse) : 0.0f;
                    dp[i][j] = s[i][j] * (dp[i][j] - row_delta);
                }
            }
            store_weights(p, s);
            store_weights(ds, dp);
            __syncthreads();
            accumulate(dv_sum, p, douts, d);
            accumulate(dk_sum, ds, queries, d);
        }
    const float ones[2] = {1.0f, 1.0f}, scales[2] = {scale, scale};
    store_rows(dv + sequence * ld + head * d, dv_sum, ones, first, T, d, ld);
    store_rows(dk + sequence * ld + head * d, dk_sum, scales, first, T, d, ld);
}
