// Products of codes and trits on the int8 tensor cores of sm_90a: whole numbers, exact in 32 bits, rounded once
// when they are stored.
//
// Blocks stay on their processors and take one tile of the result, 128 x 256, after another. One warp of a block
// has its factors copied to shared memory, 128 bytes of the depth at a time, as far ahead as there is room;
// two groups of four warps multiply them, 64 rows each. Copies and products wait for each other at barriers in
// shared memory, and so a group that stores its part of a tile holds up neither the copies nor the other group.
// Two blocks that are neighbours (a cluster) take tiles one under the other, and each copies one half of the 256
// columns for both of them, which halves most of what is read. (PTX ISA 8.0, sections on cp.async.bulk.tensor,
// mbarrier and wgmma; the division of labour is that of CUTLASS's kernels for Hopper.)
#if defined(EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a copy knows of a matrix in global memory: made by the host, by cuTensorMapEncodeTiled.
struct alignas(64) TensorMap {
    u64 words[16];
};

namespace product_int8 {

using namespace wgmma;

// ---- What else is new in sm_90a; the emulation is in emulate.hpp. ----
#ifndef EMULATED
// A barrier in shared memory, whose phase ends when `count` arrivals have come and all bytes that were expected.
__device__ __forceinline__ void barrier_init(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// After that, and before others use them.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}
// Arrives, and has the phase wait for so many bytes of copies.
__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Arrives at the barrier of the block of this number in the cluster. Not said to release to the cluster, which would
// wait for all that this thread has stored to global memory: what is read has been read when products are done.
__device__ __forceinline__ void barrier_arrive(u64* barrier, u32 block) {
    asm volatile("{.reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(shared_address(barrier)),
                 "r"(block)
                 : "memory");
}
// Waits until the phase of this parity has ended. (The phase before the first has the parity 1 and has ended.)
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
    asm volatile("{.reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;}" ::"r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}
// Until all threads of the cluster have come. Warps come whole.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The map's box of a matrix, from this row and column on, to shared memory, with zeros beyond the matrix; then
// its bytes have come to the barrier.
__device__ __forceinline__ void copy_box(u8* to, const TensorMap& map, u32 row, u32 column, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
                 "[%4];" ::"r"(shared_address(to)), "l"((u64)&map), "r"(column), "r"(row), "r"(shared_address(barrier))
                 : "memory");
}
// That, to the same place in each block of a cluster of two, and to its own barrier there.
__device__ __forceinline__ void copy_box_to_both(u8* to, const TensorMap& map, u32 row, u32 column, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)), "l"((u64)&map), "r"(column), "r"(row),
                 "r"(shared_address(barrier)), "h"((u16)3)
                 : "memory");
}
#endif

constexpr u32 ROWS = 128, COLUMNS = 256, DEPTH = 128; // of a tile, and of what is copied of its factors at a time
constexpr u32 BOX = 128 * DEPTH; // bytes; maps have boxes of 128 rows
constexpr u32 STAGE = 3 * BOX; // the rows' codes, and two boxes for the columns' trits
constexpr u32 STAGES = 4;
constexpr u32 GROUPS = 2, WARPS = 4 * GROUPS; // that multiply
constexpr u32 CLUSTER = 2; // blocks, which are neighbours
// Shared memory: to begin at 1024; the stages; 4096 bytes for each warp's stores; room for 16 barriers.
constexpr u32 SHARED = 1024 + STAGES * STAGE + WARPS * 4096 + 16 * sizeof(u64);
static_assert(SHARED == 230528 && 2 * STAGES + 1 <= 16, "as is said over the kernels");
constexpr u32 TALL = 8; // a band of tiles, the columns of which come one after the other, is as many works tall

// Works are tiles, or pairs of them one under the other: the first row and column of one.
struct Place {
    u32 row, column;
};
__device__ __forceinline__ Place place(u32 work, u32 tall, u32 wide, u32 rows) {
    const u32 band = work / (TALL * wide), rest = work % (TALL * wide);
    const u32 height = min(TALL, tall - band * TALL);
    return {(band * TALL + rest % height) * rows, rest / height * COLUMNS};
}

// Two sums that are neighbours in a row, as they are stored.
__device__ __forceinline__ void put(bf16* to, int x, int y) { *(u32*)to = pack_bf16((float)x, (float)y); }
__device__ __forceinline__ void put(float* to, int x, int y) {
    struct alignas(8) Pair {
        float x, y;
    };
    *(Pair*)to = Pair{(float)x, (float)y};
}

// A warp's sums, in the 16 rows from `row` and the 256 columns from `column` on. 256 bytes of each row at a time
// go through `room`, for stores of whole pieces of 16 bytes. Piece p of row r is in place p ^ r % 8 there, lest
// lanes meet in banks; 256 bytes and 8 rows being powers of two, places differ from a lane's first one in bits.
template <class T>
__device__ __forceinline__ void store(int (&c)[32][4], u8* room, T* y, u32 row, u32 column, u32 M, u32 N, u32 ldc) {
    constexpr u32 PIECE = 16 / sizeof(T), WIDTH = 16 * PIECE;
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const bool pieces = ldc % PIECE == 0 && (u64)y % 16 == 0;
    const bool inside = pieces && row + 16 <= M && column + COLUMNS <= N;
    row += lane / 16; // that this lane stores, and every other one after it
    column += lane % 16 * PIECE;
    y += (u64)row * ldc + column;
#pragma unroll
    for (u32 done = 0; done < COLUMNS; done += WIDTH) {
        // Sums leave few registers: nothing is to be computed, or kept, for later.
        int to = g * 256 + ((u32)(2 * t * sizeof(T)) ^ g * 16), from = lane / 16 * 256 + (lane % 16 ^ lane / 16) * 16;
        keep_place(to);
        keep_place(from);
#pragma unroll
        for (u32 n = 0; n < WIDTH / 8; n++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) keep_place(c[done / 8 + n][i]);
#pragma unroll
        for (u32 n = 0; n < WIDTH / 8; n++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const int* x = &c[done / 8 + n][2 * half];
                put((T*)(room + (to ^ n * 8 * sizeof(T)) + half * (8 * 256)), x[0], x[1]);
            }
        __syncwarp();
        if (inside) {
#pragma unroll 4
            for (u32 i = 0; i < 16; i += 2)
                *(Words*)(y + (u64)i * ldc + done) = *(const Words*)(room + (from ^ i % 8 * 16) + i * 256);
        } else {
#pragma unroll 1
            for (u32 i = 0; i < 16 && row + i < M; i += 2) {
                const T* x = (const T*)(room + (from ^ i % 8 * 16) + i * 256);
                T* at = y + (u64)i * ldc + done;
                if (pieces && column + done + PIECE <= N) *(Words*)at = *(const Words*)x;
                else
#pragma unroll 1
                    for (u32 j = 0; j < PIECE && column + done + j < N; j++) at[j] = x[j];
            }
        }
        __syncwarp();
    }
}

template <class T>
__device__ __forceinline__ void multiply(const TensorMap& codes, const TensorMap& trits, T* y, u32 M, u32 N, u32 K,
                                         u32 ldc) {
    DYNAMIC_SHARED(memory);
    u8* const stages = memory + before_tiles(shared_address(memory));
    u8* const rooms = stages + STAGES * STAGE; // for stores
    u64* const full = (u64*)(rooms + WARPS * 4096); // a barrier of each stage: its bytes have come,
    u64* const empty = full + STAGES; // and it may be written
    u64* const begun = empty + STAGES; // the first group has begun
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = blockIdx.x % CLUSTER;
    const u32 tall = (M + ROWS * CLUSTER - 1) / (ROWS * CLUSTER), wide = (N + COLUMNS - 1) / COLUMNS;
    const u32 clusters = gridDim.x / CLUSTER, first = blockIdx.x / CLUSTER;

    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; s++) {
            barrier_init(full + s, 1);
            barrier_init(empty + s, WARPS * CLUSTER); // both blocks read what comes to both
        }
        barrier_init(begun, WARPS / GROUPS);
        barrier_init_fence();
    }
    cluster_barrier();

    u32 step = 0; // pieces of the depth, of all tiles
    if (warp == WARPS) {
        if (lane == 0)
            for (u32 work = first; work < tall * wide; work += clusters) {
                const Place at = place(work, tall, wide, ROWS * CLUSTER);
                for (u32 k = 0; k < K; k += DEPTH, step++) {
                    const u32 s = step % STAGES;
                    u8* const to = stages + s * STAGE;
                    barrier_wait(empty + s, step / STAGES % 2 ^ 1);
                    barrier_expect(full + s, STAGE);
                    copy_box(to, codes, at.row + own * ROWS, k, full + s);
                    copy_box_to_both(to + (1 + own) * BOX, trits, at.column + own * 128, k, full + s);
                }
            }
        __syncwarp();
    } else {
        const u32 group = warp / 4;
        // A warp needs nothing more of the stage of this step.
        const auto release = [&](u32 step) {
            if (lane < CLUSTER) barrier_arrive(empty + step % STAGES, lane);
        };
        // One group begins a piece of the depth later, so that it multiplies while the other one stores.
        if (group == 1 && first < tall * wide) barrier_wait(begun, 0);
        for (u32 work = first; work < tall * wide; work += clusters) {
            int c[32][4];
            for (u32 k = 0; k < K; k += DEPTH, step++) {
                const u32 s = step % STAGES;
                const u64 x = matrix<ROWS>(shared_address(stages + s * STAGE + group * (BOX / 2)));
                const u64 z = matrix<COLUMNS>(shared_address(stages + s * STAGE + BOX));
                barrier_wait(full + s, step / STAGES % 2);
                group_fence();
#pragma unroll
                for (u32 i = 0; i < DEPTH / 32; i++)
                    group_multiply(c, further(x, 32 * i), further(z, 32 * i), k + i > 0);
                group_commit();
                group_wait<1>();
                if (k > 0) release(step - 1);
                if (step == 0 && group == 0 && lane == 0) barrier_arrive(begun, own);
            }
            group_wait<0>();
            keep_place(c);
            release(step - 1);
            const Place at = place(work, tall, wide, ROWS * CLUSTER);
            store(c, rooms + warp * 4096, y, at.row + own * ROWS + warp * 16, at.column, M, N, ldc);
        }
    }
    // A block stays while the other one may arrive at its barriers.
    cluster_barrier();
}

} // namespace product_int8

// y (M, N), rows ldc apart, = codes (M, K) times trits (N, K) transposed; codes and trits are given by maps of
// boxes of 128 rows and 128 bytes in which pieces of 16 change places within 128 bytes. At least one element of
// each dimension. Grid (a multiple of the cluster, at most as many blocks as run at once), 288 threads,
// 230,528 bytes of dynamic shared memory.
#define PRODUCT_INT8(name, T)                                                                                        \
    extern "C" __global__ void __cluster_dims__(product_int8::CLUSTER, 1, 1) __launch_bounds__(288, 1)               \
    name(const __grid_constant__ TensorMap codes, const __grid_constant__ TensorMap trits, T* __restrict__ y, u32 M, \
         u32 N, u32 K, u32 ldc) {                                                                                    \
        product_int8::multiply(codes, trits, y, M, N, K, ldc);                                                       \
    }
PRODUCT_INT8(product_int8_bf16, bf16)
PRODUCT_INT8(product_int8_f32, float)

#endif
