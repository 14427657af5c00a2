#pragma once

#include "../rows.h"
#include "isa.h"

namespace fastllm::cpu {

enum class Activation : int { silu, gelu_tanh };

struct GatedActivationArgs {
  const void *gate, *up;  // (rows, I), row starts at gate_rows and up_rows
  void* y;                // (rows, I) contiguous
  DType dtype;            // of all of them
  int64_t rows, I;
  Rows gate_rows, up_rows;
  Activation activation;
  int threads;
};

FASTLLM_KERNEL(gated_activation, GatedActivationArgs, avx512)

}  // namespace fastllm::cpu
