#pragma once

#include "../rows.h"
#include "isa.h"

namespace fastllm::cpu {

enum class Activation : int { silu, gelu_tanh };

struct GatedActivationArgs {
  const void *gate, *up;  // (rows, I), row starts at gate_rows and up_rows
  void* y;                // (rows, I) contiguous; int8 if groups is there
  float* groups;          // (rows, ceil(I / group_size), 2) contiguous: scales and sums of y's integers; or null
  DType dtype;            // of all but an int8 y
  int64_t rows, I, group_size;
  Rows gate_rows, up_rows;
  Activation activation;
  bool past_caches;  // where y goes, if it is not int8
  int threads;
};

FASTLLM_KERNEL(gated_activation, GatedActivationArgs, avx512_bf16)

}  // namespace fastllm::cpu
