// What both attention kernels are given. Plain data only: shared by all rungs.
#pragma once

#include <cstdint>

#include "../tensor.h"

namespace fastllm::cpu {

// o[b, h, t] = sum over s of softmax_s(scale q[b, h, t] . k[b, h / G, s]) v[b, h / G, s], with G = H / Hk query heads
// to a key/value head. Strides are in elements; the last dimension of q, k, v and o has stride 1.
struct AttentionArgs {
  const void* q;                                   // (B, H, T, D)
  const void* k;                                   // (B, Hk, S, D)
  const void* v;                                   // (B, Hk, S, D)
  void* o;                                         // (B, H, T, D)
  DType dtype;                                     // of q and o
  DType kv_dtype;                                  // of k and v: dtype, bf16 or f16 with f32, or i8
  const float *k_scale, *v_scale;                  // (B, Hk, S): what a step of i8 is worth in each row; else null
  int64_t k_scale_strides[2], v_scale_strides[2];  // of the first two dimensions; the last has 1
  int64_t B, H, Hk, T, S, D;
  int64_t q_strides[3], k_strides[3], v_strides[3], o_strides[3];  // of the first three dimensions
  const void* mask;                                                // (B, H, T, S) boolean, f32, bf16 or f16; or null
  DType mask_dtype;
  int64_t mask_strides[4];  // 0 where broadcast
  const void* kv_lens;      // (B) i32 or i64, each in [0, S]; or null: all are S
  DType kv_lens_dtype;
  int64_t kv_lens_stride;
  const float* sinks;  // (H) or null
  bool causal;
  int64_t window;  // in [1, S + T]; 0: none
  float scale;
  float softcap;  // 0: none
  int threads;
  bool bf16_dots;  // whether the kernel for many queries may use them, where the rung has them
};

}  // namespace fastllm::cpu
