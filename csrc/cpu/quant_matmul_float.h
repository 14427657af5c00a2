#pragma once

#include "quant_matmul.h"

namespace fastllm::cpu {

inline constexpr int kPrefetchBytes = 1024;  // how far ahead of the weights
// Columns of K that are worked on together: bounds what L1 must hold.
inline constexpr int64_t kFloatSegment = 128;

// Bytes of scratch for M tokens: activations as floats, whole lines.
static inline int64_t quant_matmul_float_scratch(int64_t M, int64_t K) {
  return (M < kMaxTokens ? M : kMaxTokens) * padded_k(K) * static_cast<int64_t>(sizeof(float));
}

FASTLLM_KERNEL(quant_matmul_float, QuantMatmulArgs, avx512_bf16)

}  // namespace fastllm::cpu
