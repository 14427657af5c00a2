#pragma once

#include "../rows.h"
#include "isa.h"

namespace fastllm::cpu {

struct RmsNormArgs {
  const void* x;         // (rows, K), row starts at x_rows
  const void* weight;    // (K) or null
  const void* residual;  // (rows, K) or null
  void* y;               // (rows, K) contiguous; int8 if groups is there
  float* groups;         // (rows, ceil(K / group_size), 2) contiguous: scales and sums of y's integers; or null
  void* sum;             // (rows, K) contiguous: x + residual; null if residual is
  DType dtype;           // of all but an int8 y
  int64_t rows, K, group_size;
  Rows x_rows, residual_rows;
  float eps, offset;         // y = normed * (weight + offset)
  bool round_before_weight;  // LLaMA rounds the normed value to dtype before the weight multiplies it, Gemma does not
  int threads;
};

FASTLLM_KERNEL(rms_norm, RmsNormArgs, avx512_bf16)

}  // namespace fastllm::cpu
