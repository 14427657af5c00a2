#pragma once

#include "../rotary_tensor.h"
#include "launch.h"

namespace fastllm::cuda {

struct RotaryArgs {
  RotaryTensor tensors[3];
  int num_tensors;
  DType dtype;  // of every `in`
  int64_t B, T;
  int D, R;                // the first R lanes of D are rotated, the others copied
  const void *cos, *sin;   // rows of R
  DType table_dtype;       // of both: f32 or dtype
  int64_t table_rows;      // of cos and sin
  int64_t cos_strides[2];  // of (batch, row)
  int64_t sin_strides[2];
  const int64_t* positions;  // (B, T): which row of cos and sin; null: row t
  int64_t positions_strides[2];
  const int64_t* slots;  // (B, T), for slotted tensors
  int64_t slots_strides[2];
  int64_t cache_rows;  // slots that a sequence has
  const void*
      block_table;  // (B, max_pages) int32 or int64: slot s is row s % page of page block_table[b, s / page] of the
  DType block_table_dtype;  // caches, whose batch stride is then a page's; null for caches in one piece
  int64_t block_table_strides[2];
  int64_t page, num_pages;
  bool interleaved;  // pairs are lanes (2i, 2i + 1), else (i, i + R / 2)
};

constexpr int kMaxRotaryD = 512;

// A position or a slot is read on the GPU: one outside of its table gives NaN, one outside of its cache writes nothing.
void rotary(const RotaryArgs& args, Place place);

}  // namespace fastllm::cuda
