// Every kernel, on a CPU, by its name: a library for tests.
//   g++ -O2 -std=c++17 -DEMULATED -shared -fPIC emulate.cpp -o libemulate.so
#include "emulate.hpp"
#include "../kernels/device.cuh"
#include "../kernels/rows.cuh"
#include "../kernels/tiles.cuh"

// A file of kernels, and a line for each of them.

#include "../kernels/attention_f32.cu"
KERNEL(attention_forward_f32)
KERNEL(attention_backward_queries_f32)
KERNEL(attention_backward_keys_f32)

#include "../kernels/attention.cuh"

#include "../kernels/attention.cu"
KERNEL(attention_forward_bf16_d32)
KERNEL(attention_forward_bf16_d64)
KERNEL(attention_forward_bf16_d128)

#include "../kernels/wgmma.cuh"

#include "../kernels/attention_hopper.cu"
KERNEL(attention_forward_hopper_d64)
KERNEL(attention_forward_hopper_d128)

#include "../kernels/product_int8.cu"
KERNEL_OF_CLUSTERS(product_int8_bf16, 2)
KERNEL_OF_CLUSTERS(product_int8_f32, 2)

#include "../kernels/attention_delta.cu"
KERNEL(attention_delta_f32)
KERNEL(attention_delta_bf16)

#include "../kernels/attention_backward.cu"
KERNEL(attention_backward_kv_bf16_d32)
KERNEL(attention_backward_kv_bf16_d64)
KERNEL(attention_backward_kv_bf16_d128)
KERNEL(attention_backward_kv_bf16_d128_narrow)
KERNEL(attention_backward_q_bf16_d32)
KERNEL(attention_backward_q_bf16_d64)
KERNEL(attention_backward_q_bf16_d128)

#include "../kernels/attention_backward_hopper.cu"
KERNEL(attention_backward_kv_hopper_d64)
KERNEL(attention_backward_kv_hopper_d128)
KERNEL(attention_backward_q_hopper_d64)
KERNEL(attention_backward_q_hopper_d128)

#include "../kernels/norm.cu"
KERNEL(norm_f32_f32_2)
KERNEL(norm_f32_f32_4)
KERNEL(norm_f32_f32_8)
KERNEL(norm_f32_bf16_2)
KERNEL(norm_f32_bf16_4)
KERNEL(norm_f32_bf16_8)
KERNEL(norm_bf16_bf16_2)
KERNEL(norm_bf16_bf16_4)
KERNEL(norm_bf16_bf16_8)
KERNEL(norm_backward_f32_f32_2)
KERNEL(norm_backward_f32_f32_4)
KERNEL(norm_backward_f32_f32_8)
KERNEL(norm_backward_f32_bf16_2)
KERNEL(norm_backward_f32_bf16_4)
KERNEL(norm_backward_f32_bf16_8)
KERNEL(norm_backward_bf16_bf16_2)
KERNEL(norm_backward_bf16_bf16_4)
KERNEL(norm_backward_bf16_bf16_8)
KERNEL(sum_columns)

#include "../kernels/gate.cu"
KERNEL(gate_f32_2)
KERNEL(gate_f32_4)
KERNEL(gate_f32_8)
KERNEL(gate_bf16_2)
KERNEL(gate_bf16_4)
KERNEL(gate_bf16_8)
KERNEL(gate_backward_f32_2)
KERNEL(gate_backward_f32_4)
KERNEL(gate_backward_f32_8)
KERNEL(gate_backward_bf16_2)
KERNEL(gate_backward_bf16_4)
KERNEL(gate_backward_bf16_8)

#include "../kernels/rope.cu"
KERNEL(rope_f32)
KERNEL(rope_bf16)
KERNEL(rope_backward_f32)
KERNEL(rope_backward_bf16)

#include "../kernels/loss.cu"
KERNEL(cross_entropy_f32)
KERNEL(cross_entropy_bf16)
KERNEL(add_sum)

#include "../kernels/embedding.cu"
KERNEL(embed)
KERNEL(embed_backward)

#include "../kernels/weights.cu"
KERNEL(sum_magnitudes)
KERNEL(absmean)
KERNEL(ternarize_f32)
KERNEL(ternarize_bf16)
KERNEL(sum_squares)
KERNEL(sum_parts)
KERNEL(adamw)

#include "../kernels/adapters.cu"
KERNEL(unpack_bytes)
KERNEL(unpack_f32)
KERNEL(unpack_bf16)
KERNEL(convert_f32_f32)
KERNEL(convert_f32_bf16)
KERNEL(convert_bf16_f32)
KERNEL(convert_bf16_bf16)
KERNEL(adapters_f32)
KERNEL(adapters_bf16)
KERNEL(add_kept_f32)
KERNEL(add_kept_bf16)

#include "../kernels/muon.cu"
KERNEL(muon_direction)
KERNEL(muon_begin_f32)
KERNEL(muon_begin_bf16)
KERNEL(cast_f32)
KERNEL(cast_bf16)
KERNEL(muon_polynomial_f32)
KERNEL(muon_polynomial_bf16)
KERNEL(muon_add_f32)
KERNEL(muon_add_bf16)
KERNEL(muon_update)

// As cuLaunchKernel: `args[i]` points to the value of the i-th argument. 0, or 1 where no kernel has that name.
extern "C" int emulate_launch(const char* name, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 shared_bytes,
                              void** args) {
    return emulation::launch_named(name, {gx, gy, gz}, {bx, by, bz}, shared_bytes, args);
}
