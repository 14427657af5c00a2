// TensorView: what crosses the boundary between Python and the kernels. No torch header, no ownership.
#pragma once

#include <cstdint>

#include "check.h"

namespace fastllm {

enum class DType : uint8_t { f32, bf16, f16, f64, u8, i8, i32, i64, boolean };
inline constexpr int kNumDTypes = 9;

inline const char* name(DType dtype) {
  constexpr const char* names[kNumDTypes] = {"float32", "bfloat16", "float16", "float64", "uint8",
                                             "int8",    "int32",    "int64",   "bool"};
  return names[static_cast<int>(dtype)];
}

inline constexpr int kMaxDims = 8;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  bool on_cpu = true;
  int device_index = 0;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements

  int64_t size(int dim) const { return shape[dim < 0 ? dim + ndim : dim]; }
  int64_t stride(int dim) const { return strides[dim < 0 ? dim + ndim : dim]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  // A dimension of size 1 (or an empty tensor) may carry any stride.
  bool contiguous_from(int dim) const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= dim; --i) {
      if (shape[i] != 1 && strides[i] != expected) return numel() == 0;
      expected *= shape[i];
    }
    return true;
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace fastllm
