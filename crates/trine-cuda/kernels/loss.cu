// Cross entropy of some rows of logits, and its gradient in their place.
namespace loss {

// e to the power of x; of bf16, as exact as these need it.
template <class T> __device__ __forceinline__ float exponential(float x);
template <> __device__ __forceinline__ float exponential<float>(float x) { return expf(x); }
template <> __device__ __forceinline__ float exponential<bf16>(float x) { return exp2_fast(x * 1.4426950408889634f); }

// `logits` (n, stride), of which `vocab` columns count; `targets` (n,); `losses` (n,) in nats; `margins` (n,),
// if given: by how much the largest logit is larger than the target's. With a `weight` other than 0 the logits become the gradient of the losses' sum times `weight`; columns from
// `vocab` on become 0. `cached`: the block has a row of shared memory. Blocks: n.
template <class T>
__device__ __forceinline__ void cross_entropy(T* logits, const u32* targets, float weight, float* losses, float* margins,
                                              u32 vocab, u32 stride, u32 cached) {
    constexpr int N = Vector<T>::N;
    DYNAMIC_SHARED(memory);
    T* const row = (T*)memory;
    logits += (u64)blockIdx.x * stride;
    const u32 target = targets[blockIdx.x];
    float most = -INFINITY, sum = 0.0f;
    for (u32 c = threadIdx.x * N; c < vocab; c += blockDim.x * N) {
        const Vector<T> v = *(const Vector<T>*)(logits + c);
        if (cached) *(Vector<T>*)(row + c) = v;
        float x[N], here = most;
#pragma unroll
        for (int i = 0; i < N; i++) {
            x[i] = c + i < vocab ? to_float(v.x[i]) : -INFINITY;
            here = fmaxf(here, x[i]);
        }
        sum *= exponential<T>(most - here);
#pragma unroll
        for (int i = 0; i < N; i++) sum += exponential<T>(x[i] - here);
        most = here;
    }
    const float all = block_max(most);
    sum = block_sum(most == -INFINITY ? 0.0f : sum * expf(most - all));
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = all + logf(sum) - to_float(logits[target]);
        if (margins) margins[blockIdx.x] = all - to_float(logits[target]);
    }
    if (weight == 0.0f) return;
    // The target's logit was read before anyone overwrites it.
    __syncthreads();
    const float scale = weight / sum;
    for (u32 c = threadIdx.x * N; c < stride; c += blockDim.x * N) {
        Vector<T> v = *(const Vector<T>*)((cached && c < vocab ? row : logits) + c);
#pragma unroll
        for (int i = 0; i < N; i++) {
            float p = c + i < vocab ? exponential<T>(to_float(v.x[i]) - all) * scale : 0.0f;
            if (c + i == target) p -= weight;
            v.x[i] = from_float<T>(p);
        }
        *(Vector<T>*)(logits + c) = v;
    }
}

} // namespace loss

extern "C" __global__ void cross_entropy_f32(float* logits, const u32* targets, float weight, float* losses,
                                             float* margins, u32 vocab, u32 stride, u32 cached) {
    loss::cross_entropy(logits, targets, weight, losses, margins, vocab, stride, cached);
}
extern "C" __global__ void cross_entropy_bf16(bf16* logits, const u32* targets, float weight, float* losses, float* margins,
                                              u32 vocab, u32 stride, u32 cached) {
    loss::cross_entropy(logits, targets, weight, losses, margins, vocab, stride, cached);
}

// Adds the sum of `x` (n,) to `total`. One block of 1024.
extern "C" __global__ void add_sum(const float* x, u32 n, double* total) {
    __shared__ double parts[1024];
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) sum += (double)x[i];
    parts[threadIdx.x] = sum;
    __syncthreads();
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) *total += parts[0];
}
