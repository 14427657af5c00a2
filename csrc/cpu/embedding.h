#pragma once

#include "../rows.h"
#include "isa.h"

namespace fastllm::cpu {

struct EmbeddingArgs {
  const int64_t* ids;   // (count), checked against N
  const uint8_t* data;  // layout "x16", see fastllm/quant/tensor.py
  const void* scale;    // (N16, groups, 16) of scale_dtype
  const void* minimum;  // the same, or null
  void* y;              // (count, K) contiguous
  DType scale_dtype, y_dtype;
  int64_t count, K, group_size;
  int bits, zero, threads;
};

FASTLLM_KERNEL(embedding, EmbeddingArgs, scalar)

}  // namespace fastllm::cpu
