// Every kernel, on a CPU, by its name: a library for tests.
//   g++ -O2 -std=c++17 -DEMULATED -shared -fPIC emulate.cpp -o libemulate.so
#include "emulate.hpp"
#include "../kernels/device.cuh"

// A file of kernels, and a line for each of them.

#include "../kernels/attention_backward.cu"
KERNEL(attention_backward_kv_bf16_d32)
KERNEL(attention_backward_kv_bf16_d64)
KERNEL(attention_backward_kv_bf16_d128)
KERNEL(attention_backward_kv_bf16_d128_narrow)
KERNEL(attention_backward_q_bf16_d32)
KERNEL(attention_backward_q_bf16_d64)
KERNEL(attention_backward_q_bf16_d128)

// As cuLaunchKernel: `args[i]` points to the value of the i-th argument. 0, or 1 where no kernel has that name.
extern "C" int emulate_launch(const char* name, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 shared_bytes,
                              void** args) {
    return emulation::launch_named(name, {gx, gy, gz}, {bx, by, bz}, shared_bytes, args);
}
