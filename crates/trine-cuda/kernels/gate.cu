// The gate of the feed-forward part, `act(gate) * up`, with its norm and codes; and backward. The product
// (M, 2 width) has gate and up side by side.

enum { RELU2 = 0, SILU = 1 };

__device__ __forceinline__ float gate_value(u32 act, float g, float u) {
    if (act == RELU2) {
        const float r = fmaxf(g, 0.0f);
        return r * r * u;
    }
    return g / (1.0f + expf(-g)) * u;
}

// To the gradients of gate and up.
__device__ __forceinline__ void gate_slopes(u32 act, float& g, float& u, float da) {
    if (act == RELU2) {
        const float r = fmaxf(g, 0.0f);
        g = 2.0f * r * u * da;
        u = r * r * da;
    } else {
        const float s = 1.0f / (1.0f + expf(-g)), silu = g * s;
        g = (s + silu * (1.0f - s)) * u * da;
        u = silu * da;
    }
}

// `product` (M, 2 width), the scales of the weights of gate and up, and `product_rows` (M,) make the gate,
// which goes through the norm of `weight` (width,), if there is one, and is stored by `store_row`: `out`, `narrow` and
// `plain` (M, width), `scales` (M,). `rms` (M,) as in `norm`. Blocks: M.
template <class T, int PER>
__device__ __forceinline__ void gate(const T* product, const float* gate_weight, const float* up_weight,
                                     const float* product_rows, u32 act, const float* weight, float eps,
                                     T* out, i8* narrow, float* scales, float* rms, const Plain<T>& plain, u32 width) {
    const u32 row = blockIdx.x;
    product += (u64)row * 2 * width;
    const float fg = product_factor(gate_weight, product_rows, row);
    const float fu = product_factor(up_weight, product_rows, row);
    float a[PER][4];
    float square = 0.0f;
#pragma unroll
    for (int g = 0; g < PER; g++) {
        const u32 c = column(g);
        if (c >= width) continue;
        float u[4];
        load4(product + c, a[g]);
        load4(product + width + c, u);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a[g][i] = gate_value(act, a[g][i] * fg, u[i] * fu);
            square += a[g][i] * a[g][i];
        }
    }
    if (weight) {
        const float r = inverse_rms(square, width, eps);
        if (threadIdx.x == 0) rms[row] = r;
#pragma unroll
        for (int g = 0; g < PER; g++) {
            const u32 c = column(g);
            if (c >= width) continue;
            float w[4];
            load4(weight + c, w);
#pragma unroll
            for (int i = 0; i < 4; i++) a[g][i] = a[g][i] * r * w[i];
        }
    }
    store_row(a, width, out, narrow, scales ? scales + row : scales, plain, (u64)row * width);
}

// From `da` (M, width) times `da_scales` (M,), the gradient of what `gate` returned, to that of gate and up,
// each multiplied by its weights' scale over `product_rows`, in the place of `product`. `partial`
// (gridDim.x, width) as in `norm_backward`. Blocks: any number.
//
// What a row needs is asked for while the row before it is reduced: a block would wait for memory otherwise.
template <class T, int PER> struct GateRow {
    Four<T> da[PER], gates[PER], ups[PER];
    float factor, rms, row_scale;
};

template <class T, int PER>
__device__ __forceinline__ void gate_backward(T* product, const float* gate_weight, const float* up_weight,
                                              const float* product_rows, u32 act, const float* weight,
                                              const float* rms, const T* da, const float* da_scales,
                                              float* partial, u32 n, u32 width) {
    const auto ask = [&](u32 row, GateRow<T, PER>& r) {
        r.factor = factor(da_scales, row);
        r.rms = weight ? rms[row] : 1.0f;
        r.row_scale = gate_weight ? product_rows[row] : 1.0f;
        const T* gates = product + (u64)row * 2 * width;
#pragma unroll
        for (int g = 0; g < PER; g++) {
            const u32 c = column(g);
            if (c >= width) continue;
            r.da[g] = ask4(da + (u64)row * width + c);
            r.gates[g] = ask4(gates + c);
            r.ups[g] = ask4(gates + width + c);
        }
    };
    const float gate_scale = factor(gate_weight), up_scale = factor(up_weight);
    float dw[PER][4];
#pragma unroll
    for (int g = 0; g < PER; g++)
#pragma unroll
        for (int i = 0; i < 4; i++) dw[g][i] = 0.0f;
    GateRow<T, PER> now, after;
    if (blockIdx.x < n) ask(blockIdx.x, now);
    for (u32 row = blockIdx.x; row < n; row += gridDim.x) {
        if (row + gridDim.x < n) ask(row + gridDim.x, after);
        const float fg = gate_scale / now.row_scale, fu = up_scale / now.row_scale;
        float dot = 0.0f;
        float d[PER][4], a[PER][4];
#pragma unroll
        for (int g = 0; g < PER; g++) {
            const u32 c = column(g);
            if (c >= width) continue;
            widen4(now.da[g], d[g]);
#pragma unroll
            for (int i = 0; i < 4; i++) d[g][i] *= now.factor;
            if (!weight) continue;
            float w[4], u[4];
            load4(weight + c, w);
            widen4(now.gates[g], a[g]);
            widen4(now.ups[g], u);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[g][i] = gate_value(act, a[g][i] * fg, u[i] * fu) * now.rms;
                dw[g][i] += d[g][i] * a[g][i];
                d[g][i] *= w[i];
                dot += d[g][i] * a[g][i];
            }
        }
        if (weight) dot = block_sum(dot) / (float)width;
        T* gates = product + (u64)row * 2 * width;
#pragma unroll
        for (int g = 0; g < PER; g++) {
            const u32 c = column(g);
            if (c >= width) continue;
            float x[4], u[4];
            widen4(now.gates[g], x);
            widen4(now.ups[g], u);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float slope = weight ? now.rms * (d[g][i] - a[g][i] * dot) : d[g][i];
                x[i] *= fg;
                u[i] *= fu;
                gate_slopes(act, x[i], u[i], slope);
                x[i] *= fg;
                u[i] *= fu;
            }
            store4(gates + c, x);
            store4(gates + width + c, u);
        }
        now = after;
    }
    if (!partial) return;
#pragma unroll
    for (int g = 0; g < PER; g++)
        if (column(g) < width) store4(partial + (u64)blockIdx.x * width + column(g), dw[g]);
}

#define GATE(NAME, T, PER)                                                                               \
    extern "C" __global__ void __launch_bounds__(PER == 4 ? 448 : 512) gate_##NAME(const T* product, const float* gate_weight,                  \
                                           const float* up_weight, const float* product_rows, u32 act,  \
                                           const float* weight, float eps, T* out, i8* narrow,          \
                                           float* scales, float* rms, T* plain, u64 key, u64 below,     \
                                           float kept, u32 width) {                                     \
        gate<T, PER>(product, gate_weight, up_weight, product_rows, act, weight, eps, out, narrow,      \
                     scales, rms, {plain, key, below, kept}, width);                                    \
    }                                                                                                   \
    extern "C" __global__ void __launch_bounds__(PER == 4 ? 448 : 512) gate_backward_##NAME(                                                    \
        T* product, const float* gate_weight, const float* up_weight, const float* product_rows,        \
        u32 act, const float* weight, const float* rms, const T* da, const float* da_scales,            \
        float* partial, u32 n, u32 width) {                                                             \
        gate_backward<T, PER>(product, gate_weight, up_weight, product_rows, act, weight, rms, da,      \
                              da_scales, partial, n, width);                                            \
    }
GATE(f32_2, float, 2)
GATE(f32_4, float, 4)
GATE(f32_8, float, 8)
GATE(bf16_2, bf16, 2)
GATE(bf16_4, bf16, 4)
GATE(bf16_8, bf16, 8)
