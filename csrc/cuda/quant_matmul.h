#pragma once

#include "../rows.h"
#include "launch.h"

namespace fastllm::cuda {

// y (M, N) = x (M, K) w (N, K)^T + bias, w in 4 or 8 bits in the layout "x16" (fastllm/quant/tensor.py).
struct QuantMatmulArgs {
  const void* x;                   // (M, K), row starts at x_rows; int8 where there are x_groups
  const float* x_groups;           // (M, ceil(K / A), 2): int8_groups.cuh; null where x is not in integers yet
  const uint8_t* data;             // (ceil(N / 16), lines, 64)
  const void *scale, *minimum;     // (ceil(N / 16), groups, 16) of scale_dtype; minimum may be null
  const void* bias;                // (N), may be null
  void* y;                         // (M, N) contiguous
  float* workspace;                // quant_matmul_workspace() floats at a multiple of 16 bytes
  DType dtype, scale_dtype;        // dtype: of y and bias, and of an x of floats
  int64_t M, N, K, lines, groups;  // lines: of 64 bytes in a block of 16 rows
  Rows x_rows;
  int bits, group_size, zero;  // group_size: K where a row is one group
  bool int8_activations;       // x is integers, or is rounded to them first, for each token and group of A columns
};

// How many floats of memory the call needs for itself.
int64_t quant_matmul_workspace(const QuantMatmulArgs& args, int device);
void quant_matmul(const QuantMatmulArgs& args, Place place);

}  // namespace fastllm::cuda
