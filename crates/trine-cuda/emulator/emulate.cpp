// Every kernel, on a CPU, by its name: a library for tests.
//   g++ -O2 -std=c++17 -DEMULATED -shared -fPIC emulate.cpp -o libemulate.so
#include "emulate.hpp"
#include "../kernels/device.cuh"

// A file of kernels, and a line for each of them.

#include "../kernels/attention_f32.cu"
KERNEL(attention_forward_f32)
KERNEL(attention_backward_queries_f32)
KERNEL(attention_backward_keys_f32)

#include "../kernels/attention.cu"
KERNEL(attention_forward_bf16_d32)
KERNEL(attention_forward_bf16_d64)
KERNEL(attention_forward_bf16_d128)

#include "../kernels/attention_hopper.cu"
KERNEL(attention_forward_hopper_d64)
KERNEL(attention_forward_hopper_d128)

#include "../kernels/attention_delta.cu"
KERNEL(attention_delta_f32)
KERNEL(attention_delta_bf16)

// As cuLaunchKernel: `args[i]` points to the value of the i-th argument. 0, or 1 where no kernel has that name.
extern "C" int emulate_launch(const char* name, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 shared_bytes,
                              void** args) {
    return emulation::launch_named(name, {gx, gy, gz}, {bx, by, bz}, shared_bytes, args);
}
