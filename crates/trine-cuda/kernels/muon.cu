// Muon (Jordan et al. 2024), of one matrix: what stands between the products of its Newton-Schulz steps. All
// arrays of n elements, a multiple of 4; any number of blocks of 256.

#define FOUR_AT_A_TIME(i, n)                                                              \
    for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < (n); i += (u64)gridDim.x * blockDim.x * 4)

// Moves the running mean of gradients, which are `g` over `scale` times `clip`, and looks ahead as Nesterov
// does: `x`. `partial` (gridDim.x,): parts of the sum of its squares.
extern "C" __global__ void muon_direction(const float* g, const float* scale, float clip, float momentum, float* mean,
                                          float* x, double* partial, u64 n) {
    const float f = clip / factor(scale);
    double sum = 0.0;
    FOUR_AT_A_TIME(i, n) {
        float a[4], m[4];
        load4(g + i, a);
        load4(mean + i, m);
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float now = a[j] * f;
            m[j] += (now - m[j]) * (1.0f - momentum);
            a[j] = now + (m[j] - now) * momentum;
            squares += a[j] * a[j];
        }
        sum += (double)squares;
        store4(mean + i, m);
        store4(x + i, a);
    }
    sum = block_sum_f64(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// `x` over its norm, of which `square` is the square; also as T, for products.
template <class T> __device__ __forceinline__ void muon_begin(float* x, const double* square, T* factors, u64 n) {
    const float inverse = (float)(1.0 / (sqrt(*square) + 1e-7));
    FOUR_AT_A_TIME(i, n) {
        float a[4];
        load4(x + i, a);
#pragma unroll
        for (int j = 0; j < 4; j++) a[j] *= inverse;
        store4(x + i, a);
        store4(factors + i, a);
    }
}

// `a` as T.
template <class T> __device__ __forceinline__ void cast(const float* a, T* out, u64 n) {
    FOUR_AT_A_TIME(i, n) {
        float x[4];
        load4(a + i, x);
        store4(out + i, x);
    }
}

// `b gram + c squared` as T.
template <class T>
__device__ __forceinline__ void muon_polynomial(const float* gram, const float* squared, float b, float c, T* out, u64 n) {
    FOUR_AT_A_TIME(i, n) {
        float x[4], y[4];
        load4(gram + i, x);
        load4(squared + i, y);
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] = b * x[j] + c * y[j];
        store4(out + i, x);
    }
}

// `x` becomes `a x + product`; also as T.
template <class T> __device__ __forceinline__ void muon_add(float* x, const float* product, float a, T* factors, u64 n) {
    FOUR_AT_A_TIME(i, n) {
        float y[4], p[4];
        load4(x + i, y);
        load4(product + i, p);
#pragma unroll
        for (int j = 0; j < 4; j++) y[j] = a * y[j] + p[j];
        store4(x + i, y);
        store4(factors + i, y);
    }
}

#define MUON(NAME, T)                                                                                                \
    extern "C" __global__ void muon_begin_##NAME(float* x, const double* square, T* factors, u64 n) {                \
        muon_begin(x, square, factors, n);                                                                           \
    }                                                                                                                \
    extern "C" __global__ void cast_##NAME(const float* a, T* out, u64 n) { cast(a, out, n); }                       \
    extern "C" __global__ void muon_polynomial_##NAME(const float* gram, const float* squared, float b, float c,     \
                                                      T* out, u64 n) {                                               \
        muon_polynomial(gram, squared, b, c, out, n);                                                                \
    }                                                                                                                \
    extern "C" __global__ void muon_add_##NAME(float* x, const float* product, float a, T* factors, u64 n) {         \
        muon_add(x, product, a, factors, n);                                                                         \
    }
MUON(f32, float)
MUON(bf16, bf16)

// Moves masters against `x`: `keep w - step x`, rounded stochastically where they are bf16. One tensor, the
// entry `at` of the table.
extern "C" __global__ void muon_update(u8* masters, const Entry* table, u32 at, const float* x, float keep, float step,
                                       u64 chance) {
    const Entry e = table[at];
    const u64 key = mix(chance ^ (u64)e.number);
    FOUR_AT_A_TIME(i, e.count) {
        float w[4], d[4];
        load_masters(masters, e, i, w);
        load4(x + i, d);
#pragma unroll
        for (int j = 0; j < 4; j++) w[j] = w[j] * keep - step * d[j];
        store_masters(masters, e, i, key, w);
    }
}
