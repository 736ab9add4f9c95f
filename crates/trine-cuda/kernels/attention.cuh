// What the kernels of attention on tensor cores have in common.
namespace attention {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// Which part of the result a block has. Blocks start in the order of their numbers: of SECTION heads (of all sequences)
// first all tiles 0, then all tiles 1 and so on. So those with the most work begin first, and no more is in use at a
// time than the L2 cache holds.
struct Part {
    u32 tile, head, sequence;
};
__device__ __forceinline__ Part part_of_block() {
    constexpr u32 SECTION = 64;
    const u32 number = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const u32 section = number / (SECTION * gridDim.x), rest = number % (SECTION * gridDim.x);
    const u32 heads = min(SECTION, gridDim.y * gridDim.z - section * SECTION);
    const u32 head = section * SECTION + rest % heads;
    return {rest / heads, head % gridDim.y, head / gridDim.y};
}

// ---- For gradients ----

// What a tile of queries needs of each row. Past the end lse and delta are 0, as are Q and dO; so dP and dS are.
template <u32 QUERIES> struct Rows {
    float lse[QUERIES];
    float delta[QUERIES];
    u32 start[QUERIES]; // the first key that is seen
};
// What the Rows have for two columns that are neighbours.
struct alignas(8) Two {
    float x, y;
};
struct alignas(8) TwoWords {
    u32 x, y;
};

// Asks for the Rows from row `query` of a sequence on; starts that are null are left as they are.
template <u32 QUERIES, u32 THREADS>
__device__ __forceinline__ void copy_numbers(Rows<QUERIES>& to, const float* lse, const float* delta, const u32* starts,
                                             u32 query, u32 T) {
#pragma unroll
    for (u32 j = 0; j < 2 * QUERIES; j += THREADS) {
        const u32 i = j + threadIdx.x, row = query + i % QUERIES;
        if (j + THREADS > 2 * QUERIES && i >= 2 * QUERIES) break;
        const float* const from = i < QUERIES ? lse : delta;
        copy_word_async((i < QUERIES ? to.lse : to.delta) + i % QUERIES, row < T ? from + row : from, row < T);
        if (i < QUERIES && starts) copy_word_async(to.start + i, starts + min(row, T - 1), true);
    }
}

// Tiles of QUERIES queries see some of the keys before `end` from tile `first` to before this one: starts never fall,
// so those whose first row does not begin after the last key are the first ones. For all threads of a block.
template <u32 QUERIES, u32 THREADS>
__device__ __forceinline__ u32 end_of_sight(const u32* starts, u32 row0, u32 first, u32 T, u32 end) {
    const u32 tiles = (T + QUERIES - 1) / QUERIES;
    u32 last = tiles;
    if (starts) {
        float seen = 0.0f;
        for (u32 i = first + threadIdx.x; i < tiles; i += THREADS)
            if (starts[row0 + i * QUERIES] < end) seen += 1.0f;
        last = first + (u32)block_sum(seen);
    }
    return last;
}

} // namespace attention
