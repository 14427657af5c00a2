#pragma once

#include "../rows.h"
#include "int8_output.h"
#include "launch.h"

namespace fastllm::cuda {

struct RmsNormArgs {
  const void *x, *weight, *residual;  // (rows, K), (K), (rows, K); weight and residual may be null
  void *y, *sum;                      // (rows, K) contiguous; sum = x + residual, null without a residual
  Int8Output int8;                    // what y becomes, where it has data
  DType dtype;                        // of all of them
  int64_t rows, K;
  Rows x_rows, residual_rows;
  float eps, offset;         // y = (x + residual) / rms * (weight + offset)
  bool round_before_weight;  // LLaMA rounds the normed value to dtype before the weight multiplies it, Gemma after
};

void rms_norm(const RmsNormArgs& args, Place place);

}  // namespace fastllm::cuda
