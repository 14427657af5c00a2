#pragma once

#include "../rows.h"
#include "int8_output.h"
#include "launch.h"

namespace fastllm::cuda {

struct GatedActivationArgs {
  const void *gate, *up;  // (rows, I), row starts at gate_rows and up_rows
  void* y;                // (rows, I) contiguous
  Int8Output int8;        // what y becomes, where it has data
  DType dtype;            // of all of them
  int64_t rows, I;
  Rows gate_rows, up_rows;
  bool gelu_tanh;  // else silu
};

void gated_activation(const GatedActivationArgs& args, Place place);

}  // namespace fastllm::cuda
