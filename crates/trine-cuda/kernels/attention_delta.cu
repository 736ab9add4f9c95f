// delta, which the backward kernels of attention subtract: for each head of each row the product of out and
// its gradient (FlashAttention-2, Dao 2023, arXiv 2307.08691, algorithm 2).
//
// out and dout (B T, ldo), head h in columns h d .. ; delta (B, H, T). Half a warp has a head of a row.
// Grid (ceil(B H T / 16)), 256 threads. For bf16, d is a multiple of 8 and rows begin at multiples of 16 bytes.
namespace attention_delta {

__device__ __forceinline__ float product(const float* x, const float* y, u32 d) {
    float sum = 0.0f;
    for (u32 c = threadIdx.x % 16; c < d; c += 16) sum += x[c] * y[c];
    return sum;
}

__device__ __forceinline__ float product(const bf16* x, const bf16* y, u32 d) {
    float sum = 0.0f;
    for (u32 c = threadIdx.x % 16 * 8; c < d; c += 128) {
        const Words a = *(const Words*)(x + c), b = *(const Words*)(y + c);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum += low_bf16(a.x[i]) * low_bf16(b.x[i]);
            sum += high_bf16(a.x[i]) * high_bf16(b.x[i]);
        }
    }
    return sum;
}

template <class E>
__device__ __forceinline__ void attention_delta(const E* out, const E* dout, float* delta, u64 count, u32 T, u32 H, u32 d,
                                                u32 ldo) {
    const u64 i = (u64)blockIdx.x * 16 + threadIdx.x / 16;
    const u64 row = i / T; // b H + h
    const u64 at = (row / H * T + i % T) * ldo + row % H * d;
    float sum = i < count ? product(out + at, dout + at, d) : 0.0f;
    for (int mask = 8; mask > 0; mask >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, mask);
    if (i < count && threadIdx.x % 16 == 0) delta[i] = sum;
}

} // namespace attention_delta

// `count` is B H T.
#define ATTENTION_DELTA(name, E)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                \
    name(const E* __restrict__ out, const E* __restrict__ dout, float* __restrict__ delta, u64 count, u32 T, u32 H,  \
         u32 d, u32 ldo) {                                                                                           \
        attention_delta::attention_delta(out, dout, delta, count, T, H, d, ldo);                                     \
    }
ATTENTION_DELTA(attention_delta_f32, float)
ATTENTION_DELTA(attention_delta_bf16, bf16)
