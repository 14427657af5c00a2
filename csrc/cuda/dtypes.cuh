// The 16-bit floats, how they become fp32 and back, and rows of them in 16-byte accesses.
#pragma once

#include "../rows.h"
#include "ptx.cuh"

namespace fastllm::cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float widen(f16 x) { return ptx::f32_of_f16(x.bits); }
__device__ __forceinline__ float widen(int8_t x) { return static_cast<float>(x); }

// Rounds to the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return {static_cast<uint16_t>(ptx::bf16x2_of_f32(x, 0.0f))};
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) {
  return {static_cast<uint16_t>(ptx::f16x2_of_f32(x, 0.0f))};
}

// Two elements in one register, the first in the low half.
template <typename T>
__device__ __forceinline__ unsigned narrow2(float low, float high);
template <>
__device__ __forceinline__ unsigned narrow2<bf16>(float low, float high) {
  return ptx::bf16x2_of_f32(low, high);
}
template <>
__device__ __forceinline__ unsigned narrow2<f16>(float low, float high) {
  return ptx::f16x2_of_f32(low, high);
}

// N elements that are loaded and stored with one instruction where N * sizeof(T) is 16 (or 8, 4): the address must be a
// multiple of that.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};
template <typename T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <typename T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Whether vectors of `elements` can be used: bytes of an address, strides of rows.
inline bool is_aligned(const void* address, int64_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }
inline bool rows_are_aligned(const Rows& rows, int elements) {
  for (int i = 0; i < rows.ndim; ++i) {
    if (rows.strides[i] % elements != 0) return false;
  }
  return true;
}

}  // namespace fastllm::cuda
