// Rotary embedding (arXiv 2104.09864), of pairs (i, i + d / 2).

// Four pairs from `pair` on of a head of a row.
template <class T, bool BACKWARD>
__device__ __forceinline__ void turn(T* row, const float (&factors)[3], const float* cos, const float* sin, u32 position,
                                     u32 head, u32 pair, u32 heads, u32 kv_heads, u32 d) {
    const u32 part = head < heads ? 0 : head < heads + kv_heads ? 1 : 2;
    const float f = part == 0 ? factors[0] : part == 1 ? factors[1] : factors[2];
    T* low = row + head * d + pair;
    T* high = low + d / 2;
    float a[4], b[4];
    load4(low, a);
    load4(high, b);
    if (part < 2) {
        float c[4], s[4];
        load4(cos + (u64)position * (d / 2) + pair, c);
        load4(sin + (u64)position * (d / 2) + pair, s);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!BACKWARD) {
                a[i] *= f;
                b[i] *= f;
            }
            const float x = a[i], y = b[i], t = BACKWARD ? -s[i] : s[i];
            a[i] = x * c[i] - y * t;
            b[i] = y * c[i] + x * t;
            if (BACKWARD) {
                a[i] *= f;
                b[i] *= f;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a[i] *= f;
            b[i] *= f;
        }
    }
    store4(low, a);
    store4(high, b);
}

// In place: `qkv` (M, (H + 2 K) d), queries, keys and values side by side, each as a product whose factor
// is its weights' scale (`weights` (3,)) over `rows` (M,). Queries and keys are turned by their position's
// angle; BACKWARD, gradients are turned back, and all are multiplied by the factor after that. `cos`, `sin`
// (positions, d / 2). A thread has four pairs at a time. Blocks: M.
template <class T, bool BACKWARD>
__device__ __forceinline__ void rope(T* qkv, const float* weights, const float* rows, const float* cos,
                                     const float* sin, u32 tokens, u32 heads, u32 kv_heads, u32 d) {
    const u32 all = heads + 2 * kv_heads, row = blockIdx.x;
    float factors[3];
#pragma unroll
    for (int part = 0; part < 3; part++)
        factors[part] = product_factor(weights ? weights + part : weights, rows, row);
    for (u32 at = threadIdx.x; at < all * (d / 8); at += blockDim.x)
        turn<T, BACKWARD>(qkv + (u64)row * all * d, factors, cos, sin, row % tokens, at / (d / 8), at % (d / 8) * 4,
                          heads, kv_heads, d);
}

#define ROPE(NAME, T, BACKWARD)                                                                          \
    extern "C" __global__ void NAME(T* qkv, const float* weights, const float* rows, const float* cos,  \
                                    const float* sin, u32 tokens, u32 heads, u32 kv_heads,       \
                                    u32 d) {                                                            \
        rope<T, BACKWARD>(qkv, weights, rows, cos, sin, tokens, heads, kv_heads, d);                 \
    }
ROPE(rope_f32, float, false)
ROPE(rope_bf16, bf16, false)
ROPE(rope_backward_f32, float, true)
ROPE(rope_backward_bf16, bf16, true)
