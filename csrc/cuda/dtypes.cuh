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
__device__ __forceinline__ float2 widen2(unsigned pair);
template <>
__device__ __forceinline__ float2 widen2<bf16>(unsigned pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 widen2<f16>(unsigned pair) {
  return {ptx::f32_of_f16(static_cast<uint16_t>(pair)), ptx::f32_of_f16(static_cast<uint16_t>(pair >> 16))};
}
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

// N elements that are loaded and stored with one instruction, where N * sizeof(T) is 16 or a lower power of two: the
// address has to be a multiple of that. The compiler is shown one register or four, not N elements, which it would load
// in pieces.
template <typename T, int N>
struct Pack {
  T at[N];
};
template <typename T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<16> {
  using type = uint4;
};
template <>
struct BitsOf<8> {
  using type = uint2;
};
template <>
struct BitsOf<4> {
  using type = unsigned;
};
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<1> {
  using type = uint8_t;
};

// is_there: else zeros, and nothing is read.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from, bool is_there = true) {
  typename BitsOf<sizeof(T) * N>::type bits{};
  if (is_there) bits = *reinterpret_cast<const decltype(bits)*>(from);
  Pack<T, N> pack;
  memcpy(&pack, &bits, sizeof(pack));
  return pack;
}
template <typename T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
  typename BitsOf<sizeof(T) * N>::type bits;
  memcpy(&bits, &pack, sizeof(pack));
  *reinterpret_cast<decltype(bits)*>(to) = bits;
}

// A pack's elements as fp32 and back; 16-bit ones in pairs, because each alone would take a register of its own.
template <int N>
struct Floats {
  float at[N];
};
template <typename T, int N>
__device__ __forceinline__ Floats<N> widened(const Pack<T, N>& pack) {
  Floats<N> y;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    unsigned pairs[N / 2];
    memcpy(pairs, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float2 both = widen2<T>(pairs[i]);
      y.at[2 * i] = both.x;
      y.at[2 * i + 1] = both.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) y.at[i] = widen(pack.at[i]);
  }
  return y;
}
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> narrowed(const Floats<N>& x) {
  Pack<T, N> pack;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    unsigned pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] = narrow2<T>(x.at[2 * i], x.at[2 * i + 1]);
    memcpy(&pack, pairs, sizeof(pack));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = narrow<T>(x.at[i]);
  }
  return pack;
}

// See ptx::make_opaque.
template <typename T, int N>
__device__ __forceinline__ void make_opaque(Pack<T, N>& pack) {
  if constexpr (sizeof(pack) % 4 == 0) {
    unsigned bits[sizeof(pack) / 4];
    memcpy(bits, &pack, sizeof(pack));
    for (unsigned& x : bits) ptx::make_opaque(x);
    memcpy(&pack, bits, sizeof(pack));
  }
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
