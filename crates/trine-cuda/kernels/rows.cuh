// Rows in registers: a block has a row of up to 4 PER blockDim.x elements, each thread PER groups of
// four that lie blockDim.x groups apart, so that a warp's accesses are contiguous.

template <class T> __device__ __forceinline__ void load4(const T* p, float (&x)[4]);
template <> __device__ __forceinline__ void load4<float>(const float* p, float (&x)[4]) {
    const Vector<float> v = *(const Vector<float>*)p;
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = v.x[i];
}
template <> __device__ __forceinline__ void load4<bf16>(const bf16* p, float (&x)[4]) {
    const u64 v = *(const u64*)p;
    x[0] = low_bf16((u32)v);
    x[1] = high_bf16((u32)v);
    x[2] = low_bf16((u32)(v >> 32));
    x[3] = high_bf16((u32)(v >> 32));
}

template <class T> __device__ __forceinline__ void store4(T* p, const float (&x)[4]);
template <> __device__ __forceinline__ void store4<float>(float* p, const float (&x)[4]) {
    Vector<float> v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.x[i] = x[i];
    *(Vector<float>*)p = v;
}
template <> __device__ __forceinline__ void store4<bf16>(bf16* p, const float (&x)[4]) {
    *(u64*)p = (u64)pack_bf16(x[0], x[1]) | (u64)pack_bf16(x[2], x[3]) << 32;
}

// Four numbers as they lie in memory: asked for long before they are used.
template <class T> struct alignas(4 * sizeof(T)) Four {
    T x[4];
};
template <class T> __device__ __forceinline__ Four<T> ask4(const T* p) { return *(const Four<T>*)p; }
template <class T> __device__ __forceinline__ void widen4(const Four<T>& v, float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = to_float(v.x[i]);
}

// The column of a thread's group.
__device__ __forceinline__ u32 column(int group) { return (group * blockDim.x + threadIdx.x) * 4; }

// What a product of codes and trits is multiplied by: the scale of the weights over that of the row's
// activations, in this order, as `trine_ternary::rescale` has it. Null for what is not quantized.
__device__ __forceinline__ float product_factor(const float* weight_scale, const float* row_scales, u32 row) {
    return weight_scale ? *weight_scale / row_scales[row] : 1.0f;
}

// One over the root of the mean square of a row; `square` is this thread's part of the sum.
__device__ __forceinline__ float inverse_rms(float square, u32 width, float eps) {
    return 1.0f / sqrtf(block_sum(square) / (float)width + eps);
}

// Where a row goes for adapters, which read it as it is before it becomes codes, times the scale of these; but
// for what is left out of it: see `share_kept`, of its place in the matrix.
template <class T> struct Plain {
    T* out;
    u64 key, below;
    float kept;
};

// Stores a row whose first element is that at `from`.
template <int PER, class T>
__device__ __forceinline__ void store_plain(const float (&x)[PER][4], u32 width, const Plain<T>& plain, u64 from, float scale) {
#pragma unroll
    for (int g = 0; g < PER; g++) {
        const u64 at = from + column(g);
        if (column(g) >= width) continue;
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            y[i] = x[g][i] * scale;
            if (plain.below) y[i] *= share_kept(plain.key, plain.below, plain.kept, at + i);
        }
        store4(plain.out + at, y);
    }
}

// Stores the row whose first element is that at `from`: as codes of int8, `out` of T and `narrow`, one of which may
// be null, with their scale `127 (1 / max|x|)`, see `trine_ternary::quantize_activations`; where no scales are
// wanted as it is; and `plain` where that is given. Numbers that are not finite stay what they are.
template <int PER, class T>
__device__ __forceinline__ void store_row(float (&x)[PER][4], u32 width, T* out, i8* narrow, float* scale, const Plain<T>& plain, u64 from) {
    if (!scale) {
        if (plain.out) store_plain(x, width, plain, from, 1.0f);
#pragma unroll
        for (int g = 0; g < PER; g++)
            if (column(g) < width) store4(out + from + column(g), x[g]);
        return;
    }
    float largest = 0.0f;
#pragma unroll
    for (int g = 0; g < PER; g++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (column(g) < width) largest = fmaxf(largest, fabsf(x[g][i]));
    largest = fmaxf(block_max(largest), 1e-5f);
    const float s = 127.0f * (1.0f / largest);
    if (threadIdx.x == 0) *scale = s;
    if (plain.out) store_plain(x, width, plain, from, s);
#pragma unroll
    for (int g = 0; g < PER; g++) {
        if (column(g) >= width) continue;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float code = rintf(x[g][i] * s);
            x[g][i] = code < -128.0f ? -128.0f : code > 127.0f ? 127.0f : code;
        }
        if (out) store4(out + from + column(g), x[g]);
        if (narrow) {
            u32 codes = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) codes |= ((u32)(int)x[g][i] & 0xff) << (8 * i);
            *(u32*)(narrow + from + column(g)) = codes;
        }
    }
}
