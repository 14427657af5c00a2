#pragma once

#include "../rotary_tensor.h"
#include "isa.h"

namespace fastllm::cpu {

struct RotaryArgs {
  RotaryTensor tensors[3];
  int num_tensors;
  DType dtype;  // of every `in`
  int64_t B, T, D;
  int64_t R;               // the first R lanes of D are rotated, the others copied
  const void *cos, *sin;   // rows of R
  DType table_dtype;       // of both: f32 or dtype
  int64_t cos_strides[2];  // of (batch, row)
  int64_t sin_strides[2];
  const int64_t* positions;  // (B, T): which row of cos and sin; null: row t
  int64_t positions_strides[2];
  const int64_t* slots;  // (B, T), for slotted tensors
  int64_t slots_strides[2];
  bool interleaved;  // pairs are lanes (2i, 2i + 1), else (i, i + R / 2)
  int threads;
};

constexpr int64_t kMaxInt8Row = 512;  // the largest D that goes to an int8 cache

FASTLLM_KERNEL(rotary, RotaryArgs, avx512_bf16)

}  // namespace fastllm::cpu
