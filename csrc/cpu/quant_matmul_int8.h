#pragma once

#include "quant_matmul.h"

namespace fastllm::cpu {

// Columns of K that are quantised, and summed, before the sums join the total: bounds the error and what L1 must hold.
inline constexpr int64_t kMaxSegment = 640;
// K in equal segments of whole groups of activations, the last one shorter at most.
static inline int64_t int8_segment(int64_t K) {
  const int64_t segments = (K + kMaxSegment - 1) / kMaxSegment;
  return round_up((K + segments - 1) / segments, 128);
}

// Tokens that are quantised together, and then divided among threads: at most kMaxTokens at a time for each.
inline constexpr int64_t kPassTokens = 512;

// One group of one token's activations.
struct ActivationGroup {
  float scale;    // real value per integer step, kSmaller where the weights have one scale
  float sum;      // scale * (sum of the integers): what the weights' offset multiplies
  int32_t start;  // -center * (sum of the integers): what the integer sums start from
};

// Activations share a scale along as many columns as weights do, but never along more than 128.
static inline int64_t activation_group(int64_t group_size) {
  return group_size == 32 || group_size == 64 ? group_size : 128;
}

// Bytes of scratch for M tokens: up to two bytes an activation, whole segments.
static inline int64_t quant_matmul_int8_scratch(int64_t M, int64_t K) {
  const int64_t tokens = M < kPassTokens ? M : kPassTokens;
  return tokens * round_up(K, int8_segment(K)) * 2 +
         round_up(tokens * ((K + 31) / 32) * static_cast<int64_t>(sizeof(ActivationGroup)), kLineBytes);
}

FASTLLM_KERNEL(quant_matmul_int8, QuantMatmulArgs, avx512_vnni)

}  // namespace fastllm::cpu
