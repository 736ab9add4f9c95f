// Matrices of bf16 on their way to tiles in shared memory, and from tensor cores back. Pieces of 16 bytes change places
// in a tile, so that those that are read at once lie in different banks: differently for mma.sync and for wgmma.

// The thread's part of ROWS rows of D columns, from row `first` on of a matrix of width d, to a tile, without waiting
// for them; zeros beyond row T and column d. A thread has piece threadIdx.x % (D / 8) of rows threadIdx.x / (D / 8) and
// on; `to` is where the first of them goes, and rows that are a multiple of 8 apart are PITCH elements a row apart.
template <u32 D, u32 ROWS, u32 THREADS, u32 PITCH>
__device__ __forceinline__ void copy_pieces(bf16* to, const bf16* x, u32 first, u32 T, u32 d, u32 ld) {
    constexpr u32 PIECES = D / 8, STEP = THREADS / PIECES;
    static_assert(THREADS % PIECES == 0 && STEP % 8 == 0, "a thread's places are PITCH a row apart");
    const u32 row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    const bf16* from = x + ((u64)(first + row) * ld + piece * 8);
    const u32 end = 8 * piece < d ? T : 0;
#pragma unroll
    for (u32 i = 0; i < ROWS; i += STEP)
        if (i + STEP <= ROWS || i + row < ROWS) copy_async(to + i * PITCH, from + (u64)i * ld, first + row + i < end);
}

// 16 rows and 8 N columns of a warp's accumulators, to a tile: times x in rows 0 to 7, times y in rows 8 to 15.
// `place` says where a piece of 16 bytes of one of the rows goes.
template <u32 N, class Place>
__device__ __forceinline__ void put_rows(const float (&c)[N][4], float x, float y, Place place) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 n = 0; n < N; n++) {
        *(u32*)(place(g, n) + 2 * t) = pack_bf16(c[n][0] * x, c[n][1] * x);
        *(u32*)(place(g + 8, n) + 2 * t) = pack_bf16(c[n][2] * y, c[n][3] * y);
    }
}

// ROWS rows of a tile to global memory by a warp, PIECES pieces of 16 bytes of each, from `first` on: of those that
// exist, which are `count` rows and d columns. `out` is where the first row begins, `place` as for put_rows.
template <u32 ROWS, u32 PIECES, class Place>
__device__ __forceinline__ void store_pieces(bf16* out, u32 ld, u32 count, u32 first, u32 d, Place place) {
#pragma unroll 4
    for (u32 i = threadIdx.x % 32; i < ROWS * PIECES; i += 32) {
        const u32 row = i / PIECES, piece = first + i % PIECES;
        if (row < count && piece * 8 < d)
            *(Words*)(out + (u64)row * ld + piece * 8) = *(const Words*)place(row, piece);
    }
}

// The 16 columns from 8 n of a warp's accumulators, as the left factor of a product.
template <u32 N> __device__ __forceinline__ void as_left(u32 (&a)[4], const float (&c)[N][4], u32 n) {
#pragma unroll
    for (u32 j = 0; j < 4; j++) a[j] = pack_bf16(c[n + j / 2][j % 2 * 2], c[n + j / 2][j % 2 * 2 + 1]);
}
