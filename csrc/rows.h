// Where the rows of a strided tensor start, for every kernel. Plain data and members only: shared by all rungs.
#pragma once

#include <cstdint>

#include "tensor.h"
#include "types.h"

#ifdef __CUDACC__
#define FASTLLM_ON_BOTH __host__ __device__
#else
#define FASTLLM_ON_BOTH
#endif

namespace fastllm {

// The leading dimensions of a tensor (..., K), folded where strides allow, so that row r starts at element offset(r).
struct Rows {
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};

  static Rows of(const TensorView& x) {  // on the CPU, baseline code: called from the bindings
    Rows rows;
    for (int i = 0; i < x.ndim - 1; ++i) {
      if (x.shape[i] == 1) continue;
      if (rows.ndim > 0 && rows.strides[rows.ndim - 1] == x.shape[i] * x.strides[i]) {
        rows.shape[rows.ndim - 1] *= x.shape[i];
        rows.strides[rows.ndim - 1] = x.strides[i];
      } else {
        rows.shape[rows.ndim] = x.shape[i];
        rows.strides[rows.ndim++] = x.strides[i];
      }
    }
    return rows;
  }
};

// static: a copy a rung of the CPU's, so that no rung's code is shared.
FASTLLM_ON_BOTH static inline int64_t row_offset(const Rows& rows, int64_t row) {
  if (rows.ndim == 1) return row * rows.strides[0];
  int64_t offset = 0;
  for (int i = rows.ndim - 1; i >= 0; --i) {
    offset += row % rows.shape[i] * rows.strides[i];
    row /= rows.shape[i];
  }
  return offset;
}

}  // namespace fastllm

// Calls body(T{}) with the C++ type of a floating dtype; of a cache's, which may be int8 too. In macros, because a
// template shared between rungs would not do.
#define FASTLLM_FOR_FLOAT(dtype, body) \
  switch (dtype) {                     \
    case ::fastllm::DType::f32:        \
      body(float{});                   \
      break;                           \
    case ::fastllm::DType::bf16:       \
      body(::fastllm::bf16{});         \
      break;                           \
    case ::fastllm::DType::f16:        \
      body(::fastllm::f16{});          \
      break;                           \
    default:                           \
      break;                           \
  }
#define FASTLLM_FOR_CACHE(dtype, body)   \
  if ((dtype) == ::fastllm::DType::i8) { \
    body(int8_t{});                      \
  } else {                               \
    FASTLLM_FOR_FLOAT(dtype, body)       \
  }
