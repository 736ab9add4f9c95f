// A model that stays as it is, with adapters (LoRA, arXiv 2106.09685) beside its projections: what is
// multiplied is made of what is kept, a layer at a time.

__device__ __forceinline__ void store_trits(const i8 (&t)[16], i8* out) {
    Vector<i8> v;
#pragma unroll
    for (int i = 0; i < 16; i++) v.x[i] = t[i];
    *(Vector<i8>*)out = v;
}
template <class T> __device__ __forceinline__ void store_trits(const i8 (&t)[16], T* out) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
        const float x[4] = {(float)t[i], (float)t[i + 1], (float)t[i + 2], (float)t[i + 3]};
        store4(out + i, x);
    }
}

// Trits, 16 in a word of `packed` (words,), the first in its lowest two bits, each one more than it is
// (`trine_ternary::pack_2bit`), as T. Any number of blocks of 256.
template <class T> __device__ __forceinline__ void unpack(const u32* packed, T* out, u64 words) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (u64)gridDim.x * blockDim.x) {
        const u32 word = packed[i];
        i8 t[16];
#pragma unroll
        for (int j = 0; j < 16; j++) t[j] = (i8)((int)(word >> (2 * j) & 3) - 1);
        store_trits(t, out + 16 * i);
    }
}
extern "C" __global__ void unpack_bytes(const u32* packed, i8* out, u64 words) { unpack(packed, out, words); }
extern "C" __global__ void unpack_f32(const u32* packed, float* out, u64 words) { unpack(packed, out, words); }
extern "C" __global__ void unpack_bf16(const u32* packed, bf16* out, u64 words) { unpack(packed, out, words); }

// `a` (n,) as T. n is a multiple of 4; any number of blocks of 256.
template <class X, class T> __device__ __forceinline__ void convert(const X* a, T* out, u64 n) {
    for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < n; i += (u64)gridDim.x * blockDim.x * 4) {
        float x[4];
        load4(a + i, x);
        store4(out + i, x);
    }
}
extern "C" __global__ void convert_f32_f32(const float* a, float* out, u64 n) { convert(a, out, n); }
extern "C" __global__ void convert_f32_bf16(const float* a, bf16* out, u64 n) { convert(a, out, n); }
extern "C" __global__ void convert_bf16_f32(const bf16* a, float* out, u64 n) { convert(a, out, n); }
extern "C" __global__ void convert_bf16_bf16(const bf16* a, bf16* out, u64 n) { convert(a, out, n); }

// Matrices of adapters over their scales, as T. blockIdx.y is the number of a tensor.
template <class T>
__device__ __forceinline__ void adapters(const u8* masters, const Entry* table, const float* scales, T* out) {
    const Entry e = table[blockIdx.y];
    const float f = gradient_factor(e, scales);
    for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < e.count; i += (u64)gridDim.x * blockDim.x * 4) {
        float w[4];
        load_masters(masters, e, i, w);
#pragma unroll
        for (int j = 0; j < 4; j++) w[j] *= f;
        store4(out + e.copy + i, w);
    }
}
extern "C" __global__ void adapters_f32(const u8* masters, const Entry* table, const float* scales, float* out) {
    adapters(masters, table, scales, out);
}
extern "C" __global__ void adapters_bf16(const u8* masters, const Entry* table, const float* scales, bf16* out) {
    adapters(masters, table, scales, out);
}

// Adds to `dx` (n,) what is kept of `more` (n,): see `share_kept`. n is a multiple of 4; any number of blocks of 256.
template <class T>
__device__ __forceinline__ void add_kept(const T* more, T* dx, u64 key, u64 below, float kept, u64 n) {
    for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < n; i += (u64)gridDim.x * blockDim.x * 4) {
        float x[4], y[4];
        load4(more + i, x);
        load4(dx + i, y);
#pragma unroll
        for (int j = 0; j < 4; j++) y[j] += x[j] * share_kept(key, below, kept, i + j);
        store4(dx + i, y);
    }
}
extern "C" __global__ void add_kept_f32(const float* more, float* dx, u64 key, u64 below, float kept, u64 n) {
    add_kept(more, dx, key, below, kept, n);
}
extern "C" __global__ void add_kept_bf16(const bf16* more, bf16* dx, u64 key, u64 below, float kept, u64 n) {
    add_kept(more, dx, key, below, kept, n);
}
