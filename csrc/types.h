// Sixteen-bit floats as the kernels see them: storage only.
#pragma once

#include <cstdint>

namespace fastllm {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace fastllm
