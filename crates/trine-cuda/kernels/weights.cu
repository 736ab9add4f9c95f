// From masters to trits, all projections in one launch; and what an optimizer does to all parameters.
//
// A tensor is described by an entry of a table; blockIdx.y is its number.

struct Entry {
    // Of its first element, in elements of gradients and moments; a multiple of 8.
    u64 start;
    // A multiple of 4.
    u64 count;
    // Of its masters, in bytes.
    u64 masters;
    // Of its trits or its copy for products, in elements.
    u64 copy;
    // Which of the weights' scales is its own; gradients are multiplied by that. Negative: none.
    int scale;
    // How its masters are kept: 0 as f32; 1 as bf16; 2 as f32 that are rounded to bf16.
    int kept;
    // Whether its weights decay.
    int decays;
    // Its number among all parameters, by name.
    int number;
};

__device__ __forceinline__ void load_masters(const u8* masters, const Entry& e, u64 at, float (&w)[4]) {
    if (e.kept == 1)
        load4((const bf16*)(masters + e.masters) + at, w);
    else
        load4((const float*)(masters + e.masters) + at, w);
}

__device__ __forceinline__ double block_sum_f64(double x) {
    __shared__ double parts[256];
    __syncthreads();
    parts[threadIdx.x] = x;
    __syncthreads();
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
        __syncthreads();
    }
    return parts[0];
}

// Sums of magnitudes, `partial` (tensors, gridDim.x). Blocks of 256.
extern "C" __global__ void sum_magnitudes(const u8* masters, const Entry* table, double* partial) {
    const Entry e = table[blockIdx.y];
    double sum = 0.0;
    for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < e.count; i += (u64)gridDim.x * blockDim.x * 4) {
        float w[4];
        load_masters(masters, e, i, w);
#pragma unroll
        for (int j = 0; j < 4; j++) sum += (double)fabsf(w[j]);
    }
    sum = block_sum_f64(sum);
    if (threadIdx.x == 0) partial[(u64)blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// Scales `max(mean |w|, 1e-5)` (`trine_ternary::absmean`) of such sums. One block of 256 a tensor.
extern "C" __global__ void absmean(const double* partial, u32 parts, const Entry* table, float* scales) {
    const Entry e = table[blockIdx.x];
    double sum = threadIdx.x < parts ? partial[(u64)blockIdx.x * parts + threadIdx.x] : 0.0;
    sum = block_sum_f64(sum);
    const float mean = (float)(sum / (double)e.count);
    // A NaN stays one.
    if (threadIdx.x == 0) scales[e.scale] = mean < 1e-5f ? 1e-5f : mean;
}

// `clamp(round_half_even(w * (1 / scale)), -1, 1)` (`trine_ternary::ternarize`) of all tensors, as T and,
// where `narrow` is given, as int8; of tensors without a scale their values as T.
template <class T>
__device__ __forceinline__ void ternarize(const u8* masters, const Entry* table, const float* scales, T* out, i8* narrow) {
    const Entry e = table[blockIdx.y];
    const float inverse = e.scale >= 0 && scales ? 1.0f / scales[e.scale] : 0.0f;
    for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < e.count; i += (u64)gridDim.x * blockDim.x * 4) {
        float w[4];
        load_masters(masters, e, i, w);
        if (e.scale >= 0 && scales) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float t = rintf(w[j] * inverse);
                w[j] = t < -1.0f ? -1.0f : t > 1.0f ? 1.0f : t;
            }
            if (narrow) {
                u32 trits = 0;
#pragma unroll
                for (int j = 0; j < 4; j++) trits |= ((u32)(int)w[j] & 0xff) << (8 * j);
                *(u32*)(narrow + e.copy + i) = trits;
            }
        }
        store4(out + e.copy + i, w);
    }
}
extern "C" __global__ void ternarize_f32(const u8* masters, const Entry* table, const float* scales, float* out, i8* narrow) {
    ternarize(masters, table, scales, out, narrow);
}
extern "C" __global__ void ternarize_bf16(const u8* masters, const Entry* table, const float* scales, bf16* out, i8* narrow) {
    ternarize(masters, table, scales, out, narrow);
}

// What a tensor's gradient is to be multiplied by: those of ternary weights are kept times their scale.
__device__ __forceinline__ float gradient_factor(const Entry& e, const float* scales) {
    return e.scale >= 0 && scales ? 1.0f / scales[e.scale] : 1.0f;
}

// Sums of squares of gradients, `partial` (tensors, gridDim.x). Blocks of 256.
extern "C" __global__ void sum_squares(const float* gradients, const Entry* table, const float* scales, double* partial) {
    const Entry e = table[blockIdx.y];
    double sum = 0.0;
    for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < e.count; i += (u64)gridDim.x * blockDim.x * 4) {
        float g[4];
        load4(gradients + e.start + i, g);
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) squares += g[j] * g[j];
        sum += (double)squares;
    }
    sum = block_sum_f64(sum);
    const double f = gradient_factor(e, scales);
    if (threadIdx.x == 0) partial[(u64)blockIdx.y * gridDim.x + blockIdx.x] = sum * f * f;
}

// Sums of such parts, `out` (tensors,). One block of 256 a tensor.
extern "C" __global__ void sum_parts(const double* partial, u32 parts, double* out) {
    double sum = threadIdx.x < parts ? partial[(u64)blockIdx.x * parts + threadIdx.x] : 0.0;
    sum = block_sum_f64(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Four masters of a tensor, from element `i` on. Those of bf16 are rounded up or down by chance, of which `key` is
// the tensor's in this update.
__device__ __forceinline__ void store_masters(u8* masters, const Entry& e, u64 i, u64 key, float (&w)[4]) {
    if (e.kept != 0) {
        const u64 bits = mix(key ^ (i / 4));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 x = __float_as_uint(w[j]);
            if ((x & 0x7f800000u) != 0x7f800000u)
                w[j] = __uint_as_float((x + ((u32)(bits >> (16 * j)) & 0xffff)) & 0xffff0000u);
        }
    }
    if (e.kept == 1)
        store4((bf16*)(masters + e.masters) + i, w);
    else
        store4((float*)(masters + e.masters) + i, w);
}

// AdamW (arXiv 1711.05101), as PyTorch computes it, of all tensors: `clip` is what gradients are multiplied
// by, `keep` what is left of weights that decay. Masters of bf16 are rounded stochastically; `chance` is
// the hash of seed and update.
extern "C" __global__ void adamw(u8* masters, const float* gradients, float* m, float* v, const Entry* table,
                                 const float* scales, float clip, float beta1, float beta2, float eps,
                                 float keep, float step_size, float inverse_root_correction2, u64 chance) {
    const Entry e = table[blockIdx.y];
    const float f = gradient_factor(e, scales) * clip, left = e.decays ? keep : 1.0f;
    const u64 key = mix(chance ^ (u64)e.number);
    for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < e.count; i += (u64)gridDim.x * blockDim.x * 4) {
        float w[4], g[4], a[4], b[4];
        load_masters(masters, e, i, w);
        load4(gradients + e.start + i, g);
        load4(m + e.start + i, a);
        load4(v + e.start + i, b);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float x = g[j] * f;
            a[j] += (x - a[j]) * (1.0f - beta1);
            b[j] = b[j] * beta2 + x * x * (1.0f - beta2);
            const float root = sqrtf(b[j]) * inverse_root_correction2 + eps;
            w[j] = w[j] * left - step_size * a[j] / root;
        }
        store4(m + e.start + i, a);
        store4(v + e.start + i, b);
        store_masters(masters, e, i, key, w);
    }
}
