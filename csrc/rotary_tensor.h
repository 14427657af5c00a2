// One of q, k, v on its way through rotary, on the CPU and on GPUs. Plain data and members only: shared by all rungs.
#pragma once

#include "tensor.h"

namespace fastllm {

// (B, heads, T, D) and where its result goes. Strides in elements, of (batch, head, token); lanes have 1.
struct RotaryTensor {
  const void* in;
  void* out;
  DType out_dtype;
  int heads;
  int64_t in_strides[3], out_strides[3];
  bool rotated;  // v is not
  bool slotted;  // token t of sequence b goes to row slots[b, t] of a cache rather than to row t
  float* scale;  // (batch, head, token) of an int8 cache; else null
  int64_t scale_strides[3];

  static RotaryTensor of(const TensorView& in, const TensorView& out, bool rotated, bool slotted) {
    RotaryTensor tensor{};
    tensor.in = in.data;
    tensor.out = out.data;
    tensor.out_dtype = out.dtype;
    tensor.heads = static_cast<int>(in.shape[1]);
    tensor.rotated = rotated;
    tensor.slotted = slotted;
    for (int i = 0; i < 3; ++i) {
      tensor.in_strides[i] = in.strides[i];
      tensor.out_strides[i] = out.strides[i];
    }
    return tensor;
  }

  void set_scale(const TensorView& of_cache) {
    scale = of_cache.as<float>();
    for (int i = 0; i < 3; ++i) scale_strides[i] = of_cache.strides[i];
  }
};

}  // namespace fastllm
