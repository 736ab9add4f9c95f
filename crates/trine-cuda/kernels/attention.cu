// Causal attention in bf16 on tensor cores, forward, with grouped queries and documents.
//
// FlashAttention-2 (Dao 2023, arXiv 2307.08691): a block has 128 queries, a warp 32 of them; keys and values
// come in tiles of 64, the next one while this one is used; scores and weights stay in registers. The
// softmax runs over the tiles as they come, in f32, in powers of two.
//
// Shapes, row-major: q, k, v are columns of one matrix of B T rows, `ld` apart; query head h has columns
// h d .. of q and reads key head h / (H / K). out (B T, ldo), head h in columns h d .. ; lse (B, H, T), the
// natural logarithm of the sum of the exponentials of a row's scaled scores. Row t of a sequence sees keys
// starts[b T + t] .. t; starts never fall within a sequence; no starts stand for 0. d is a multiple of 8, and
// all rows begin at multiples of 16 bytes.
namespace attention_forward {

using namespace attention;

constexpr u32 QUERIES = 128; // of a block
constexpr u32 KEYS = 64; // of a tile
constexpr u32 THREADS = 128;
// A tile in shared memory has rows of D elements. Pieces of 16 bytes change places within their row, so that
// the same piece of 8 rows in sequence lies in 8 different parts of 128 bytes, which is what can be read at once.
template <u32 D> __device__ __forceinline__ u32 place(u32 row, u32 piece) {
    return row * D + (piece ^ (D >= 64 ? row % 8 : row / 2 % 4)) * 8;
}

// Rows `first` and on of a matrix of width d to a tile, without waiting for them; zeros beyond row T and column d.
template <u32 D, u32 ROWS>
__device__ __forceinline__ void copy_tile(bf16* tile, const bf16* x, u32 first, u32 T, u32 d, u32 ld) {
    bf16* const to = tile + place<D>(threadIdx.x / (D / 8), threadIdx.x % (D / 8));
    copy_pieces<D, ROWS, THREADS, D>(to, x, first, T, d, ld);
}

template <u32 D>
__device__ __forceinline__ void forward(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse,
                                        const u32* starts, u32 T, u32 H, u32 K, u32 d, u32 ld, u32 ldo, float scale) {
    // Of the products of queries and keys; with all of them at 64, registers would not be enough.
    [[maybe_unused]] constexpr int UNROLL = D == 64 ? 2 : D / 16;
    DYNAMIC_SHARED(memory);
    bf16* queries = (bf16*)memory;
    bf16* tiles = queries + QUERIES * D; // keys, values; and again
    u32* see_from = (u32*)(tiles + 4 * KEYS * D); // the first key that each query sees
    const u32 b = blockIdx.y / H, h = blockIdx.y % H;
    q += (u64)b * T * ld + h * d;
    k += (u64)b * T * ld + h / (H / K) * d;
    v += (u64)b * T * ld + h / (H / K) * d;

    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 block_first = (gridDim.x - 1 - blockIdx.x) * QUERIES; // those with most to do come first
    const u32 first = block_first + warp * 32; // of the warp's queries
    // The tiles of keys that some query of the block sees.
    const u32 keys_end = min(block_first + QUERIES, T);
    const u32 keys_first = starts ? starts[(u64)b * T + block_first] / KEYS * KEYS : 0;
    see_from[threadIdx.x] = starts ? starts[(u64)b * T + min(block_first + threadIdx.x, T - 1)] : 0;

    copy_tile<D, QUERIES>(queries, q, block_first, T, d, ld);
    const auto tile = [&](u32 key) { return tiles + key / KEYS % 2 * (2 * KEYS * D); };
    const auto copy_keys_and_values = [&](u32 key) {
        copy_tile<D, KEYS>(tile(key), k, key, T, d, ld);
        copy_tile<D, KEYS>(tile(key) + KEYS * D, v, key, T, d, ld);
    };
    copy_keys_and_values(keys_first);
    copy_commit();
    queries += warp * 32 * D; // from here on the warp's own
    see_from += warp * 32;

    // Queries are the rows 16 i + g and 16 i + 8 + g of the warp: `[i][half]`.
    // `most` is the largest score so far times `factor`, finite lest a row that sees nothing yet give NaN.
    float sum[2][D / 8][4] = {};
    float most[2][2] = {{-1e38f, -1e38f}, {-1e38f, -1e38f}}, total[2][2] = {};
    const float factor = scale * LOG2_E;
    // What each lane points to when four matrices are loaded from 16 rows and 16 columns: queries and values
    // one below the other first, keys one beside the other first. With `^ 16 c` it is the c-th 16 columns.
    const u32 below = place<D>(lane % 16, lane / 16), beside = place<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);

    for (u32 key = keys_first; key < keys_end; key += KEYS) {
        bf16* const keys = tile(key);
        bf16* const values = keys + KEYS * D;
        copy_wait<0>();
        __syncthreads(); // this tile is here, and all are done with the one before
        if (key + KEYS < keys_end) copy_keys_and_values(key + KEYS);
        copy_commit();
        if (key > first + 31 || key + KEYS <= see_from[0]) continue; // no query of the warp sees any

        float s[2][KEYS / 8][4] = {};
#pragma unroll UNROLL
        for (u32 c = 0; c < D / 16; c++) {
            u32 x[2][4];
#pragma unroll
            for (u32 i = 0; i < 2; i++) load_matrices(x[i], queries + (below ^ 16 * c) + i * 16 * D);
#pragma unroll
            for (u32 n = 0; n < KEYS / 16; n++) {
                u32 y[4];
                load_matrices(y, keys + (beside ^ 16 * c) + n * 16 * D);
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    multiply_add(s[i][2 * n], x[i], y[0], y[1]);
                    multiply_add(s[i][2 * n + 1], x[i], y[2], y[3]);
                }
            }
        }

        if (key + KEYS > first + 1 || key < see_from[31]) {
#pragma unroll
            for (u32 i = 0; i < 2; i++)
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    // Numbers of keys from this lane's first one on: those from `start` to `last` are seen.
                    const u32 own = 16 * i + 8 * half + g, lane_first = key + 2 * t;
                    const int last = (int)(first + own) - (int)lane_first, start = (int)see_from[own] - (int)lane_first;
#pragma unroll
                    for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                        for (u32 j = 0; j < 2; j++) {
                            const int at = 8 * n + j;
                            if (at > last || at < start) s[i][n][2 * half + j] = -INFINITY;
                        }
                }
        }

        float kept[2][2];
#pragma unroll
        for (u32 i = 0; i < 2; i++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                float now = -INFINITY;
#pragma unroll
                for (u32 n = 0; n < KEYS / 8; n++) now = fmaxf(now, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
                now = fmaxf(now, __shfl_xor_sync(ALL_LANES, now, 1));
                now = fmaxf(now, __shfl_xor_sync(ALL_LANES, now, 2));
                now = fmaxf(now * factor, most[i][half]);
                kept[i][half] = exp2_fast(most[i][half] - now);
                total[i][half] *= kept[i][half];
                most[i][half] = now;
            }
        // Where no maximum grew, and all factors are 1, the sums stay as they are.
        if (__any_sync(ALL_LANES, fminf(fminf(kept[0][0], kept[0][1]), fminf(kept[1][0], kept[1][1])) < 1.0f))
#pragma unroll
            for (u32 i = 0; i < 2; i++)
#pragma unroll
                for (u32 n = 0; n < D / 8; n++)
#pragma unroll
                    for (u32 j = 0; j < 4; j++) sum[i][n][j] *= kept[i][j / 2];
#pragma unroll
        for (u32 c = 0; c < KEYS / 16; c++) {
            u32 x[2][4];
#pragma unroll
            for (u32 i = 0; i < 2; i++)
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    const u32 half = j % 2;
                    const float* pair = &s[i][2 * c + j / 2][2 * half];
                    const float p0 = exp2_fast(pair[0] * factor - most[i][half]);
                    const float p1 = exp2_fast(pair[1] * factor - most[i][half]);
                    total[i][half] += p0 + p1;
                    x[i][j] = pack_bf16(p0, p1);
                }
#pragma unroll
            for (u32 n = 0; n < D / 16; n++) {
                u32 y[4];
                load_matrices_transposed(y, values + (below ^ 16 * n) + c * 16 * D);
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    multiply_add(sum[i][2 * n], x[i], y[0], y[1]);
                    multiply_add(sum[i][2 * n + 1], x[i], y[2], y[3]);
                }
            }
        }
    }
    copy_wait<0>();

    // Outputs take the place of the warp's own queries, to be written in whole pieces of 16 bytes.
#pragma unroll
    for (u32 i = 0; i < 2; i++)
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 own = 16 * i + 8 * half + g, row = first + own;
            float all = total[i][half];
            all += __shfl_xor_sync(ALL_LANES, all, 1);
            all += __shfl_xor_sync(ALL_LANES, all, 2);
            if (t == 0 && row < T) lse[(u64)blockIdx.y * T + row] = (most[i][half] + __log2f(all)) * LN_2;
            const float inverse = __fdividef(1.0f, all);
#pragma unroll
            for (u32 n = 0; n < D / 8; n++)
                *(u32*)(queries + place<D>(own, n) + 2 * t) =
                    pack_bf16(sum[i][n][2 * half] * inverse, sum[i][n][2 * half + 1] * inverse);
        }
    __syncwarp();
    constexpr u32 PIECES = D / 8;
    out += (u64)b * T * ldo + h * d;
#pragma unroll 4
    for (u32 i = lane; i < 32 * PIECES; i += 32) {
        const u32 row = i / PIECES, piece = i % PIECES;
        if (first + row < T && piece * 8 < d)
            *(Words*)(out + (u64)(first + row) * ldo + piece * 8) =
                *(const Words*)(queries + place<D>(row, piece));
    }
}

} // namespace attention_forward

// For d <= D. Grid (ceil(T / 128), B H), 128 threads, 768 D + 512 bytes of dynamic shared memory.
#define ATTENTION_FORWARD(name, D, BLOCKS)                                                                           \
    extern "C" __global__ void __launch_bounds__(128, BLOCKS)                                                        \
    name(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, bf16* __restrict__ out, \
         float* __restrict__ lse, const u32* __restrict__ starts, u32 T, u32 H, u32 K, u32 d, u32 ld, u32 ldo,       \
         float scale) {                                                                                              \
        attention_forward::forward<D>(q, k, v, out, lse, starts, T, H, K, d, ld, ldo, scale);                        \
    }
ATTENTION_FORWARD(attention_forward_bf16_d32, 32, 3)
ATTENTION_FORWARD(attention_forward_bf16_d64, 64, 3)
ATTENTION_FORWARD(attention_forward_bf16_d128, 128, 2)
