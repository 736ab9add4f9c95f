// Checks the emulator itself against plain loops.
//   g++ -O2 -std=c++17 -DEMULATED check_emulator.cpp -o check_emulator -pthread && ./check_emulator
// With an argument it does one of the things that must be refused: `barrier`, `lanes`, `kinds`, `align`, `words`.
#include "emulate.hpp"
#include "../kernels/device.cuh"

extern "C" __global__ void sums(const float* x, float* y, u32 n, float more) {
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) sum += x[(u64)blockIdx.x * n + i];
    const float total = block_sum(sum), most = block_max(sum);
    float* row = y + (u64)blockIdx.x * 4;
    if (threadIdx.x == blockDim.x - 1) row[0] = total + more, row[1] = most;
    const u32 lane = threadIdx.x % 32;
    const int a = __shfl_sync(ALL_LANES, (int)lane * 3, 5), b = __shfl_down_sync(ALL_LANES, (int)lane, 4);
    const u32 c = __shfl_xor_sync(ALL_LANES, lane, 9);
    if (threadIdx.x == 7) row[2] = a + 100 * b + 10000.0f * c;
    if (threadIdx.x == 30) row[3] = b;
}

// c (16 x 8) = a (16 x 16) b, where b is (16 x 8), or its transpose (8 x 16).
extern "C" __global__ void product(const bf16* a, const bf16* b, const bf16* b_transposed, float* c, int wait) {
    DYNAMIC_SHARED(memory);
    bf16* sa = (bf16*)memory;
    bf16 *sb = sa + 256, *st = sb + 128;
    const u32 lane = threadIdx.x, g = lane / 4, t = lane % 4;
    copy_async(sa + 8 * lane, a + 8 * lane, true);
    copy_async(sb + 8 * (lane % 16), b + 8 * (lane % 16), true);
    copy_commit();
    copy_async(st + 8 * (lane % 16), b_transposed + 8 * (lane % 16), true);
    copy_commit();
    if (wait) copy_wait<0>();
    else copy_wait<1>();
    __syncthreads();
    u32 fa[4], fb[4], ft[4];
    load_matrices(fa, sa + (lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8);
    load_matrices_transposed(fb, sb + lane % 16 * 8);
    load_matrices(ft, st + lane % 8 * 16 + lane / 8 % 2 * 8);
    float x[4] = {}, y[4] = {};
    multiply_add(x, fa, fb[0], fb[1]);
    multiply_add(y, fa, ft[0], ft[1]);
    for (int i = 0; i < 4; i++) {
        float* p = c + (g + i / 2 * 8) * 8 + 2 * t + i % 2;
        p[0] = x[i];
        p[128] = y[i];
    }
}

extern "C" __global__ void wrong(int what, void* memory) {
    if (what == 0 && threadIdx.x > 3) __syncthreads();
    if (what == 1 && threadIdx.x != 3) __syncwarp();
    if (what == 2) threadIdx.x < 3 ? __syncwarp() : (void)__shfl_xor_sync(ALL_LANES, 1, 1);
    u32 r[4];
    DYNAMIC_SHARED(shared);
    if (what == 3) load_matrices(r, shared + 8);
    if (what == 4) *(Words*)((u8*)memory + 16) = *(Words*)((u8*)memory + 4);
}

KERNEL(sums)
KERNEL(product)
KERNEL(wrong)

static int errors = 0;
static void expect(const char* what, float got, float right) {
    if (!(fabsf(got - right) <= 1e-4f * (1 + fabsf(right)))) {
        if (errors++ < 20) printf("%s: %g, should be %g\n", what, got, right);
    }
}

int main(int count, char** words) {
    if (count > 1) {
        const char* names[] = {"barrier", "lanes", "kinds", "align", "words"};
        alignas(16) char memory[64] = {};
        void* p = memory;
        for (int i = 0; i < 5; i++)
            if (!strcmp(words[1], names[i])) {
                void* args[] = {&i, &p};
                emulation::launch_named("wrong", {1, 1, 1}, {64, 1, 1}, 256, args);
            }
        return 0;
    }
    u32 n = 1000;
    float more = 0.5f;
    std::vector<float> x(50 * n), y(200);
    for (size_t i = 0; i < x.size(); i++) x[i] = (float)((i * 7919) % 1009) / 1009 - 0.4f;
    const float *px = x.data();
    float* py = y.data();
    void* args[] = {&px, &py, &n, &more};
    for (u32 threads : {32u, 96u, 256u, 1024u}) {
        emulation::launch_named("sums", {50, 1, 1}, {threads, 1, 1}, 0, args);
        for (int row = 0; row < 50; row++) {
            float total = 0, most = -INFINITY;
            for (u32 i = 0; i < threads; i++) {
                float part = 0;
                for (u32 j = i; j < n; j += threads) part += x[row * n + j];
                total += part;
                most = fmaxf(most, part);
            }
            expect("block_sum", y[4 * row], total + more);
            expect("block_max", y[4 * row + 1], most);
            expect("shuffles", y[4 * row + 2], 15 + 1100 + 140000);
            expect("shuffle down past the end", y[4 * row + 3], 30);
        }
    }
    alignas(16) bf16 a[256], b[128], bt[128];
    float c[256];
    for (int i = 0; i < 256; i++) a[i] = from_float<bf16>((i * 37 % 101) / 50.0f - 1);
    for (int i = 0; i < 128; i++) b[i] = bt[i % 8 * 16 + i / 8] = from_float<bf16>((i * 53 % 97) / 48.0f - 1);
    for (int wait : {1, 0}) {
        const bf16 *pa = a, *pb = b, *pt = bt;
        float* pc = c;
        void* args[] = {&pa, &pb, &pt, &pc, &wait};
        emulation::launch_named("product", {1, 1, 1}, {32, 1, 1}, 1024, args);
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                float sum = 0;
                for (int k = 0; k < 16; k++) sum += to_float(a[i * 16 + k]) * to_float(b[k * 8 + j]);
                expect("a b", c[i * 8 + j], sum);
                if (wait) expect("a b, b transposed", c[128 + i * 8 + j], sum);
                else if (c[128 + i * 8 + j] == c[128 + i * 8 + j]) expect("a copy that nobody waited for", 0, 1);
            }
    }
    if (emulation::launch_named("nothing", {1, 1, 1}, {1, 1, 1}, 0, nullptr) != 1) expect("no such kernel", 0, 1);
    printf(errors ? "%d errors\n" : "all right\n", errors);
    return errors != 0;
}
