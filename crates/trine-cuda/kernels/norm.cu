// RMSNorm (arXiv 1910.07467) with what stands before it, a sum, and after it, codes; and backward.
// One block a row.

// `x` (M, width) of X. Where `product` (M, width) is given, it is multiplied by `product_weight` over
// `product_rows` and added, and the sum goes to `sum` (M, width). Then, where `weight` (width,) is given,
// the norm; then what `store_row` makes of it, `out`, `narrow` and `plain` being (n, width), `scales` (n,).
// `rms` (n,): one over the root of the mean square. Output row `i` is made of row `rows[i]`, or of row `i`.
// Blocks: n.
template <class X, class T, int PER>
__device__ __forceinline__ void norm(const X* x, const T* product, const float* product_weight,
                                     const float* product_rows, float* sum, const u32* rows,
                                     const float* weight, float eps, T* out, i8* narrow,
                                     float* scales, float* rms, const Plain<T>& plain, u32 width) {
    const u32 row = rows ? rows[blockIdx.x] : blockIdx.x;
    const u64 from = (u64)row * width, to = (u64)blockIdx.x * width;
    float y[PER][4];
    float square = 0.0f;
    const float f = product ? product_factor(product_weight, product_rows, row) : 0.0f;
#pragma unroll
    for (int g = 0; g < PER; g++) {
        const u32 c = column(g);
        if (c >= width) continue;
        load4(x + from + c, y[g]);
        if (product) {
            float p[4];
            load4(product + from + c, p);
#pragma unroll
            for (int i = 0; i < 4; i++) y[g][i] += p[i] * f;
            store4(sum + from + c, y[g]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) square += y[g][i] * y[g][i];
    }
    if (weight) {
        const float r = inverse_rms(square, width, eps);
        if (threadIdx.x == 0) rms[blockIdx.x] = r;
#pragma unroll
        for (int g = 0; g < PER; g++) {
            const u32 c = column(g);
            if (c >= width) continue;
            float w[4];
            load4(weight + c, w);
#pragma unroll
            for (int i = 0; i < 4; i++) y[g][i] = y[g][i] * r * w[i];
        }
    }
    store_row(y, width, out, narrow, scales ? scales + blockIdx.x : scales, plain, to);
}

// The gradient of `x` (M, width) from that of what the norm returned, which is `dy` (n, width) times
// `dy_scales` (n,), to which `residual` (M, width) is added; it goes to `dx` (M, width). `dx` times
// `next_weight` over `next_rows`, which is what the gradients of the projections below are made of, goes to
// `scaled` (M, width). `partial` (gridDim.x, width): sums over the block's rows of the gradient of `weight`.
// Without `weight` there was no norm. `rows` as above: rows that it does not name are left alone. Blocks:
// any number, each of every gridDim.x-th row.
template <class X, class T, int PER>
__device__ __forceinline__ void norm_backward(const X* x, const float* weight, const float* rms, const T* dy,
                                              const float* dy_scales, const float* residual, const u32* rows,
                                              float* dx, T* scaled, const float* next_weight,
                                              const float* next_rows, float* partial, u32 n, u32 width) {
    float dw[PER][4];
#pragma unroll
    for (int g = 0; g < PER; g++)
#pragma unroll
        for (int i = 0; i < 4; i++) dw[g][i] = 0.0f;
    for (u32 at = blockIdx.x; at < n; at += gridDim.x) {
        const u32 row = rows ? rows[at] : at;
        const u64 from = (u64)row * width, to = (u64)at * width;
        const float f = factor(dy_scales, at), r = weight ? rms[at] : 1.0f;
        float g_[PER][4], x_[PER][4];
        float dot = 0.0f;
#pragma unroll
        for (int g = 0; g < PER; g++) {
            const u32 c = column(g);
            if (c >= width) continue;
            load4(dy + to + c, g_[g]);
#pragma unroll
            for (int i = 0; i < 4; i++) g_[g][i] *= f;
            if (!weight) continue;
            float w[4];
            load4(x + from + c, x_[g]);
            load4(weight + c, w);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x_[g][i] *= r;
                dw[g][i] += g_[g][i] * x_[g][i];
                g_[g][i] *= w[i];
                dot += g_[g][i] * x_[g][i];
            }
        }
        if (weight) dot = block_sum(dot) / (float)width;
        const float next = product_factor(next_weight, next_rows, row);
#pragma unroll
        for (int g = 0; g < PER; g++) {
            const u32 c = column(g);
            if (c >= width) continue;
            if (weight) {
#pragma unroll
                for (int i = 0; i < 4; i++) g_[g][i] = r * (g_[g][i] - x_[g][i] * dot);
            }
            if (residual) {
                float add[4];
                load4(residual + from + c, add);
#pragma unroll
                for (int i = 0; i < 4; i++) g_[g][i] += add[i];
            }
            if (dx) store4(dx + from + c, g_[g]);
            if (scaled) {
#pragma unroll
                for (int i = 0; i < 4; i++) g_[g][i] *= next;
                store4(scaled + from + c, g_[g]);
            }
        }
    }
    if (!partial) return;
#pragma unroll
    for (int g = 0; g < PER; g++)
        if (column(g) < width) store4(partial + (u64)blockIdx.x * width + column(g), dw[g]);
}

#define NORM(NAME, X, T, PER)                                                                            \
    extern "C" __global__ void __launch_bounds__(PER == 4 ? 448 : 512) norm_##NAME(const X* x, const T* product, const float* product_weight,   \
                                           const float* product_rows, float* sum, const u32* rows,      \
                                           const float* weight, float eps, T* out, i8* narrow,          \
                                           float* scales, float* rms, T* plain, u64 key, u64 below, float kept,         \
                                           u32 width) {                                                 \
        norm<X, T, PER>(x, product, product_weight, product_rows, sum, rows, weight, eps, out, narrow,  \
                        scales, rms, {plain, key, below, kept}, width);                                 \
    }                                                                                                   \
    extern "C" __global__ void __launch_bounds__(PER == 4 ? 448 : 512) norm_backward_##NAME(                                                    \
        const X* x, const float* weight, const float* rms, const T* dy, const float* dy_scales,         \
        const float* residual, const u32* rows, float* dx, T* scaled, const float* next_weight,         \
        const float* next_rows, float* partial, u32 n, u32 width) {                                     \
        norm_backward<X, T, PER>(x, weight, rms, dy, dy_scales, residual, rows, dx, scaled, next_weight, \
                                 next_rows, partial, n, width);                                         \
    }
NORM(f32_f32_2, float, float, 2)
NORM(f32_f32_4, float, float, 4)
NORM(f32_f32_8, float, float, 8)
NORM(f32_bf16_2, float, bf16, 2)
NORM(f32_bf16_4, float, bf16, 4)
NORM(f32_bf16_8, float, bf16, 8)
NORM(bf16_bf16_2, bf16, bf16, 2)
NORM(bf16_bf16_4, bf16, bf16, 4)
NORM(bf16_bf16_8, bf16, bf16, 8)

// Sums of the columns of `partial` (parts, width) go to `out` (width,), or are added to it. Blocks of 1024:
// 32 columns, 32 threads each; width / 32 of them, rounded up.
extern "C" __global__ void sum_columns(const float* partial, u32 parts, u32 width, u32 add, float* out) {
    __shared__ float sums[32][33];
    const u32 lane = threadIdx.x % 32, slice = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (c < width)
        for (u32 i = slice; i < parts; i += 32) sum += partial[(u64)i * width + c];
    sums[slice][lane] = sum;
    __syncthreads();
    // Now a warp has the parts of one column.
    sum = warp_sum(sums[lane][slice]);
    const u32 to = blockIdx.x * 32 + slice;
    if (lane == 0 && to < width) out[to] = add ? out[to] + sum : sum;
}
