// Rows of the embedding, and their gradients.

// `x` (M, width): the rows of `embedding` (vocab, width), of bf16 where `narrow`, for `ids` (M,).
// Blocks: M.
extern "C" __global__ void embed(const void* embedding, u32 narrow, const u32* ids, float* x, u32 width) {
    const u64 from = (u64)ids[blockIdx.x] * width, to = (u64)blockIdx.x * width;
    for (u32 c = threadIdx.x * 4; c < width; c += blockDim.x * 4) {
        float v[4];
        if (narrow)
            load4((const bf16*)embedding + from + c, v);
        else
            load4((const float*)embedding + from + c, v);
        store4(x + to + c, v);
    }
}

// Adds to the gradient of the embedding (vocab, width) the rows of `dx` (M, width). The rows that belong to
// the block's id, which is `ids[b]`, are `rows[starts[b]..starts[b + 1]]`; they are added in this order.
// Blocks: as many as there are different ids.
extern "C" __global__ void embed_backward(const float* dx, const u32* ids, const u32* starts, const u32* rows,
                                          float* gradient, u32 width) {
    const u64 to = (u64)ids[blockIdx.x] * width;
    const u32 first = starts[blockIdx.x], last = starts[blockIdx.x + 1];
    for (u32 c = threadIdx.x * 4; c < width; c += blockDim.x * 4) {
        float sum[4];
        load4(gradient + to + c, sum);
        for (u32 i = first; i < last; i++) {
            float v[4];
            load4(dx + (u64)rows[i] * width + c, v);
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] += v[j];
        }
        store4(gradient + to + c, sum);
    }
}
