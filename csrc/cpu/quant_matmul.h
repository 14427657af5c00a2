// What the two quant_matmul kernels share: arguments, and how they cut the work. Plain data only: seen by all rungs.
//
// w[n, k] = (q[n, k] - zero) * scale[n, k / group_size] + minimum[n, k / group_size], stored in layout "x16"
// (fastllm/quant/tensor.py): blocks of 16 rows, lines of 64 bytes, of which 4 bytes belong to each row.
#pragma once

#include <cstdint>

#include "../rows.h"
#include "isa.h"

namespace fastllm::cpu {

struct QuantMatmulArgs {
  const void* x;          // (M, K), row starts at x_rows; int8 if x_groups is there
  const float* x_groups;  // (M, G, 2): scales and sums of x's integers; or null
  const uint8_t* data;    // (blocks, lines, 64)
  const void* scale;      // (blocks, G, 16)
  const void* minimum;    // like scale, or null
  const void* bias;       // (N) or null
  void* y;                // (M, N) contiguous
  DType dtype;            // of y, bias and a float x
  DType scale_dtype;      // of scale and minimum
  Rows x_rows;
  int64_t M, N, K, group_size;
  int bits, zero, threads;
  bool bf16_dots;  // whether the kernel for float activations may use them, where the rung has them
  char* scratch;   // 64-byte aligned; the kernel's _scratch function says how much
};

inline constexpr int64_t kBlockRows = 16;
inline constexpr int64_t kLineBytes = 64;
// Tokens that share one pass over the weights. Their activations for one segment of K stay in L2, their sums in L1.
inline constexpr int64_t kMaxTokens = 256;

// static: a copy a rung, so that no rung's code is shared.
static inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
static inline int64_t padded_k(int64_t K) { return round_up(K, 8); }

}  // namespace fastllm::cpu
